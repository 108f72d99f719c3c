from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

from callbacks.resume.atomic import AtomicCheckpointIO, save_atomically
from callbacks.resume.callback import ExactResume
from callbacks.resume.seeds import counter_seed, reseed
from datamodules.folder import ImageFolder
from datamodules.sampling.samplers import EpochSampler
from tests.conftest import write_folder

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
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        drawn = torch.rand(()).item(), random.random(), float(np.random.rand())
        self.events.append(("batch", *numbers, loop.batch_progress.is_last_batch, content, rate, *drawn))

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


SETTINGS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (partial(shuffled, noise=0.1), {}),
    "validation twice an epoch": (shuffled, {"val_check_interval": 0.5}),
    "accumulate 3": (partial(shuffled, noise=0.1), {"accumulate_grad_batches": 3, "val_check_interval": 2}),
    "two workers": (partial(shuffled, 2), {"every": 3}),
    "two workers, accumulate 3": (partial(shuffled, 2), {"every": 3, "accumulate_grad_batches": 3}),
    "EpochSampler": (by_epoch, {"accumulate_grad_batches": 3}),
    "EpochSampler, two workers": (partial(by_epoch, 2), {"every": 3, "schedule": "epoch"}),
    "limited": (shuffled, {"limit_train_batches": 5, "schedule": "epoch"}),
    "plateau on training loss": (shuffled, {"schedule": "plateau-step", "val_check_interval": 3}),
    "validation by total batches": (shuffled, {"check_val_every_n_epoch": None, "val_check_interval": 5}),
    "validation every other epoch": (shuffled, {"check_val_every_n_epoch": 2}),
    "loaders made anew": (shuffled, {"reload_dataloaders_every_n_epochs": 1}),
    "stream": (lambda: DataLoader(Stream(), 4), {"accumulate_grad_batches": 3}),
    "stream, two workers": (lambda: DataLoader(Stream(), 5, num_workers=2), {"every": 3, "val_check_interval": 4}),
    "weighted": (partial(shuffled, sampler=WeightedRandomSampler((Y + 1).tolist(), ROWS)), {}),
    "no batches of its own": (lambda: DataLoader(Pairs(), None, shuffle=True), {}),
}


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return ROWS // 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[4 * index : 4 * index + 4], Y[4 * index : 4 * index + 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_anywhere_a_run_ends_as_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    data, options = SETTINGS[name]
    assert resume_everywhere(tmp_path, data, **options) == {}


