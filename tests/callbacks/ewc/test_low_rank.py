"""Weights that change through LoRA are held through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from callbacks import EWC
from callbacks.ewc.low_rank import (
    add_low_rank_gradient_,
    effective_weight,
    low_rank_layers,
    low_rank_proximal_step_,
    plain_name,
)
from recipes.parts.peft import Peft, adapt, merge
from tests.callbacks.ewc.conftest import Net, fit

BLOCKS = {"first": ["0"], "body": ["3"]}


class Adapted(Net):
    """The body's last layer is frozen beside an adapter; it may begin from the weights of a `Net`."""

    def __init__(self, method: Any = "lora", start: Net | None = None) -> None:
        super().__init__()
        if start is not None:
            self.load_state_dict(start.state_dict())
        adapt(self.body, Peft(method, rank=2), BLOCKS, lambda: self.body(torch.ones(2, 6)))
        self.untuned = {p for p in self.body.parameters() if not p.requires_grad}


def test_layers_have_the_names_of_before() -> None:
    net = Adapted()
    assert list(low_rank_layers(net)) == ["body.3.weight"]
    assert plain_name("_orig_mod.body.3.base_layer.weight") == "body.3.weight"
    assert not low_rank_layers(Adapted("dora")) and not low_rank_layers(Adapted("ia3"))


def test_the_gradient_is_that_of_the_penalty_on_the_product() -> None:
    net, strength = Adapted(), 3.0
    (layer,) = low_rank_layers(net).values()
    a, b = (getattr(layer, f"lora_{side}")["default"].weight for side in "AB")
    nn.init.normal_(b)
    fisher = {"body.3.weight": torch.rand(16, 16)}
    anchor = {"body.3.weight": layer.base_layer.weight.detach() + 0.1 * torch.randn(16, 16)}
    a.grad = torch.ones_like(a)  # of the loss
    add_low_rank_gradient_({"body.3.weight": layer}, anchor, fisher, strength)

    away = layer.base_layer.weight + 16 / 2 * b @ a - anchor["body.3.weight"]
    force = strength * fisher["body.3.weight"] * away * 16 / 2
    torch.testing.assert_close(a.grad, 1 + b.T @ force)
    torch.testing.assert_close(b.grad, force @ a.T)
    torch.testing.assert_close(effective_weight(layer), layer.base_layer.weight + 8 * b @ a)


def test_the_proximal_step_is_projected_and_diverges_for_no_strength() -> None:
    net = Adapted()
    (layer,) = low_rank_layers(net).values()
    a, b = (getattr(layer, f"lora_{side}")["default"].weight for side in "AB")
    nn.init.normal_(b)
    fisher, anchor = torch.rand(16, 16) + 0.1, layer.base_layer.weight.detach()
    product = 8 * (b @ a).detach()
    low_rank_proximal_step_(layer, anchor, fisher, 0.5)
    wanted = product / (1 + 0.5 * fisher)
    rows = torch.linalg.qr(a.detach().T)[0]
    torch.testing.assert_close(8 * (b @ a).detach(), wanted @ rows @ rows.T, atol=1e-4, rtol=1e-3)
    low_rank_proximal_step_(layer, anchor, fisher, 1e12)
    assert float((8 * b @ a).detach().norm()) < 1e-3 * float(product.norm())


@pytest.mark.parametrize("mode", ["proximal", "gradient"])
def test_a_net_with_lora_stays_near_the_old_task(mode: Any, own_folder: Path) -> None:
    old = Net()
    fit(old, 0, EWC(save=own_folder / "old.safetensors"))
    moved = {}
    strong = {"proximal": 1e6, "gradient": 20.0}[mode]
    for strength in (0.0, strong):
        torch.manual_seed(0)
        net = Adapted(start=old)
        fit(net, 1, EWC(strength, mode, load=own_folder / "old.safetensors", exclude=["^head"]))
        merge(net.body)
        moved[strength] = float((net.body[3].weight - old.body[3].weight).detach().norm())
    assert 0 < moved[strong] < 0.7 * moved[0.0]


def test_adapters_that_change_no_weight_are_not_held_and_that_is_said(own_folder: Path) -> None:
    fit(Net(), 0, EWC(save=own_folder / "old.safetensors", exclude=["^head"]))
    with pytest.raises(
        ValueError, match="the weights of the Fisher are frozen, and of adapters beside them it holds LoRA"
    ):
        fit(Adapted("adapter"), 1, EWC(load=own_folder / "old.safetensors", exclude=["^head"]))


def test_an_adapter_is_a_task_of_its_own_for_the_next(own_folder: Path) -> None:
    """Its matrices have a Fisher and an anchor, as any parameter."""
    net = Adapted()
    fit(net, 0, EWC(save=own_folder / "a.safetensors", exclude=["^head"]))
    before: dict[str, Tensor] = {n: p.detach().clone() for n, p in net.named_parameters() if "lora_" in n}
    fit(net, 1, EWC(1e12, load=own_folder / "a.safetensors", exclude=["^head"]))
    for name, value in before.items():
        torch.testing.assert_close(net.get_parameter(name), value, atol=1e-3, rtol=1e-2)
