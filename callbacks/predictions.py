"""Write predictions to a CSV while they are made: in constant memory, in order, also from several ranks."""

from __future__ import annotations

import csv
import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes `name,label,probability` for each sample that `Trainer.predict` goes through.

    `predict_step` must return a dictionary of tensors `(batch,)`: `index`, `label` (a class number) and
    `probability`. Names come from `datamodule.sample_names("predict")`, class names from
    `datamodule.class_names`, where these exist; else the numbers are written. Each rank writes a part of its
    own; at the end the first rank merges them by index and drops what was predicted twice to fill up a batch.

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
        columns = (prediction[key].tolist() for key in ("index", "label", "probability"))
        for index, label, probability in zip(*columns, strict=True):
            name = self.class_names[label] if self.class_names else label
            self.rows.writerow([index, self.names(index), name, f"{probability:.6f}"])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the parts of all ranks."""
        self.part.close()
        trainer.strategy.barrier("predictions written")
        if trainer.is_global_zero:
            parts = [part_of(self.target, rank) for rank in range(trainer.world_size)]
            merge_parts(parts, self.target)


def part_of(target: Path, rank: int) -> Path:
    """Where a rank writes before the merge."""
    return target.with_suffix(f".rank{rank}{target.suffix}")


def merge_parts(parts: Sequence[Path], target: Path) -> None:
    """Merge CSV files whose rows begin with ascending indices into one without that column; remove them."""
    files = [part.open(newline="", encoding="utf-8") for part in parts]
    try:
        merged = heapq.merge(*(_by_index(csv.reader(file)) for file in files), key=lambda row: row[0])
        with target.open("w", newline="", encoding="utf-8") as out:
            rows = csv.writer(out)
            rows.writerow(["name", "label", "probability"])
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
