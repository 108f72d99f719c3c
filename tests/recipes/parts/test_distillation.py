"""Losses of a student against their definitions, and features of blocks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from recipes.parts.distillation import distillation_loss, feature_loss, projection

STUDENT, TEACHER = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_one_class_is_the_divergence_at_a_temperature(temperature: float) -> None:
    p, q = (TEACHER / temperature).softmax(1), (STUDENT / temperature).softmax(1)
    expected = (p * (p / q).log()).sum(1).mean() * temperature**2
    torch.testing.assert_close(distillation_loss(STUDENT, TEACHER, temperature=temperature), expected)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_it_is_zero_where_both_say_the_same_and_pulls_there(problem: str) -> None:
    assert float(distillation_loss(TEACHER, TEACHER, problem_type=problem, temperature=3)) == pytest.approx(0, abs=1e-6)
    logits = STUDENT.clone().requires_grad_()
    distillation_loss(logits, TEACHER, problem_type=problem, temperature=3).backward()
    nearer = STUDENT - 0.1 * logits.grad  # type: ignore[operator]
    before, after = (distillation_loss(x, TEACHER, problem_type=problem, temperature=3) for x in (STUDENT, nearer))
    assert 0 < after < before


def test_the_gradient_keeps_its_size_at_a_high_temperature() -> None:
    """And is then that of the squared difference of centred logits over the number of classes (Hinton, equation 4)."""
    logits = STUDENT.clone().requires_grad_()
    distillation_loss(logits, TEACHER, temperature=1e4).backward()
    away = (STUDENT - STUDENT.mean(1, keepdim=True)) - (TEACHER - TEACHER.mean(1, keepdim=True))
    torch.testing.assert_close(logits.grad, away / 3 / 4, atol=1e-3, rtol=1e-2)


def test_samples_that_fill_up_do_not_count() -> None:
    weight = torch.tensor([True, True, False, False])
    torch.testing.assert_close(distillation_loss(STUDENT, TEACHER, weight), distillation_loss(STUDENT[:2], TEACHER[:2]))
    assert float(distillation_loss(STUDENT, TEACHER, torch.zeros(4))) == 0
    weighted = distillation_loss(STUDENT[:2], TEACHER[:2], torch.tensor([1.0, 3.0]))
    one, two = (distillation_loss(STUDENT[i : i + 1], TEACHER[i : i + 1]) for i in (0, 1))
    torch.testing.assert_close(weighted, (one + 3 * two) / 4)


def test_several_labels_by_hand() -> None:
    p, q = TEACHER.sigmoid(), STUDENT.sigmoid()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(
        distillation_loss(STUDENT, TEACHER, problem_type="multi_label_classification"), each.mean()
    )
    squares = (STUDENT[:, :1] - TEACHER[:, :1]).square().mean()
    torch.testing.assert_close(distillation_loss(STUDENT[:, :1], TEACHER[:, :1], problem_type="regression"), squares)


def test_features_are_compared_at_each_place() -> None:
    maps, larger = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 8, 8)
    means = F.avg_pool2d(larger, 2)
    expected = 1 - F.cosine_similarity(maps, means, dim=1).mean()
    torch.testing.assert_close(feature_loss(maps, larger), expected)
    assert float(feature_loss(means * 7, larger)) == pytest.approx(0, abs=1e-6), "blind to length"
    tokens, others = torch.randn(2, 2, 3, 5)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    kept = [1 - F.cosine_similarity(tokens[i, j], others[i, j], dim=0) for i, j in ((0, 0), (0, 1), (0, 2), (1, 0))]
    torch.testing.assert_close(feature_loss(tokens, others, mask), torch.stack(kept).mean())


def test_a_projection_brings_features_to_the_teachers_width() -> None:
    assert projection(torch.rand(1, 4, 2, 2), torch.rand(1, 6, 1, 1))(torch.rand(3, 4, 2, 2)).shape == (3, 6, 2, 2)
    assert projection(torch.rand(1, 7, 4), torch.rand(1, 7, 6))(torch.rand(3, 7, 4)).shape == (3, 7, 6)
    with pytest.raises(ValueError, match=r"features of \(4, 2, 2\) and \(7, 6\) can't be matched"):
        projection(torch.rand(1, 4, 2, 2), torch.rand(1, 7, 6))
