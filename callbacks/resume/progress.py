"""Lightning's progress counters, corrected in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer

PROGRESS = {"last_epoch", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"}  # what schedulers count


def settle(loops: dict[str, Any], validation: str) -> tuple[int, str]:
    """Sets a fit loop's saved counters to the last thing that was finished.

    Args:
        loops: `checkpoint["loops"]["fit_loop"]`; changed in place.
        validation: `begun` or `over` if the checkpoint was saved during or just after one, else empty.

    Returns:
        How many batches of the epoch are done, and what is pending after them: nothing (empty), `validation` and what
        follows it, only what comes `after validation`, or a finished epoch's `plateau` step.
    """
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    if epoch["current"]["started"] == epoch["current"]["processed"]:  # after an epoch's last batch, or at its start
        ended = epoch["current"]["processed"] > epoch["current"]["completed"]
        _level(epoch)
        return 0, "plateau" if ended else ""
    now = batch["current"]
    repeated, at_its_end = now["ready"] > now["processed"], now["processed"] > now["completed"]
    batch["is_last_batch"] &= not repeated
    _level(batch)
    if repeated:
        validation = ""  # it came after the batch before
    if validation == "begun" and not at_its_end:
        evaluation = loops["epoch_loop.val_loop.batch_progress"]
        total = evaluation["total"]
        total.update(dict.fromkeys(total, total["completed"] - evaluation["current"]["completed"]))
    if at_its_end or validation == "begun":
        return now["completed"], "validation"
    return now["completed"], "after validation" if validation == "over" else ""


def _level(progress: dict[str, Any]) -> None:
    """What was begun and not processed counts as not begun; what was processed, as finished."""
    for counters in (progress["total"], progress["current"]):
        counters.update(dict.fromkeys(counters, counters["processed"]))


def during_step(counters: dict[str, int]) -> bool:
    """Whether a batch was begun and is not finished."""
    return counters["started"] > counters["processed"]


def during_accumulation(trainer: Trainer) -> bool:
    """Whether gradients of earlier batches wait for the optimiser step."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    done: int = vars(progress.current)["processed"]
    at_last = progress.is_last_batch and progress.current.ready == done
    return done % trainer.accumulate_grad_batches > 0 and not at_last


def length_of_run(trainer: Trainer) -> dict[str, Any]:
    """All that decides the length of a run, by its description in a warning."""
    return {
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "the number of batches per epoch": trainer.num_training_batches,
        "the number of ranks": trainer.world_size,
        "the number of optimiser steps": trainer.estimated_stepping_batches,
    }


def run_settings(trainer: Trainer) -> dict[str, Any]:
    """Base learning rates or the schedulers' options, by name; without their progress."""
    schedulers = [s for config in trainer.lr_scheduler_configs for s in _with_inner(config.scheduler)]
    if not schedulers:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        return {f"lr of group {group.get('name', n)}": float(group["lr"]) for n, group in enumerate(groups)}
    return {
        f"{key} of {type(scheduler).__name__}{number or ''}": value
        for number, scheduler in enumerate(schedulers)
        for key, value in vars(scheduler).items()
        if not key.startswith("_") and key not in PROGRESS and _is_plain(value)
    }


def _with_inner(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _with_inner(inner)


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str) or (
        isinstance(value, list | tuple | dict) and all(map(_is_plain, value))
    )
