"""What a student learns from a teacher: its answers at a temperature, and features of its blocks.

loss = (1 - weight) * loss + weight * distillation_loss(logits, told, temperature=4)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def distillation_loss(
    logits: Tensor,
    told: Tensor,
    weight: Tensor | None = None,
    *,
    problem_type: str = "single_label_classification",
    temperature: float = 1.0,
) -> Tensor:
    """How far a student's answers are from its teacher's: the mean over the batch.

    One class: T^2 KL(teacher || student) of softmax(logits / T), whose gradient keeps its size whatever T is (Hinton et
    al. 2015, https://arxiv.org/abs/1503.02531). Several: the same of each label's yes and no, the mean over labels. A
    score: the squared difference.

    Args:
        logits: The student's, `(batch, classes)`.
        told: The teacher's, of the same shape and in the same order of classes.
        weight: Of each sample, `(batch,)`; 0 for what is only there to fill up. All alike if not given.
        problem_type: What is learnt, in transformers' words.
        temperature: T, above 0; the higher, the more counts which wrong classes are nearly right.
    """
    logits, told = logits.float(), told.float()
    if problem_type == "regression":
        each = (logits - told).square().mean(1)
    elif problem_type == "multi_label_classification":
        p, yes, no = (told / temperature).sigmoid(), logits / temperature, -logits / temperature
        cross = -(p * F.logsigmoid(yes) + (1 - p) * F.logsigmoid(no))
        own = -(p * F.logsigmoid(told / temperature) + (1 - p) * F.logsigmoid(-told / temperature))
        each = (cross - own).mean(1) * temperature**2
    else:
        log_q, log_p = (logits / temperature).log_softmax(1), (told / temperature).log_softmax(1)
        each = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1) * temperature**2
    if weight is None:
        return each.mean()
    return (each * weight).sum() / weight.sum().clamp(min=torch.finfo(each.dtype).tiny)


def feature_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - the cosine of features at each place, the mean over places; as FitNets' hints, but blind to their length.

    Romero et al. 2015, https://arxiv.org/abs/1412.6550. Maps of another size than the student's are brought to it by
    taking means.

    Args:
        student: After its projection, `(batch, channels, height, width)` or `(batch, tokens, width)`.
        teacher: With as many channels or as wide.
        mask: Of tokens, `(batch, tokens)`, 0 for padding.
    """
    if student.ndim == 4:
        teacher = F.adaptive_avg_pool2d(teacher.float(), (student.shape[2], student.shape[3]))
        return 1 - F.cosine_similarity(student.float(), teacher, dim=1).mean()
    away = 1 - F.cosine_similarity(student.float(), teacher.float(), dim=2)
    if mask is None:
        return away.mean()
    return (away * mask).sum() / mask.sum().clamp(min=1)


def projection(student: Tensor, teacher: Tensor) -> nn.Module:
    """A learnt linear map from a student's features, at each place, to as many as the teacher's.

    Raises:
        ValueError: One gives a map and the other tokens, or another number of tokens.
    """
    if student.ndim == teacher.ndim == 4:
        return nn.Conv2d(student.shape[1], teacher.shape[1], 1)
    if student.ndim == teacher.ndim == 3 and student.shape[1] == teacher.shape[1]:
        return nn.Linear(student.shape[2], teacher.shape[2])
    shapes = f"{tuple(student.shape)[1:]} and {tuple(teacher.shape)[1:]}"
    raise ValueError(f"match_blocks: features of {shapes} can't be matched; take maps with maps, tokens with as many")
