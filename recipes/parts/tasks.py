"""Losses and metrics of several tasks, in which a label that is missing counts nothing.

Labels, and what marks one that is not known: classes int64 `(batch,)`, -100; several labels 0 or 1 `(batch, classes)`,
NaN; numbers `(batch,)`, NaN; masks int64 `(batch, height, width)`, -100.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection, R2Score
from torchmetrics.classification import MulticlassF1Score, MulticlassJaccardIndex, MultilabelF1Score

from .losses import IGNORED, LossKind, classification_loss
from .metrics import classification_metrics

TaskKind: TypeAlias = Literal["classification", "multi_label", "regression", "segmentation"]
SCORES = {  # kind -> the metric that is at most 1, and about 0 for a net that knows nothing
    "classification": "accuracy",
    "multi_label": "f1",
    "regression": "r2",
    "segmentation": "iou",
}


def known(kind: TaskKind, target: Tensor) -> Tensor:
    """Which samples have a label, or a part of one, `(batch,)`."""
    there = ~target.isnan() if target.is_floating_point() else target != IGNORED
    return there.flatten(1).any(1) if target.ndim > 1 else there


def task_loss(
    kind: TaskKind,
    outputs: Tensor,
    target: Tensor,
    *,
    loss: LossKind = "cross_entropy",
    label_smoothing: float = 0.0,
    gamma: float = 2.0,
) -> Tensor:
    """Mean loss over the samples that have a label; 0, with gradients of 0, where none has.

    Args:
        kind: What is learnt.
        outputs: Logits `(batch, classes)` or `(batch, classes, height, width)`; of a number `(batch, 1)`.
        target: Labels; numbers on the scale of the outputs.
        loss: Of classes: `cross_entropy` or `focal`. Several labels have binary cross-entropy, numbers the squared
            error, masks cross-entropy, the mean over an image's pixels.
        label_smoothing: Of classes: probability spread evenly over all.
        gamma: Of the focal loss.

    Returns:
        Scalar, float32.
    """
    outputs = outputs.float()
    if kind == "classification":
        return classification_loss(outputs, target, kind=loss, label_smoothing=label_smoothing, gamma=gamma)
    if kind == "segmentation":
        each = F.cross_entropy(outputs, target, ignore_index=IGNORED, reduction="none")
        there = target != IGNORED
    elif kind == "multi_label":
        there = ~target.isnan()
        each = F.binary_cross_entropy_with_logits(outputs, target.nan_to_num(), reduction="none")
    else:
        there = ~target.isnan()
        each = (outputs.squeeze(1) - target.nan_to_num()).square()
    each, there = each.reshape(len(each), -1), there.reshape(len(there), -1)
    per_sample = (each * there).sum(1) / there.sum(1).clamp(min=1)
    return per_sample.sum() / there.any(1).sum().clamp(min=1)


def task_metrics(kind: TaskKind, outputs: int) -> MetricCollection:
    """Metrics of a kind, from torchmetrics; that of `SCORES` among them.

    Args:
        kind: What is learnt.
        outputs: How many classes there are.
    """
    if kind == "classification":
        return classification_metrics(outputs, "")
    options: dict[str, Any] = {"ignore_index": IGNORED, "validate_args": False}
    found: dict[str, Any]
    if kind == "multi_label":
        found = {
            "f1": MultilabelF1Score(outputs, average="micro", **options),
            "f1_macro": MultilabelF1Score(outputs, average="macro", **options),
        }
    elif kind == "segmentation":
        found = {
            "iou": MulticlassJaccardIndex(outputs, average="macro", **options),
            "dice": MulticlassF1Score(outputs, average="macro", **options),
            "pixels": MulticlassF1Score(outputs, average="micro", **options),
        }
    else:
        found = {"r2": R2Score(), "mae": MeanAbsoluteError(), "mse": MeanSquaredError()}
    return MetricCollection(found)


def measured(kind: TaskKind, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the metrics are given of a batch: outputs and labels of the samples that have one; None if none has.

    Numbers are to be on their own scale, `(batch, 1)`.
    """
    there = known(kind, target)
    if not there.any():
        return None
    outputs, target = outputs[there].float(), target[there]
    if kind == "regression":
        return outputs.squeeze(1), target
    if kind == "multi_label":
        return outputs.sigmoid(), target.nan_to_num(nan=IGNORED).long()
    return outputs.argmax(1) if kind == "segmentation" else outputs, target


def score(kind: TaskKind, metrics: dict[str, Tensor]) -> Tensor:
    """One number for how good a task is done, at most 1; below 0 it is 0."""
    return torch.as_tensor(metrics[SCORES[kind]]).float().clamp(min=0)
