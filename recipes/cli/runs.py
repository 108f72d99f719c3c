"""A run: its folder, what lies in it, and what is known of it in the end."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from callbacks import Report

from ..parts.checkpoints import run_of_checkpoint
from . import early

log = logging.getLogger(__name__)


@dataclass
class FinishedRun:
    """A run that is over, or was interrupted, for who tells of it.

    Args:
        recipe: Its name, such as `vision`.
        subcommand: fit, validate, test or predict.
        config: Of the subcommand.
        folder: The run's.
        started: When its command began, in seconds since 1970.
        trainer: Whose callbacks know the rest.
        model: A recipe's module.
        data: The data module.
        next_command: What to type next, where that is not to predict.
    """

    recipe: str
    subcommand: str
    config: Any
    folder: Path
    started: float
    trainer: Any
    model: Any
    data: Any
    next_command: str | None = None

    @property
    def report(self) -> Any:
        """The callback of the report; `None` where there is none."""
        return next((callback for callback in self.trainer.callbacks if isinstance(callback, Report)), None)

    @property
    def checkpoint(self) -> Any:
        """The callback that keeps the best checkpoint: the first that monitors a metric; `None` where none does."""
        return next((callback for callback in self.trainer.checkpoint_callbacks if callback.monitor), None)

    @property
    def best(self) -> str:
        """Path of the best checkpoint of a fit, or nothing."""
        return getattr(self.checkpoint, "best_model_path", "") if self.subcommand == "fit" else ""


def folder_for(config: Any, recipe: str, subcommand: str, started: float) -> Path:
    """`runs/<recipe>/<config>/<time>` below the trainer's `default_root_dir`; a resumed run keeps its own.

    With strategies, `<config>` is `<config>+<strategy>`.

    Args:
        config: Of the subcommand.
        recipe: Its name.
        subcommand: fit, validate, test or predict.
        started: When the command began.
    """
    before = run_of_checkpoint(config.get("ckpt_path"))
    if before and subcommand == "fit":
        return before.resolve()  # one spelling, or Lightning takes it for another run and forgets the best
    first, *others = [Path(str(path)).absolute() for path in config.get("config") or ["run"]]
    name = first.parents[1].name if first.stem == "config" else first.stem  # of a finished run's own, what that run had
    name += "".join(f"+{path.stem}" for path in others if path.parent.name == "strategy")
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(started))
    if subcommand != "fit":
        stamp += f"-{subcommand}"
    parent = Path(config.trainer.default_root_dir or ".") / "runs" / recipe / name
    folder, again = parent / stamp, 2
    while folder.exists() and "LOCAL_RANK" not in os.environ:
        folder, again = parent / f"{stamp}-{again}", again + 1
    return folder.resolve()


class SaveRunConfig(SaveConfigCallback):
    """Writes the run's complete config into its folder, as one to start a new run from.

    Args:
        parser: As in Lightning, and so is `config`.
        config: The parsed configuration.
        folder: The run's folder.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, folder: Path) -> None:
        config = config.clone()
        config["ckpt_path"] = None  # else whoever starts from this config would go on from that checkpoint
        config["quiet"] = False
        super().__init__(parser, config)
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Too early: what is refused before the first batch should leave no folder behind."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write on the first rank; a resumed run's config replaces the one before."""
        if trainer.is_global_zero and not self.already_saved:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, self.folder / "config.yaml", skip_none=False, overwrite=True)
            self.already_saved = True

    on_validation_start = on_test_start = on_predict_start = on_train_start


def keep_metrics(folder: Path) -> None:
    """Put the metrics of a run that is resumed aside: Lightning's CSV logger would delete them."""
    metrics = folder / "metrics.csv"
    if metrics.is_file() and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        earlier = len(list(folder.glob("metrics.part*.csv")))
        metrics.rename(folder / f"metrics.part{earlier + 1}.csv")


def check_writable(folder: Path) -> None:
    """End the program where a run's folder cannot be made."""
    there = next(part for part in (folder, *folder.parents) if part.exists())
    if not there.is_dir():
        early.stop(f"{there} is a file, and the run's folder goes below it: move it, or set trainer.default_root_dir")
    if not os.access(there, os.W_OK | os.X_OK):
        early.stop(f"no permission to write in {there}, where the run's folder goes: set trainer.default_root_dir")


def started() -> float:
    """When the command began, the same on all ranks that one command starts."""
    if "LOCAL_RANK" not in os.environ:
        os.environ["RECIPES_STARTED"] = str(time.time())
    return float(os.environ.get("RECIPES_STARTED", time.time()))
