"""How good a classifier is, and how certain that is: plain functions of logits and labels.

No function here draws from torch's global generator. Shapes: `(n,)` for labels and predictions, `(n, classes)` for
logits, counts as int64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .intervals import Statistic, bca, bootstrap, mean_with_interval, wilson, within_bounds

MOST_FITTED = 10_000  # samples that a temperature is fitted on
HIGHEST = 20.0  # temperature
MOST_POINTS = 1000  # samples of a figure of scores
THRESHOLDS = [n / 20 for n in range(1, 20)]  # of a label's probability


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts, `(classes, classes)`: rows are the true classes, columns the predicted ones."""
    return confusions((labels * classes + predicted)[None], classes)[0]


class ClassScores(NamedTuple):
    """Of each class, `(classes,)`; 0 where undefined."""

    precision: Tensor
    recall: Tensor
    f1: Tensor
    support: Tensor


def class_scores(confusion: Tensor) -> ClassScores:
    """Precision, recall, F1 and number of samples of each class; `(..., classes, classes)` gives `(..., classes)`."""
    correct = confusion.diagonal(dim1=-2, dim2=-1).double()  # 0 where a sum below is
    support, predicted = confusion.sum(-1), confusion.sum(-2)
    f1 = 2 * correct / (support + predicted).clamp(min=1)
    return ClassScores(correct / predicted.clamp(min=1), correct / support.clamp(min=1), f1, support)


def macro_f1(confusion: Tensor) -> Tensor:
    """The mean F1 of the classes that occur or were predicted; `(..., classes, classes)` gives `(...)`."""
    scores = class_scores(confusion)
    present = (confusion.sum(-1) + confusion.sum(-2)) > 0
    return scores.f1.sum(-1) / present.sum(-1).clamp(min=1)


