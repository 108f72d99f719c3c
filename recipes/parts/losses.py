"""Classification losses that take labels or probabilities, and skip what is only there to fill up a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

LossKind: TypeAlias = Literal["cross_entropy", "focal"]
IGNORED = -100  # label of a sample without one, as in torch


def classification_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kind: LossKind = "cross_entropy",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    gamma: float = 2.0,
) -> Tensor:
    """Mean loss of a batch; 0, not NaN, where every label is ignored.

    Args:
        logits: `(batch, classes)`.
        target: Labels `(batch,)`, of which -100 is ignored, or class probabilities `(batch, classes)`.
        kind: `cross_entropy`, or `focal` (Lin et al. 2017, https://arxiv.org/abs/1708.02002), which weighs the
            log-likelihood of each class by (1 - p)^gamma.
        weight: Class weights, `(classes,)`. The mean is over the weights, as in torch's cross-entropy: a batch
            of one class has the loss it would have without.
        label_smoothing: Probability spread evenly over all classes.
        gamma: Of the focal loss; 0 makes it cross-entropy.

    Returns:
        Scalar in the type of the logits, at least float32.
    """
    classes = logits.shape[1]
    if target.ndim == 1:
        kept = target != IGNORED
        target = F.one_hot(target.clamp(min=0), classes).float() * kept[:, None]
    total = weight_of(target, weight).sum()
    if label_smoothing:
        present = target.sum(1, keepdim=True)
        target = target * (1 - label_smoothing) + present * (label_smoothing / classes)
    log_p = F.log_softmax(logits.float(), dim=1)
    if kind == "focal":
        log_p = (1 - log_p.exp()).pow(gamma) * log_p
    if weight is not None:
        target = target * weight
    return -(target * log_p).sum() / total.clamp(min=torch.finfo(log_p.dtype).tiny)


def weight_of(target: Tensor, weight: Tensor | None) -> Tensor:
    """Weight of each sample `(batch,)` under its unsmoothed target `(batch, classes)`."""
    return target.sum(1) if weight is None else target @ weight


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """Class weights inverse to the number of training samples, with mean 1 over the samples.

    Raises:
        ValueError: A class has no sample.
    """
    empty = [label for label, count in enumerate(counts) if count == 0]
    if empty:
        raise ValueError(f"class_weights 'balanced' needs a training sample of every class; none of class {empty[0]}")
    per_class = torch.tensor(counts, dtype=torch.float32)
    return per_class.sum() / (len(counts) * per_class)
