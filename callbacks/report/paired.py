"""Whether one net is better than another on the same samples: plain functions of both nets' predictions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .evaluation import confusions, drawn_label_f1, in_order, label_counts, macro_f1, pooled, spearman
from .intervals import Statistic, bootstrap
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
        first: Predictions of the one.
        other: Predictions of the other, of the same samples in the same order.
        draws: How often samples are drawn with replacement, the same for both.

    Returns:
        For each figure its `name`, whether it `rises` as it gets better, both values, the `gain` of the other over the
        first, and its `interval`; without undefined ones.
    """
    compared, everything = [], torch.arange(len(first.labels))[None]
    others = figures_of(other)
    for name, (rises, one) in figures_of(first).items():
        pair = one, others[name][1]
        values = [float(statistic(everything)) for statistic in pair]
        drawn = bootstrap(lambda rows, pair=pair: pair[1](rows) - pair[0](rows), len(first.labels), draws=draws)  # type: ignore[misc]
        drawn = drawn[drawn.isfinite()]
        if all(map(math.isfinite, values)) and len(drawn):
            low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
            compared.append({
                "name": name, "rises": rises, "first": values[0], "other": values[1],
                "gain": values[1] - values[0], "interval": (low, high),
            })  # fmt: skip
    return compared


def figures_of(found: Predictions) -> dict[str, tuple[bool, Statistic]]:
    """What runs are compared by, the most important first: whether it rises as it gets better, and its statistic."""
    logits, labels = found.logits.double(), found.labels
    if found.kind == "scores":
        codes, errors = (in_order(found.logits[:, 0]), in_order(labels)), found.logits[:, 0] - labels
        return {
            "Spearman": (True, lambda rows: spearman(codes, rows)),
            "mean absolute error": (False, mean_over(errors.abs())),
            "mean squared error": (False, mean_over(errors.square())),
        }
    if found.kind == "labels":
        counts = label_counts(found.logits > 0, labels > 0.5)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")
        return {
            "F1, all labels": (True, drawn_label_f1(pooled(counts))),
            "macro F1": (True, drawn_label_f1(counts)),
            "every label right": (True, mean_over(counts[1:].sum((0, 2)) == 0)),
            "loss": (False, mean_over(losses.mean(1))),
        }
    classes, predicted = logits.shape[1], logits.argmax(1)
    cells = labels * classes + predicted
    return {
        "accuracy": (True, mean_over(predicted == labels)),
        "macro F1": (True, lambda rows: macro_f1(confusions(cells[rows], classes))),
        "loss": (False, mean_over(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))),
    }


def mean_over(values: Tensor) -> Statistic:
    """The mean of a value of each sample, `(n,)`."""
    values = values.double()
    return lambda rows: values[rows].mean(1)
