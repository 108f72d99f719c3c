"""Data, a net and callbacks that save everywhere, for runs that are resumed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset

from callbacks.resume.callback import ExactResume
from callbacks.resume.seeds import reseed
from datamodules.sampling.samplers import EpochSampler

ROWS = 26
X = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(ROWS) % 3


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """With random augmentation where asked for; `loaded` tells which rows were read in this process."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        row = int(getattr(index, "row", index))
        self.loaded.append(row)
        drawn = torch.randn(6) + random.random() + np.random.rand()
        return X[row] + self.noise * drawn.float(), Y[row]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """In a random order; a worker gives every other row."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for row in torch.randperm(ROWS).tolist()[start::step]:
            yield X[row] + 0.1 * torch.randn(6), Y[row]


class Net(LightningModule):
    """BatchNorm, dropout, clipping, and a schedule by name."""

    def __init__(self, schedule: str = "step", lr: float = 0.05, steps: int = 30) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))
        self.schedule, self.lr, self.steps = schedule, lr, steps

    def loss(self, batch: Any) -> Tensor:
        x, y = batch["long"] if isinstance(batch, dict) and "long" in batch else batch
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), sync_dist=self.trainer.world_size > 1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        plateau = partial(lr_scheduler.ReduceLROnPlateau, optimizer, patience=0, factor=0.5, threshold=0.2)
        kinds: dict[str, Callable[[], dict[str, Any]]] = {
            "step": lambda: {"scheduler": lr_scheduler.CosineAnnealingLR(optimizer, self.steps), "interval": "step"},
            "epoch": lambda: {"scheduler": lr_scheduler.StepLR(optimizer, 1, 0.7)},
            "plateau": lambda: {"scheduler": plateau(), "monitor": "val/loss"},
            "plateau-step": lambda: {"scheduler": plateau(), "monitor": "train/loss", "interval": "step"},
        }
        return [optimizer], [kinds[self.schedule]()] if self.schedule in kinds else []


class Trace(Callback):
    """What happened, with all that is to be the same in a resumed run."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.events.append(("epoch", trainer.current_epoch, trainer.global_step, torch.rand(()).item()))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        tensors: list[Tensor] = []
        torch.utils._pytree.tree_map_only(Tensor, tensors.append, batch)
        loop = trainer.fit_loop.epoch_loop
        numbers = [trainer.current_epoch, batch_idx, trainer.global_step, trainer.fit_loop.total_batch_idx]
        content = sum(t.double().sum().item() for t in tensors)
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        drawn = torch.rand(()).item(), random.random(), float(np.random.rand())
        self.events.append(("batch", *numbers, loop.batch_progress.is_last_batch, content, lr, *drawn))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.events.append(("batch end", trainer.global_step))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.events.append(("validation", trainer.current_epoch, trainer.global_step, torch.rand(()).item()))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.events.append(("validation end", trainer.callback_metrics["val/loss"].item()))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metric = trainer.callback_metrics.get("val/loss")
        self.events.append(("epoch end", trainer.current_epoch, metric and metric.item()))


class SaveEverywhere(Checkpoint):
    """Saves wherever ModelCheckpoint may, and remembers how far the trace had come."""

    repeated = 0  # events that come again after resuming, since the hook they were recorded in comes again

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[tuple[str, int, Path]] = []

    def save(self, trainer: Trainer, where: str) -> None:
        trace = next(c for c in trainer.callbacks if isinstance(c, Trace))
        path = self.folder / f"{len(self.saved)}.ckpt"
        name = f"{where} {trainer.current_epoch}.{trainer.fit_loop.batch_idx}"
        self.saved.append((name, len(trace.events) - self.repeated, path))
        trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.save(trainer, "batch end")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, "validation end")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, "epoch end")


class SaveOnException(Checkpoint):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


class SaveInOddPlaces(SaveEverywhere):
    """Where only `trainer.save_checkpoint` or an exception may."""

    repeated = 1

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None: ...

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None: ...

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None: ...

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, "epoch start")

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.save(trainer, "batch start")

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, "during validation")


def shuffled(workers: int = 0, noise: float = 0.0, **options: Any) -> DataLoader[Any]:
    """As in any project."""
    options = {"batch_size": 4, "shuffle": "sampler" not in options} | options
    return DataLoader(Rows(noise), num_workers=workers, persistent_workers=workers > 0, **options)


def by_epoch(workers: int = 0) -> DataLoader[Any]:
    """With this project's sampler."""
    return shuffled(workers, sampler=EpochSampler(ROWS, shuffle=True, seed=3))


def fit(
    data: Callable[[], Any] | Any = shuffled,
    *callbacks: Callback,
    ckpt_path: Path | str | None = None,
    make: Callable[[], LightningModule] | None = None,
    schedule: str = "step",
    exact: bool = True,
    **options: Any,
) -> tuple[Trainer, LightningModule]:
    """A fit whose outcome hangs on nothing but its arguments; without ExactResume, on everything."""
    torch.manual_seed(0)
    net = make() if make else Net(schedule)
    defaults = {"max_epochs": 2, "gradient_clip_val": 1.0, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    if not any(isinstance(callback, Checkpoint) for callback in callbacks):
        quiet["enable_checkpointing"] = False
    chosen = [*callbacks, ExactResume(7)] if exact else [*callbacks]
    trainer = Trainer(**{**quiet, **defaults, **options}, callbacks=chosen)
    reseed(time.time_ns())  # nothing may hang on the state that the generators are in
    trainer.fit(net, data(), DataLoader(Rows(), 13), ckpt_path=ckpt_path, weights_only=None)
    return trainer, net


def state_of(trainer: Trainer, net: LightningModule) -> dict[str, Any]:
    """Weights, optimiser, schedules and all counters."""
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    whole = {"net": net.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "schedules": schedules}
    return deepcopy({**whole, "loop": trainer.fit_loop.state_dict()})


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Bitwise, through dictionaries and lists."""
    if isinstance(one, Tensor):
        return [] if torch.equal(one, other) else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: keys"]
        return [line for key in one for line in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list | tuple) and len(one) == len(other):
        return [
            line for n, (a, b) in enumerate(zip(one, other, strict=True)) for line in differences(a, b, f"{path}.{n}")
        ]
    return [] if one == other else [f"{path}: {one} became {other}"]


def resume_everywhere(
    folder: Path,
    data: Callable[[], Any] = shuffled,
    saver: type[SaveEverywhere] = SaveEverywhere,
    every: int = 1,
    **options: Any,
) -> dict[str, list[str]]:
    """Runs once, saving everywhere; resumes from each checkpoint; returns what differs, by place."""
    trace, save = Trace(), saver(folder)
    whole = state_of(*fit(data, trace, save, **options))
    found = {}
    for place, events, path in save.saved[::every]:
        again = Trace()
        lines = differences(whole, state_of(*fit(data, again, ckpt_path=path, **options)))
        lines += differences(trace.events[events:], again.events, "trace")
        if lines:
            found[place] = lines
    assert len(save.saved) > 10
    return found


def saved(folder: Path, batch: int = 3, **options: Any) -> Path:
    save = SaveEverywhere(folder)
    fit(shuffled, Trace(), save, **options)
    return save.saved[batch][2]
