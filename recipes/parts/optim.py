"""Optimisers with layer-wise learning rates and the right weight decay, for any network and any torch optimiser.

    groups = param_groups(net, net.layer_groups(), weight_decay=0.05, layer_decay=0.8, lr_multipliers={"^head": 10})
    optimizer = build_optimizer(partial(torch.optim.AdamW, lr=1e-3), groups)

Every parameter is in a named group from the start, frozen ones too, and each group's learning rate is real: `lr` and
`initial_lr` carry the layer's scale, so that any schedule keeps the ratios.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Muon, Optimizer, RMSprop, SparseAdam

from .muon import MuonWithAdamW
from .param_groups import ParamGroup, describe, param_groups, table
from .spelling import some

__all__ = ["MuonWithAdamW", "build_optimizer", "describe", "param_groups", "reassert", "snapshot", "table"]


def build_optimizer(
    optimizer: Callable[[Iterable[Any]], Optimizer], groups: Sequence[ParamGroup], *, fused: bool | None = None
) -> Optimizer:
    """Builds an optimiser whose groups carry their real learning rates.

    Each is that of `optimizer` times the group's `lr_scale`, and at most its `lr_limit`.

    `optimizer` is called twice, at first with a throw-away parameter, to see what it builds. L-BFGS knows but one
    group and gets one. Rprop uses its learning rate in the first step alone.

    A fused optimiser would unscale float16 gradients by itself, after all hooks that read or clip them. That is
    switched off: `GradScaler` unscales before the hooks, as for any other optimiser.

    Args:
        optimizer: Such as `partial(AdamW, lr=1e-3)`, or what jsonargparse makes of `class_path` and `init_args`.
        groups: From `param_groups`.
        fused: One kernel for all tensors of a group, a fraction of the default's time. None: where `optimizer`
            does not say and the kernel is right, which is not so for SGD with momentum: it fails on a tensor that
            joins its group late, as under gradual unfreezing.

    Raises:
        ValueError: The optimiser cannot do what `groups` or `fused` ask for.
    """
    probe = optimizer([nn.Parameter(torch.zeros(1, 1))])
    kind = type(probe).__name__
    decays = "weight_decay" in probe.defaults
    if not decays and any(group.get("weight_decay") for group in groups):
        raise ValueError(f"{kind} has no weight decay; leave weight_decay unset or take another optimiser")
    if isinstance(probe, LBFGS):
        groups = [_one_group(groups)]
    if isinstance(probe, Muon) and any(p.ndim != 2 for group in groups for p in group["params"]):
        raise ValueError(
            "torch.optim.Muon updates matrices only, and this network has parameters of other shapes; take "
            f"{MuonWithAdamW.__module__}.MuonWithAdamW, which gives those to AdamW"
        )
    if isinstance(probe, SparseAdam):
        _refuse_dense(groups)

    built = optimizer([dict(group) for group in groups])
    for group in built.param_groups:
        lr = min(group["lr"] * group.pop("lr_scale", 1.0), group.pop("lr_limit", math.inf))
        group["lr"], group["initial_lr"] = lr, copy.deepcopy(lr)  # a copy of a tensor would share its memory
        if not decays:
            group.pop("weight_decay", None)
        fusible = "sparse" not in group.pop("kinds", []) and _can_fuse(built, group)
        if fused and not fusible and not group.get("muon"):
            raise ValueError(f"{kind} has no fused kernel that is right for {group['name']}; leave fused unset")
        if fusible and (fused or group["fused"] is None):
            group["fused"] = True
        if "fused" in group and fused is False:
            group["fused"] = False
    built._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    built.register_step_pre_hook(_align)
    return built


def snapshot(optimizer: Optimizer) -> list[ParamGroup]:
    """Hyper-parameters of every group, as they are now, without the parameters."""
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def reassert(optimizer: Optimizer, configured: Sequence[ParamGroup], scheduled: Sequence[str] = ("lr",)) -> list[str]:
    """Puts configured hyper-parameters back after a checkpoint has brought its own.

    Args:
        optimizer: Just restored.
        configured: `snapshot` of it, taken before.
        scheduled: Keys that a schedule writes (the `writes` of ours) and that are left to it; `()` if none does.

    Returns:
        One line per difference: `weight_decay of layer3: 0.01 (checkpoint) -> 0.05 (configured)`.

    Raises:
        ValueError: The checkpoint's groups are other ones, or an option is on now that needs state from the
            first step.
    """
    lines, changed = [], set()
    for index, (group, wanted) in enumerate(zip(optimizer.param_groups, configured, strict=True)):
        name = str(wanted.get("name", f"group {index}"))
        if str(group.get("name", name)).split("/")[0] != name.split("/")[0]:
            raise ValueError(
                f"the checkpoint's group {index} is {group['name']} where {name} is configured; its state belongs to "
                "other layers: resume with the layer groups it was written with, or load its weights alone"
            )
        for key, new in wanted.items():
            old = group.get(key, "absent")
            if old == new or key in scheduled or (key == "initial_lr" and "lr" in scheduled):
                continue
            late = key in ("amsgrad", "centered") or (key == "momentum" and isinstance(optimizer, RMSprop))
            if late and new and not old:
                raise ValueError(
                    f"{key} of {name} is {new} as configured and {old} in the checkpoint, which lacks the state for "
                    f"it; set it to {old}, or load the weights alone"
                )
            group[key] = copy.deepcopy(new)
            changed.add(key)
            if key != "initial_lr":
                lines.append(f"{key} of {name}: {old} (checkpoint) -> {new} (configured)")
    if changed & {"fused", "capturable"}:
        optimizer.load_state_dict(optimizer.state_dict())  # moves the step counts to the device these need
    return lines


def _one_group(groups: Sequence[ParamGroup]) -> ParamGroup:
    """All parameters in a single group, for L-BFGS."""
    if any(group.get("lr_scale", 1.0) != 1.0 for group in groups):
        raise ValueError(
            "L-BFGS has one learning rate for all parameters; set layer_decay to 1 and lr_multipliers to none, "
            "or take another optimiser"
        )
    return {"params": [p for group in groups for p in group["params"]], "name": "all"}


def _refuse_dense(groups: Sequence[ParamGroup]) -> None:
    dense = [
        group["name"]
        for group in groups
        if any(p.requires_grad and kind != "sparse" for p, kind in zip(group["params"], group["kinds"], strict=True))
    ]
    if dense:
        raise ValueError(
            f"SparseAdam takes sparse gradients only; {some(dense)} would have dense ones: set sparse=True on the "
            "embeddings and freeze the rest, or take Adam"
        )


def _can_fuse(optimizer: Optimizer, group: ParamGroup) -> bool:
    """Whether a fused kernel exists for the group and is right whatever happens in a run."""
    devices = {"cpu"} if isinstance(optimizer, Adagrad) else {"cpu", "cuda"}
    return (
        "fused" in group
        and not (group["foreach"] or group["differentiable"])
        and not (isinstance(optimizer, SGD) and group["momentum"])
        and all(
            type(p) in (nn.Parameter, Tensor)
            and p.is_floating_point()
            and p.device.type in devices
            and p.stride() == torch.empty_like(p, device="meta").stride()  # dense
            for p in group["params"]
        )
    )


def _align(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a fused kernel runs, that is after the closure where there is one, matches all memory layouts."""
    if not any(group.get("fused") for group in optimizer.param_groups):
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimiser
    if closure is None:
        _match_layouts(optimizer)
        return None

    def closure_then_align() -> Any:
        loss = closure()
        _match_layouts(optimizer)
        return loss

    return args[:1], {**kwargs, "closure": closure_then_align}


def _match_layouts(optimizer: Optimizer) -> None:
    """Lays gradients and state out as their parameters are.

    A fused kernel walks through memory. Where a hand-made gradient, or state from a checkpoint of a run in
    another memory format, is laid out differently, it would update the wrong numbers on a CPU, without a word.
    """
    for group in optimizer.param_groups:
        for p in group["params"] if group.get("fused") else ():
            if p.grad is None:
                continue
            if not _same_layout(p, p.grad):
                p.grad = torch.empty_like(p, dtype=p.grad.dtype).copy_(p.grad)
            state = optimizer.state.get(p, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape and not _same_layout(p, value):
                    state[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def _same_layout(one: Tensor, other: Tensor) -> bool:
    if one.stride() == other.stride():
        return True
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or mine == its for size, mine, its in strides)
