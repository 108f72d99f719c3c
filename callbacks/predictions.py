"""Write predictions to a CSV while they are made: in constant memory, in order, also from several ranks."""

from __future__ import annotations

import csv
import heapq
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor


class PredictionWriter(BasePredictionWriter):
    """Writes a row for each sample that `Trainer.predict` goes through.

    `predict_step` must return a dictionary of tensors: `index` `(batch,)`, and what is to be written, a column each:
    `label`, a class number `(batch,)` or truth values `(batch, classes)`, written as names; `probability` or another
    number `(batch,)`; `p`, a number for each class, `(batch, classes)`, written to as many columns. The sample's name
    comes first, from `datamodule.sample_names("predict")`, in a column headed `datamodule.sample_kind` or `name`; class
    names are those of `datamodule.class_names`; where these are absent, numbers are written. Each rank writes a part
    of its own; at the end the first rank merges them by index and drops what was predicted twice to fill up a batch.

    Runs on: predict. Touches: one file.

    Args:
        path: The CSV; `predictions.csv` in the trainer's log folder if not given.

    Example:
        >>> Trainer(callbacks=[PredictionWriter("flowers.csv")]).predict(model, datamodule=data)  # doctest: +SKIP
    """

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path = Path(path) if path is not None else None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this rank's part."""
        folder = trainer.log_dir or trainer.default_root_dir
        self.target = Path(trainer.strategy.broadcast(str(self.path or Path(folder) / "predictions.csv")))
        self.target.parent.mkdir(parents=True, exist_ok=True)
        data: Any = getattr(trainer, "datamodule", None)
        self.names = data.sample_names("predict") if hasattr(data, "sample_names") else str
        self.class_names: Sequence[str] | None = getattr(data, "class_names", None)
        self.header = [getattr(data, "sample_kind", "name")]
        self.part = part_of(self.target, trainer.global_rank).open("w", newline="", encoding="utf-8")
        self.rows = csv.writer(self.part)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch."""
        written = columns(prediction, self.class_names)
        self.header[1:] = written
        for index, *values in zip(prediction["index"].tolist(), *written.values(), strict=True):
            self.rows.writerow([index, self.names(index), *values])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the parts of all ranks."""
        self.part.close()
        trainer.strategy.barrier("predictions written")
        if trainer.is_global_zero:
            parts = [part_of(self.target, rank) for rank in range(trainer.world_size)]
            merge_parts(parts, self.target, self.header)


def columns(prediction: Mapping[str, Tensor], class_names: Sequence[str] | None = None) -> dict[str, list[str]]:
    """A batch of predictions as columns of words, by their headings.

    Args:
        prediction: As `PredictionWriter` says; `index` is left out.
        class_names: Names in the order of the labels; numbers if not given.
    """

    def name(label: int) -> str:
        return class_names[label] if class_names else str(label)

    found: dict[str, list[str]] = {}
    for key, values in prediction.items():
        if key == "index":
            continue
        if key == "label" and values.ndim == 2:
            found[key] = ["|".join(name(n) for n, is_so in enumerate(row) if is_so) for row in values.tolist()]
        elif key == "label":
            found[key] = [name(label) for label in values.tolist()]
        elif values.ndim == 2:
            for label, column in enumerate(values.T.tolist()):
                found[f"{key}({name(label)})"] = [f"{value:.6f}" for value in column]
        else:
            found[key] = [f"{value:.6f}" for value in values.tolist()]
    return found


def part_of(target: Path, rank: int) -> Path:
    """Where a rank writes before the merge."""
    return target.with_suffix(f".rank{rank}{target.suffix}")


def merge_parts(parts: Sequence[Path], target: Path, header: Sequence[str]) -> None:
    """Merge CSV files whose rows begin with ascending indices into one without that column; remove them."""
    files = [part.open(newline="", encoding="utf-8") for part in parts]
    try:
        merged = heapq.merge(*(_by_index(csv.reader(file)) for file in files), key=lambda row: row[0])
        with target.open("w", newline="", encoding="utf-8") as out:
            rows = csv.writer(out)
            rows.writerow(header)
            last = -1
            for index, row in merged:
                if index > last:  # with fewer samples than ranks, two parts begin with the same one
                    rows.writerow(row)
                    last = index
    finally:
        for file in files:
            file.close()
    for part in parts:
        part.unlink()


def _by_index(rows: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    last = -1
    for index, *row in rows:
        if int(index) > last:  # what fills up a rank's last batch begins again at the first index
            yield int(index), row
            last = int(index)
