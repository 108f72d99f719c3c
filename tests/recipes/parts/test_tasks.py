"""Losses and metrics of several tasks: what is not known counts for nothing, to the last bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.parts.tasks import SCORES, TaskKind, known, measured, score, task_loss, task_metrics

KINDS: list[TaskKind] = ["classification", "multi_label", "regression", "segmentation"]


def batch(kind: TaskKind, samples: int = 6) -> tuple[Tensor, Tensor]:
    """Outputs and labels, all known."""
    generator = torch.Generator().manual_seed(3)
    shape = {"regression": (samples, 1), "segmentation": (samples, 3, 4, 5)}.get(kind, (samples, 3))
    outputs = torch.randn(shape, generator=generator, requires_grad=True)
    if kind == "classification":
        return outputs, torch.randint(0, 3, (samples,), generator=generator)
    if kind == "segmentation":
        return outputs, torch.randint(0, 3, (samples, 4, 5), generator=generator)
    size = (samples,) if kind == "regression" else (samples, 3)
    values = torch.rand(size, generator=generator)
    return outputs, values if kind == "regression" else values.round()


def without(target: Tensor, rows: list[int]) -> Tensor:
    """The same labels, those of some rows not known."""
    target = target.clone()
    target[rows] = math.nan if target.is_floating_point() else -100
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_label_gives_no_loss_and_a_gradient_of_exactly_zero(kind: TaskKind) -> None:
    outputs, target = batch(kind)
    loss = task_loss(kind, outputs, without(target, [1, 4]))
    loss.backward()
    assert outputs.grad is not None
    assert not outputs.grad[[1, 4]].any()
    assert outputs.grad[[0, 2, 3, 5]].flatten(1).abs().sum(1).min() > 0
    others = outputs.detach()[[0, 2, 3, 5]].requires_grad_()
    alone = task_loss(kind, others, target[[0, 2, 3, 5]])
    alone.backward()
    torch.testing.assert_close(loss, alone)
    assert others.grad is not None
    torch.testing.assert_close(outputs.grad[[0, 2, 3, 5]], others.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_where_no_label_is_known_loss_and_gradients_are_zero_and_no_nan(kind: TaskKind) -> None:
    outputs, target = batch(kind)
    loss = task_loss(kind, outputs, without(target, list(range(6))))
    loss.backward()
    assert loss == 0 and outputs.grad is not None and not outputs.grad.any()
    assert not known(kind, without(target, list(range(6)))).any()
    assert measured(kind, outputs, without(target, list(range(6)))) is None


def test_losses_are_torchs_own() -> None:
    outputs, target = batch("classification")
    torch.testing.assert_close(task_loss("classification", outputs, target), F.cross_entropy(outputs, target))
    outputs, target = batch("segmentation")
    torch.testing.assert_close(task_loss("segmentation", outputs, target), F.cross_entropy(outputs, target))
    outputs, target = batch("multi_label")
    expected = F.binary_cross_entropy_with_logits(outputs, target)
    torch.testing.assert_close(task_loss("multi_label", outputs, target), expected)
    outputs, target = batch("regression")
    torch.testing.assert_close(task_loss("regression", outputs, target), F.mse_loss(outputs[:, 0], target))


def test_parts_of_a_label_count_by_themselves() -> None:
    outputs, target = batch("multi_label")
    target[2, 1] = math.nan
    task_loss("multi_label", outputs, target).backward()
    assert outputs.grad is not None
    assert outputs.grad[2, 1] == 0 and outputs.grad[2, [0, 2]].abs().min() > 0
    torch.testing.assert_close(outputs.grad[2, 0], (outputs[2, 0].sigmoid() - target[2, 0]).detach() / (2 * 6))
    maps, mask = batch("segmentation")
    mask[0, :, 1:] = -100
    task_loss("segmentation", maps, mask).backward()
    assert maps.grad is not None
    assert not maps.grad[0, :, :, 1:].any() and maps.grad[0, :, :, 0].abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_see_known_labels_only(kind: TaskKind) -> None:
    outputs, target = batch(kind, 40)
    hidden = without(target, [3, 7])
    metrics, alone = task_metrics(kind, 3), task_metrics(kind, 3)
    kept = [row for row in range(40) if row not in (3, 7)]
    metrics.update(*(measured(kind, outputs.detach(), hidden) or ()))
    alone.update(*(measured(kind, outputs.detach()[kept], target[kept]) or ()))
    found, expected = metrics.compute(), alone.compute()
    assert SCORES[kind] in found
    torch.testing.assert_close(found, expected)


def test_metrics_are_those_of_their_definitions() -> None:
    outputs, target = batch("segmentation", 5)
    metrics = task_metrics("segmentation", 3)
    target[0, 0] = -100
    metrics.update(*(measured("segmentation", outputs.detach(), target) or ()))
    found, told = outputs.argmax(1)[target != -100], target[target != -100]
    both = [float(((found == one) & (told == one)).sum()) for one in range(3)]
    either = [float(((found == one) | (told == one)).sum()) for one in range(3)]
    total = [float((found == one).sum() + (told == one).sum()) for one in range(3)]
    values = metrics.compute()
    assert float(values["iou"]) == pytest.approx(sum(b / e for b, e in zip(both, either, strict=True)) / 3)
    assert float(values["dice"]) == pytest.approx(sum(2 * b / t for b, t in zip(both, total, strict=True)) / 3)
    assert float(values["pixels"]) == pytest.approx(float((found == told).float().mean()))
    outputs, target = batch("regression", 30)
    metrics = task_metrics("regression", 1)
    metrics.update(*(measured("regression", outputs.detach(), target) or ()))
    outputs = outputs.detach()
    expected = 1 - float((outputs[:, 0] - target).square().sum() / (target - target.mean()).square().sum())
    assert float(metrics.compute()["r2"]) == pytest.approx(expected, rel=1e-4)


def test_a_score_is_not_below_zero() -> None:
    assert score("regression", {"r2": torch.tensor(-3.0)}) == 0
    assert score("classification", {"accuracy": torch.tensor(0.25)}) == 0.25
