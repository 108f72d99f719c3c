"""Optimiser steps of an epoch and of a run, as Lightning will count them."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer


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
