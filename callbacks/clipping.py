"""Gradient clipping whose limit adapts: to the norms seen so far, or to the weights themselves.

    Trainer(callbacks=[AutoClip(percentile=10)])     # the whole gradient, by the history of its norm
    Trainer(callbacks=[AGC(ratio=0.01)])             # each unit's gradient, by the norm of the unit's weights

Both act after every other callback's `on_before_optimizer_step` and before Lightning's own `gradient_clip_val`,
which may stay on: it then is an upper limit on what is left.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.optim import LBFGS, Optimizer

log = logging.getLogger(__name__)


@torch.no_grad()
def percentile_limit(history: Tensor, percentile: float, warmup_steps: int = 0) -> Tensor:
    """The percentile of the norms in a history; infinity up to `warmup_steps` norms.

    Args:
        history: Norms `(steps,)`; NaN is ignored.
        percentile: 0.0 to 100.0; interpolated between two norms.
        warmup_steps: Norms to wait for.
    """
    limit = torch.nanquantile(history, percentile / 100.0)
    return torch.where(history.isnan().logical_not().sum() > warmup_steps, limit, torch.inf)


@torch.no_grad()
def clip_norm_(gradients: list[Tensor], norm: Tensor, limit: Tensor) -> None:
    """Scales gradients of a total `norm` down to `limit`, unless the norm is not finite."""
    clips = norm.isfinite() & (norm > limit)  # not 0 at a limit of 0
    torch._foreach_mul_(gradients, torch.where(clips, limit / norm, 1.0))


def unit_norms(tensor: Tensor, dim: int = 0) -> Tensor:
    """Norm of each output unit's part of a weight, or of a whole vector.

    Args:
        tensor: `(out, in, ...)`: the rows of a linear layer, the filters of a convolution; or one dimension.
        dim: The dimension of the units: 1 for transposed convolutions.

    Returns:
        Norms that broadcast with the tensor: `(out, 1, ...)`, or `(1,)` for a vector.
    """
    others = [d for d in range(tensor.ndim) if d != dim or tensor.ndim < 2]
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=others, keepdim=True)
    return norms


@torch.no_grad()
def clip_units_(
    parameters: list[Tensor], ratio: float, eps: float = 1e-3, unit_dims: Mapping[Tensor, int] | None = None
) -> Tensor:
    """Scales each unit's gradient down to `ratio` times the norm of the unit's weights.

    Args:
        parameters: With gradients, which are changed in place.
        ratio: Above 0.0.
        eps: Lower bound of the weights' norm, so that what begins at zero can grow.
        unit_dims: Dimension of the units, where it is not 0.

    Returns:
        Share of the units that were clipped.
    """
    scales = []
    for p in parameters:
        dim = (unit_dims or {}).get(p, 0)
        limit = unit_norms(p, dim).clamp(min=eps) * ratio
        norm = unit_norms(p.grad, dim)  # type: ignore[arg-type]
        scale = torch.where(norm.isfinite(), (limit / norm).clamp(max=1.0), 1.0)
        p.grad.mul_(scale)  # type: ignore[union-attr]
        scales.append(scale.flatten())
    return (torch.cat(scales) < 1.0).float().mean() if scales else torch.zeros(())


class AutoClip(Callback):
    """Clips the total gradient norm to a percentile of the norms seen so far.

    The current norm is part of the history, so the first step is never clipped. Norms that are not finite, as in a
    step that a float16 scaler skips, never enter it, and such gradients do not change. Every rank sees the same
    gradients and keeps the same history, which is in the checkpoint. Nothing is read back from the device. Log steps
    log `autoclip/norm`, before clipping, and `autoclip/limit`.

    Runs on: on_before_optimizer_step, after all others. Touches: gradients; its place in `trainer.callbacks`.

    Args:
        percentile: 0.0 to 100.0; the lower, the more is clipped.
        history: Length of the history in optimiser steps.
        warmup_steps: Finite norms before the first clipping.

    Raises:
        ValueError: Several optimisers, L-BFGS, sharded parameters, or an argument out of range.

    Source: Seetharaman et al. 2020, https://arxiv.org/abs/2007.14469

    Example:
        >>> Trainer(callbacks=[AutoClip(percentile=25)]).fit(model, data)
    """

    def __init__(self, percentile: float = 10.0, history: int = 1000, warmup_steps: int = 0) -> None:
        if not 0.0 <= percentile <= 100.0:
            raise ValueError(f"expected a percentile from 0 to 100, received {percentile}; the paper uses 10")
        if not 0 <= warmup_steps < history:
            raise ValueError(f"expected 0 <= warmup_steps < history, received {warmup_steps} and {history}")
        self.percentile, self.history, self.warmup_steps = percentile, history, warmup_steps
        self.norms = torch.empty(0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the previous fit; move behind the others."""
        if stage == "fit":
            self.norms = torch.empty(0)
            _move_last(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the history to the device, padded to its length."""
        _prepare(trainer)
        if len(trainer.optimizers) > 1:
            raise ValueError(f"AutoClip keeps the history of one optimiser, received {len(trainer.optimizers)}")
        norms = self.norms[-self.history :].to(pl_module.device)
        self.norms = torch.cat([norms.new_full((self.history - len(norms),), torch.nan), norms])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad for p in _live(optimizer)]
        if not gradients:
            return
        norm = torch.nn.utils.get_total_norm(gradients).float()
        self.norms = torch.cat([self.norms[1:], torch.where(norm.isfinite(), norm, torch.nan).reshape(1)])
        limit = percentile_limit(self.norms, self.percentile, self.warmup_steps)
        clip_norm_(gradients, norm, limit)
        if _logs_now(trainer):
            pl_module.log_dict({"autoclip/norm": norm, "autoclip/limit": limit})

    def state_dict(self) -> dict[str, Any]:
        """The history, oldest first; NaN is ignored."""
        return {"norms": self.norms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.norms = state_dict["norms"]


class AGC(Callback):
    """Clips each unit's gradient to a share of the norm of the unit's weights: adaptive gradient clipping.

    A unit is a row of a linear layer or an embedding, a filter of a convolution, or a whole vector, such as a bias or
    the scales of a norm. Gradients that are not finite do not change. The last linear layer is not clipped, as in the
    paper. Log steps log `agc/clipped`, the share of the units that were.

    Runs on: on_before_optimizer_step, after all others. Touches: gradients; its place in `trainer.callbacks`.

    Args:
        ratio: Limit of |gradient| / |weights|, above 0.0; larger batches need less.
        eps: Lower bound of the weights' norm.
        exclude: Regular expressions searched for in the dotted names of parameters not to clip, such as `^head`. None:
            the last `Linear` of the module, in the order of registration; the log names it.

    Raises:
        ValueError: A pattern matches nothing, L-BFGS, sharded parameters, or an argument out of range.

    Source: Brock et al. 2021, https://arxiv.org/abs/2102.06171

    Example:
        >>> Trainer(callbacks=[AGC(0.02, exclude=["^head"])]).fit(model, data)
    """

    def __init__(self, ratio: float = 0.01, eps: float = 1e-3, exclude: Sequence[str] | None = None) -> None:
        if not (ratio > 0.0 and eps > 0.0):
            raise ValueError(f"expected ratio and eps above 0, received {ratio} and {eps}")
        self.ratio, self.eps, self.exclude = ratio, eps, exclude

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move behind the others."""
        if stage == "fit":
            _move_last(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose what is clipped."""
        _prepare(trainer)
        named = dict(pl_module.named_parameters())
        if self.exclude is None:
            linear = [(name, m) for name, m in pl_module.named_modules() if isinstance(m, nn.Linear)]
            self.excluded: set[Tensor] = set(linear[-1][1].parameters()) if linear else set()
            if trainer.is_global_zero:
                _say(f"AGC does not clip {linear[-1][0]}" if linear else "AGC found no linear layer to exclude")
        else:
            self.excluded = {named[name] for pattern in self.exclude for name in _matches(pattern, named)}
        transposed = [m for m in pl_module.modules() if isinstance(m, _ConvTransposeNd)]
        self.unit_dims: dict[Tensor, int] = {m.weight: 1 for m in transposed}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = [p for p in _live(optimizer) if p not in self.excluded]
        clipped = clip_units_(parameters, self.ratio, self.eps, self.unit_dims)
        if _logs_now(trainer):
            pl_module.log("agc/clipped", clipped)


def _is(thing: Any, *names: str) -> bool:
    """Whether it is of one of these classes or derived from one, in lightning or in pytorch_lightning."""
    return any(kind.__name__ in names for kind in thing.__class__.__mro__)


def _say(text: str, *values: Any) -> None:
    """Log information here or, where this logger shows none, once through Lightning's."""
    (log.info if log.isEnabledFor(logging.INFO) else rank_zero_info)(text, *values)


def _live(optimizer: Optimizer) -> list[Any]:
    """Parameters that take part in this step."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.grad is not None]


def _matches(pattern: str, names: Mapping[str, Any]) -> list[str]:
    found = [name for name in names if re.search(pattern, name)]
    if not found:
        known = sorted({*names, *(part for name in names for part in name.split("."))})
        near = difflib.get_close_matches(re.sub(r"[\\^$]", "", pattern), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; it is searched for in dotted names"
        raise ValueError(f"pattern {pattern!r} matches no parameter{hint}")
    return found


def _move_last(trainer: Trainer, callback: Callback) -> None:
    """Behind all others but checkpoints, which come last; a new list, since this one is being iterated."""
    others = [other for other in trainer.callbacks if other is not callback]  # type: ignore[attr-defined]
    last = [other for other in others if _is(other, "Checkpoint")]
    trainer.callbacks = [*(o for o in others if o not in last), callback, *last]  # type: ignore[attr-defined]


def _prepare(trainer: Trainer) -> None:
    """Refuses what would go wrong; makes a float16 scaler unscale before the hooks, for fused optimisers too."""
    if _is(trainer.strategy, "FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
        name = type(trainer.strategy).__name__
        raise ValueError(f"adaptive clipping needs whole gradients, received {name}, which divides them; use DDP")
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, LBFGS):
            raise ValueError("L-BFGS builds on differences of gradients, which clipping breaks; use another optimiser")
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def _logs_now(trainer: Trainer) -> bool:
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and (trainer.global_step + 1) % every == 0
