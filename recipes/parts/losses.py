"""Losses that skip what is only there to fill up a batch; the classes' takes labels or probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

WeightKind: TypeAlias = Literal["balanced", "effective"]
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


def labelled(target: Tensor) -> Tensor:
    """Which samples have a label, `(batch,)`: not -100, and for several labels or a score not NaN."""
    known = ~target.isnan() if target.is_floating_point() else target != IGNORED
    return known if known.ndim == 1 else known.all(1)


def multi_label_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy over classes and the samples that have labels; 0 where none has.

    Args:
        logits: `(batch, classes)`.
        target: 0 or 1, `(batch, classes)`; NaN for a sample without labels.
    """
    known = labelled(target)
    each = F.binary_cross_entropy_with_logits(logits.float(), target.nan_to_num(), reduction="none").mean(1)
    return (each * known).sum() / known.sum().clamp(min=1)


def score_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the samples that have a score; 0 where none has.

    Args:
        logits: `(batch, 1)`.
        target: `(batch,)`; NaN for a sample without a score.
    """
    known = labelled(target)
    each = (logits.float().squeeze(1) - target.nan_to_num()).square()
    return (each * known).sum() / known.sum().clamp(min=1)


def score_scale(scores: Tensor) -> tuple[float, float]:
    """About the mean and the spread of scores `(n,)`, to learn them with; NaN is left out.

    The spread is a power of two, and the mean a multiple of half of it: other splits of the same data have nearly
    always the same, so that nets of them can be mixed.
    """
    known = scores[~scores.isnan()].double()
    spread = float(known.std()) if len(known) > 1 else 0.0
    step = 2.0 ** round(math.log2(spread)) if spread > 0 else 1.0
    return (round(2 * float(known.mean()) / step) * step / 2 if len(known) else 0.0), step


def weight_of(target: Tensor, weight: Tensor | None) -> Tensor:
    """Weight of each sample `(batch,)` under its unsmoothed target `(batch, classes)`."""
    return target.sum(1) if weight is None else target @ weight


def mass(target: Tensor, weight: Tensor | None = None) -> Tensor:
    """What the mean of the losses here is over: the samples with a label or, with class weights, the sum of theirs."""
    if weight is None:
        return labelled(target).sum()
    if target.ndim == 1:
        return (weight[target.clamp(min=0)] * (target != IGNORED)).sum()
    return weight_of(target, weight).sum()


def weights_by_count(counts: Sequence[int], kind: WeightKind = "balanced", beta: float = 0.999) -> Tensor:
    """Class weights that fall with the number of training samples, with mean 1 over the samples.

    They move the decision towards rare classes, and with it the probabilities, which are then not those of the data.

    Args:
        counts: Training samples of each class.
        kind: `balanced`: inverse to the number. `effective`: inverse to the effective number (1 - beta^n) / (1 - beta),
            which saturates at 1 / (1 - beta) (Cui et al. 2019, https://arxiv.org/abs/1901.05555): gentler where some
            classes have thousands.
        beta: Of the effective number.

    Raises:
        ValueError: A class has no sample.
    """
    empty = [label for label, count in enumerate(counts) if count == 0]
    if empty:
        raise ValueError(f"class_weights {kind!r} needs a training sample of every class; none of class {empty[0]}")
    per_class = torch.tensor(counts, dtype=torch.float64)
    weights = 1 / per_class if kind == "balanced" else (1 - beta) / (1 - beta**per_class)
    return (weights * per_class.sum() / (weights * per_class).sum()).float()


LOSSES: dict[str, Callable[..., Tensor]] = {  # by what is learnt, in transformers' words
    "single_label_classification": classification_loss,
    "multi_label_classification": multi_label_loss,
    "regression": score_loss,
}
