"""Learning-learning rate schedules as functions of progress: a group's learning rate = its own base x factor(step).

Each is built from `(optimizer, total_steps, ...)` and stepped once per optimiser step. Ratios between groups
always hold, and resuming takes nothing but the step. In YAML:

    schedule:
      class_path: recipes.parts.schedules.Cosine
      init_args: {warmup: 0.1}

All take `warmup`: step t of a warm-up of n steps runs at (t + 1) / (n + 1) of the full learning rate, so that the
first step already learns. What decays does so from the end of the warm-up and has reached its end in the run's last
step; further steps stay there. Options that a schedule does not name are those of its base.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal, SupportsFloat

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .curves import check, cosine, first_step, one_cycle, progress, ramp, warmup_length, whole_length


class Schedule(LRScheduler):
    """Base of the schedules: warm-up, progress and resuming; a subclass adds its `shape`.

    On resume what is configured now beats the checkpoint. Only progress is restored; every group's learning rate is
    then computed anew from the base learning rate, length and shape that this object was built with.

    Args:
        optimizer: Base learning rates are its groups' `initial_lr`, or `lr` where that is absent.
        total_steps: Optimiser steps in the run.
        warmup: Linear warm-up: below 1 a share of the run, from 1 on optimiser steps.
        warmup_steps: A former name of `warmup`, which saved configs carry; and so is `warmup_share`.

    Attributes:
        writes: Keys of the optimiser's groups that the schedule sets.

    Raises:
        ValueError: The length of the run is not known, or the warm-up does not fit into it.
    """

    writes: tuple[str, ...] = ("lr",)

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.0,
        warmup_steps: int | None = None,
        warmup_share: float | None = None,
    ) -> None:
        self.total_steps = whole_length(total_steps)
        given = [length for length in (warmup, warmup_steps, warmup_share) if length]
        if len(given) > 1:
            raise ValueError(f"received warm-ups of {given[0]:g} and {given[1]:g}: give warmup alone")
        self.warmup_steps = warmup_length(self.total_steps, given[0] if given else 0)
        super().__init__(optimizer)

    def shape(self, step: int) -> float:
        """Factor at a step of the run, without the warm-up's ramp."""
        raise NotImplementedError

    def factor(self, step: int) -> float:
        """What each group's base learning rate is multiplied by at optimiser step `step`, counted from 0."""
        step = min(step, self.total_steps - 1)
        return ramp(step, self.warmup_steps) * self.shape(step)

    def turning_points(self) -> dict[str, int]:
        """Optimiser steps at which something changes, by what changes there."""
        return {"warm-up ends": self.warmup_steps} if self.warmup_steps else {}

    def get_lr(self) -> list[float | Tensor]:
        """Rate of each group at the present step."""
        factor = self.factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Progress alone, in plain types."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the progress; writes what restoring the optimiser has replaced."""
        self.last_epoch = state_dict["last_epoch"]
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["initial_lr"] = base.clone() if isinstance(base, Tensor) else base
        self._write()

    def _write(self) -> None:
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # a compiled or captured step reads this very tensor
            else:
                group["lr"] = lr


class Constant(Schedule):
    """The base learning rate throughout, after the warm-up."""

    def shape(self, step: int) -> float:
        """1.0."""
        return 1.0


