"""Gradual unfreezing: a network is frozen but for its last blocks, and opened block by block while it trains.

Trainer(callbacks=[GradualUnfreezing(every_epochs=1)])      # the head first, then one more block every epoch
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from .blocks import Blocks, HasLayerGroups, find_blocks
from .freeze import Freeze, _Freezing, check_alone, close, frozen_modules, is_compiled
from .messages import count, counted, log, say, some
from .ranks import check_strategy, compare_ranks, is_kind, rewrap
from .steps import step_at_epoch, steps_of_run, steps_per_epoch


class GradualUnfreezing(_Freezing):
    """Opens the network block by block: the last blocks train from the start, the others join later.

    A block is a named group of parameters, from the module's own `layer_groups()`, from patterns, or inferred from the
    module tree. All parameters are in the optimiser from the first step; opening only flips `requires_grad`, so
    schedulers, momentum and resuming are not affected. What is open is computed from the run's progress at every
    start of an epoch or step, also after a resume. A frozen block has no gradient, decay or momentum, and its modules
    are in evaluation mode: BatchNorm (SyncBatchNorm, too) keeps its statistics. Parameters that were frozen before, by
    the module itself or by `Freeze`, stay so. After the fit the module is trainable as before.

    Under DDP the module is wrapped anew at each change, on all ranks at the same step: frozen parameters cost no
    traffic, opened ones are reduced. Weights are compared across ranks at each change and at the end. A block that
    opens must receive a gradient in its first step. FSDP, DeepSpeed and model parallelism are refused.

    Runs on: fit start, start of epochs and batches, end of validation. Touches: `requires_grad`, `training`,
    `grad`, under DDP the strategy's wrapper, with `restore_best` weights and buffers.

    Args:
        every_epochs: Epochs from one opening to the next.
        every_steps: The same in optimiser steps.
        at: When each phase opens: below 1 a share of the run, from 1 on an optimiser step.
        over_share: Open evenly, the last phase at this share of the run; 0.5 where nothing else is given.
        monitor: Logged metric; a phase opens when it has not improved for more than `patience` validations.
        mode: Whether smaller (`min`) or larger (`max`) values of `monitor` are better.
        patience: Validations without improvement before an opening.
        min_delta: Smallest change of `monitor` that counts as an improvement.
        restore_best: With `monitor`: return to the phase's best weights and buffers before the next opens; the
            optimiser's momentum is kept.
        blocks_at_start: Blocks open from the first step.
        blocks_per_phase: Blocks that open together; None for all the others at once.
        order: `top_down` from the head, `bottom_up`, or names of all blocks in the order to open.
        patterns: Blocks as regular expressions, input to output; see `find_blocks`.
        frozen_dropout: Leave dropout on in frozen blocks.

    Raises:
        ValueError: A phase that the run can't reach or that an early stop could prevent; a pattern without a match; a
            parameter in no optimiser group or in two; fewer than two blocks.
        RuntimeError: Replicas differ; an opened block receives no gradient.

    Source: Howard & Ruder 2018, https://arxiv.org/abs/1801.06146

    Example:
        >>> Trainer(callbacks=[GradualUnfreezing(every_epochs=1, blocks_per_phase=2)]).fit(model, data)
    """

    def __init__(
        self,
        every_epochs: int | None = None,
        every_steps: int | None = None,
        at: Sequence[float] | None = None,
        over_share: float | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        patience: int = 1,
        min_delta: float = 0.0,
        restore_best: bool = False,
        blocks_at_start: int = 1,
        blocks_per_phase: int | None = 1,
        order: Literal["top_down", "bottom_up"] | Sequence[str] = "top_down",
        patterns: Sequence[str] | None = None,
        frozen_dropout: bool = False,
    ) -> None:
        super().__init__(frozen_dropout)
        self.every_epochs, self.every_steps, self.at, self.over_share = every_epochs, every_steps, at, over_share
        self.monitor, self.patience, self.min_delta, self.restore_best = monitor, patience, min_delta, restore_best
        self.sign = 1.0 if mode == "min" else -1.0
        self.blocks_at_start, self.blocks_per_phase = blocks_at_start, blocks_per_phase
        self.order, self.patterns = order, patterns
        ways = ("every_epochs", "every_steps", "at", "over_share", "monitor")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"GradualUnfreezing received {' and '.join(given)}; give one of them")
        if any(value is not None and value < 1 for value in (every_epochs, every_steps, blocks_per_phase)):
            raise ValueError("every_epochs, every_steps and blocks_per_phase must be at least 1")
        if blocks_at_start < 1:
            raise ValueError(f"blocks_at_start must be at least 1, or nothing trains; received {blocks_at_start}")
        if over_share is not None and not 0 < over_share < 1:
            raise ValueError(f"over_share must lie between 0 and 1; received {over_share:g}")
        if at is not None and (not at or min(at) <= 0 or list(at) != sorted(at)):
            raise ValueError(f"at must be ascending shares of the run, then steps, above 0; received {list(at)}")
        if restore_best and monitor is None:
            raise ValueError("restore_best needs monitor, to know what is best")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be min or max; received {mode!r}")
        self._reset()

    def _reset(self) -> None:
        self.blocks: list[Blocks] = []  # by phase; phase 0 is open from the start
        self.opening_steps: list[int] = []  # optimiser step at which each open phase opened
        self.due = 0  # the phase that the monitored metric has reached
        self.best: float | None = None
        self.bad_validations = 0
        self.best_weights: dict[str, Tensor] = {}
        self._boundaries: list[tuple[str, int]] = []
        self._shown = -1  # the phase that the module has been brought to
        self._untried: Blocks = {}  # opened, but gradients not yet checked

    @property
    def phases(self) -> list[list[nn.Parameter]]:
        """Parameters that open together, in the order of opening."""
        return [[p for members in part.values() for p in members.values()] for part in self.blocks]

    @property
    def all_open(self) -> bool:
        """Whether the last phase has begun."""
        return bool(self.blocks) and len(self.opening_steps) == len(self.blocks)

    def plan(self, module: nn.Module) -> list[Blocks]:
        """The blocks of each phase, in the order of opening."""
        blocks = find_blocks(module, self.patterns)
        if len(blocks) < 2:
            kind = type(module).__name__
            raise ValueError(f"GradualUnfreezing found {len(blocks)} block in {kind}; give patterns, one per block")
        names = list(blocks if self.order in ("top_down", "bottom_up") else self.order)
        if self.order == "top_down":
            names.reverse()
        if sorted(names) != sorted(blocks):
            raise ValueError(f"order must name each block once: {', '.join(blocks)}; received {self.order}")
        first, rest = names[: self.blocks_at_start], names[self.blocks_at_start :]
        size = self.blocks_per_phase or max(len(rest), 1)
        parts = [first, *(rest[i : i + size] for i in range(0, len(rest), size))]
        if self.at is not None and len(self.at) < len(parts) - 1:
            parts[len(self.at) :] = [list(chain(*parts[len(self.at) :]))]  # the last opens all others
        return [{name: blocks[name] for name in part} for part in parts]

    def boundaries(self, phases: int, total_steps: float) -> list[tuple[str, int]]:
        """`("epoch" or "step", number)` at which each phase after the first opens; none with a metric."""
        count = range(1, phases)
        if self.monitor is not None:
            return []
        if self.every_epochs is not None:
            return [("epoch", self.every_epochs * n) for n in count]
        if self.every_steps is not None:
            return [("step", self.every_steps * n) for n in count]
        points = self.at or [(self.over_share or 0.5) * n / len(count) for n in count]
        if min(points, default=1) < 1 and not math.isfinite(total_steps):
            raise ValueError(
                "a share of the run needs its length: set max_epochs or max_steps, or give every_steps; for data "
                "without a length, or several optimisers, it is max_steps"
            )
        return [("step", max(math.ceil(p * total_steps - 1e-9), 1) if p < 1 else int(p)) for p in points[: len(count)]]

    def planned_steps(self, phases: int, total_steps: float, steps_per_epoch: float, begin: float = 0.0) -> list[float]:
        """Optimiser step at which each phase opens; with a metric, of the first alone.

        Args:
            phases: Their number.
            total_steps: Of the run; infinite where unknown.
            steps_per_epoch: Infinite where the data has no length.
            begin: Step at which the run began, or would have with as many steps in each epoch: `step_at_epoch` of 0.
        """
        ends = self.boundaries(phases, total_steps)
        steps = [0, *(begin + number * steps_per_epoch if unit == "epoch" else number for unit, number in ends)]
        if total_steps <= steps[-1] < math.inf:
            raise ValueError(
                f"the last blocks would open at step {steps[-1]:g}, but the run has {total_steps:g} optimiser steps: "
                "open faster, more blocks_per_phase, or train longer"
            )
        return steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the previous fit."""
        if stage == "fit":
            check_alone(trainer, self)
            self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks and freeze all but the first phase.

        Not before: a `configure_optimizers` that omits what is frozen has now seen every parameter.
        """
        check_strategy(trainer)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, Freeze):
                other.freeze(pl_module)
        self.blocks = self.plan(pl_module)
        _check_groups(trainer, self.blocks)
        found = "layer_groups()" if isinstance(pl_module, HasLayerGroups) else "inferred"
        order = " | ".join(", ".join(part) for part in self.blocks)
        say(f"unfreezing: phases of blocks, {found if self.patterns is None else 'patterns'}: {order}")
        self._show(pl_module, max(len(self.opening_steps) - 1, 0))  # more than 0 after a resume

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan when phases open, now that a resumed run's progress is known."""
        total, per_epoch = steps_of_run(trainer), steps_per_epoch(trainer)
        self._boundaries = self.boundaries(len(self.blocks), total)
        last = self.planned_steps(len(self.blocks), total, per_epoch, step_at_epoch(trainer, 0))[-1]
        _check_early_stops(trainer, math.inf if self.monitor is not None else last)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open what is due."""
        self._advance(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open what is due, also after a resume during an epoch."""
        self._advance(trainer, pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Check in a block's first step that gradients arrive."""
        untried, self._untried = self._untried, {}
        for block, members in untried.items():
            missing = [name for name, parameter in members.items() if parameter.grad is None]
            if missing and (len(missing) == len(members) or is_compiled(pl_module)):
                raise RuntimeError(
                    f"{block} opened at step {self.opening_steps[-1]}, but no gradient reaches {some(missing)}: does "
                    "forward() use it, and not under no_grad()? If it is compiled, a graph from before may be in use"
                )
            if missing:
                log.warning(f"unfreezing: no gradient reaches {some(missing)}: forward() does not use it")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With `monitor`: the first rank decides, for all, whether the next phase is due."""
        if self.monitor is None or trainer.state.fn != "fit" or trainer.sanity_checking or self.all_open:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ValueError(f"monitor {self.monitor!r} is not logged; logged are {known}")
        value = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))
        if self.best is None or self.sign * value < self.sign * self.best - self.min_delta:
            self.best, self.bad_validations = value, 0
            if self.restore_best:
                opened = ((name, p) for name, p in pl_module.named_parameters() if p.requires_grad)
                moving = chain(opened, pl_module.named_buffers())
                self.best_weights = {name: tensor.detach().clone() for name, tensor in moving}
        elif self.bad_validations < self.patience:
            self.bad_validations += 1
        else:
            self.due, self.best, self.bad_validations = len(self.opening_steps), None, 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A last comparison of the ranks' weights."""
        compare_ranks(trainer, pl_module)
        if not self.all_open:
            never = ", ".join(chain(*self.blocks[len(self.opening_steps) :]))
            log.warning(f"unfreezing: the run ended before these opened: {never}")

    def state_dict(self) -> dict[str, Any]:
        """When phases opened, and what the next decision by a metric depends on."""
        names = ("opening_steps", "due", "best", "bad_validations", "best_weights")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the history; what is open follows from it and the progress."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the module to the phase of the run's progress."""
        reached = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        due = self.due if self.monitor is not None else sum(reached[unit] >= at for unit, at in self._boundaries)
        due = min(max(due, len(self.opening_steps) - 1), len(self.blocks) - 1)
        if due == self._shown:
            return
        if due >= len(self.opening_steps):  # else a resume, for which nothing is new
            compare_ranks(trainer, pl_module)
            tensors = dict(chain(pl_module.named_parameters(), pl_module.named_buffers()))
            for name, best in self.best_weights.items():
                tensors[name].data.copy_(best)
            self.best_weights = {}
            self.opening_steps = self.opening_steps + [trainer.global_step] * (due + 1 - len(self.opening_steps))
        first, self._shown = self._shown + 1, due
        self._untried = dict(chain(*(part.items() for part in self.blocks[max(first, 1) : due + 1])))
        self._show(pl_module, due)
        self._announce(trainer, first)
        rewrap(trainer, pl_module)

    def _show(self, pl_module: LightningModule, phase: int) -> None:
        """Set `requires_grad` and modes so that phases up to `phase` are open."""
        self.release()
        self.frozen = close(chain(*self.phases[phase + 1 :]))
        self.eval_modules = frozen_modules(pl_module, self.frozen, dropout=self.frozen_dropout)

    def _announce(self, trainer: Trainer, first: int) -> None:
        """Log what is open from now on, as a line and as metrics."""
        opened = set(chain(*self.phases[first : self._shown + 1]))
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        lrs = sorted(float(group["lr"]) for group in groups if not opened.isdisjoint(group["params"]))
        lr = f"{lrs[0]:.3g}" if lrs[0] == lrs[-1] else f"{lrs[0]:.3g} to {lrs[-1]:.3g}"
        names, now = ", ".join(chain(*self.blocks[first : self._shown + 1])), self.blocks[: self._shown + 1]
        say(
            f"unfreezing: step {trainer.global_step}, epoch {trainer.current_epoch}: {names} open, {counted(opened)} "
            f"at lr {lr}; {sum(map(len, now))} of {sum(map(len, self.blocks))} blocks"
        )
        parameters = count(chain(*self.phases[: self._shown + 1]))
        facts = {"unfreezing/phase": float(self._shown), "unfreezing/parameters": float(parameters)}
        for logger in trainer.loggers:
            logger.log_metrics(facts, step=trainer.global_step)


def _check_groups(trainer: Trainer, phases: Sequence[Blocks]) -> None:
    """Each parameter must be in one group of the optimisers."""
    members = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    known = set(members)
    lost = [name for part in phases for block in part.values() for name, p in block.items() if p not in known]
    fault = f"in no group of the optimiser: {some(lost)}" if lost else "a parameter is in two groups of the optimisers"
    if lost or len(known) < len(members):
        raise ValueError(f"{fault}; give configure_optimizers every parameter once, frozen or not")


def _check_early_stops(trainer: Trainer, last_opening: float) -> None:
    """Refuse an early stop that may come before the last blocks open."""
    per_epoch, batches = steps_per_epoch(trainer), float(trainer.val_check_batch or math.inf)
    whole = batches >= trainer.num_training_batches  # its last, perhaps shorter accumulation is a step, too
    steps = (per_epoch if whole else batches / trainer.accumulate_grad_batches) * (trainer.check_val_every_n_epoch or 1)
    least = max(trainer.min_steps or 0, trainer.min_epochs * per_epoch if trainer.min_epochs else 0.0)
    for stop in trainer.callbacks:  # type: ignore[attr-defined]
        if is_kind(stop, "EarlyStopping") and not getattr(stop, "waits_for_phases", False):
            earliest = (stop.patience + 1) * steps
            if max(earliest, least) <= last_opening:
                raise ValueError(
                    f"EarlyStopping on {stop.monitor} (patience {stop.patience}) could end the run before the last "
                    "blocks open: raise its patience, set min_epochs, or use PhaseAwareEarlyStopping"
                )