@pytest.mark.slow
def test_without_the_callback_it_does_not(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ended before the epoch ended"):
        found = resume_everywhere(tmp_path, shuffled, exact=False)
    assert len(found) >= 17, "these tests would see a difference"


@pytest.mark.slow
@pytest.mark.parametrize("data", [shuffled, lambda: DataLoader(Stream(), 4)], ids=["sized", "stream"])
@pytest.mark.parametrize("options", [{"val_check_interval": 3}, {"accumulate_grad_batches": 3}], ids=str)
def test_checkpoints_written_in_odd_places_resume_exactly(data: Any, options: dict[str, Any], tmp_path: Path) -> None:
    assert resume_everywhere(tmp_path, data, SaveInOddPlaces, **options) == {}


@pytest.mark.slow
def test_a_generator_given_to_the_loader_is_seeded_too(tmp_path: Path) -> None:
    def data() -> DataLoader[Any]:
        generator = torch.Generator()
        generator.seed()
        sampler = RandomSampler(range(ROWS), replacement=True, num_samples=70, generator=generator)
        return shuffled(sampler=sampler, generator=generator)

    assert resume_everywhere(tmp_path, data, max_epochs=1) == {}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
def test_several_loaders_go_on_together(mode: str, tmp_path: Path) -> None:
    def data() -> CombinedLoader:
        return CombinedLoader({"long": shuffled(noise=0.1), "short": shuffled(noise=0.1, batch_size=10)}, mode)  # type: ignore[arg-type]

    assert resume_everywhere(tmp_path, data, max_epochs=2 if mode != "min_size" else 4) == {}


def test_each_loader_each_round_and_each_epoch_has_an_order_of_its_own() -> None:
    long, short = shuffled(), shuffled(batch_size=13)
    fit(lambda: {"long": long, "short": short})
    assert isinstance(long.dataset, Rows) and isinstance(short.dataset, Rows)
    loaded = long.dataset.loaded, short.dataset.loaded
    orders = [tuple(rows[start : start + ROWS]) for rows in loaded for start in range(0, len(rows) - ROWS + 1, ROWS)]
    assert len(orders) > 5 and len(set(orders)) == len(orders) and all(len(set(order)) > 13 for order in orders)


def test_a_run_limited_by_steps_resumes_exactly(tmp_path: Path) -> None:
    found = resume_everywhere(tmp_path, max_steps=11, max_epochs=-1)
    over = "batch end 1.3"  # where the last step has been made Lightning does not even start
    assert found.keys() == {over} and not [line for line in found[over] if line.startswith((".net", ".opt", ".sch"))]


@pytest.mark.slow
def test_no_step_of_reduce_lr_on_plateau_is_lost(tmp_path: Path) -> None:
    found = resume_everywhere(tmp_path, schedule="plateau", val_check_interval=3, max_epochs=3)
    assert found.keys() == {"epoch end 2.6"}, "at most that of a run that is over"
    assert not [line for line in found["epoch end 2.6"] if line.startswith((".net", ".optimizer.state", "trace"))]


def test_batches_that_were_had_are_not_loaded_again(tmp_path: Path) -> None:
    save = SaveEverywhere(tmp_path)
    fit(shuffled, Trace(), save, max_epochs=1)
    loader = shuffled()
    assert isinstance(loader.dataset, Rows)
    fit(lambda: loader, max_epochs=1, ckpt_path=save.saved[4][2])
    assert save.saved[4][0] == "batch end 0.4" and len(loader.dataset.loaded) == ROWS - 5 * 4


def test_an_epoch_that_was_over_is_not_read_again_to_find_its_end(tmp_path: Path) -> None:
    class Counted(Stream):
        read = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for row in super().__iter__():
                self.read += 1
                yield row

    save, stream = SaveEverywhere(tmp_path), Counted()
    fit(lambda: DataLoader(Counted(), 4), Trace(), save, max_epochs=1)
    assert save.saved[6][0] == "batch end 0.6"
    fit(lambda: DataLoader(stream, 4), max_epochs=1, ckpt_path=save.saved[6][2])
    assert stream.read == 0
    fit(lambda: DataLoader(stream, 4), max_epochs=1, ckpt_path=save.saved[5][2])
    assert stream.read == ROWS, "a stream can only be read up to there"


class OwnIteration(DataLoader[Any]):
    """A generator, so that nothing happens before the first batch is asked for."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


class TakesItsSamplerEarly(DataLoader[Any]):
    """So that nothing can be put in its sampler's place."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.indices = self.batch_sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        assert self.indices is not None
        for rows in self.indices:
            yield X[rows], Y[rows]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OwnIteration, TakesItsSamplerEarly])
def test_loaders_that_iterate_in_their_own_way_resume_exactly(kind: type[DataLoader[Any]], tmp_path: Path) -> None:
    assert resume_everywhere(tmp_path, lambda: kind(Rows(), 4, shuffle=True)) == {}


