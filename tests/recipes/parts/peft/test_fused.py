"""The same numbers as the library's layer, and the library's way where they would not be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from recipes.parts.peft import Peft, adapt, merge
from recipes.parts.peft.fused import FusedLinear, LowRankLinear

BLOCKS = {"first": ["0"], "body": ["2"], "head": ["4"]}


def net(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 2))
    adapt(made, Peft(**{"method": "lora", "rank": 3, **options}), BLOCKS, lambda: made(torch.ones(1, 5)))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return made


def as_the_library(made: nn.Module) -> nn.Module:
    other = copy.deepcopy(made)
    for module in other.modules():
        if isinstance(module, FusedLinear):
            module.__class__ = Linear
    return other


def numbers(made: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = made(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in made.parameters() if p.requires_grad)]  # type: ignore[list-item]


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5)])
@pytest.mark.parametrize("stabilised", [False, True])
def test_outputs_and_gradients_are_the_librarys(shape: tuple[int, ...], stabilised: bool) -> None:
    made = net(rank_stabilised=stabilised)
    layer: Any = made[2]
    assert isinstance(layer, FusedLinear) and layer.is_plain()
    x = torch.rand(shape)
    for mine, its in zip(numbers(made, x), numbers(as_the_library(made), x), strict=True):
        torch.testing.assert_close(mine, its)


def test_the_gradients_are_right_to_first_principles() -> None:
    x, a, b = (torch.rand(*s, dtype=torch.double, requires_grad=True) for s in ((2, 3, 5), (2, 5), (4, 2)))
    weight, bias = torch.rand(4, 5, dtype=torch.double), torch.rand(4, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x, a, b: LowRankLinear.apply(x, weight, bias, a, b, 0.7), (x, a, b))  # type: ignore[no-untyped-call]


def fused_calls(made: nn.Module, monkeypatch: pytest.MonkeyPatch, run: Any) -> int:
    calls = []
    apply = LowRankLinear.apply
    monkeypatch.setattr(LowRankLinear, "apply", lambda *given: calls.append(1) or apply(*given))
    run()
    monkeypatch.undo()
    return len(calls)


def test_where_the_numbers_would_differ_it_is_the_librarys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision the sum of the weights would lose a small product; hooks want to see the matrices."""
    x = torch.rand(4, 5)
    made = net()
    assert fused_calls(made, monkeypatch, lambda: made(x)) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_calls(made, monkeypatch, lambda: made(x)) == 0
    half = net().bfloat16()
    assert fused_calls(half, monkeypatch, lambda: half(x.bfloat16())) == 0
    dropped = net(dropout=0.1)
    assert fused_calls(dropped, monkeypatch, lambda: dropped(x)) == 0
    layer: Any = made[2]
    seen = []
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    assert fused_calls(made, monkeypatch, lambda: made(x)) == 0 and seen
    handle.remove()
    layer.base_layer.weight.requires_grad_(True)
    assert fused_calls(made, monkeypatch, lambda: made(x)) == 0
    assert not isinstance(net(method="dora")[2], FusedLinear) or not net(method="dora")[2].is_plain()
    merge(made)
    assert type(made[2]) is nn.Linear
