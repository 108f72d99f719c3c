"""What a run says while it works: log lines, a bar on a terminal, a line an epoch where the output goes elsewhere."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    ProgressBar,
    RichProgressBar,
)
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Task
from rich.text import Text

WIDE = 200  # columns of a table in a file


def console(*, stderr: bool = False) -> Console:
    """A screen, or a file or pipe, where nothing wraps; colours as rich finds them, none with NO_COLOR."""
    found = Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=WIDE, soft_wrap=True)


def counted(count: int, what: str, several: str | None = None) -> str:
    """`1 row`, `2 rows`, `2 classes`."""
    return f"{count:,} {what if count == 1 else several or f'{what}s'}"


class Lines(logging.Handler):
    """Log messages as they are, on whatever is the error stream by then."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        print(self.format(record), file=sys.stderr, flush=True)


def configure_logging(*, quiet: bool = False) -> None:
    """Let this collection say on the screen, once, what it does: `log.info` in its modules.

    Args:
        quiet: Warnings and errors only.
    """
    level = logging.INFO if rank_zero_only.rank == 0 and not quiet else logging.WARNING  # type: ignore[attr-defined]
    for package in ("recipes", "callbacks", "datamodules", "__main__"):
        logger = logging.getLogger(package)
        logger.setLevel(level)
        if not logger.handlers:
            screen = console(stderr=True)
            rich = RichHandler(console=screen, show_time=False, show_level=False, show_path=False)
            logger.addHandler(rich if screen.is_terminal else Lines())


def filter_warnings() -> None:
    """Silence what Lightning says about choices that are made on purpose here."""
    for pattern in (
        ".*does not have many workers.*",  # none are needed for images in memory
        ".*You have overridden `on_after_batch_transfer`.*",
        ".*isinstance.treespec, LeafSpec.*",
        r".*module\(s\) in eval mode at the start of training.*",  # frozen blocks are
        ".*Experiment logs directory .* exists and is not empty.*",  # a resumed run's is; see keep_metrics
        ".*callbacks used to create the checkpoint need to be provided.*",  # evaluation needs none
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*could not find the monitored key in the returned metrics.*",  # the summary says why nothing is best
    ):
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)


def progress() -> ProgressBar:
    """What shows how far a run is: a bar on a terminal, lines elsewhere."""
    return Bar(refresh_rate=5) if console().is_terminal else EpochLines()  # Lightning's 100 Hz cost time in every step


class Bar(RichProgressBar):
    """Lightning's bar, with epochs counted from 1, no version number, and no speed before there is one."""

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        return f"Epoch {current_epoch + 1}" + (f"/{last}" if last and last > 0 else "") + " "

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Without the logger's version."""
        found = super().get_metrics(trainer, pl_module)
        found.pop("v_num", None)
        return found

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """As Lightning's, with a speed that is measured."""
        columns = super().configure_columns(trainer)
        speed = self.theme.processing_speed
        return [Speed(speed) if isinstance(column, ProcessingSpeedColumn) else column for column in columns]


class Speed(ProcessingSpeedColumn):
    """Batches per second."""

    def render(self, task: Task) -> Text:
        """Nothing before the first second."""
        return Text(f"{task.speed:.1f} batches/s" if task.speed else "", style=self.style)


class EpochLines(ProgressBar):
    """A line an epoch with its metrics, for a file or a pipe."""

    def __init__(self) -> None:
        super().__init__()
        self.began = 0.0
        self.waiting: int | None = None  # epoch whose line is to be written: its metrics are complete when it is over

    def disable(self) -> None:
        """Only the first rank writes."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer)
        self.began, self.waiting = time.perf_counter(), trainer.current_epoch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        """The line of the epoch that is over."""
        epoch, self.waiting = self.waiting, None
        if epoch is None or not trainer.is_global_zero:
            return
        of = f" of {trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        shown = {name: float(value) for name, value in sorted(trainer.callback_metrics.items()) if name[:3] != "lr-"}
        if "train/loss_epoch" in shown:
            shown.pop("train/loss", None)  # of one batch
        metrics = [f"{name} {value:.4f}" for name, value in shown.items()]
        seconds = time.perf_counter() - self.began
        words = [f"epoch {epoch + 1}{of}", f"step {trainer.global_step}", *metrics, f"{seconds:.1f} s"]
        print(", ".join(words), file=sys.stderr, flush=True)
