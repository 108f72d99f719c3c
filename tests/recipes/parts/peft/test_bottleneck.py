"""A bottleneck adapter by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from recipes.parts.peft.bottleneck import Bottleneck

LAYERS = [(nn.Linear(3, 5), torch.rand(2, 3)), (nn.Conv2d(3, 5, 3, stride=2), torch.rand(2, 3, 7, 7))]


@pytest.mark.parametrize(("layer", "x"), LAYERS)
def test_at_first_it_is_the_layer_then_the_formula_by_hand(layer: nn.Module, x: torch.Tensor) -> None:
    adapted = Bottleneck(layer, 2)
    out = layer(x)
    assert torch.equal(adapted(x), out)
    nn.init.normal_(adapted.adapter_up.weight)
    nn.init.normal_(adapted.adapter_up.bias)

    def last(t: torch.Tensor) -> torch.Tensor:
        return t.movedim(1, -1) if t.ndim == 4 else t

    (down, b1), (up, b2) = ((m.weight.flatten(1), m.bias) for m in (adapted.adapter_down, adapted.adapter_up))
    expected = last(out) + gelu(last(out) @ down.T + b1) @ up.T + b2
    torch.testing.assert_close(last(adapted(x)), expected)
