"""The penalty of weights that change through LoRA: of the product of two thin matrices beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Layers: TypeAlias = Mapping[str, Any]  # name of the frozen weight -> the layer around it


def low_rank_layers(module: nn.Module) -> dict[str, Any]:
    """Layers whose weight gets LoRA's product added, by the weight's name without the library's additions.

    DoRA, which also changes the weight's length, is not among them.
    """
    return {
        plain_name(f"{path}.base_layer.weight"): layer
        for path, layer in module.named_modules()
        if hasattr(layer, "get_delta_weight") and getattr(layer, "lora_A", None) and not layer.lora_variant
    }


def plain_name(name: str) -> str:
    """A parameter's name as it was before torch.compile or adapters."""
    return name.replace("_orig_mod.", "").replace(".base_layer.", ".")


def effective_weight(layer: Any) -> Tensor:
    """The weight that such a layer computes with; differentiable in its matrices."""
    weight: Tensor = layer.get_base_layer().weight.detach()
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter)
    return weight


def matrices(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of the product that it adds."""
    adapter = layer.active_adapters[0]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def add_low_rank_gradient_(
    layers: Layers, anchor: Mapping[str, Tensor], fisher: Mapping[str, Tensor], strength: float
) -> None:
    """Adds to `.grad` of the matrices the gradient of strength / 2 * sum F (W + s B A - theta*)^2.

    Args:
        layers: From `low_rank_layers`; frozen ones are left alone.
        anchor: theta* by name.
        fisher: F by name.
        strength: Weight of the penalty.
    """
    for name, layer in layers.items():
        mine = [p for p in matrices(layer) if p.requires_grad]
        if not mine:
            continue
        with torch.enable_grad(), torch.autocast(mine[0].device.type, enabled=False):
            away = effective_weight(layer) - anchor[name]
            value = strength / 2 * (fisher[name] * away.square()).sum()
            gradients = torch.autograd.grad(value, mine)
        for p, gradient in zip(mine, gradients, strict=True):
            p.grad = gradient if p.grad is None else p.grad + gradient


@torch.no_grad()
def low_rank_proximal_step_(layer: Any, anchor: Tensor, fisher: Tensor, coefficient: float | Tensor) -> None:
    """Implicit step on the penalty, as far as B can follow it: the product nearest to where the weight would go.

    The weight would go to (W + s B A + c F theta*) / (1 + c F). What that changes is projected on the rows of A: a
    projection makes nothing larger, so that this diverges for no c, as the step of a whole weight.

    Args:
        layer: One of `low_rank_layers`; where B is frozen it is left alone.
        anchor: theta*.
        fisher: F.
        coefficient: c, learning rate times strength.
    """
    a, b = matrices(layer)
    if not b.requires_grad or not coefficient:
        return
    weight = effective_weight(layer)
    change = ((anchor - weight) * (fisher / (fisher + 1 / coefficient))).flatten(1).float()
    rows = a.flatten(1).float()
    step = change @ rows.T @ torch.linalg.pinv(rows @ rows.T, hermitian=True)
    b.add_((step / layer.scaling[layer.active_adapters[0]]).view(b.shape).to(b.dtype))