class Decay(Schedule):
    """Base of the schedules that fall from the base learning rate to a given end.

    Args:
        end_factor: Share of the base learning rate in the last step, 0.0 to 1.0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        end_factor: float = 0.0,
        **options: Any,
    ) -> None:
        check("end_factor", end_factor, 0.0 <= end_factor <= 1.0, "between 0 and 1")
        self.end_factor = end_factor
        super().__init__(optimizer, total_steps, **options)

    def left(self, progress: float) -> float:
        """What is left of the fall: 1.0 at progress 0.0, 0.0 at progress 1.0."""
        raise NotImplementedError

    def decay_begins(self) -> int:
        """Last step at the full learning rate."""
        return self.warmup_steps

    def shape(self, step: int) -> float:
        """From 1.0 to `end_factor`."""
        left = self.left(progress(step, self.decay_begins(), self.total_steps - 1))
        return left + self.end_factor * (1.0 - left)  # exact at both ends

    def turning_points(self) -> dict[str, int]:
        """End of the warm-up, begin and end of the fall."""
        fall = {"decay begins": self.decay_begins(), "decay ends": self.total_steps - 1}
        return super().turning_points() | fall


class Cosine(Decay):
    """Half a cosine, from the base learning rate to `end_factor` of it.

    SGDR without its restarts: Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983
    """

    def left(self, progress: float) -> float:
        """Half a cosine."""
        return cosine(progress)


class Linear(Decay):
    """A straight line, from the base learning rate to `end_factor` of it."""

    def left(self, progress: float) -> float:
        """A straight line."""
        return 1.0 - progress


class Polynomial(Decay):
    """A line bent by `power`, from the base learning rate to `end_factor` of it.

    Args:
        power: Above 0; 1.0 is a straight line, 2.0 falls fast at first and slowly at last.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        power: float = 2.0,
        **options: Any,
    ) -> None:
        check("power", power, power > 0.0, "above 0")
        self.power = power
        super().__init__(optimizer, total_steps, **options)

    def left(self, progress: float) -> float:
        """A line to the given power."""
        return float((1.0 - progress) ** self.power)


class WarmupStableDecay(Decay):
    """The base learning rate for most of the run, and a fall over its last part.

    Up to the fall nothing depends on the length of the run, so it can be prolonged from there. Hu et al. 2024
    (MiniCPM), https://arxiv.org/abs/2404.06395; the 1-sqrt fall: Hägele et al. 2024,
    https://arxiv.org/abs/2405.18392

    Args:
        decay_share: Share of the run over which the learning rate falls, 0.0 to 1.0.
        decay: How it falls.

    Raises:
        ValueError: Warm-up and fall together are longer than the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        decay_share: float = 0.2,
        decay: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt",
        **options: Any,
    ) -> None:
        check("decay_share", decay_share, 0.0 <= decay_share <= 1.0, "between 0 and 1")
        check("decay", decay, decay in ("linear", "cosine", "1-sqrt"), "linear, cosine or 1-sqrt")
        self.decay_share, self.decay = decay_share, decay
        super().__init__(optimizer, total_steps, **options)
        if self.warmup_steps + int(decay_share * self.total_steps) > self.total_steps:
            raise ValueError(
                f"a warm-up of {self.warmup_steps} steps and a decay over {decay_share:g} of the run do not both fit "
                f"in a run of {self.total_steps} steps; shorten one of them or train longer"
            )

    def left(self, progress: float) -> float:
        """A line, half a cosine or 1 - sqrt(progress)."""
        if self.decay == "cosine":
            return cosine(progress)
        return 1.0 - (math.sqrt(progress) if self.decay == "1-sqrt" else progress)

    def decay_begins(self) -> int:
        """Last step at the full learning rate."""
        steps = max(round(self.decay_share * self.total_steps), 1)
        return max(self.total_steps - steps, self.warmup_steps)


class Step(Schedule):
    """Multiplies the learning rate by `drop` again and again: at regular distances, or at given points.

    Args:
        drop: What the learning rate is multiplied by each time, above 0.0 and up to 1.0.
        every: Distance between drops: below 1 a share of the run, from 1 on optimiser steps. Where neither it
            nor `milestones` is given, a third of the run.
        milestones: Where to drop: each a share of the run (below 1) or an optimiser step.

    Raises:
        ValueError: A drop lies beyond the run, or both `every` and `milestones` are given.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        drop: float = 0.1,
        every: float | None = None,
        milestones: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        check("drop", drop, 0.0 < drop <= 1.0, "above 0 and at most 1")
        if every is not None and milestones is not None:
            raise ValueError(f"received every={every:g} and milestones={list(milestones)}; give one of the two")
        total = whole_length(total_steps)
        if milestones is None:
            every = 1 / 3 if every is None else every
            check("every", every, every > 0.0, "above 0")
            first_step(every, total)
            distance = every * total if every < 1 else every
            times = range(1, math.ceil(total / distance - 1e-9))
            self.milestones = [math.ceil(time * distance - 1e-9) for time in times]
        else:
            self.milestones = sorted(first_step(at, total) for at in milestones)
        self.drop = drop
        super().__init__(optimizer, total_steps, **options)

    def shape(self, step: int) -> float:
        """`drop` to the power of the number of drops so far."""
        return float(self.drop ** bisect_right(self.milestones, step))

    def turning_points(self) -> dict[str, int]:
        """End of the warm-up, and every drop."""
        drops = {f"drop {number}": step for number, step in enumerate(self.milestones, 1)}
        return super().turning_points() | drops


