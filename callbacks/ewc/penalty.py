"""The quadratic penalty of EWC, its gradient and its proximal step, and the merging of two tasks' memories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Mapping[str, Tensor]
BLOCK = 1 << 20  # numbers of each tensor that the penalty works on at a time on a CPU, for its cache


def penalty(parameters: Tensors, anchor: Tensors, fisher: Tensors, strength: float) -> Tensor:
    """Value of strength / 2 * sum F (theta - theta*)^2, the half included, over all names of F; differentiable.

    Args:
        parameters: theta by name.
        anchor: theta*, the weights after the old task.
        fisher: F, in the anchor's shapes.
        strength: Weight of the penalty.
    """
    terms = [(f * (parameters[name] - anchor[name]).square()).sum() for name, f in fisher.items()]
    return strength / 2 * torch.stack(terms).sum()


@torch.no_grad()
def add_penalty_gradient_(parameters: Tensors, anchor: Tensors, fisher: Tensors, strength: float) -> None:
    """Adds the gradient of `penalty`, strength * F (theta - theta*), to `.grad`, which is made where there is none.

    Frozen parameters are left alone, sparse gradients refused. Gradient descent on it diverges where
    lr * strength * F exceeds 2.
    """
    rows = []
    for name, f in fisher.items():
        if name not in parameters or not (p := parameters[name]).requires_grad:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        elif p.grad.layout != torch.strided:
            raise RuntimeError(
                f"{name} has a sparse gradient, and the penalty's is dense; use EWC's mode proximal, or sparse=False"
            )
        rows.append((p, anchor[name], f, p.grad))
    if rows and rows[0][0].device.type != "cpu":
        weights, anchors, fishers, grads = zip(*rows, strict=True)
        torch._foreach_addcmul_(grads, torch._foreach_sub(weights, anchors), fishers, strength)
        return
    for _, scratch, (w, a, f, g) in _pieces(rows):
        g.addcmul_(torch.sub(w, a, out=scratch), f, value=strength)


@torch.no_grad()
def proximal_step_(
    parameters: Tensors, anchor: Tensors, fisher: Tensors, coefficients: Mapping[str, float | Tensor]
) -> None:
    """Implicit step on the penalty: theta <- (theta + c F theta*) / (1 + c F), which diverges for no c.

    In place, for each name of `coefficients`, which holds c = lr * strength; frozen parameters are left alone.
    """
    names = [
        name
        for name, c in coefficients.items()
        if name in fisher and parameters[name].requires_grad and (isinstance(c, Tensor) or c > 0)
    ]
    rows = [(parameters[name], anchor[name], fisher[name]) for name in names]
    # The share F / (F + 1 / c) of the way back is the same as c F / (1 + c F), and overflows for no c.
    inverse: list[Any] = [1 / coefficients[name] for name in names]
    if rows and rows[0][0].device.type != "cpu":
        weights, anchors, fishers = zip(*rows, strict=True)
        if any(isinstance(k, Tensor) for k in inverse):
            inverse = [
                torch.as_tensor(k, dtype=f.dtype, device=f.device) for k, f in zip(inverse, fishers, strict=True)
            ]
        torch._foreach_lerp_(weights, anchors, torch._foreach_div(fishers, torch._foreach_add(fishers, inverse)))
        return
    for row, scratch, (w, a, f) in _pieces(rows):
        torch.add(f, inverse[row], out=scratch)
        w.lerp_(a, torch.div(f, scratch, out=scratch))


def _pieces(rows: Sequence[tuple[Tensor, ...]]) -> Iterator[tuple[int, Tensor, tuple[Tensor, ...]]]:
    """Row, scratch memory and matching pieces of tensors, small enough for a CPU's cache."""
    scratch: dict[torch.dtype, Tensor] = {}
    for row, tensors in enumerate(rows):
        first = tensors[0]
        if not all(t.is_contiguous() for t in tensors):
            yield row, torch.empty_like(first), tensors
            continue
        if first.dtype not in scratch:
            scratch[first.dtype] = first.new_empty(BLOCK)
        for piece in zip(*(torch.split(t.view(-1), BLOCK) for t in tensors), strict=True):
            yield row, scratch[first.dtype][: len(piece[0])], piece


def merge(
    first: tuple[Tensors, Tensors], second: tuple[Tensors, Tensors], decay: float | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Two tasks' (Fisher, anchor) as one: what a step costs does not grow with the number of tasks.

    A sum of quadratics is a quadratic: with separate anchors, and for all theta,

        sum F1 (theta - theta1)^2 + sum F2 (theta - theta2)^2  =  sum F (theta - anchor)^2 + constant

    where F = F1 + F2 and the anchor is the mean of the two, weighted with F1 and F2. With a `decay` the online form:
    F = decay * F1 + F2 at the newest anchor (Schwarz et al. 2018, https://arxiv.org/abs/1805.06370).

    Returns:
        Fisher, anchor and the constant; names of either task are kept.
    """
    (old, old_anchor), (new, new_anchor) = first, second
    if decay is not None:
        faded = {name: decay * f.float() for name, f in old.items()}
        fisher = faded | {name: f.float() + faded[name] if name in faded else f for name, f in new.items()}
        return fisher, {**old_anchor, **new_anchor}, 0.0
    fisher, anchor, constant = {**old, **new}, {**old_anchor, **new_anchor}, 0.0
    for name in old.keys() & new.keys():
        one, at_one, two, at_two = (t.float() for t in (old[name], old_anchor[name], new[name], new_anchor[name]))
        fisher[name] = one + two
        share = torch.where(fisher[name] > 0, two / fisher[name], 1.0)
        anchor[name] = torch.lerp(at_one, at_two, share)
        constant += float((one * share * (at_one - at_two).square()).sum(dtype=torch.float64))
    return fisher, anchor, constant
