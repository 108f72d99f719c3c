"""What a config will do, without data or training: groups, learning rates and steps; refuses what cannot work."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..parts.optim import build_optimizer
from ..parts.param_groups import describe
from ..parts.schedules import Plateau, Schedule
from .early import stop

ASSUMED_SAMPLES = 10_000


def plan(main: Callable[..., Any], args: list[str], samples: int | None = None) -> None:
    """Print the plan of a config.

    Args:
        main: The recipe's `main`.
        args: Command line after the subcommand: `--config` and overrides.
        samples: Training samples, where the data is not at hand.
    """
    cli = main(["fit", *args], plan=True)
    try:
        show_plan(cli, samples)
    except (ValueError, TypeError) as error:
        stop(str(error))


def show_plan(cli: Any, samples: int | None) -> None:
    """Print steps and groups of a command line that was built but not run."""
    console, trainer, model, data = Console(width=max(Console().width, 160)), cli.trainer, cli.model, cli.datamodule
    found, note = training_samples(data) if samples is None else (samples, "given")
    batch = data.batch_size
    if found < batch and not hasattr(data, "planned_steps"):
        raise ValueError(f"{found} training samples don't fill one batch: set data.batch_size below {batch}")
    per_epoch = batches_per_epoch(data, found, trainer.world_size)
    steps_per_epoch = math.ceil(per_epoch / trainer.accumulate_grad_batches)
    total = trainer.max_steps if trainer.max_steps > 0 else steps_per_epoch * trainer.max_epochs
    console.print(
        f"{found} training samples ({note}), batches of {batch}: {steps_per_epoch} optimiser steps per epoch, "
        f"{total} in all{'; 10 classes assumed, for the data is not here' if cli.assumed_classes else ''}",
        highlight=False,
    )
    phases = plan_phases(trainer.callbacks, model, total, steps_per_epoch)
    optimizer = build_optimizer(model.optimizer, model.param_groups())
    if isinstance(optimizer, torch.optim.LBFGS) and trainer.accumulate_grad_batches > 1:
        raise ValueError(
            "L-BFGS evaluates its closure several times a step: it needs trainer.accumulate_grad_batches=1"
        )
    rows = describe(optimizer)
    if not any(row.trainable for row in rows):
        raise ValueError("no parameter trains: let Freeze leave something")
    schedule = model.schedule(optimizer, total)
    if not isinstance(schedule, Schedule):
        raise ValueError(f"plan knows the schedules of recipes.parts.schedules only, not {type(schedule).__name__}")
    if phases.warmup is not None:
        phases.warmup.check_schedule(schedule)
    turns = {0: "start"}
    for name, step in [*schedule.turning_points().items(), *phases.turning_points().items()]:
        if 0 < step < total - 1:
            turns[step] = f"{turns[step]}, {name}" if step in turns else name
    turns[total - 1] = "end"
    table = Table("group", "tensors", "parameters", "weight decay", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for column in table.columns:
        column.no_wrap = True
    for step, name in sorted(turns.items()):
        table.add_column(f"{name}\nstep {step}", justify="right")
    for row, group, base in zip(rows, optimizer.param_groups, schedule.base_lrs, strict=True):
        factors = [(phases.factor(group["params"], step), schedule.factor(step)) for step in sorted(turns)]
        rates = [f"{base * mine * its:.3g}" if row.trainable and mine else "frozen" for mine, its in factors]
        decay = group.get("weight_decay")
        table.add_row(
            row.name,
            str(row.tensors),
            f"{row.parameters:,}",
            f"{decay:g}" if decay is not None else "-",
            *rates,
        )
    console.print(table)
    if isinstance(schedule, Plateau):
        console.print(f"and a factor of {schedule.drop:g} whenever {schedule.monitor} stops improving")
    for name, parameters in phases.waiting.items():
        console.print(f"{name}: {parameters:,} parameters that open when {phases.monitor} stops improving")


@dataclass
class Phases:
    """What opens when, and how learning rates warm up: read off callbacks that offer it."""

    opens: dict[str, int] = field(default_factory=dict)  # names of blocks -> optimiser step
    waiting: dict[str, int] = field(default_factory=dict)  # names of blocks that wait for a metric -> parameters
    monitor: str | None = None
    opened_at: dict[torch.nn.Parameter, float] = field(default_factory=dict)
    warmup: Any = None
    warmup_length: int = 0

    def turning_points(self) -> dict[str, int]:
        """Optimiser steps at which blocks open and the warm-up ends."""
        end = {"warm-up ends": self.warmup_length} if self.warmup else {}
        several = {names: "open" if "," in names else "opens" for names in self.opens}
        return {f"{names} {several[names]}": step for names, step in self.opens.items() if step} | end

    def factor(self, parameters: Sequence[torch.nn.Parameter], step: int) -> float:
        """Factor on a group's learning rate: 0 while all of it is frozen, less than 1 while it warms up."""
        opened = min((self.opened_at.get(parameter, 0) for parameter in parameters), default=0)
        if step < opened:
            return 0.0
        return float(self.warmup.factor(step, self.warmup_length, int(opened))) if self.warmup else 1.0


def plan_phases(callbacks: Sequence[Any], model: torch.nn.Module, total: int, steps_per_epoch: int) -> Phases:
    """Ask the callbacks: one that freezes, one that opens blocks, one that warms up."""
    phases = Phases()
    for callback in callbacks:
        if hasattr(callback, "freeze"):
            callback.freeze(model)
    for callback in callbacks:
        if hasattr(callback, "planned_steps"):
            parts = callback.plan(model)
            steps = callback.planned_steps(len(parts), total, steps_per_epoch)
            phases.monitor = callback.monitor
            for part, step in zip(parts, [*steps, *[math.inf] * len(parts)], strict=False):
                parameters = [parameter for members in part.values() for parameter in members.values()]
                phases.opened_at |= dict.fromkeys(parameters, step)
                names = ", ".join(part)
                if step < math.inf:
                    phases.opens[names] = int(step)
                else:
                    phases.waiting[names] = sum(parameter.numel() for parameter in parameters)
        if hasattr(callback, "planned_length"):
            phases.warmup = callback
            phases.warmup_length = callback.planned_length(total, steps_per_epoch)
    return phases


def batches_per_epoch(data: Any, samples: int, world_size: int) -> int:
    """Batches of each rank: images drop the last that is not full, texts say how many they make."""
    if hasattr(data, "planned_steps"):
        return int(data.planned_steps(samples, world_size))
    return samples // int(data.batch_size) // world_size


def training_samples(data: Any) -> tuple[int, str]:
    """Number of training samples, and how it is known: from the data at hand, the data set, or a guess."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data.setup("fit")
        return len(data.splits["train"].labels), "counted"
    except (OSError, RuntimeError):
        expected = getattr(data, "expected_samples", None)
        return (expected, "expected") if expected else (ASSUMED_SAMPLES, "assumed; --samples N says how many")
