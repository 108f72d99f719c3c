"""LoRA's linear layer in three products in place of five: the same numbers in less time.

The library computes W x + s B (A x): two thin products forward and their results' sums, all as large as the layer's
output. Here the sum is made of the weights, which are smaller than a batch: (W + s B A) x, and the backward pass takes
the gradients of A and B from thin products alone, never that of W.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional as F


class LowRankLinear(torch.autograd.Function):
    """x (W + s B A)^T + bias, for a frozen W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Inputs `(..., in)`, weight `(out, in)`, A `(rank, in)`, B `(out, rank)`, to `(..., out)`."""
        whole = torch.addmm(weight, b, a, alpha=scale)
        ctx.save_for_backward(x, whole, a, b)
        ctx.scale = scale
        return F.linear(x, whole, bias)

    @staticmethod
    def backward(ctx: Any, out: Tensor) -> Any:  # type: ignore[override]
        """Gradients of x, A and B; a CPU is much slower at thin products whose columns are the rank than at these."""
        x, whole, a, b = ctx.saved_tensors
        flat, inputs = out.flatten(0, -2), x.flatten(0, -2)
        to_x = out @ whole if ctx.needs_input_grad[0] else None
        to_a = ((b.T @ flat.T) @ inputs).mul_(ctx.scale)
        to_b = ((a @ inputs.T) @ flat).T.mul_(ctx.scale)
        return to_x, None, None, to_a, to_b, None


class FusedLinear(Linear):  # type: ignore[misc]
    """The library's layer, with this way where it gives the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the library's."""
        half = x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type)
        if half or args or kwargs or not self.is_plain():  # in half precision the sum of the weights would lose B A
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,), base = self.active_adapters, self.get_base_layer()
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        found: Tensor = LowRankLinear.apply(x, base.weight, base.bias, a, b, self.scaling[name])  # type: ignore[no-untyped-call]
        return found

    def is_plain(self) -> bool:
        """Whether it is nothing but a frozen weight and one product that is trained, which nobody watches."""
        if self.disable_adapters or self.merged or self.lora_variant or len(self.active_adapters) != 1:
            return False
        (name,), base = self.active_adapters, self.get_base_layer()
        parts: list[nn.Module] = [base, self.lora_A[name], self.lora_B[name], self.lora_dropout[name]]
        return (
            type(base) is nn.Linear
            and isinstance(parts[3], nn.Identity)
            and not base.weight.requires_grad
            and not (base.bias is not None and base.bias.requires_grad)
            and parts[1].bias is None
            and parts[2].bias is None
            and not any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts)
        )


def fuse(net: nn.Module) -> None:
    """Have all of a net's LoRA layers that are linear take this way, in place."""
    for module in net.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear
