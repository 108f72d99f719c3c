"""Exact resume: a run that was stopped anywhere goes on as if it had not been.

Randomness is a function of counters, so that there is no generator to save: the order of an epoch's samples comes
from (seed, epoch), and what is drawn in a batch from (seed, epoch, batch, rank). Progress is brought to the last thing
that was finished, and what an interruption cut off, such as a validation that was due, is done before going on.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

WORD = (1 << 64) - 1
HOST = socket.gethostname().split(".")[0]
EPOCH, VALIDATION, ITERATOR, BATCH = range(4)  # kinds of seeds
PROGRESS = {"last_epoch", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"}  # what schedulers count


def counter_seed(*counters: int) -> int:
    """Mix whole numbers into a seed in [0, 2**64); their order matters.

    SplitMix64: Steele et al. 2014, https://doi.org/10.1145/2714064.2660195
    """
    word = 0
    for counter in counters:
        word = _mix(word ^ _mix(counter & WORD))
    return word


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def reseed(seed: int) -> None:
    """Seed torch on the CPU and on the GPU in use, `random`, and numpy if something has imported it.

    `torch.manual_seed` does the first two as well, but takes ten times as long where there is no GPU.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed & 0xFFFFFFFF)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints so that a kill at any moment leaves the old file or the new one, and never a part.

    A file is written beside its target, flushed to the disk and moved into place; Lightning's own goes by way of the
    temporary folder, from where a move to another file system can be cut off. Nothing is held twice in memory. What
    a killed process left behind is removed at the next save. Remote paths are left to Lightning. Checkpoints are
    loaded with `weights_only=True` unless told otherwise, since a pickle can run code.

    `ExactResume` installs it. Alone: `Trainer(plugins=[AtomicCheckpointIO()])`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes one file."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_atomically(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        """Reads one file."""
        return super().load_checkpoint(path, map_location, weights_only is not False)


def save_atomically(what: Any, path: Path) -> None:
    """`torch.save` that never leaves a part of a file at `path`, and none of an earlier, killed call beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(".*.checkpoint-part"):
        if _is_stale(left_over):
            left_over.unlink(missing_ok=True)
    new = path.with_name(f".{path.name[:100]}.{HOST}.{os.getpid()}.checkpoint-part")
    try:
        with new.open("wb") as file:
            torch.save(what, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the name, too, has to reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _is_stale(file: Path) -> bool:
    """Whether nobody writes to a temporary file any more: its process is gone, or elsewhere and quiet for an hour."""
    host, pid = file.name.split(".")[-3:-1]
    try:
        if host != HOST or os.name != "posix":
            return time.time() - file.stat().st_mtime > 3600
        os.kill(int(pid), 0)
    except (ProcessLookupError, FileNotFoundError):
        return True
    except PermissionError:  # it is another user's
        pass
    return False


class ExactResume(Callback):
    """Makes a run that was stopped and resumed end with the very weights of one that was not.

    Lightning restarts a cut-off epoch's data from its first batch, draws another order and other dropout masks, skips
    a validation that was due, drops gradients accumulated so far, and loses a step of ReduceLROnPlateau. Here

    - generators are seeded before each batch is loaded, by (seed, epoch, batch, rank), and before each epoch's
      iterator is made, by (seed, epoch): what torch's samplers, loading in the main process, batch transforms, dropout
      and stochastic depth draw is a function of progress;
    - the batches that a cut-off epoch has had are skipped without loading them, for every DataLoader over a map-style
      data set; other loaders are read up to there, and those with a `state_dict` of their own go on from it;
    - gradients accumulated since the last optimiser step, and metrics that schedulers and callbacks look at, are saved
      and restored; a validation or scheduler step that was due is made up for;
    - `AtomicCheckpointIO` takes the place of Lightning's default;
    - a warning names what the checkpoint overrules (a rate, a schedule's length), and whatever else makes the rest of
      the run another one.

    Bitwise on one machine with one set of software, on a GPU with deterministic kernels. Not exact are: what worker
    processes draw at random, where an epoch is resumed in its midst or workers are persistent (make it a function of
    the index); a sampler of one's own that draws from the global generator as it goes, with workers; averages of
    training metrics over the resumed epoch, which miss its first part; over several ranks, gradients saved amid an
    accumulation, which are right to rounding; a stop that early stopping asked for just before the save. A run whose
    last step has been made is over: its last epoch's end does not come again. What the LightningModule's own hook does
    after a checkpoint was written in the callbacks' hook of that name is lost, as ever. Needs Lightning 2.6's fit loop.

    Runs on: each epoch's start, each batch's loading, saving and loading of checkpoints. Touches: random generators,
    those of loaders and samplers too; the iteration of the training data; the strategy's checkpoint IO.

    Args:
        seed: Decides all randomness. `None`: the seed of `seed_everything`, or a random one; a resumed run then takes
            the one that its checkpoint holds.

    Raises:
        TypeError: The training data come in a class derived from Lightning's CombinedLoader.
        RuntimeError: The checkpoint stands beyond the end of the data; or Lightning has another fit loop.

    Example:
        >>> trainer = Trainer(callbacks=[ExactResume(), ModelCheckpoint(every_n_train_steps=100)])  # doctest: +SKIP
        >>> trainer.fit(model, data, ckpt_path="last")  # doctest: +SKIP
    """

    run_seed: int | None = None  # known from the first fit on

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install what decides about randomness and position; come first, so that other hooks draw under its seed."""
        if type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO":
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage != "fit":
            return
        drawn = int(os.environ.get("PL_GLOBAL_SEED", random.SystemRandom().getrandbits(32)))
        self.run_seed = trainer.strategy.broadcast(drawn if self.seed is None else self.seed)
        self.resumed: dict[str, Any] | None = None  # what a checkpoint brought, until training starts
        self.skip, self.owed = 0, ""  # see `settle`
        self.stateful = False  # whether the checkpoint holds states of loaders
        self.validation = (-1, -1, "")  # epoch and batch that the last one came after; `begun` or `over`
        trainer.callbacks = [self, *(other for other in trainer.callbacks if other is not self)]  # type: ignore[attr-defined]
        if not hasattr(trainer.fit_loop.epoch_loop, "_skip_next_val"):
            raise RuntimeError("ExactResume needs the fit loop of Lightning 2.6; install lightning>=2.6,<2.7")
        source, epoch_loop = trainer.fit_loop._data_source, trainer.fit_loop.epoch_loop
        loop = next(kind for kind in type(trainer.fit_loop).__mro__ if kind.__name__ == "_FitLoop")
        own = sys.modules[loop.__module__].CombinedLoader  # of lightning or pytorch_lightning, whose Trainer it is
        vars(source)["dataloader"] = partial(self._train_loaders, source, own)
        vars(epoch_loop)["on_run_start"] = partial(self._start_epoch, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave Lightning's loops as they were."""
        vars(trainer.fit_loop._data_source).pop("dataloader", None)
        vars(trainer.fit_loop.epoch_loop).pop("on_run_start", None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same. A signal to terminate comes when all that follows a validation has been done."""
        if _is(exception, "SIGTERMException") and self.validation[2] == "over":
            self.validation = (-1, -1, "")
        self.teardown(trainer, pl_module, "fit")

    def _train_loaders(self, source: Any, own: type[CombinedLoader]) -> _Replay:
        """In place of the data source's `dataloader`."""
        loaders = type(source).dataloader(source)
        if not _is(loaders, "CombinedLoader"):
            loaders = own(loaders, "max_size_cycle")  # as Lightning does
        elif type(loaders).__name__ != "CombinedLoader":
            raise TypeError(
                f"ExactResume expects training data in DataLoaders or a CombinedLoader; received {type(loaders)}, "
                "whose own way of iterating would be lost; return its loaders, or leave ExactResume out"
            )
        replay: _Replay = type("_Replay", (_Replay, own), {})(loaders)
        return replay

    def _start_epoch(self, trainer: Trainer, fetcher: Any) -> None:
        """In place of the epoch loop's `on_run_start`, which comes after all hooks of an epoch's start."""
        epoch_loop, loader = trainer.fit_loop.epoch_loop, fetcher.combined_loader
        loader.close()
        type(epoch_loop).on_run_start(epoch_loop, fetcher)
        epoch_loop.restarting = False
        skip, owed, self.skip, self.owed = self.skip, self.owed, 0, ""
        if owed in ("validation", "after validation"):  # the rest of an iteration that was cut off
            epoch_loop._skip_next_val = owed == "after validation"
            epoch_loop.on_advance_end(fetcher)
        if not epoch_loop.done:
            epoch = vars(trainer.fit_loop.epoch_progress.current)["processed"]
            loader.open(self.run_seed, epoch, trainer.global_rank, skip, self.stateful)
            iter(fetcher)
            fetcher.fetched += skip

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the hooks of an epoch's start draw depends on the epoch alone."""
        reseed(counter_seed(self.run_seed or 0, EPOCH, trainer.current_epoch))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a validation draws depends on where it comes."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            place = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.completed
            reseed(counter_seed(self.run_seed or 0, VALIDATION, *place))
            self.validation = (*place, "begun")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember that it need not be repeated."""
        if trainer.state.fn == "fit":
            self.validation = (*self.validation[:2], "over")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the seed, the metrics, where a validation stands, the run's length, gradients amid an accumulation."""
        if self.run_seed is None:
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        validated_here = self.validation[:2] == (trainer.current_epoch, progress.completed)
        gradients = {}
        plain = _is(trainer.strategy, "SingleDeviceStrategy", "DDPStrategy")
        if plain and _amid_accumulation(trainer) and not _amid_step(vars(progress)):
            grads = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            gradients = {name: trainer.strategy.reduce(g.clone(), reduce_op="mean") for name, g in grads.items()}
        checkpoint["callbacks"][self.state_key] = {
            "seed": self.run_seed,
            "metrics": dict(trainer.callback_metrics),
            "validation": self.validation[2] if validated_here else "",
            "run": _length_of_run(trainer),
            "gradients": gradients,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring the saved progress to the point where the run is to go on."""
        if trainer.state.fn != "fit":
            return
        loops = checkpoint["loops"]["fit_loop"]
        self.resumed = checkpoint["callbacks"].get(self.state_key, {})
        self.resumed["amid step"] = _amid_step(loops["epoch_loop.batch_progress"]["current"])
        self.resumed["schedulers"] = len(checkpoint["lr_schedulers"])
        self.skip, self.owed = settle(loops, self.resumed.get("validation", ""))
        if self.skip == 0 or loops["epoch_loop.batch_progress"]["is_last_batch"]:
            loops["state_dict"].pop("combined_loader", None)  # a stateful loader would begin with an empty epoch
        self.stateful = "combined_loader" in loops["state_dict"]
        if self.seed is None:
            self.run_seed = self.resumed.get("seed", self.run_seed)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what is configured, before the checkpoint's values take its place."""
        self.configured = _settings(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore what Lightning does not, and say what will not be as it was."""
        if self.resumed is None:
            return
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        fit_loop, gradients = trainer.fit_loop, self.resumed.get("gradients", {})
        trainer.callback_metrics.update(self.resumed.get("metrics", {}))
        lines = list(self._differences(trainer, self.resumed))
        if self.skip and _amid_accumulation(trainer) and not gradients:
            lines.append("gradients accumulated since the last optimiser step are not in the checkpoint")
        for name, p in pl_module.named_parameters():
            if name in gradients:
                p.grad = gradients[name].to(p.device, p.dtype)
        fit_loop._restarting = False  # or this epoch's step of ReduceLROnPlateau would be left out
        fit_loop.epoch_loop.restarting = self.skip > 0
        if self.owed == "plateau":
            plateaus = [c for c in trainer.lr_scheduler_configs if c.reduce_on_plateau and c.interval == "epoch"]
            lost = [str(c.monitor) for c in plateaus if c.monitor not in trainer.callback_metrics]
            if lost:
                lines.append(f"a step of ReduceLROnPlateau is lost: the checkpoint lacks {', '.join(lost)}")
            else:
                fit_loop.epoch_progress.current.completed -= 1  # the epoch that the step belongs to
                fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
                fit_loop.epoch_progress.current.completed += 1
        self.resumed = None
        if lines:
            rank_zero_warn("resumed, but not as if never stopped: " + "; ".join(lines))

    def _differences(self, trainer: Trainer, saved: dict[str, Any]) -> Iterator[str]:
        """What makes the rest of the run another one."""
        if "seed" not in saved:
            yield "the checkpoint was written without ExactResume"
        elif saved["seed"] != self.run_seed:
            yield f"the seed is {self.run_seed} (checkpoint: {saved['seed']})"
        if saved["amid step"]:
            yield (
                "the checkpoint was written amid a training step, which is repeated: gradients accumulated before it "
                "are lost, and statistics such as BatchNorm's take its batch in twice"
            )
        now, schedulers = _length_of_run(trainer), trainer.lr_scheduler_configs
        for name, was in saved.get("run", now).items():
            if was != now[name]:
                yield f"{name} is {now[name]} (checkpoint: {was})"
        if saved["schedulers"] != len(schedulers):
            yield f"{len(schedulers)} schedulers are configured (checkpoint: {saved['schedulers']})"
        restored = _settings(trainer)
        for name, wanted in self.configured.items():
            if restored.get(name, wanted) != wanted:
                yield f"{name} stays at the checkpoint's {restored[name]}, not the configured {wanted}"
        for config in schedulers:
            step = getattr(config.scheduler, "last_epoch", None)
            every_step = config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau
            if every_step and step not in (None, trainer.global_step):
                yield f"{type(config.scheduler).__name__} stands at step {step}, the run at {trainer.global_step}"


def settle(loops: dict[str, Any], validation: str) -> tuple[int, str]:
    """Brings a fit loop's saved counters to the last thing that was finished.

    Args:
        loops: `checkpoint["loops"]["fit_loop"]`; changed in place.
        validation: `begun` or `over` if the checkpoint was written during or just after one, else empty.

    Returns:
        How many batches of the epoch are done, and what is still to be done after them: nothing (empty), `validation`
        if it is due and what follows it, only what comes `after validation`, or an ended epoch's `plateau` step.
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
    """What was begun and not finished counts as not begun; what was processed, as finished."""
    for counters in (progress["total"], progress["current"]):
        counters.update(dict.fromkeys(counters, counters["processed"]))


def _amid_step(counters: dict[str, int]) -> bool:
    return counters["started"] > counters["processed"]


def _amid_accumulation(trainer: Trainer) -> bool:
    progress = trainer.fit_loop.epoch_loop.batch_progress
    done: int = vars(progress.current)["processed"]
    at_last = progress.is_last_batch and progress.current.ready == done
    return done % trainer.accumulate_grad_batches > 0 and not at_last


def _length_of_run(trainer: Trainer) -> dict[str, Any]:
    return {
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "the number of batches per epoch": trainer.num_training_batches,
        "the number of ranks": trainer.world_size,
        "the number of optimiser steps": trainer.estimated_stepping_batches,
    }


def _settings(trainer: Trainer) -> dict[str, Any]:
    """Base rates and the schedulers' options, by name; without their progress."""
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


class _Replay:
    """The training loaders, iterated from where the run stands; comes before a CombinedLoader among the bases.

    Lightning makes an iterator too early, when it does not know the epoch yet. Closed, this one starts no worker and
    gives no batch; open, it gives an epoch's batches from a given one on, each under its own seed.
    """

    _flattened: list[Any]

    def __init__(self, loaders: CombinedLoader) -> None:
        super().__init__(loaders.iterables, loaders._mode)  # type: ignore[call-arg]
        self.close()

    def close(self) -> None:
        self.is_open = self.stateful = False

    def open(self, seed: int, epoch: int, rank: int, skip: int, stateful: bool) -> None:
        self.seed, self.epoch, self.rank, self.skip, self.stateful = seed, epoch, rank, skip, stateful
        self.is_open = True

    def reseed(self, loader: int) -> None:
        reseed(counter_seed(self.seed, BATCH, self.epoch, self.batch, self.rank, loader))

    def __iter__(self) -> _Replay:
        plain = self._flattened
        self._flattened = [_Batches(loader, number, self) for number, loader in enumerate(plain)]
        try:
            super().__iter__()  # type: ignore[misc]
        finally:
            self._flattened = plain
        self.batch, self.skipping = 0, False
        return self

    def __next__(self) -> Any:
        if not self.is_open:
            raise StopIteration
        while self.batch < self.skip:
            self.skipping = True
            try:
                super().__next__()  # type: ignore[misc]
            except StopIteration:
                raise RuntimeError(
                    f"the checkpoint was written after batch {self.skip} of an epoch, which has only {self.batch} now; "
                    "resume with the same data and batch size"
                ) from None
            self.batch += 1
        self.skipping = False
        item = super().__next__()  # type: ignore[misc]
        self.batch += 1
        return item


def _is(thing: Any, *names: str) -> bool:
    """Whether it is of one of these classes or derived from one, in lightning or in pytorch_lightning."""
    return any(kind.__name__ in names for kind in thing.__class__.__mro__)


class _Batches:
    """One of the loaders; iterated again where it is shorter than another and cycled through."""

    def __init__(self, loader: Any, number: int, replay: _Replay) -> None:
        self.loader, self.number, self.replay = loader, number, replay
        self.round = 0
        self.by_index = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        self.by_itself = replay.stateful and hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.round += 1
        skip = 0
        if self.by_index or self.by_itself:
            length = sized_len(self.loader)
            while self.replay.skipping:
                if skip == length:
                    return
                skip += 1
                yield None
        for count, batch in enumerate(self._start(skip), skip):
            if count == 0:
                self.replay.reseed(self.number)  # the first one is loaded under the iterator's seed
            yield batch
            self.replay.reseed(self.number)

    def _start(self, skip: int) -> Iterable[Any]:
        """The loader's iterator without its first `skip` batches, made under a seed of its own."""
        loader, replay, again = self.loader, self.replay, partial(self.replay.reseed, self.number)
        seed = counter_seed(replay.seed, ITERATOR, replay.epoch, self.number, self.round)
        reseed(seed)
        batch_sampler = getattr(loader, "batch_sampler", None)
        for owner in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                generator.manual_seed(seed)
        if getattr(loader, "_iterator", None) is not None:  # workers that live on: no base seed is drawn for them
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        if skip == 0 or self.by_itself:
            iterator: Iterator[Any] = iter(loader)
            if skip:
                again()
            return iterator
        name = "sampler" if batch_sampler is None else "batch_sampler"
        rest = _Rest(getattr(loader, name), skip, again)
        vars(loader)[name] = rest  # only while the iterator is made, which keeps it
        try:
            iterator = iter(loader)
            first = list(islice(iterator, 1))
        finally:
            vars(loader)[name] = rest.whole
        if not rest.skip:
            return chain(first, iterator)
        for _ in islice(iterator, skip - 1):  # it takes its indices from elsewhere: batches are loaded to skip them
            pass
        again()
        return iterator


class _Rest:
    """A sampler without what it gives first; when it is iterated once more it is whole."""

    def __init__(self, whole: Iterable[Any], skip: int, then: Callable[[], None]) -> None:
        self.whole, self.skip, self.then = whole, skip, then

    def __len__(self) -> int:
        return len(self.whole)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def __iter__(self) -> Iterator[Any]:
        indices = iter(self.whole)
        skip, self.skip = self.skip, 0
        if skip:
            for _ in islice(indices, skip):
                pass
            self.then()
        yield from indices