class RemembersWhereItStands:
    """A loader with a state of its own, as torchdata's StatefulDataLoader; at its end it begins with nothing."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.at = 0
        self.restored = False

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[Any]:
        if not self.restored:
            self.order, self.at = torch.randperm(ROWS).tolist(), 0
        self.restored = False
        while self.at < ROWS:
            rows = self.order[self.at : self.at + 4]
            self.at += 4
            yield X[rows], Y[rows]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.at, self.restored = state["order"], state["at"], True


@pytest.mark.slow
def test_a_stateful_loader_goes_on_by_itself_and_no_epoch_ends_early(tmp_path: Path) -> None:
    found = resume_everywhere(tmp_path, RemembersWhereItStands)
    assert {line for lines in found.values() for line in lines if "combined_loader" not in line} == set()
    assert all(place.endswith("1.6") for place in found), "where the data are over its state is not asked for"


@pytest.mark.slow
def test_pictures_and_their_augmentation_resume_exactly_in_worker_processes(tmp_path: Path) -> None:
    class Pictures(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(3 * 16 * 16, 3))

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch["image"]), batch["target"])

    def run(*callbacks: Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
        data = ImageFolder(root, batch_size=4, image_size=16, in_memory=False, num_workers=2, mixup=0.4)
        trainer = Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            limit_val_batches=0, callbacks=[Trace(), *callbacks, ExactResume(1)], enable_checkpointing=bool(callbacks),
        )  # fmt: skip
        torch.manual_seed(0)
        net = Pictures()
        trainer.fit(net, datamodule=data, ckpt_path=ckpt_path)
        return state_of(trainer, net)

    root = write_folder(tmp_path / "pictures")
    save = SaveEverywhere(tmp_path)
    whole = run(save)
    for _, _, path in save.saved[2::5]:
        assert differences(whole, run(ckpt_path=path)) == []


def test_what_workers_draw_at_random_is_not_exact_during_an_epoch(tmp_path: Path) -> None:
    # A limit: a worker's generator goes on from batch to batch. At the start of an epoch it is exact, with workers
    # that do not live on.
    def data() -> DataLoader[Any]:
        return DataLoader(Rows(noise=0.1), 4, shuffle=True, num_workers=1)

    found = resume_everywhere(tmp_path, data)
    assert "epoch end 0.6" not in found and "batch end 1.6" not in found
    assert "batch end 1.3" in found and "batch end 0.2" in found
    order = [line for line in found["batch end 1.3"] if line.startswith(".loop")]
    assert order == [], "the counters are right all the same"


class Terminate(Callback):
    """As a cluster's scheduler does, in a given hook."""

    def __init__(self, hook: str, batch: int) -> None:
        self.batch = batch
        setattr(self, hook, self.send)

    def send(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            trainer._signal_connector.received_sigterm = True


@pytest.mark.parametrize(
    ("hook", "batch"), [("on_train_batch_end", 1), ("on_train_batch_end", 2), ("on_validation_end", 5)]
)
def test_a_run_that_was_told_to_terminate_resumes_exactly(hook: str, batch: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"val_check_interval": 3, "schedule": "plateau-step", "accumulate_grad_batches": 2}
    trace, first, again = Trace(), Trace(), Trace()
    whole = state_of(*fit(shuffled, trace, **options))
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(SIGTERMException):
        fit(shuffled, first, Terminate(hook, batch), SaveOnException(path), **options)
    resumed = state_of(*fit(shuffled, again, ckpt_path=path, **options))
    if first.events[-1][0] == "validation":
        first.events.pop()  # it was cut off, and is repeated
    assert first.events + again.events == trace.events
    assert differences(whole, resumed) == []


def test_a_checkpoint_from_within_a_step_is_repeated_with_a_warning(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 6:  # the epoch's last, at which Lightning would end it early
                raise RuntimeError("out of memory")

    save = SaveOnException(tmp_path / "failed.ckpt")
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(shuffled, Fails(), save)
    trace = Trace()
    with pytest.warns(UserWarning, match="saved during a training step, which is repeated: gradients accumulated"):
        fit(shuffled, trace, ckpt_path=tmp_path / "failed.ckpt")
    assert trace.events[0][:4] == ("batch", 0, 6, 6) and len(trace.events) == 2 + 3 + 1 + 14 + 3


def on_two_ranks(folder: Path, name: str, *callbacks: Callback, **options: Any) -> list[dict[str, Any]]:
    """Each rank's state after a fit, and what it drew."""

    class Keep(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            drawn = [event[-3] for event in trace.events if event[0] == "batch"]
            torch.save(state_of(trainer, pl_module) | {"drawn": drawn}, folder / f"{name}.{trainer.global_rank}.pt")

    trace = Trace()
    fit(partial(shuffled, batch_size=5), trace, *callbacks, Keep(), devices=2, strategy="ddp_fork", **options)
    return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_resume_exactly_and_draw_different_numbers(tmp_path: Path) -> None:
    whole = on_two_ranks(tmp_path, "whole", SaveEverywhere(tmp_path))
    assert not set(whole[0]["drawn"]) & set(whole[1]["drawn"])
    for number in (1, 2, 3, 4, 5):  # within an epoch, at its last batch, after its validation, at its end, in the next
        again = on_two_ranks(tmp_path, "again", ckpt_path=tmp_path / f"{number}.ckpt")
        for one, other in zip(whole, again, strict=True):
            assert other["drawn"] == one["drawn"][-len(other["drawn"]) :]
            lines = differences(one | {"drawn": []}, other | {"drawn": []})
            assert [line for line in lines if "running_" not in line] == [], "each rank's own statistics apart"


def test_gradients_during_an_accumulation_over_ranks_are_right_to_rounding(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "schedule": "none", "limit_val_batches": 0}
    whole = on_two_ranks(tmp_path, "whole", SaveEverywhere(tmp_path), **options)[0]
    again = on_two_ranks(tmp_path, "again", ckpt_path=tmp_path / "1.ckpt", **options)[0]
    apart = {key: (again["net"][key] - weight).abs().max().item() for key, weight in whole["net"].items()}
    apart.pop("net.0.bias")  # before BatchNorm its gradient is nothing but rounding, and AdamW normalises it
    assert max(apart.values()) < 1e-4
    gradients = torch.load(tmp_path / "1.ckpt")["callbacks"]["ExactResume"]["gradients"]
    assert gradients.keys() == {f"net.{n}.{kind}" for n in (0, 1, 4) for kind in ("weight", "bias")}


# What is said


def saved(folder: Path, batch: int = 3, **options: Any) -> Path:
    save = SaveEverywhere(folder)
    fit(shuffled, Trace(), save, **options)
    return save.saved[batch][2]


def test_learning_rates_that_the_checkpoint_overrides_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.warns(UserWarning) as caught:
        trainer, _ = fit(shuffled, ckpt_path=path, make=partial(Net, lr=0.001, steps=60))
    words = str(caught[-1].message)
    assert "base_lrs of CosineAnnealingLR stays at the checkpoint's [0.05], not the configured [0.001]" in words
    assert "T_max of CosineAnnealingLR stays at the checkpoint's 30, not the configured 60" in words
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.05

    path = saved(tmp_path, schedule="none")
    with pytest.warns(UserWarning, match=r"lr of group 0 stays at the checkpoint's 0.05, not the configured 0.001"):
        fit(shuffled, ckpt_path=path, make=partial(Net, "none", lr=0.001))


def test_another_length_of_the_run_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.warns(UserWarning, match=r"max_epochs is 3 \(checkpoint: 2\); the number of optimiser steps is 21"):
        fit(shuffled, ckpt_path=path, max_epochs=3)
    with pytest.warns(UserWarning, match=r"accumulate_grad_batches is 2 \(checkpoint: 1\)"):
        fit(shuffled, ckpt_path=path, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match=r"the number of batches per epoch is 6 \(checkpoint: 7\)"):
        fit(shuffled, ckpt_path=path, limit_train_batches=6)


def test_schedulers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.warns(UserWarning, match=r"0 schedulers are configured \(checkpoint: 1\)"):
        fit(shuffled, ckpt_path=path, schedule="none")
    checkpoint = torch.load(path)
    checkpoint["lr_schedulers"][0]["last_epoch"] = 2
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="CosineAnnealingLR is at step 2, the run at 4"):
        fit(shuffled, ckpt_path=path)


def test_nothing_is_said_where_all_is_as_it_was(tmp_path: Path) -> None:
    trainer, _ = fit(shuffled, ckpt_path=saved(tmp_path))  # a warning would be an error
    assert trainer.global_step == fit(shuffled)[0].global_step


def test_a_checkpoint_of_a_run_without_the_callback_is_resumed_with_a_warning(tmp_path: Path) -> None:
    path = saved(tmp_path, 8, exact=False, schedule="plateau")
    lost = "saved without ExactResume; a step of ReduceLROnPlateau is lost: the checkpoint lacks val/loss"
    with pytest.warns(UserWarning, match=lost):
        fit(shuffled, ckpt_path=path, schedule="plateau")


def test_data_that_end_before_the_checkpoint_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 5)
    with (
        pytest.raises(RuntimeError, match="after batch 6 of an epoch, which has only 4 now; resume with the same data"),
        pytest.warns(UserWarning, match="the number of batches per epoch is inf"),
    ):
        fit(lambda: DataLoader(Stream(), 7), ckpt_path=path)


def test_a_combined_loader_of_another_class_is_refused() -> None:
    class Mixed(CombinedLoader): ...

    with pytest.raises(TypeError, match="expects training data in DataLoaders or a CombinedLoader; received .*Mixed"):
        fit(lambda: Mixed([shuffled()]))


# The seed


def test_a_resumed_run_takes_its_own_seed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(seed: int | None, *callbacks: Callback, **options: Any) -> dict[str, Any]:
        return state_of(*fit(shuffled, Trace(), *callbacks, ExactResume(seed), exact=False, **options))

    save = SaveEverywhere(tmp_path)
    whole = run(None, save)
    assert differences(whole, run(None, ckpt_path=save.saved[3][2])) == []
    assert differences(whole, run(None)) != [], "a random one"
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    assert differences(run(None), run(11)) == [], "that of seed_everything"
    with pytest.warns(UserWarning, match=r"the seed is 5 \(checkpoint: \d+\)"):
        run(5, ckpt_path=save.saved[3][2])


def test_one_instance_serves_two_fits_and_leaves_nothing_behind(tmp_path: Path) -> None:
    callback = ExactResume(7)
    trainer, net = fit(shuffled, callback, exact=False)
    assert "dataloader" not in vars(trainer.fit_loop._data_source)
    assert "on_run_start" not in vars(trainer.fit_loop.epoch_loop)
    again, other = fit(shuffled, callback, exact=False)
    assert differences(state_of(trainer, net), state_of(again, other)) == []
    pickle.dumps(ExactResume(3))


def test_seeds_differ_by_every_counter_and_their_order() -> None:
    seeds = {counter_seed(*counters) for counters in [(), (0,), (1,), (0, 0), (1, 2), (2, 1), (2, 1, 0), (-1,)]}
    assert len(seeds) == 8 and all(0 <= seed < 2**64 for seed in seeds)
    low = torch.tensor([counter_seed(7, step) % 2**32 for step in range(4000)], dtype=torch.float64) / 2**32
    assert abs(low.mean() - 0.5) < 0.02 and abs(low.var() - 1 / 12) < 0.004, "torch's CPU generator takes 32 bits"
    assert counter_seed(7, 2, 1, 5, 0, 0) == 13857407508119580281, (
        "another one would change runs that are resumed by a later version"
    )


def test_reseeding_covers_torch_python_and_numpy() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    reseed(2**64 - 1)
    first = draw()
    assert draw() != first
    reseed(2**64 - 1)
    assert draw() == first


# The checkpoint files


class Large(Net):
    """Saving it takes far longer than a step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ballast", torch.zeros(6_000_000))


def train_and_tell(folder: Path, pipe: Any, tmp: Path) -> None:
    """In a process of its own: goes on from the last checkpoint, and tells after each batch."""

    class Tell(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            pipe.send(trainer.global_step)

    os.environ["TMPDIR"] = str(tmp)
    save = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=2, monitor="step", mode="max", save_last=True)
    last = folder / "last.ckpt"
    trainer, net = fit(shuffled, Tell(), save, make=Large, ckpt_path=last if last.exists() else None)
    torch.save(state_of(trainer, net), folder / "nearly.pt")  # it may be killed here, too
    (folder / "nearly.pt").replace(folder / "done.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_kill_at_any_moment_also_during_a_save_ends_with_the_uninterrupted_run(tmp_path: Path) -> None:
    expected = state_of(*fit(shuffled, make=Large))
    fork, chance = multiprocessing.get_context("fork"), random.Random(5)
    during_a_save = kills = 0
    while not (tmp_path / "done.pt").exists():
        ours, theirs = fork.Pipe(duplex=False)
        child = fork.Process(target=train_and_tell, args=(tmp_path, theirs, tmp_path / "tmp"))
        child.start()
        theirs.close()
        try:
            for _ in range(chance.choice([1, 1, 2])):  # at least one step is made and its checkpoint begun
                ours.recv()
            time.sleep(chance.uniform(0.0, 0.08))
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        except EOFError:  # there was nothing more to do
            pass
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        assert child.exitcode in (0, -signal.SIGKILL)
        during_a_save += any(tmp_path.glob(".*.checkpoint-part"))
        for file in tmp_path.glob("*.ckpt"):
            torch.load(file, weights_only=True)  # whole, whatever moment it was
    assert kills >= 3 and during_a_save >= 1
    assert differences(expected, torch.load(tmp_path / "done.pt")) == []


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.ckpt"
    save_atomically({"x": 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_atomically({"x": lambda: None}, path)
    assert torch.load(path) == {"x": 1} and [file.name for file in path.parent.iterdir()] == ["a.ckpt"]


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    here = os.uname().nodename.split(".")[0]
    gone = multiprocessing.get_context("fork").Process()
    gone.start()
    gone.join()
    names = [
        f".a.ckpt.{here}.{gone.pid}.checkpoint-part",
        f".b.ckpt.{here}.{os.getpid()}.checkpoint-part",
        ".c.ckpt.far.1.checkpoint-part",
    ]
    for name in [*names, ".d.ckpt.far.2.checkpoint-part"]:
        (tmp_path / name).touch()
    os.utime(tmp_path / ".d.ckpt.far.2.checkpoint-part", (0, time.time() - 7200))
    save_atomically({}, tmp_path / "a.ckpt")
    assert sorted(file.name for file in tmp_path.iterdir()) == [*names[1:], "a.ckpt"]


def test_the_data_reach_the_disk_before_the_name_and_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        calls.append("fsync folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "fsync file")
        fsync(descriptor)

    def spy_replace(self: Path, target: Path) -> Path:
        calls.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    save_atomically({"x": 1}, tmp_path / "a.ckpt")
    assert calls == ["fsync file", "replace", "fsync folder"]


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"trap": Trap()}, tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "sprung").exists()
    AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert (tmp_path / "sprung").exists(), "only where somebody asks for it"


def test_remote_paths_are_left_to_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", lambda self, *args: calls.append(args))
    AtomicCheckpointIO().save_checkpoint({}, "s3://bucket/a.ckpt")
    assert calls == [({}, "s3://bucket/a.ckpt", None)]


def test_it_takes_the_place_of_the_default_and_of_nothing_else(tmp_path: Path) -> None:
    trainer, _ = fit(shuffled, max_epochs=1)
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    chosen = AsyncCheckpointIO()
    trainer, _ = fit(shuffled, max_epochs=1, plugins=[chosen])
    assert trainer.strategy.checkpoint_io is chosen
    trainer, _ = fit(shuffled, max_epochs=1, plugins=[AtomicCheckpointIO()], exact=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO and (tmp_path / "a.ckpt").exists()
