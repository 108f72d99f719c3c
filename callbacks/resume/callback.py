"""Exact resume: a run that was stopped anywhere goes on as if it had not been.

Randomness is a function of counters, so that there is no generator to save: the order of an epoch's samples depends on
(seed, epoch), and what is drawn in a batch on (seed, epoch, batch, rank). Progress is set to the last thing that was
finished, and what an interruption cut off, such as a validation that was due, is done before going on.
"""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from .atomic import AtomicCheckpointIO
from .progress import during_accumulation, during_step, length_of_run, run_settings, settle
from .replay import Replay
from .seeds import EPOCH, VALIDATION, counter_seed, reseed


class ExactResume(Callback):
    """Makes a run that was stopped and resumed end with exactly the weights of one that was not.

    Lightning restarts an interrupted epoch's data from its first batch, draws another order and other dropout masks,
    skips a validation that was due, drops accumulated gradients, and loses a step of ReduceLROnPlateau. Here

    - generators are seeded before each batch is loaded, by (seed, epoch, batch, rank), and before each epoch's
      iterator is made, by (seed, epoch): what samplers, loading in the main process, batch transforms and dropout draw
      is a function of progress;
    - the batches that an interrupted epoch has had are skipped without loading them, for every DataLoader over a
      map-style data set; other loaders are read up to there, and those with their own `state_dict` go on from it;
    - gradients accumulated since the last optimiser step, and metrics that schedulers and callbacks read, are saved
      and restored; a validation or scheduler step that was due is done;
    - `AtomicCheckpointIO` replaces Lightning's default;
    - a warning names what the checkpoint overrides (a learning rate, a schedule's length), and whatever else makes the
      rest of the run differ.

    Bitwise on one machine with one set of software, on a GPU with deterministic kernels. Not exact: random numbers of
    worker processes, where an epoch is resumed before its end or workers are persistent (make them a function of the
    index); a custom sampler that draws from the global generator as it goes, with workers; averages of training
    metrics over the resumed epoch, which miss its first part; over several ranks, gradients saved during an
    accumulation, which are right up to rounding; a stop that early stopping requested just before the save. A run
    whose last step is done is over: its last epoch's end is not repeated. What the LightningModule's own hook does
    after a callback's hook of that name has saved a checkpoint is lost, as always. Needs Lightning 2.6's fit loop.

    Runs on: each epoch's start, each batch's loading, saving and loading of checkpoints. Touches: random generators,
    also of loaders and samplers; the iteration of the training data; the strategy's checkpoint IO.

    Args:
        seed: Of all randomness. `None`: that of `seed_everything`, or a random one; a resumed run takes that of its
            checkpoint.

    Raises:
        TypeError: The training data come in a class derived from Lightning's CombinedLoader.
        RuntimeError: The checkpoint is beyond the end of the data; or Lightning has another fit loop.

    Example:
        >>> trainer = Trainer(callbacks=[ExactResume(), ModelCheckpoint(every_n_train_steps=100)])
        >>> trainer.fit(model, data, ckpt_path="last")
    """

    run_seed: int | None = None  # known from the first fit on

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install seeds and positions; come first, so that other hooks draw under its seed."""
        if type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO":
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage != "fit":
            return
        drawn = int(os.environ.get("PL_GLOBAL_SEED", random.SystemRandom().getrandbits(32)))
        self.run_seed = trainer.strategy.broadcast(drawn if self.seed is None else self.seed)
        self.resumed: dict[str, Any] | None = None  # what a checkpoint brought, until training starts
        self.skip, self.pending = 0, ""  # see `settle`
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
        """Restore Lightning's loops."""
        vars(trainer.fit_loop._data_source).pop("dataloader", None)
        vars(trainer.fit_loop.epoch_loop).pop("on_run_start", None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same. A termination signal is raised when all that follows a validation is done."""
        if is_kind(exception, "SIGTERMException") and self.validation[2] == "over":
            self.validation = (-1, -1, "")
        self.teardown(trainer, pl_module, "fit")

    def _train_loaders(self, source: Any, own: type[CombinedLoader]) -> Replay:
        """In place of the data source's `dataloader`."""
        loaders = type(source).dataloader(source)
        if not is_kind(loaders, "CombinedLoader"):
            loaders = own(loaders, "max_size_cycle")  # as Lightning does
        elif type(loaders).__name__ != "CombinedLoader":
            raise TypeError(
                f"ExactResume expects training data in DataLoaders or a CombinedLoader; received {type(loaders)}, "
                "whose own way of iterating would be lost; return its loaders, or remove ExactResume"
            )
        replay: Replay = type("Replay", (Replay, own), {})(loaders)
        return replay

    def _start_epoch(self, trainer: Trainer, fetcher: Any) -> None:
        """In place of the epoch loop's `on_run_start`, which runs after all hooks of an epoch's start."""
        epoch_loop, loader = trainer.fit_loop.epoch_loop, fetcher.combined_loader
        loader.close()
        type(epoch_loop).on_run_start(epoch_loop, fetcher)
        epoch_loop.restarting = False
        skip, pending, self.skip, self.pending = self.skip, self.pending, 0, ""
        if pending in ("validation", "after validation"):  # the rest of an iteration that was cut off
            epoch_loop._skip_next_val = pending == "after validation"
            epoch_loop.on_advance_end(fetcher)
        if not epoch_loop.done:
            epoch = vars(trainer.fit_loop.epoch_progress.current)["processed"]
            loader.open(self.run_seed, epoch, trainer.global_rank, skip, self.stateful)
            iter(fetcher)
            fetcher.fetched += skip

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the hooks of an epoch's start by the epoch."""
        reseed(counter_seed(self.run_seed or 0, EPOCH, trainer.current_epoch))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed a validation by its place."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            place = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.completed
            reseed(counter_seed(self.run_seed or 0, VALIDATION, *place))
            self.validation = (*place, "begun")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that it need not be repeated."""
        if trainer.state.fn == "fit":
            self.validation = (*self.validation[:2], "over")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the seed, the metrics, a validation's state, the run's length, gradients during an accumulation."""
        if self.run_seed is None:
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        validated_here = self.validation[:2] == (trainer.current_epoch, progress.completed)
        gradients = {}
        plain = is_kind(trainer.strategy, "SingleDeviceStrategy", "DDPStrategy")
        if plain and during_accumulation(trainer) and not during_step(vars(progress)):
            grads = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            gradients = {name: trainer.strategy.reduce(g.clone(), reduce_op="mean") for name, g in grads.items()}
        checkpoint["callbacks"][self.state_key] = {
            "seed": self.run_seed,
            "metrics": dict(trainer.callback_metrics),
            "validation": self.validation[2] if validated_here else "",
            "run": length_of_run(trainer),
            "gradients": gradients,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the saved progress to the point where the run is to go on."""
        if trainer.state.fn != "fit" or "loops" not in checkpoint:  # which holds weights to begin with, and no progress
            return
        loops = checkpoint["loops"]["fit_loop"]
        self.resumed = checkpoint["callbacks"].get(self.state_key, {})
        self.resumed["during step"] = during_step(loops["epoch_loop.batch_progress"]["current"])
        self.resumed["schedulers"] = len(checkpoint["lr_schedulers"])
        self.skip, self.pending = settle(loops, self.resumed.get("validation", ""))
        if self.skip == 0 or loops["epoch_loop.batch_progress"]["is_last_batch"]:
            loops["state_dict"].pop("combined_loader", None)  # a stateful loader would begin with an empty epoch
        self.stateful = "combined_loader" in loops["state_dict"]
        if self.seed is None:
            self.run_seed = self.resumed.get("seed", self.run_seed)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the configured settings, before the checkpoint's replace them."""
        self.configured = run_settings(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore what Lightning does not; warn of what will differ."""
        if self.resumed is None:
            return
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        fit_loop, gradients = trainer.fit_loop, self.resumed.get("gradients", {})
        trainer.callback_metrics.update(self.resumed.get("metrics", {}))
        lines = list(self._differences(trainer, self.resumed))
        if self.skip and during_accumulation(trainer) and not gradients:
            lines.append("gradients accumulated since the last optimiser step are not in the checkpoint")
        for name, p in pl_module.named_parameters():
            if name in gradients:
                p.grad = gradients[name].to(p.device, p.dtype)
        fit_loop._restarting = False  # or this epoch's step of ReduceLROnPlateau would be skipped
        fit_loop.epoch_loop.restarting = self.skip > 0
        if self.pending == "plateau":
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
        """What makes the rest of the run differ."""
        if "seed" not in saved:
            yield "the checkpoint was saved without ExactResume"
        elif saved["seed"] != self.run_seed:
            yield f"the seed is {self.run_seed} (checkpoint: {saved['seed']})"
        if saved["during step"]:
            yield (
                "the checkpoint was saved during a training step, which is repeated: gradients accumulated before it "
                "are lost, and statistics such as BatchNorm's count its batch twice"
            )
        now, schedulers = length_of_run(trainer), trainer.lr_scheduler_configs
        for name, was in saved.get("run", now).items():
            if was != now[name]:
                yield f"{name} is {now[name]} (checkpoint: {was})"
        if saved["schedulers"] != len(schedulers):
            yield f"{len(schedulers)} schedulers are configured (checkpoint: {saved['schedulers']})"
        restored = run_settings(trainer)
        for name, wanted in self.configured.items():
            if restored.get(name, wanted) != wanted:
                yield f"{name} stays at the checkpoint's {restored[name]}, not the configured {wanted}"
        for config in schedulers:
            step = getattr(config.scheduler, "last_epoch", None)
            every_step = config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau
            if every_step and step not in (None, trainer.global_step):
                yield f"{type(config.scheduler).__name__} is at step {step}, the run at {trainer.global_step}"


def is_kind(thing: Any, *names: str) -> bool:
    """Whether it is of one of these classes or derived from one, in lightning or in pytorch_lightning."""
    return any(kind.__name__ in names for kind in thing.__class__.__mro__)
