"""Bounds on weights after each update, and on learning rates during it.

Trainer(callbacks=[Constrain("head.weight", max_norm=3.0), Constrain("scale$", minimum=0.0)])
Trainer(callbacks=[RateBounds(minimum=1e-6, maximum=1e-3)])
"""

from __future__ import annotations

import difflib
import logging
import math
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn.modules.conv import _ConvTransposeNd
from torch.optim import Optimizer

log = logging.getLogger(__name__)


@torch.no_grad()
def clamp_(tensors: list[Tensor], minimum: float | None = None, maximum: float | None = None) -> None:
    """Moves each element to the nearest value in the range; `minimum=0.0` keeps the sign."""
    if tensors and minimum is not None:
        torch._foreach_clamp_min_(tensors, minimum)
    if tensors and maximum is not None:
        torch._foreach_clamp_max_(tensors, maximum)


@torch.no_grad()
def bound_norms_(tensor: Tensor, least: float, most: float, dim: int = 0) -> None:
    """Scales each output unit's part of a weight, or a whole vector, to the nearest norm in the range.

    What is within rounding error of the range, and what is zero, does not change, so a second call does nothing.

    Args:
        tensor: `(out, in, ...)`: the rows of a linear layer, the filters of a convolution; or one dimension.
        least: 0.0 or more.
        most: The same as `least` for a fixed norm.
        dim: The dimension of the units: 1 for transposed convolutions.
    """
    others = [d for d in range(tensor.ndim) if d != dim or tensor.ndim < 2]
    norms = torch.linalg.vector_norm(tensor, dim=others, keepdim=True)
    slack = max(torch.finfo(tensor.dtype).eps, 1e-5)
    outside = (norms > most * (1.0 + slack)) | (norms < least * (1.0 - slack)) & (norms > 0.0)
    tensor.mul_(torch.where(outside, norms.clamp(least, most) / norms, 1.0))


