"""Metrics of classes, of several labels and of scores, from torchmetrics."""

from __future__ import annotations

import warnings

from torch import Tensor
from torchmetrics import MeanSquaredError, Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassStatScores,
    MultilabelExactMatch,
    MultilabelF1Score,
)

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


def multi_label_metrics(num_classes: int, prefix: str) -> MetricCollection:
    """Micro and macro F1 at a probability of one half, and the share of samples with every label right."""
    metrics: dict[str, Metric | MetricCollection] = {
        "f1": MultilabelF1Score(num_classes, average="micro", validate_args=False),
        "f1_macro": MultilabelF1Score(num_classes, average="macro", validate_args=False),
        "accuracy": MultilabelExactMatch(num_classes, validate_args=False),
    }
    return MetricCollection(metrics, prefix=prefix)


def score_metrics(prefix: str) -> MetricCollection:
    """Pearson's and Spearman's correlation, and the mean squared error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*large memory footprint")  # ranks need all scores: two numbers a sample
        spearman = SpearmanCorrCoef()
    metrics: dict[str, Metric | MetricCollection] = {
        "pearson": PearsonCorrCoef(),
        "spearman": spearman,
        "mse": MeanSquaredError(),
    }
    return MetricCollection(metrics, prefix=prefix)


def metrics_of(problem_type: str, num_classes: int, prefix: str) -> MetricCollection:
    """The metrics of what is learnt, in transformers' words: one label, several labels or a score."""
    if problem_type == "regression":
        return score_metrics(prefix)
    make = multi_label_metrics if problem_type == "multi_label_classification" else classification_metrics
    return make(num_classes, prefix)


def answers(problem_type: str, logits: Tensor) -> Tensor:
    """What these metrics are given of logits `(batch, outputs)`: probabilities of labels, scores `(batch,)`.

    torchmetrics takes logits of several labels for probabilities, batch by batch, if all lie between 0 and 1.
    """
    if problem_type == "multi_label_classification":
        return logits.sigmoid()
    return logits.squeeze(1) if problem_type == "regression" else logits


def per_class_counts(num_classes: int) -> MulticlassStatScores:
    """For each class true and false positives, true and false negatives, and samples: `(num_classes, 5)`."""
    return MulticlassStatScores(num_classes, average=None, ignore_index=IGNORED, validate_args=False)
