"""Callbacks that tests name on the command line to see what happened inside a run."""

from __future__ import annotations

import copy
import os
import signal
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StopAfterEpoch(Callback):
    """Ends the run as if it were interrupted at the end of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.should_stop = True


class Record(Callback):
    """Keeps every training batch's indices and the learning rates of each step."""

    def __init__(self) -> None:
        self.indices: list[list[int]] = []
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.indices.append(batch["index"].tolist())
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


class Interrupt(Callback):
    """Presses Ctrl-C, or has a cluster end the run, before a step."""

    def __init__(self, step: int, terminate: bool = False) -> None:
        self.step, self.terminate = step, terminate

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            if not self.terminate:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)


class States(Callback):
    """Keeps what the run's callbacks hold when training starts, which on a resume is what they were given."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found = {
            other.state_key: copy.deepcopy(other.state_dict())
            for other in trainer.callbacks  # type: ignore[attr-defined]
        }


class Losses(Callback):
    """Keeps every training step's loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
