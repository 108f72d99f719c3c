from __future__ import annotations

import pytest
import torch
from torch import nn

from recipes.parts.heads import CosineHead, build_head, on_own_scale


@pytest.mark.parametrize("kind", ["linear", "mlp", "cosine"])
@pytest.mark.parametrize("init", ["default", "kaiming", "xavier", "normal"])
def test_every_head_with_every_start(kind: str, init: str) -> None:
    head = build_head(kind, 16, 5, hidden=8, dropout=0.5, init=init)  # type: ignore[arg-type]
    assert head(torch.randn(4, 16)).shape == (4, 5)
    drops = [m.p for m in head.modules() if isinstance(m, nn.Dropout)]
    assert drops == [0.5] * (2 if kind == "mlp" else 1)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_head_of_zeros_gives_no_class_a_start_and_still_learns(kind: str) -> None:
    head = build_head(kind, 16, 5, init="zeros")  # type: ignore[arg-type]
    x = torch.randn(6, 16)
    assert torch.equal(head(x), torch.zeros(6, 5))
    nn.functional.cross_entropy(head(x), torch.arange(6) % 5).backward()
    last = [m for m in head.modules() if isinstance(m, nn.Linear)][-1]
    assert last.weight.grad is not None and last.weight.grad.abs().sum() > 0


def test_starts_have_the_spread_of_their_papers() -> None:
    def spread(init: str) -> float:
        head = build_head("linear", 400, 600, init=init)  # type: ignore[arg-type]
        assert isinstance(head, nn.Linear)
        assert torch.equal(head.bias, torch.zeros(600))
        return float(head.weight.detach().std())

    assert spread("kaiming") == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert spread("xavier") == pytest.approx((2 / 1000) ** 0.5, rel=0.02)
    assert spread("normal") == pytest.approx(0.01, rel=0.02)


def test_cosine_head_ignores_the_features_norm() -> None:
    head = CosineHead(16, 5)
    x = torch.randn(4, 16)
    assert torch.allclose(head(x), head(7 * x), atol=1e-5)
    assert head(head.weight[2:3]).argmax() == 2
    assert head(head.weight[2:3]).max().item() == pytest.approx(10.0)


def test_scores_on_their_own_scale_for_a_while() -> None:
    head = build_head("mlp", 8, 1).eval()
    x, scale = torch.randn(5, 8), torch.tensor([3.0, 4.0])
    before = {name: value.clone() for name, value in head.state_dict().items()}
    expected = head(x) * 4 + 3
    with on_own_scale(head, scale):
        torch.testing.assert_close(head(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items()), "to the last bit"


@pytest.mark.slow
def test_mistakes_get_a_sentence() -> None:
    with pytest.raises(ValueError, match="head 'liner' is not known; expected one of linear, mlp, cosine"):
        build_head("liner", 4, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init 'orthogonal' is not known"):
        build_head("linear", 4, 2, init="orthogonal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a zero vector has no direction"):
        build_head("cosine", 4, 2, init="zeros")