class Constrain(Callback):
    """Keeps weights in a range, or their norms, from before the first step and after every update.

    Several act in their order. Within one, the range comes first and the norm second. Norms are those of output units:
    rows of a linear layer, filters of a convolution; a vector is one unit. They hold to a relative 1e-5, or the
    precision of the weights if that is lower. Frozen parameters are left alone.

    Runs on: on_train_start; after the optimiser's step, behind all other callbacks' hooks. Touches: weights; its
    place in `trainer.callbacks`.

    Args:
        pattern: Regular expression searched for in the dotted names of parameters.
        minimum: Smallest value; 0.0 keeps weights from turning negative.
        maximum: Largest value.
        max_norm: Largest norm of a unit, above 0.0; usual are 1 to 4.
        unit_norm: Whether each unit's norm is kept at 1.

    Raises:
        ValueError: The pattern matches nothing, nothing is asked for, or contradictory bounds.

    Source: Srivastava et al. 2014, 5.1, of max-norm: https://jmlr.org/papers/v15/srivastava14a.html

    Example:
        >>> Trainer(callbacks=[Constrain("head.weight", minimum=-1.0, maximum=1.0, max_norm=3.0)]).fit(model, data)
    """

    def __init__(
        self,
        pattern: str,
        minimum: float | None = None,
        maximum: float | None = None,
        max_norm: float | None = None,
        unit_norm: bool = False,
    ) -> None:
        _check_range(minimum, maximum)
        if max_norm is None and minimum is None and maximum is None and not unit_norm:
            raise ValueError("Constrain has nothing to do; give minimum, maximum, max_norm or unit_norm")
        if max_norm is not None and not 0.0 < max_norm < math.inf:
            raise ValueError(f"expected max_norm above 0, received {max_norm}")
        if unit_norm and (max_norm is not None or minimum is not None or maximum is not None):
            raise ValueError("unit_norm leaves nothing to max_norm and breaks a range; give it alone")
        if max_norm is not None and ((minimum or 0.0) > 0.0 or (maximum or 0.0) < 0.0):
            raise ValueError(
                f"a norm is bounded by scaling towards 0, which is not in the range from {minimum} to {maximum}; drop "
                "max_norm or widen the range"
            )
        self.pattern, self.minimum, self.maximum, self.max_norm = pattern, minimum, maximum, max_norm
        self.unit_norm = unit_norm
        self.hooks: list[Any] = []

    @property
    def state_key(self) -> str:
        """One for each set of arguments, so that a Trainer takes several."""
        options = ("pattern", "minimum", "maximum", "max_norm", "unit_norm")
        return self._generate_state_key(**{option: getattr(self, option) for option in options})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move behind all others but checkpoints; a new list, since this one is being iterated."""
        if stage == "fit":
            others = [other for other in trainer.callbacks if other is not self]  # type: ignore[attr-defined]
            last = [other for other in others if _is(other, "Checkpoint")]
            trainer.callbacks = [*(o for o in others if o not in last), self, *last]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Constrain the weights now, and after each update."""
        if _is(trainer.strategy, "FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
            name = type(trainer.strategy).__name__
            raise ValueError(f"Constrain needs whole parameters, received {name}, which divides them; train with DDP")
        transposed = {m.weight for m in pl_module.modules() if isinstance(m, _ConvTransposeNd)}
        named = _matching(self.pattern, dict(pl_module.named_parameters()), "parameter")
        self.unit_dims: dict[Tensor, int] = {p: int(p in transposed) for p in named.values()}
        before = {name: p.detach().clone() for name, p in named.items() if p.requires_grad}
        self.apply(self.unit_dims)
        moved = [name for name, old in before.items() if not torch.equal(old, named[name])]
        if moved and trainer.is_global_zero:
            _say(f"Constrain({self.pattern!r}) moved, before the first step: {', '.join(moved)}")
        self.hooks += [optimizer.register_step_post_hook(self._after) for optimizer in trainer.optimizers]

    def apply(self, parameters: Iterable[Tensor]) -> None:
        """Constrain those of the given parameters that are chosen and not frozen."""
        chosen = [p for p in parameters if p in self.unit_dims and p.requires_grad]
        clamp_(chosen, self.minimum, self.maximum)
        if self.max_norm is not None or self.unit_norm:
            least, most = (1.0, 1.0) if self.unit_norm else (0.0, self.max_norm or 0.0)
            for p in chosen:
                bound_norms_(p, least, most, self.unit_dims[p])

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.apply(p for group in optimizer.param_groups for p in group["params"])

    def on_train_end(self, *_: Any) -> None:
        """Leave the optimisers."""
        while self.hooks:
            self.hooks.pop().remove()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()


class RateBounds(Callback):
    """Keeps the learning rates of an optimiser's groups in a range, whatever schedule and warm-up set.

    A learning rate is bounded for the update alone and restored after it, so schedules go on from their own value and
    LearningRateMonitor shows that. One log line says when a bound begins to act on a group and one when it ends.
    Groups of frozen parameters only are left alone. Several may be used, each for groups of its own. What reads
    learning rates in a hook, as a proximal penalty does, must come after it in the list of callbacks.

    Runs on: before and after the optimiser's step, inside of a warm-up's hooks. Touches: `lr`, during the update.

    Args:
        minimum: Smallest learning rate, 0.0 or more.
        maximum: Largest learning rate.
        pattern: Regular expression searched for in the groups' names, or their numbers where these have none.

    Raises:
        ValueError: The pattern matches no group, a group is bounded twice, or the range is empty.

    Example:
        >>> Trainer(callbacks=[RateBounds(maximum=1e-4, pattern="^layer")]).fit(model, data)
    """

    def __init__(self, minimum: float = 0.0, maximum: float = math.inf, pattern: str = "") -> None:
        _check_range(minimum, maximum)
        if minimum < 0.0 or (minimum == 0.0 and maximum == math.inf):
            raise ValueError(f"expected a minimum of 0 or more and a bound, received {minimum} and {maximum}")
        self.minimum, self.maximum, self.pattern = minimum, maximum, pattern
        self.hooks: list[Any] = []

    @property
    def state_key(self) -> str:
        """One for each set of arguments, so that a Trainer takes several."""
        return self._generate_state_key(minimum=self.minimum, maximum=self.maximum, pattern=self.pattern)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the previous fit."""
        if stage == "fit":
            self.names: set[str] = set()
            self.bound: set[int] = set()
            self.before: list[tuple[dict[str, Any], Any, Any]] = []
            self.logs = trainer.is_global_zero

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore before any hook of on_train_start, such as a warm-up's: last in, first out."""
        self.hooks += [optimizer.register_step_post_hook(self._restore) for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the groups; bound after any warm-up, which goes before all others."""
        names = {name: None for optimizer in trainer.optimizers for name, _ in _named(optimizer)}
        self.names = set(_matching(self.pattern, names, "group"))
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            twice = other.names & self.names if isinstance(other, RateBounds) and other is not self else ()
            if twice:
                raise ValueError(f"RateBounds: group {min(twice)!r} is bounded twice; make the patterns disjoint")
        self.hooks += [optimizer.register_step_pre_hook(self._bind) for optimizer in trainer.optimizers]

    def _bind(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for name, group in _named(optimizer):
            if name not in self.names or not any(p.requires_grad for p in group["params"]):
                continue
            lr = group["lr"]
            if isinstance(lr, Tensor):  # a compiled or captured step reads this very tensor; reading it would wait
                before, allowed = lr.clone(), lr.clamp_(self.minimum, self.maximum).clone()
            else:
                before, allowed = lr, min(max(lr, self.minimum), self.maximum)
                if (allowed != lr) != (id(group) in self.bound):
                    self.bound ^= {id(group)}
                    if self.logs:
                        bounded = f" -> {allowed:.3g}" if allowed != lr else ""
                        _say(f"learning rate of group {name!r}: {lr:.3g}{bounded}")
                group["lr"] = allowed
            self.before.append((group, before, allowed))

    def _restore(self, *_: Any) -> None:
        while self.before:
            group, lr, _ = self.before.pop()
            if isinstance(lr, Tensor):
                group["lr"].copy_(lr)
            else:
                group["lr"] = lr

    def on_train_end(self, *_: Any) -> None:
        """Leave the optimisers."""
        while self.hooks:
            self.hooks.pop().remove()

    def on_exception(self, *_: Any) -> None:
        """Restore after an interrupted step, unless a warm-up has already restored its own."""
        if self.hooks:
            same = torch.equal if self.before and isinstance(self.before[0][2], Tensor) else operator.is_
            self.before = [entry for entry in self.before if same(entry[0]["lr"], entry[2])]
            self._restore()
            self.on_train_end()


def _named(optimizer: Optimizer) -> list[tuple[str, dict[str, Any]]]:
    """The groups by name, or by number where they have none; looked up anew, since restoring replaces them."""
    return [(str(group.get("name", number)), group) for number, group in enumerate(optimizer.param_groups)]


def _matching(pattern: str, named: Mapping[str, Any], what: str) -> dict[str, Any]:
    found = {name: thing for name, thing in named.items() if re.search(pattern, name)}
    if not found:
        near = difflib.get_close_matches(re.sub(r"[\\^$]", "", pattern), list(named), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(list(named)[:5])}"
        raise ValueError(f"pattern {pattern!r} matches no {what}{hint}")
    return found


def _check_range(minimum: float | None, maximum: float | None) -> None:
    least, most = -math.inf if minimum is None else minimum, math.inf if maximum is None else maximum
    if not least <= most:
        raise ValueError(f"expected minimum <= maximum, received {minimum} and {maximum}")


def _is(thing: Any, *names: str) -> bool:
    """Whether it is of one of these classes or derived from one, in lightning or in pytorch_lightning."""
    return any(kind.__name__ in names for kind in thing.__class__.__mro__)


def _say(text: str, *values: Any) -> None:
    """Log information here or, where this logger shows none, once through Lightning's."""
    (log.info if log.isEnabledFor(logging.INFO) else rank_zero_info)(text, *values)
