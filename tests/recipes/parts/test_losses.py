from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from recipes.parts.losses import classification_loss, score_scale, weights_by_count


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(12, 5), torch.randint(0, 5, (12,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_torchs(batch: tuple[torch.Tensor, torch.Tensor], smoothing: float, weighted: bool) -> None:
    logits, labels = batch
    labels[3] = -100
    weight = torch.rand(5) + 0.5 if weighted else None
    ours = classification_loss(logits, labels, weight=weight, label_smoothing=smoothing)
    assert torch.allclose(ours, F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing))


def test_probabilities_of_one_are_labels(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    soft = F.one_hot(labels, 5).float()
    for options in ({}, {"label_smoothing": 0.1}, {"kind": "focal"}, {"weight": torch.rand(5)}):
        assert torch.allclose(
            classification_loss(logits, soft, **options),  # type: ignore[arg-type]
            classification_loss(logits, labels, **options),  # type: ignore[arg-type]
        )
    mixed = 0.3 * soft + 0.7 * soft.flip(0)
    assert torch.allclose(classification_loss(logits, mixed), F.cross_entropy(logits, mixed))


def test_focal_loss_is_the_papers(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    p = logits.softmax(1)[range(12), labels]
    assert torch.allclose(
        classification_loss(logits, labels, kind="focal", gamma=2.0), (-((1 - p) ** 2) * p.log()).mean()
    )
    assert torch.allclose(classification_loss(logits, labels, kind="focal", gamma=0.0), F.cross_entropy(logits, labels))


def test_a_batch_without_labels_costs_nothing(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert classification_loss(batch[0], torch.full((12,), -100)) == 0


def test_half_precision_is_summed_in_full(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    assert classification_loss(logits.bfloat16(), labels).dtype == torch.float32


def test_balanced_weights_give_each_class_the_same_say() -> None:
    counts = [10, 30, 60]
    weight = weights_by_count(counts)
    assert torch.allclose(weight * torch.tensor(counts), torch.full((3,), 100 / 3))
    with pytest.raises(ValueError, match="none of class 1"):
        weights_by_count([3, 0])


def test_effective_weights_saturate() -> None:
    counts = [10, 1000, 100_000]
    effective, balanced = weights_by_count(counts, "effective"), weights_by_count(counts)
    for weight in (effective, balanced):
        assert (weight * torch.tensor(counts)).sum().item() == pytest.approx(sum(counts))
    number = [(1 - 0.999**count) / (1 - 0.999) for count in counts]
    assert (effective[0] / effective[1]).item() == pytest.approx(number[1] / number[0], rel=1e-5)
    assert effective[1] / effective[2] < 2 < 99 < balanced[1] / balanced[2]
    with pytest.raises(ValueError, match="class_weights 'effective' needs a training sample of every class"):
        weights_by_count([3, 0], "effective")


def test_the_scale_of_scores_is_about_their_mean_and_spread_and_that_of_other_splits() -> None:
    scores = 1500 + 40 * torch.randn(1000)
    mean, spread = score_scale(scores)
    assert abs(mean - 1500) < 16 and spread == 32
    assert score_scale(scores[::2]) == score_scale(scores[1::2]) == (mean, spread)
    assert score_scale(torch.tensor([2.0, torch.nan, 2.0])) == (2.0, 1.0) and score_scale(torch.ones(0)) == (0.0, 1.0)
    shifted = score_scale(8 * scores + 4096)
    assert shifted == (8 * mean + 4096, 8 * spread), "powers of two change nothing"