class Piecewise(Schedule):
    """A constant factor in each piece of the run.

    Args:
        pieces: `(start, factor)` in order: from `start` on, a share of the run (below 1) or an optimiser step,
            the base learning rate is multiplied by `factor`. Before the first start the factor is 1.0.

    Raises:
        ValueError: No pieces, starts out of order or beyond the run, or a factor that is negative or, at the
            first step, 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        pieces: Sequence[tuple[float, float]],
        **options: Any,
    ) -> None:
        total = whole_length(total_steps)
        self.starts = [first_step(at, total) for at, _ in pieces]
        self.factors = [1.0, *(factor for _, factor in pieces)]
        in_order = len(pieces) > 0 and self.starts == sorted(self.starts)
        check("pieces", list(pieces), in_order, "one or more (start, factor) in order of their starts")
        usable = min(self.factors) >= 0.0 and self.shape(0) > 0.0
        check("pieces", list(pieces), usable, "factors of at least 0, and above 0 at the first step")
        super().__init__(optimizer, total_steps, **options)

    def shape(self, step: int) -> float:
        """Factor of the piece that the step lies in."""
        return self.factors[bisect_right(self.starts, step)]

    def turning_points(self) -> dict[str, int]:
        """End of the warm-up, and the start of each piece."""
        pieces = enumerate(zip(self.factors[1:], self.starts, strict=True), 1)
        return super().turning_points() | {f"piece {n} at {factor:g}": start for n, (factor, start) in pieces}


class OneCycle(Schedule):
    """Up to the base learning rate and far down again, along two halves of a cosine; the cycle is its own warm-up.

    Smith & Topin 2019, https://arxiv.org/abs/1708.07120; the same curve as torch's OneCycleLR whose `max_lr`
    is each group's own learning rate. A warm-up asked for on top comes before the cycle.

    Args:
        up_share: Share of the cycle that goes up, above 0.0 and below 1.0.
        div_factor: The first step's learning rate is the base learning rate divided by this.
        final_div_factor: The last step's learning rate is the first one's divided by this.
        cycle_momentum: Move momentum (or the first beta) against the learning rate.
        base_momentum: Momentum where the learning rate is highest.
        max_momentum: Momentum in the first and last step.

    Raises:
        ValueError: `cycle_momentum` with an optimiser that has neither momentum nor betas.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        up_share: float = 0.3,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        cycle_momentum: bool = False,
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
        **options: Any,
    ) -> None:
        check("up_share", up_share, 0.0 < up_share < 1.0, "above 0 and below 1")
        check("div_factor", div_factor, div_factor >= 1.0, "at least 1")
        check("final_div_factor", final_div_factor, final_div_factor > 0.0, "above 0")
        if cycle_momentum and not all({"momentum", "betas"} & set(group) for group in optimizer.param_groups):
            raise ValueError(
                f"cycle_momentum needs an optimiser with momentum or betas; received {type(optimizer).__name__}; "
                "set cycle_momentum to false"
            )
        self.up_share = up_share
        self.start, self.end = 1.0 / div_factor, 1.0 / div_factor / final_div_factor
        self.cycle_momentum = cycle_momentum
        self.base_momentum, self.max_momentum = base_momentum, max_momentum
        self.writes = ("lr", "momentum", "betas") if cycle_momentum else ("lr",)
        super().__init__(optimizer, total_steps, **options)

    def cycle(self, step: int, start: float, peak: float, end: float) -> float:
        """Value at `step` of a cycle over the steps after the warm-up."""
        steps = self.total_steps - self.warmup_steps
        return one_cycle(max(step - self.warmup_steps, 0), steps, self.up_share, start, peak, end)

    def shape(self, step: int) -> float:
        """From `1 / div_factor` to 1.0 to `1 / div_factor / final_div_factor`."""
        return self.cycle(step, self.start, 1.0, self.end)

    def get_lr(self) -> list[float | Tensor]:
        """Rate of each group at the present step; sets momentum, too, where that is cycled."""
        if self.cycle_momentum:
            step = min(self.last_epoch, self.total_steps - 1)
            momentum = self.cycle(step, self.max_momentum, self.base_momentum, self.max_momentum)
            for group in self.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                else:
                    group["momentum"] = momentum
        return super().get_lr()

    def turning_points(self) -> dict[str, int]:
        """End of the warm-up, and the step nearest to the peak."""
        top = self.up_share * (self.total_steps - self.warmup_steps) - 1.0
        return super().turning_points() | {"peak": self.warmup_steps + max(round(top), 0)}


