"""Warm up the learning rate of any schedule; for each block that opens later, anew.

Trainer(callbacks=[LRWarmup(steps=500)])
Trainer(callbacks=[GradualUnfreezing(every_epochs=1), LRWarmup(steps=100), LearningRateMonitor()])
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

log = logging.getLogger(__name__)

RISING = {"OneCycle", "OneCycleLR", "CyclicLR"}
OWN_WARMUPS = ("warmup_steps", "num_warmup_steps", "warmup_t", "warmup_epochs", "warmup_iters")

Shape: TypeAlias = Literal["linear", "cosine", "exponential"]


@runtime_checkable
class OpensPhases(Protocol):
    """A callback that opens parameters later, such as GradualUnfreezing."""

    phases: Sequence[Sequence[nn.Parameter]]
    """Parameters that open together, in the order of opening."""
    opening_steps: Sequence[int]
    """Optimiser step at which each phase opened; shorter than `phases` while some are frozen."""


def ramp(step: int, steps: int, shape: Shape = "linear") -> float:
    """Factor of a warm-up over `steps` steps: above 0 at step 0, below 1 to its last step, then 1.

    Args:
        step: Optimiser steps done.
        steps: Length of the warm-up.
        shape: `linear`; `cosine`, slow at both ends; `exponential`, a hundredfold in all.
    """
    if step >= steps:
        return 1.0
    share = (step + 1) / (steps + 1)
    if shape == "cosine":
        return (1.0 - math.cos(math.pi * share)) / 2.0
    return share if shape == "linear" else float(0.01 ** (1.0 - share))


class LRWarmup(Callback):
    """Multiplies the learning rate of any schedule by a ramp from near 0 to 1.

    The learning rate of optimiser step t is exactly schedule(t) x ramp(t), whatever the schedule: none, recursive,
    one-cycle, plateau, per step or per epoch. It is scaled while a batch is trained, so that LearningRateMonitor and
    loggers see it, and restored before any scheduler or checkpoint reads it. Optimiser steps count, so accumulation
    doesn't shorten the warm-up, and resuming needs no state of its own.

    With GradualUnfreezing, blocks that open later warm up from the moment they open, and a group shows a learning rate
    of 0 while it is frozen. For that, blocks must lie in parameter groups of their own.

    Runs on: start of epochs and batches, around the optimiser's step. Touches: `lr`, and with `momentum` also
    `momentum` or the first of `betas`, in the optimiser's groups; the order of the Trainer's callbacks.

    Args:
        steps: Length of the warm-up in optimiser steps; give one of the three.
        epochs: The same in epochs; may be a fraction.
        share: The same as a share of the run, 0 to 1.
        shape: `linear`, `cosine` or `exponential`.
        momentum: Momentum at the start of the ramp, from where it rises to the optimiser's own.
        per_block: Whether blocks that open later warm up anew.

    Raises:
        ValueError: The warm-up doesn't fit into the run; another LRWarmup or the schedule itself warms up; several
            optimisers, or no momentum to warm up; a parameter group holds blocks that open at different times.

    Source: Goyal et al. 2017, https://arxiv.org/abs/1706.02677

    Example:
        >>> Trainer(callbacks=[LRWarmup(share=0.05, shape="cosine")]).fit(model, data)
    """

    def __init__(
        self,
        steps: int | None = None,
        epochs: float | None = None,
        share: float | None = None,
        shape: Shape = "linear",
        momentum: float | None = None,
        per_block: bool = True,
    ) -> None:
        given = {"steps": steps, "epochs": epochs, "share": share}
        chosen = {name: value for name, value in given.items() if value is not None}
        if len(chosen) != 1 or min(chosen.values()) <= 0 or (share or 0) >= 1:
            raise ValueError(f"LRWarmup needs one of steps, epochs and share (below 1), above 0; received {chosen}")
        if shape not in ("linear", "cosine", "exponential"):
            raise ValueError(f"shape must be linear, cosine or exponential; received {shape!r}")
        self.steps, self.epochs, self.share = steps, epochs, share
        self.shape: Shape = shape
        self.momentum, self.per_block = momentum, per_block
        self._reset()

    def _reset(self) -> None:
        self.length = 0  # in optimiser steps
        self._later_length = 0  # of blocks that open later: another one, where a resume has changed epochs
        self.opener: OpensPhases | None = None
        self._phase_of: list[int] = []  # for each group of the optimiser
        self._own: list[dict[str, Any]] = []  # what the schedule has set, while groups are scaled
        self._stepping = False
        self._hooks: list[Any] = []

    def planned_length(self, total_steps: float, steps_per_epoch: float, begin: float = 0.0) -> int:
        """Length of the warm-up in optimiser steps.

        Args:
            total_steps: Of the run; infinite where unknown.
            steps_per_epoch: Optimiser steps, of which an epoch's last, shorter accumulation is one.
            begin: Step at which the run began, or would have with as many steps in each epoch: `step_at_epoch` of 0.
        """
        if self.epochs is not None and not math.isfinite(steps_per_epoch):
            raise ValueError("LRWarmup received epochs, but the data has no length: give steps")
        if self.share is not None and not math.isfinite(total_steps):
            raise ValueError(
                "LRWarmup received a share of a run whose length is not known: give steps, or set max_steps, or "
                "max_epochs where the data has a length"
            )
        length = self.steps or round((self.share or 0) * total_steps)
        if self.epochs is not None:
            length = round(round(begin + self.epochs * steps_per_epoch, 6))
        if length >= total_steps:
            raise ValueError(f"a warm-up of {length} steps does not fit in a run of {total_steps:g} optimiser steps")
        return length

    def factor(self, step: int, length: int, opened: int = 0) -> float:
        """Factor at optimiser step `step` on the learning rate of a group that opened at step `opened`."""
        return ramp(step - (opened if self.per_block else 0), length, self.shape)

    def check_schedule(self, scheduler: Any) -> None:
        """Refuse a schedule that warms up itself; log where its learning rate rises by nature."""
        kind = type(scheduler).__name__
        if own := own_warmup(scheduler):
            raise ValueError(
                f"LRWarmup and the warm-up of {kind} itself ({own}) would multiply: switch off the schedule's own, or "
                "remove LRWarmup"
            )
        if kind in RISING:
            _say(f"warm-up: multiplies the rise of {kind}, which begins low by itself")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the previous fit; go in front of what reads learning rates, behind what opens blocks."""
        if stage == "fit":
            self._reset()
            others = [other for other in trainer.callbacks if other is not self]  # type: ignore[attr-defined]
            if any(isinstance(other, LRWarmup) for other in others):
                raise ValueError("two LRWarmup would multiply: the learning rate would rise by the square; give one")
            openers = [other for other in others if isinstance(other, OpensPhases)]
            rest = [other for other in others if not isinstance(other, OpensPhases)]
            self.opener = openers[0] if openers else None  # type: ignore[assignment]
            trainer.callbacks = [*openers, self, *rest]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the length and each group's phase, and hook the optimiser's step."""
        if len(trainer.optimizers) != 1:
            raise ValueError(f"LRWarmup serves one optimiser; this module has {len(trainer.optimizers)}")
        optimizer = trainer.optimizers[0]
        for config in trainer.lr_scheduler_configs:
            self.check_schedule(config.scheduler)
        total, per_epoch = steps_of_run(trainer), steps_per_epoch(trainer)
        self.length = self.planned_length(total, per_epoch, step_at_epoch(trainer, 0))
        self._later_length = self.length if self.epochs is None else round(self.epochs * per_epoch)
        phases = self.opener.phases if self.opener and self.per_block else []
        self._phase_of = phase_of_groups(optimizer, phases)
        if self.momentum is not None and not all({"momentum", "betas"} & set(g) for g in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} has no momentum to warm up; leave momentum unset")

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._restore(optimizer)
            self._scale(optimizer, trainer.global_step)
            self._stepping = True

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._restore(optimizer)
            self._stepping = False

        self._hooks = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        if trainer.global_step < self.length or len(phases) > 1:
            clocks = ", each block from its opening" if len(phases) > 1 else ""
            _say(f"warm-up: {self.shape} over {self.length} optimiser steps{clocks}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the learning rate of the coming step."""
        self._restore(trainer.optimizers[0])
        self._scale(trainer.optimizers[0], trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the learning rate of the coming step."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore learning rates where no step follows: during accumulation, or where a scaler may skip it."""
        if not self._stepping:
            self._restore(trainer.optimizers[0])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore learning rates; leave the optimiser."""
        if self._own:
            self._restore(trainer.optimizers[0])
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same, before anything saves the optimiser."""
        self.on_train_end(trainer, pl_module)

    def _scale(self, optimizer: Optimizer, step: int) -> None:
        """Keep what the schedule has set, and set what the step is to use."""
        opened = self.opener.opening_steps if self.opener and self.per_block else [0]
        for group, phase in zip(optimizer.param_groups, self._phase_of, strict=True):
            length = self._later_length if phase else self.length
            share = self.factor(step, length, opened[phase]) if phase < len(opened) else 0.0
            self._own.append({key: group[key] for key in ("lr", "momentum", "betas") if key in group})
            if isinstance(group["lr"], Tensor):
                self._own[-1]["lr"] = group["lr"].clone()
                group["lr"].mul_(share)  # a compiled or captured step reads this very tensor
            else:
                group["lr"] *= share
            if self.momentum is not None:
                own = group["betas"][0] if "betas" in group else group["momentum"]
                momentum = self.momentum + (own - self.momentum) * share
                group |= {"betas": (momentum, *group["betas"][1:])} if "betas" in group else {"momentum": momentum}

    def _restore(self, optimizer: Optimizer) -> None:
        """Restore what the schedule has set."""
        for group, own in zip(optimizer.param_groups, self._own, strict=False):
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(own.pop("lr"))
            group.update(own)
        self._own = []


def steps_per_epoch(trainer: Trainer) -> float:
    """Optimiser steps in an epoch; infinite where the data has no length, or several optimisers step as they like."""
    batches = float(trainer.num_training_batches) if len(trainer.optimizers) < 2 else math.inf
    return math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else math.inf


def step_at_epoch(trainer: Trainer, epoch: float) -> float:
    """Optimiser step at which an epoch begins, if it does so after now; infinite where the data has no length.

    Counted from now: a run that is resumed with other batches, accumulation or devices has steps of two kinds.
    """
    loop, per_epoch = trainer.fit_loop, steps_per_epoch(trainer)
    if not math.isfinite(per_epoch):
        return math.inf
    epochs, batches, done = loop.epoch_progress.current, loop.epoch_loop.batch_progress, 0.0
    if vars(epochs)["started"] > trainer.current_epoch:  # during an epoch
        last = batches.is_last_batch
        done = per_epoch if last else vars(batches.current)["processed"] // trainer.accumulate_grad_batches
    return trainer.global_step + (epoch - trainer.current_epoch) * per_epoch - done


def steps_of_run(trainer: Trainer) -> float:
    """Optimiser steps of the whole run, those done and those left; infinite where nobody knows.

    Lightning's `estimated_stepping_batches` is -1 where the data has no length, and takes what is done before a resume
    for what the same epochs would be now. With `fast_dev_run` it is long, for its steps are the first of a real run.
    """
    if getattr(trainer, "fast_dev_run", False):
        return 1e6
    epochs, steps = trainer.max_epochs, trainer.max_steps
    ends = [math.inf, step_at_epoch(trainer, math.inf if epochs in (None, -1) else epochs)]
    return min(ends if steps == -1 else [*ends, steps])


def own_warmup(scheduler: Any) -> str:
    """A schedule's own warm-up, such as `warmup_steps=100`; empty where it has none.

    Found by the names used here, in transformers and in timm; torch's LinearLR is accepted: it may be there to decay.
    """
    inner = [found for each in getattr(scheduler, "_schedulers", ()) if (found := own_warmup(each))]
    lambdas = [getattr(function, "keywords", {}) for function in getattr(scheduler, "lr_lambdas", ())]
    facts = {key: value for options in (*lambdas, vars(scheduler)) for key, value in options.items()}
    named = (
        f"{key}={facts[key]:g}" for key in OWN_WARMUPS if isinstance(facts.get(key), int | float) and facts[key] > 0
    )
    return next(named, inner[0] if inner else "")


def phase_of_groups(optimizer: Optimizer, phases: Sequence[Sequence[nn.Parameter]]) -> list[int]:
    """Phase in which each parameter group opens; 0 where no phases are known."""
    phase_of = {parameter: index for index, phase in enumerate(phases) for parameter in phase}
    found = []
    for index, group in enumerate(optimizer.param_groups):
        mixed = sorted({phase_of[parameter] for parameter in group["params"] if parameter in phase_of})
        if len(mixed) > 1:
            name = group.get("name", index)
            raise ValueError(
                f"parameter group {name!r} holds blocks that open at different times and can't warm up one by one: "
                "make groups by block (layerwise_param_groups does), or set per_block=False"
            )
        found.append(mixed[0] if mixed else 0)
    return found


def _say(text: str, *values: Any) -> None:
    """Log information here or, where this logger shows none, once through Lightning's."""
    (log.info if log.isEnabledFor(logging.INFO) else rank_zero_info)(text, *values)
