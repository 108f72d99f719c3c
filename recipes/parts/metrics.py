"""Metrics of a classifier, from torchmetrics."""

from __future__ import annotations

from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassStatScores

from .losses import IGNORED


def classification_metrics(num_classes: int, prefix: str) -> MetricCollection:
    """Accuracy, macro F1, and top-5 accuracy where there are more than ten classes.

    Ignores samples labelled -100, so padding under several ranks counts nothing.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "accuracy": MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED, validate_args=False),
        "f1": MulticlassF1Score(num_classes, average="macro", ignore_index=IGNORED, validate_args=False),
    }
    if num_classes > 10:
        metrics["top5"] = MulticlassAccuracy(
            num_classes, top_k=5, average="micro", ignore_index=IGNORED, validate_args=False
        )
    return MetricCollection(metrics, prefix=prefix)


def per_class_counts(num_classes: int) -> MulticlassStatScores:
    """For each class true and false positives, true and false negatives, and samples: `(num_classes, 5)`."""
    return MulticlassStatScores(num_classes, average=None, ignore_index=IGNORED, validate_args=False)