class Plateau(Schedule):
    """Multiplies the learning rate by `drop` whenever a validation metric has stopped improving.

    As torch's ReduceLROnPlateau, but as a factor of each group's own learning rate. `step` counts optimiser steps, for
    the warm-up, and takes no metric; whoever validates calls `observe` once per validation, with a value that
    is equal on all ranks.

    Args:
        monitor: Name of the metric to observe, as logged.
        mode: Whether smaller (`min`) or larger (`max`) values are better.
        drop: What the learning rate is multiplied by each time, above 0.0 and below 1.0.
        patience: Validations without improvement to wait for; the next one lowers the learning rate.
        threshold: Least improvement that counts, as a share of the best value so far.
        min_factor: The learning rate stays at or above this share of the base learning rate, 0.0 to 1.0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        drop: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        min_factor: float = 0.0,
        **options: Any,
    ) -> None:
        check("mode", mode, mode in ("min", "max"), "min or max")
        check("drop", drop, 0.0 < drop < 1.0, "above 0 and below 1")
        check("patience", patience, patience >= 0, "0 or more validations")
        check("threshold", threshold, threshold >= 0.0, "0 or above")
        check("min_factor", min_factor, 0.0 <= min_factor <= 1.0, "between 0 and 1")
        self.monitor, self.mode, self.drop = monitor, mode, drop
        self.patience, self.threshold, self.min_factor = patience, threshold, min_factor
        self.drops = 0
        self.best: float | None = None
        self.bad_validations = 0
        super().__init__(optimizer, total_steps, **options)

    def shape(self, step: int) -> float:
        """`drop` to the power of the number of drops so far, but no less than `min_factor`."""
        return max(self.drop**self.drops, self.min_factor)

    def observe(self, value: SupportsFloat) -> bool:
        """Takes one validation's metric; a NaN is no improvement.

        Returns:
            Whether the learning rate was lowered.
        """
        current, sign = float(value), 1.0 if self.mode == "min" else -1.0
        margin = 0.0 if self.best is None else self.threshold * abs(self.best)
        if sign * current < (math.inf if self.best is None else sign * self.best - margin):
            self.best, self.bad_validations = current, 0
            return False
        self.bad_validations += 1
        if self.bad_validations <= self.patience:
            return False
        self.bad_validations = 0
        if self.shape(self.last_epoch) <= self.min_factor:
            return False
        self.drops += 1
        self._write()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Progress alone: the step, the number of drops, and what the next one hangs on."""
        plateau = {"drops": self.drops, "best": self.best, "bad_validations": self.bad_validations}
        return super().state_dict() | plateau

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the progress; that of another kind of schedule brings the step alone."""
        self.drops = state_dict.get("drops", 0)
        self.best = state_dict.get("best")
        self.bad_validations = state_dict.get("bad_validations", 0)
        super().load_state_dict(state_dict)
