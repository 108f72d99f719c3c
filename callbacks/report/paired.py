"""Whether one net is better than another on the same samples: plain functions of what both said of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .evaluation import Statistic, bootstrap, confusions, drawn_label_f1, in_order, label_counts, macro_f1, spearman
from .outputs import Predictions


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


def paired(first: Predictions, other: Predictions, *, draws: int = 1000) -> list[dict[str, Any]]:
    """What one net does better than another on the same samples: each figure's gain and its interval, by bootstrap.

    Args:
        first: What the one said.
        other: What the other said, of the same samples in the same order.
        draws: How often samples are drawn with replacement, the same for both.

    Returns:
        For each figure its `name`, whether it `rises` as it gets better, both values, the `gain` of the other over the
        first, and its `interval`; without those that are not defined.
    """
    compared = []
    for name, rises, of in FIGURES[first.kind]:
        statistics = of(first), of(other)
        everything = torch.arange(len(first.labels))[None]
        values = [float(statistic(everything)) for statistic in statistics]
        drawn = bootstrap(lambda rows, s=statistics: s[1](rows) - s[0](rows), len(first.labels), draws=draws)  # type: ignore[misc]
        drawn = drawn[drawn.isfinite()]
        if all(map(math.isfinite, values)) and len(drawn):
            compared.append({
                "name": name, "rises": rises, "first": values[0], "other": values[1],
                "gain": values[1] - values[0], "interval": middle(drawn),
            })  # fmt: skip
    return compared


def middle(drawn: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The middle part of many values that holds `level` of them."""
    low, high = drawn.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.double)).tolist()
    return low, high


def mean_over(values: Tensor) -> Statistic:
    """The mean of a value of each sample, `(n,)`."""
    return lambda rows: values.double()[rows].mean(1)


def accuracy_over(found: Predictions) -> Statistic:
    """The share of samples whose class, or whose every label, is right."""
    if found.kind == "labels":
        return mean_over(((found.logits > 0) == (found.labels > 0.5)).all(1))
    return mean_over(found.logits.argmax(1) == found.labels)


def macro_f1_over(found: Predictions) -> Statistic:
    """The mean F1 of classes, or of labels."""
    if found.kind == "labels":
        return label_f1_over(found, micro=False)
    classes = found.logits.shape[1]
    cells = found.labels * classes + found.logits.argmax(1)
    return lambda rows: macro_f1(confusions(cells[rows], classes))


def label_f1_over(found: Predictions, *, micro: bool = True) -> Statistic:
    """F1 over several labels."""
    return drawn_label_f1(label_counts(found.logits > 0, found.labels > 0.5), micro=micro)


def loss_over(found: Predictions) -> Statistic:
    """Mean cross-entropy, of several labels binary."""
    functional, logits = torch.nn.functional, found.logits.double()
    if found.kind == "labels":
        each = functional.binary_cross_entropy_with_logits(logits, found.labels.double(), reduction="none").mean(1)
        return mean_over(each)
    return mean_over(functional.cross_entropy(logits, found.labels, reduction="none"))


def spearman_over(found: Predictions) -> Statistic:
    """Spearman's rank correlation of scores."""
    codes = in_order(found.logits[:, 0]), in_order(found.labels)
    return lambda rows: spearman(codes, rows)


def absolute_error_over(found: Predictions) -> Statistic:
    """How far scores are off."""
    return mean_over((found.logits[:, 0] - found.labels).abs())


def squared_error_over(found: Predictions) -> Statistic:
    """How far scores are off, squared."""
    return mean_over((found.logits[:, 0] - found.labels).square())


FIGURES: dict[str, tuple[tuple[str, bool, Callable[[Predictions], Statistic]], ...]] = {
    "classes": (
        ("accuracy", True, accuracy_over),
        ("macro F1", True, macro_f1_over),
        ("loss", False, loss_over),
    ),
    "labels": (
        ("F1, all labels", True, label_f1_over),
        ("macro F1", True, macro_f1_over),
        ("every label right", True, accuracy_over),
        ("loss", False, loss_over),
    ),
    "scores": (
        ("Spearman", True, spearman_over),
        ("mean absolute error", False, absolute_error_over),
        ("mean squared error", False, squared_error_over),
    ),
}  # what runs are compared by, the first first; whether it rises as it gets better
