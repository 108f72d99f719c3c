"""Write predictions to a CSV or Parquet file as they are made: in constant memory, in order, from several ranks.

A run that is killed at any moment goes on where it stopped. Until all is predicted, finished batches lie in a folder
beside the file, `<file>.parts`: for each rank and each start of the program a file of JSON lines, one per batch. A
batch whose line was cut off is predicted again, so the result has the same bytes as that of a run never killed.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from .columns import columns, save_masks
from .parts import (
    PARTS,
    TABLES,
    batches_done,
    check_ranks,
    claim,
    digest_of_weights,
    facts,
    list_beside,
    merge_parts,
    refusal,
    whole_lines,
)

log = logging.getLogger(__name__)


class PredictionWriter(Callback):
    """Writes a row for each sample that `Trainer.predict` goes through.

    `predict_step` must return a dictionary of tensors: `index` `(batch,)`, and the columns: `label`, `label_2`, ...: a
    class number `(batch,)` or truth values `(batch, classes)`, written as names; `probability` or another number
    `(batch,)`; `p`, a number for each class, `(batch, classes)`, written to as many columns. Each rank must get its
    samples with ascending indices; one that pads a batch is written once. Of several tasks, keys begin with the
    task's name: `breed/label` goes to the column `breed`, `breed/probability` to `breed_probability`; a `mask`, uint8
    `(batch, height, width)`, is saved as a grey PNG in a folder beside the file, `<file>.masks`, and its column says
    where.

    Of the data module it uses what is there:

    - `sample_names("predict")` gives a sample's name by its index, for the first column, headed `sample_kind`;
    - `class_names`, in the order of the labels; of several tasks, those of `tasks`, by their name;
    - `predict_from` is set to the number of finished batches, which `predict_dataloader` need not give again;
    - `fingerprint("predict")` changes with the list of samples;
    - `left_out("predict")` gives names of samples that come in no batch, each with the reason.

    A batch may hold `unreadable`, pairs of an index and the reason why that sample has no prediction. These and those
    of `left_out` go to a list of their own, for `flowers.csv` to `flowers.unreadable.csv`.

    The same command with the same file goes on with what a killed one left in `<file>.parts`. It is refused for another
    checkpoint, other samples, settings or number of ranks. A complete file is overwritten. Each start counts
    `Trainer(limit_predict_batches=...)` anew.

    Runs on: predict. Touches: the file, the list of unreadable samples, the folder of parts until all is done;
    `datamodule.predict_from`.

    Args:
        path: Ends in `.csv` or `.parquet` (which needs pyarrow); `predictions.csv` in the trainer's log folder if not
            given.

    Raises:
        ValueError: Another ending, or parts of other predictions.

    Example:
        >>> predictions = Trainer(callbacks=[PredictionWriter("flowers.csv")]).predict(model, data)
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else None
        if self.path is not None and self.path.suffix not in TABLES:
            raise ValueError(f"predictions are written to a file ending in {' or '.join(TABLES)}; received {path}")
        if self.path is not None and self.path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise ValueError(f"{path}: Parquet needs pyarrow, which is not installed; install it, or name a .csv file")
        self.part: BinaryIO | None = None
        self.rows = self.unreadable = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what is done already, before the data module is asked for its batches."""
        if stage != "predict":
            return
        folder = trainer.log_dir or trainer.default_root_dir
        self.target = Path(trainer.strategy.broadcast(str(self.path or Path(folder) / "predictions.csv")))
        self.parts = self.target.with_name(f"{self.target.name}.parts")
        self.data = data = getattr(trainer, "datamodule", None)
        refused = claim(self.parts, facts(trainer, pl_module, data)) if trainer.is_global_zero else ""
        if refused := trainer.strategy.broadcast(refused):
            raise ValueError(refused)
        self.weights = ""
        self.batch = batches_done(self.parts.glob(f"rank{trainer.global_rank}.*.jsonl"))
        if self.batch:
            log.info("%s: %d batches of this rank are done; going on from there", self.parts, self.batch)
        if data and hasattr(data, "predict_from"):
            data.predict_from = self.batch
            data.allow_zero_length_dataloader_with_multiple_devices = True  # this rank may be done, and another not
            warnings.filterwarnings("ignore", ".*across ranks is zero")  # or all, and only the merge is missing
        else:
            self.batch = 0  # all come again
        self.names = data.sample_names("predict") if data and hasattr(data, "sample_names") else str
        self.class_names: Sequence[str] | None = getattr(data, "class_names", None)
        self.tasks: Mapping[str, Any] = getattr(data, "tasks", {})

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a part for this rank and this start: another process may still be writing to an earlier one."""
        self._check_weights(pl_module)
        for number in itertools.count():
            with suppress(FileExistsError):
                self.part = (self.parts / f"rank{trainer.global_rank}.{number}.jsonl").open("xb")
                break
        self._append({"weights": self.weights})

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Append a batch."""
        if not isinstance(outputs, Mapping) or "index" not in outputs:
            received = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
            raise ValueError(
                f"PredictionWriter needs a dictionary with `index`, the numbers of the batch's samples, from "
                f"{type(pl_module).__name__}.predict_step; received {received}"
            )
        index = outputs["index"].tolist()
        names = [self.names(one) for one in index]
        unreadable = batch.get("unreadable", []) if isinstance(batch, Mapping) else []
        found = {}
        for key, values in outputs.items():
            task, _, what = key.rpartition("/")
            if what == "mask":
                found[task] = save_masks(values, self.target.with_name(f"{self.target.name}.masks") / task, index)
            elif key != "index":
                names_of = self.tasks[task].class_names if task in self.tasks else self.class_names
                found |= columns({what: values}, names_of, task)
        record = {"batch": self.batch, "index": index, "name": names, "columns": found, "unreadable": unreadable}
        self._append(record)
        self.batch += 1

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """What is done stays, for another start."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Merge the parts of all ranks; here, since a finished rank gets no other hook."""
        if stage != "predict":
            return
        self._close()
        if not self.weights:
            self._check_weights(pl_module)
        trainer.strategy.barrier("predictions saved")
        if trainer.is_global_zero:
            check_ranks(self.parts, trainer.world_size)
            heading = getattr(self.data, "sample_kind", "name")
            omitted = self.data.left_out("predict") if self.data and hasattr(self.data, "left_out") else ()
            self.rows, self.unreadable = merge_parts(self.parts, self.target, heading, omitted)

    def written(self) -> str:
        """How many predictions went where, for the screen; only the file, where another process saved it."""
        target = self.path or self.target
        if target.is_relative_to(Path.cwd()):
            target = target.relative_to(Path.cwd())  # as one would type it here
        if not self.rows + self.unreadable:
            return str(target)
        said = f"{self.rows:,} predictions in {target}"
        return f"{said}; {self.unreadable:,} unreadable, see {list_beside(target)}" if self.unreadable else said

    def _check_weights(self, model: LightningModule) -> None:
        """On each rank, once they are loaded: none may add to predictions of other weights."""
        self.weights = digest_of_weights(model)
        heads = (next(whole_lines(part), {}) for part in self.parts.glob(PARTS))  # none, if it was cut off
        if any(head.get("weights", self.weights) != self.weights for head in heads):
            raise ValueError(refusal(self.parts, "with another checkpoint"))

    def _append(self, line: dict[str, Any]) -> None:
        assert self.part is not None
        self.part.write(json.dumps(line).encode() + b"\n")
        self.part.flush()  # to the system: a kill cannot undo it

    def _close(self) -> None:
        if self.part is not None:
            self.part.close()
            self.part = None
