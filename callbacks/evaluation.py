"""How good a classifier is, and how sure one can be of it: plain functions of logits and labels.

No function here draws from torch's global generator. Shapes: `(n,)` for labels and predictions, `(n, classes)` for
logits, counts as int64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts, `(classes, classes)`: rows are the true classes, columns the predicted ones."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


MOST_FITTED = 10_000  # samples that a temperature is fitted on
HIGHEST = 20.0  # temperature


class ClassScores(NamedTuple):
    """Of each class, `(classes,)`; a score that has no samples to be taken of is 0."""

    precision: Tensor
    recall: Tensor
    f1: Tensor
    support: Tensor


def class_scores(confusion: Tensor) -> ClassScores:
    """Precision, recall, F1 and number of samples of each class; `(..., classes, classes)` gives `(..., classes)`."""
    right = confusion.diagonal(dim1=-2, dim2=-1).double()
    support, claimed = confusion.sum(-1), confusion.sum(-2)
    precision = torch.where(claimed > 0, right / claimed.clamp(min=1), 0.0)
    recall = torch.where(support > 0, right / support.clamp(min=1), 0.0)
    f1 = torch.where(support + claimed > 0, 2 * right / (support + claimed).clamp(min=1), 0.0)
    return ClassScores(precision, recall, f1, support)


def accuracy(confusion: Tensor) -> Tensor:
    """The share of samples on the diagonal; `(..., classes, classes)` gives `(...)`."""
    return confusion.diagonal(dim1=-2, dim2=-1).sum(-1).double() / confusion.sum((-2, -1))


def macro_f1(confusion: Tensor) -> Tensor:
    """The mean F1 of the classes that are there or were predicted; `(..., classes, classes)` gives `(...)`."""
    scores = class_scores(confusion)
    present = (confusion.sum(-1) + confusion.sum(-2)) > 0
    return scores.f1.sum(-1) / present.sum(-1).clamp(min=1)


def worst_pairs(confusion: Tensor, most: int = 10) -> list[tuple[int, int, int]]:
    """True class, predicted class and count of what is most often taken for something else."""
    wrong = confusion.clone().fill_diagonal_(0)
    counts, cells = wrong.flatten().sort(descending=True, stable=True)
    width = len(confusion)
    chosen = zip(cells[:most].tolist(), counts[:most].tolist(), strict=True)
    return [(cell // width, cell % width, count) for cell, count in chosen if count]


def bootstrap(
    labels: Tensor, predicted: Tensor, classes: int, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of accuracy and macro F1, over samples drawn with replacement (Efron & Tibshirani 1993)."""
    cells, size = labels * classes + predicted, len(labels)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {"accuracy": [], "f1": []}
    for _ in range(draws):
        drawn = cells[torch.randint(size, (size,), generator=generator)]
        confusion = torch.bincount(drawn, minlength=classes**2).view(classes, classes)
        found["accuracy"].append(float(accuracy(confusion)))
        found["f1"].append(float(macro_f1(confusion)))
    return {name: interval(values, level) for name, values in found.items()}


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The middle part of many values that holds `level` of them."""
    low, high = torch.tensor(values, dtype=torch.double).quantile(
        torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.double)
    )
    return float(low), float(high)


class Calibration(NamedTuple):
    """How sure predictions are, and how often they are right; a row for each bin of probability."""

    error: float  # expected calibration error: the mean distance of the two, by samples
    counts: list[int]
    confidence: list[float]  # mean probability of the predicted class
    accuracy: list[float]


def calibration(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Calibration:
    """Expected calibration error over bins of equal width (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    Args:
        probabilities: `(n, classes)`, rows that sum to 1.
        labels: `(n,)`.
        bins: Of the predicted class's probability; one belongs to a bin that lies above its lower edge.
    """
    confidence, predicted = probabilities.double().max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(place, minlength=bins)
    mean = torch.bincount(place, weights=confidence, minlength=bins) / count.clamp(min=1)
    right = torch.bincount(place, weights=(predicted == labels).double(), minlength=bins) / count.clamp(min=1)
    error = float(((mean - right).abs() * count).sum() / count.sum())
    return Calibration(error, count.tolist(), mean.tolist(), right.tolist())


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """What to divide logits by so that probabilities are as they should be (Guo et al. 2017).

    The loss is convex in 1 / temperature, so halving an interval finds it, on 10,000 samples at most. The answer lies
    within 0.05 and 20; at either end there is no best one.

    Args:
        logits: `(n, classes)`, of samples that were not trained on.
        labels: `(n,)`.
    """
    if len(labels) > MOST_FITTED:
        some = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:MOST_FITTED]
        logits, labels = logits[some], labels[some]
    logits = logits.double()
    true = logits.gather(1, labels[:, None]).squeeze(1)

    def slope(inverse: float) -> float:  # of the mean loss by 1 / temperature
        expected = ((logits * inverse).softmax(1) * logits).sum(1)
        return float((expected - true).mean())

    low, high = 1 / HIGHEST, HIGHEST
    for _ in range(30):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / math.sqrt(low * high)


def mcnemar(first_right: Tensor, second_right: Tensor) -> float:
    """Two-sided exact p-value that two classifiers err equally often (McNemar 1947), on the same samples.

    Args:
        first_right: Truth values, `(n,)`.
        second_right: Truth values, `(n,)`.
    """
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    differ = only_first + only_second
    ways = math.lgamma(differ + 1) - differ * math.log(2)
    logs = [ways - math.lgamma(k + 1) - math.lgamma(differ - k + 1) for k in range(min(only_first, only_second) + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def paired_bootstrap(
    first_right: Tensor, second_right: Tensor, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the second's accuracy minus the first's, over samples drawn with replacement."""
    gain = second_right.long() - first_right.long()
    counts = torch.stack([(gain == value).sum() for value in (-1, 0, 1)]).double()
    generator = torch.Generator().manual_seed(seed)
    size = len(gain)
    values = []
    for _ in range(draws):
        drawn = torch.multinomial(counts, size, replacement=True, generator=generator)
        values.append(float(drawn.sum()) / size - 1)  # 0, 1, 2 stand for -1, 0, 1
    return interval(values, level)


def class_centres(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean direction of each class, `(classes, width)`, of features `(n, width)`; zeros where a class has none."""
    directions = torch.nn.functional.normalize(features.float(), dim=1)
    sums = torch.zeros(classes, directions.shape[1]).index_add_(0, labels, directions)
    return torch.nn.functional.normalize(sums, dim=1)


def nearest_centre(features: Tensor, centres: Tensor) -> Tensor:
    """The class whose mean direction is nearest, `(n,)`."""
    return (torch.nn.functional.normalize(features.float(), dim=1) @ centres.T).argmax(1)


def evaluation(logits: Tensor, labels: Tensor, *, held_out: tuple[Tensor, Tensor] | None = None) -> dict[str, Any]:
    """Everything that a report says of one set of predictions, as plain values.

    Args:
        logits: `(n, classes)`.
        labels: `(n,)`.
        held_out: Logits and labels to fit the temperature on, other samples than these.
    """
    classes = logits.shape[1]
    predicted = logits.argmax(1)
    confusion = confusion_matrix(labels, predicted, classes)
    scores = class_scores(confusion)
    intervals = bootstrap(labels, predicted, classes)
    found = calibration(logits.double().softmax(1), labels)
    loss = torch.nn.functional.cross_entropy(logits.double(), labels)
    found_right = int((predicted == labels).sum())
    majority = int(scores.support.argmax())
    out: dict[str, Any] = {
        "samples": len(labels),
        "loss": float(loss),
        "accuracy": {"value": float(accuracy(confusion)), "interval": intervals["accuracy"]},
        "f1": {"value": float(macro_f1(confusion)), "interval": intervals["f1"]},
        "majority": {"class": majority, "accuracy": int(scores.support[majority]) / len(labels)},
        "classes": {name: values.tolist() for name, values in scores._asdict().items()},
        "confusion": confusion.tolist(),
        "worst_pairs": worst_pairs(confusion),
        "calibration": found._asdict(),
    }
    if not 0 < found_right < len(labels):  # drawn with replacement, what is all right is always all right
        bound = 0.025 ** (1 / len(labels))  # Clopper & Pearson 1934
        out["accuracy"]["interval"] = (bound, 1.0) if found_right else (0.0, 1 - bound)
        out["f1"]["interval"] = None
    temperature = fit_temperature(*held_out) if held_out is not None and len(held_out[1]) else HIGHEST
    if 1.01 / HIGHEST < temperature < HIGHEST / 1.01:
        scaled = calibration((logits.double() / temperature).softmax(1), labels)
        out["calibration"] |= {"temperature": temperature, "error_with_temperature": scaled.error}
    return out