def worst_pairs(confusion: Tensor, most: int = 10) -> list[tuple[int, int, int]]:
    """True class, predicted class and count of the most frequent confusions."""
    wrong = confusion.clone().fill_diagonal_(0)
    counts, cells = wrong.flatten().sort(descending=True, stable=True)
    width = len(confusion)
    chosen = zip(cells[:most].tolist(), counts[:most].tolist(), strict=True)
    return [(cell // width, cell % width, count) for cell, count in chosen if count]


def confusions(cells: Tensor, classes: int) -> Tensor:
    """Confusion matrices, `(some, classes, classes)`, of cells `(some, n)`: each a true class and a predicted one."""
    places = cells + torch.arange(len(cells))[:, None] * classes**2
    return torch.bincount(places.flatten(), minlength=len(cells) * classes**2).view(-1, classes, classes)


def f1_interval(labels: Tensor, predicted: Tensor, classes: int, *, draws: int = 1000) -> tuple[float, float] | None:
    """BCa interval of macro F1; None where all samples count alike, as without a mistake."""
    cells = labels * classes + predicted
    confusion = confusions(cells[None], classes)[0]
    size = (confusion.sum(0) + confusion.sum(1)).clamp(min=1).double()  # twice the F1's denominator
    share = class_scores(confusion).f1 / size
    influence = 2 * (labels == predicted) / size[labels] - share[labels] - share[predicted]
    influence = influence / int((confusion.sum(0) + confusion.sum(1) > 0).sum())
    drawn = bootstrap(lambda rows: macro_f1(confusions(cells[rows], classes)), len(cells), draws=draws)
    return within_bounds(drawn, float(macro_f1(confusion)), influence)


class Calibration(NamedTuple):
    """Confidence and accuracy of predictions, by bins of probability."""

    error: float  # expected calibration error: the mean distance of the two, weighted by samples
    counts: list[int]
    confidence: list[float]  # mean probability of the predicted class
    accuracy: list[float]


def calibration(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Calibration:
    """Expected calibration error over bins of equal width (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    Args:
        probabilities: `(n, classes)`, rows that sum to 1.
        labels: `(n,)`.
        bins: Of the predicted class's probability; a bin holds its upper edge.
    """
    confidence, predicted = probabilities.double().max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(place, minlength=bins)
    mean = torch.bincount(place, weights=confidence, minlength=bins) / count.clamp(min=1)
    share = torch.bincount(place, weights=(predicted == labels).double(), minlength=bins) / count.clamp(min=1)
    error = float(((mean - share).abs() * count).sum() / count.sum())
    return Calibration(error, count.tolist(), mean.tolist(), share.tolist())


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The number to divide logits by for the best calibration (Guo et al. 2017).

    The loss is convex in 1 / temperature, so bisection finds it, on 10,000 samples at most. It lies within 0.05 and
    20; at either end there is no best one.

    Args:
        logits: `(n, classes)`, of held-out samples.
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


def class_centres(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean direction of each class, `(classes, width)`, of features `(n, width)`; zeros where a class has none."""
    directions = torch.nn.functional.normalize(features.float(), dim=1)
    sums = torch.zeros(classes, directions.shape[1]).index_add_(0, labels, directions)
    return torch.nn.functional.normalize(sums, dim=1)


def nearest_centre(features: Tensor, centres: Tensor) -> Tensor:
    """The class whose mean direction is nearest, `(n,)`."""
    return (torch.nn.functional.normalize(features.float(), dim=1) @ centres.T).argmax(1)


def evaluation(logits: Tensor, labels: Tensor, *, held_out: tuple[Tensor, Tensor] | None = None) -> dict[str, Any]:
    """Everything that a report says about predicted classes, as plain values.

    Args:
        logits: `(n, classes)`.
        labels: `(n,)`.
        held_out: Logits and labels of other samples, to fit the temperature on.
    """
    classes = logits.shape[1]
    predicted = logits.argmax(1)
    confusion = confusion_matrix(labels, predicted, classes)
    scores = class_scores(confusion)
    found = calibration(logits.double().softmax(1), labels)
    loss = torch.nn.functional.cross_entropy(logits.double(), labels)
    correct_count = int((predicted == labels).sum())
    majority = int(scores.support.argmax())
    out: dict[str, Any] = {
        "samples": len(labels),
        "loss": float(loss),
        "accuracy": {"value": correct_count / len(labels), "interval": wilson(correct_count, len(labels))},
        "f1": {"value": float(macro_f1(confusion)), "interval": f1_interval(labels, predicted, classes)},
        "majority": {"class": majority, "accuracy": int(scores.support[majority]) / len(labels)},
        "classes": {name: values.tolist() for name, values in scores._asdict().items()},
        "confusion": confusion.tolist(),
        "worst_pairs": worst_pairs(confusion),
        "calibration": found._asdict(),
    }
    temperature = fit_temperature(*held_out) if held_out is not None and len(held_out[1]) else HIGHEST
    if 1.01 / HIGHEST < temperature < HIGHEST / 1.01:
        scaled = calibration((logits.double() / temperature).softmax(1), labels)
        out["calibration"] |= {"temperature": temperature, "error_with_temperature": scaled.error}
    return out


def spearman(codes: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """Spearman's rank correlation of samples; nan where one of the two is constant.

    Args:
        codes: `in_order` of two values of each sample.
        rows: Which samples, `(some, n)`; gives `(some,)`.
    """
    ranks = []
    for code in codes:
        drawn, kinds = code[rows], int(code.max()) + 1
        places = drawn + torch.arange(len(rows))[:, None] * kinds
        count = torch.bincount(places.flatten(), minlength=len(rows) * kinds).view(-1, kinds)
        middle = count.cumsum(1) - (count - 1) / 2  # equal values share the mean of their ranks
        rank = middle.double().gather(1, drawn)
        ranks.append(rank - rank.mean(1, keepdim=True))
    first, second = ranks
    return (first * second).sum(1) / (first.square().sum(1) * second.square().sum(1)).sqrt()


def in_order(values: Tensor) -> Tensor:
    """Place of each value in the order of all distinct values, `(n,)`."""
    order = torch.unique(values, return_inverse=True)[1]  # type: ignore[no-untyped-call]
    return torch.as_tensor(order)


def score_evaluation(predicted: Tensor, labels: Tensor, *, mean: float | None = None) -> dict[str, Any]:
    """Everything that a report says about predicted scores, as plain values.

    Args:
        predicted: `(n,)`.
        labels: `(n,)`.
        mean: Of the training labels, the constant baseline; the mean of these labels if not given.
    """
    predicted, labels = predicted.double(), labels.double()
    codes, rows = (in_order(predicted), in_order(labels)), torch.arange(len(labels))[None]
    rank = float(spearman(codes, rows))
    constant = float(labels.mean()) if mean is None else mean
    errors = predicted - labels
    drawn = bootstrap(lambda rows: spearman(codes, rows), len(labels)) if math.isfinite(rank) else None
    some = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:MOST_POINTS].sort().values
    return {
        "samples": len(labels),
        "spearman": None if drawn is None else {"value": rank, "interval": bca(drawn, rank, None)},
        "mae": mean_with_interval(errors.abs()),
        "mse": mean_with_interval(errors.square()),
        "bias": mean_with_interval(errors),
        "constant": {
            "value": constant,
            "of": "these" if mean is None else "training",
            "mae": float((labels - constant).abs().mean()),
            "mse": float((labels - constant).square().mean()),
        },
        "points": list(zip(labels[some].tolist(), predicted[some].tolist(), strict=True)),
    }


def label_counts(predicted: Tensor, labels: Tensor) -> Tensor:
    """True positives, false positives and false negatives, `(3, n, labels)`, of truth values `(n, labels)`."""
    return torch.stack([predicted & labels, predicted & ~labels, ~predicted & labels]).double()


def pooled(counts: Tensor) -> Tensor:
    """Counts as if of one label: their macro F1 is micro F1."""
    return counts.sum(-1, keepdim=True)


def label_f1(counts: Tensor) -> Tensor:
    """The mean F1 of the labels that occur or were predicted; of counts `(..., 3, labels)`."""
    tp, fp, fn = counts.unbind(-2)
    size = 2 * tp + fp + fn
    return (2 * tp / size.clamp(min=1)).sum(-1) / (size > 0).sum(-1).clamp(min=1)


def label_f1_with_interval(counts: Tensor) -> dict[str, Any]:
    """F1 and its interval; counts as of `label_counts`."""
    tp, fp, fn = counts.unbind(0)
    size = (2 * tp + fp + fn).sum(0)
    f1 = 2 * tp.sum(0) / size.clamp(min=1)
    influence = ((2 * tp - f1 * (2 * tp + fp + fn)) / size.clamp(min=1)).sum(1) / max(1, int((size > 0).sum()))
    value, drawn = float(label_f1(counts.sum(1))), bootstrap(drawn_label_f1(counts), counts.shape[1])
    return {"value": value, "interval": within_bounds(drawn, value, influence)}


def drawn_label_f1(counts: Tensor) -> Statistic:
    """F1 over samples that are drawn; counts as of `label_counts`."""
    by_sample = counts.permute(1, 0, 2).flatten(1)  # (n, 3 * labels)

    def statistic(rows: Tensor) -> Tensor:
        weights = torch.stack([torch.bincount(some, minlength=len(by_sample)) for some in rows]).double()
        return label_f1((weights @ by_sample).view(len(rows), 3, -1))

    return statistic


def best_constant(labels: Tensor) -> dict[str, Any]:
    """The labels that, predicted for every sample, have the highest micro F1; truth values `(n, labels)`."""
    support, order = labels.sum(0).double().sort(descending=True, stable=True)
    predicted = torch.arange(1, len(support) + 1) * len(labels)
    f1 = 2 * support.cumsum(0) / (predicted + support.sum()).clamp(min=1)
    return {"labels": order[: int(f1.argmax()) + 1].tolist(), "f1": float(f1.max())}


def label_evaluation(
    logits: Tensor, labels: Tensor, *, held_out: tuple[Tensor, Tensor] | None = None
) -> dict[str, Any]:
    """Everything that a report says about several labels per sample, as plain values; the threshold is one half.

    Args:
        logits: `(n, labels)`.
        labels: 0 or 1, `(n, labels)`.
        held_out: Logits and labels of other samples, to choose each label's threshold on.
    """
    probabilities, truth = logits.double().sigmoid(), labels > 0.5
    counts = label_counts(probabilities > 0.5, truth)
    tp, fp, fn = counts.sum(1)
    whole = int((counts[1:].sum((0, 2)) == 0).sum())
    curves = threshold_curves(probabilities, truth)
    chosen_on = curves if held_out is None else threshold_curves(held_out[0].double().sigmoid(), held_out[1] > 0.5)
    there = torch.tensor(True) if held_out is None else (held_out[1] > 0.5).any(0)
    best = torch.where((chosen_on.amax(0) > 0) & there, chosen_on.argmax(0), THRESHOLDS.index(0.5))
    return {
        "samples": len(labels),
        "loss": float(torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())),
        "f1": label_f1_with_interval(pooled(counts)),
        "f1_macro": label_f1_with_interval(counts),
        "all_right": {"value": whole / len(labels), "interval": wilson(whole, len(labels))},
        "constant": best_constant(truth),
        "labels": {
            "precision": (tp / (tp + fp).clamp(min=1)).tolist(),
            "recall": (tp / (tp + fn).clamp(min=1)).tolist(),
            "f1": (2 * tp / (2 * tp + fp + fn).clamp(min=1)).tolist(),
            "support": (tp + fn).long().tolist(),
            "said": (tp + fp).long().tolist(),
            "threshold": [THRESHOLDS[place] for place in best.tolist()],
            "f1_at_threshold": curves.gather(0, best[None])[0].tolist(),
        },
        "threshold_from": "these" if held_out is None else "validation",
        "thresholds": THRESHOLDS,
        "curves": curves.T.tolist(),
    }


def threshold_curves(probabilities: Tensor, truth: Tensor) -> Tensor:
    """F1 of each label at each of `THRESHOLDS`, `(thresholds, labels)`, of `(n, labels)`."""
    return torch.stack([
        2 * ((probabilities > at) & truth).sum(0) / ((probabilities > at).sum(0) + truth.sum(0)).clamp(min=1)
        for at in THRESHOLDS
    ])  # fmt: skip
