"""Write predictions to a CSV or Parquet file while they are made: in constant memory, in order, from several ranks.

A run that is killed at any moment goes on where it stopped. Until all is predicted, what is done lies in a folder
beside the file, `<file>.parts`: for each rank and each start of the program a file of JSON lines, one a batch. A line
is whole or it is not there: a batch whose line was cut off is predicted again, as the same batch of the same samples,
so that the result has the same bytes as that of a run that was never killed.
"""

from __future__ import annotations

import csv
import hashlib
import heapq
import importlib.util
import itertools
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

log = logging.getLogger(__name__)

NOTE, PARTS = "made_of.json", "rank*.jsonl"
ROW_GROUP = 8192  # rows of Parquet that are held in memory
Row = tuple[int, str, list[Any], str]  # index, name, values, why there are none


class PredictionWriter(Callback):
    """Writes a row for each sample that `Trainer.predict` goes through.

    `predict_step` must return a dictionary of tensors: `index` `(batch,)`, and what is to be written, a column each:
    `label`, a class number `(batch,)` or truth values `(batch, classes)`, written as names, and so `label_2` and on;
    `probability` or another number `(batch,)`; `p`, a number for each class, `(batch, classes)`, written to as many
    columns. Each rank must get its samples with ascending indices; one that comes again to fill up a batch is written
    once.

    Of the data module it takes what is there, and does without the rest:

    - `sample_names("predict")` gives a sample's name by its index, for the first column, headed `sample_kind`;
    - `class_names`, in the order of the labels;
    - `predict_from` is set to the number of batches that are done, which `predict_dataloader` need not give again;
    - `fingerprint("predict")` changes with the list of samples;
    - `left_out("predict")` gives names of samples that come in no batch, each with the reason.

    A batch may hold `unreadable`, pairs of an index and the reason why that sample has no prediction. These and those
    left out go to a list of their own, beside `flowers.csv` to `flowers.unreadable.csv`.

    The same command with the same file goes on with what a killed one left in `<file>.parts`. It is refused where that
    was made of another checkpoint, other samples or other settings, or on another number of ranks. A file that is
    whole is written over. What `Trainer(limit_predict_batches=...)` lets through is counted anew in each start.

    Runs on: predict. Touches: the file, the list of what is unreadable, the folder of parts until all is done;
    `datamodule.predict_from`.

    Args:
        path: Ends in `.csv` or `.parquet` (which needs pyarrow); `predictions.csv` in the trainer's log folder if not
            given.

    Raises:
        ValueError: Another ending, or parts that were made of something else.

    Example:
        >>> Trainer(callbacks=[PredictionWriter("flowers.csv")]).predict(model, datamodule=data)  # doctest: +SKIP
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
        """See what is done already, before the data module is asked for its batches."""
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

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a part that is this rank's and this start's: another process may still be writing to an earlier one."""
        self._see_weights(pl_module)
        for number in itertools.count():
            try:
                self.part = (self.parts / f"rank{trainer.global_rank}.{number}.jsonl").open("xb")
                break
            except FileExistsError:
                continue
        self._append({"weights": self.weights})

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append a batch."""
        index = outputs["index"].tolist()
        record = {
            "batch": self.batch,
            "index": index,
            "name": [self.names(one) for one in index],
            "columns": columns(outputs, self.class_names),
            "unreadable": batch.get("unreadable", []) if isinstance(batch, Mapping) else [],
        }
        self._append(record)
        self.batch += 1

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """What is done stays, for another start."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Merge the parts of all ranks; here, since a rank that has nothing left to do gets no other hook."""
        if stage != "predict":
            return
        self._close()
        if not self.weights:
            self._see_weights(pl_module)
        trainer.strategy.barrier("predictions written")
        if trainer.is_global_zero:
            check_ranks(self.parts, trainer.world_size)
            heading = getattr(self.data, "sample_kind", "name")
            left_out = self.data.left_out("predict") if self.data and hasattr(self.data, "left_out") else ()
            self.rows, self.unreadable = merge_parts(self.parts, self.target, heading, left_out)

    def written(self) -> str:
        """What was written where, for the screen; only the file, where another process did it."""
        target = self.path or self.target
        if target.is_relative_to(Path.cwd()):
            target = target.relative_to(Path.cwd())  # as one would type it here
        if not self.rows + self.unreadable:
            return str(target)
        said = f"{self.rows:,} predictions in {target}"
        return f"{said}; {self.unreadable:,} unreadable, see {list_beside(target)}" if self.unreadable else said

    def _see_weights(self, model: LightningModule) -> None:
        """Each rank by itself, once they are loaded: none may add to what was made with others."""
        self.weights = digest_of_weights(model)
        if any(head.get("weights", self.weights) != self.weights for head in map(head_of, self.parts.glob(PARTS))):
            raise ValueError(refusal(self.parts, "with another checkpoint"))

    def _append(self, line: dict[str, Any]) -> None:
        assert self.part is not None
        self.part.write(json.dumps(line).encode() + b"\n")
        self.part.flush()  # it is the system's now, and a kill can't take it back

    def _close(self) -> None:
        if self.part is not None:
            self.part.close()
            self.part = None


def columns(prediction: Mapping[str, Tensor], class_names: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """A batch of predictions as columns of words, and of numbers of six decimals, by their headings.

    Args:
        prediction: As `PredictionWriter` says; `index` is left out.
        class_names: Names in the order of the labels; numbers if not given.
    """

    def name(label: int) -> str:
        return class_names[label] if class_names else str(label)

    found: dict[str, list[Any]] = {}
    for key, values in prediction.items():
        if key == "index":
            continue
        if key.split("_")[0] == "label":
            rows: list[Any] = values.tolist()
            if values.ndim == 2:
                found[key] = ["|".join(name(n) for n, is_so in enumerate(row) if is_so) for row in rows]
            else:
                found[key] = [name(label) for label in rows]
        elif values.ndim == 2:
            for label, column in enumerate(values.T.tolist()):
                found[f"{key}({name(label)})"] = [round(value, 6) for value in column]
        else:
            found[key] = [round(value, 6) for value in values.tolist()]
    return found


def facts(trainer: Trainer, model: LightningModule, data: Any) -> dict[str, Any]:
    """All that predictions depend on beside the weights, as plain values; the samples as a hash."""
    settings = {
        "ranks": trainer.world_size,
        "precision": str(trainer.precision),
        **{f"data.{name}": getattr(data, name, None) for name in ("eval_batch_size", "image_size", "max_length")},
        **{f"model.{name}": value for name, value in model.hparams.items()},
    }
    return {
        "inputs": str(data.fingerprint("predict")) if hasattr(data, "fingerprint") else None,
        "class names": list(getattr(data, "class_names", None) or []),
        **{name: value for name, value in settings.items() if isinstance(value, str | int | float | None)},
    }


def digest_of_weights(model: torch.nn.Module) -> str:
    """SHA-256 of all tensors."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def claim(folder: Path, made_of: Mapping[str, Any]) -> str:
    """Make the folder of parts, with a note what they are made of; where it is there, compare.

    Returns:
        Nothing, or why what lies there is not the beginning of these predictions.
    """
    note = folder / NOTE
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # none, or what a kill left of one that was being removed
        remove_parts(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(note, json.dumps(made_of, indent=1))
        return ""
    now = json.loads(json.dumps(made_of))
    other = next((key for key in {**now, **before} if now.get(key) != before.get(key)), None)
    if other is None:
        return ""
    if other == "inputs":
        return refusal(folder, "of another list of inputs")
    if other == "class names":
        return refusal(folder, "with other class names")
    return refusal(folder, f"with {other} {before.get(other)}, and it is {now.get(other)} now")


def refusal(folder: Path, made: str) -> str:
    """Why predictions that were begun are not gone on with."""
    return (
        f"{folder} holds unfinished predictions that were made {made}: name another file to write to, or remove that "
        "folder to begin again"
    )


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def remove_parts(folder: Path) -> None:
    """Remove a folder of parts, the note first: without it nobody takes the others for a beginning."""
    for path in (folder / NOTE, *folder.glob(PARTS), *folder.glob("*.new")):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def records(part: Path) -> Iterator[dict[str, Any]]:
    """The batches of a part."""
    return (line for line in whole_lines(part) if "batch" in line)


def head_of(part: Path) -> dict[str, Any]:
    """A part's first line: what weights made it; nothing, if it was cut off."""
    return next(whole_lines(part), {})


def whole_lines(part: Path) -> Iterator[dict[str, Any]]:
    """What a part holds up to a line that was cut off."""
    with part.open("rb") as lines:
        for line in lines:
            try:
                if not line.endswith(b"\n"):
                    return
                yield json.loads(line)
            except ValueError:  # the machine, too, may have gone down
                return


def batches_done(parts: Iterable[Path]) -> int:
    """How many batches a rank has written, counted from the first."""
    return max((record["batch"] + 1 for part in parts for record in records(part)), default=0)


def rows_of(part: Path) -> Iterator[Row]:
    """The samples of a part."""
    for record in records(part):
        reasons = dict(record["unreadable"])
        for index, name, *values in zip(record["index"], record["name"], *record["columns"].values(), strict=True):
            yield index, name, values, reasons.get(index, "")


def list_beside(target: Path) -> Path:
    """Where the samples without a prediction are listed."""
    return target.with_suffix(".unreadable.csv")


def check_ranks(folder: Path, ranks: int) -> None:
    """See that the parts of all ranks are there, before what is there passes for all.

    Raises:
        FileNotFoundError: Those of a rank are not.
    """
    for rank in range(ranks):
        if not any(folder.glob(f"rank{rank}.*.jsonl")):
            raise FileNotFoundError(
                f"{folder} has no predictions of rank {rank}: name a file in a folder that all machines share"
            )


def merge_parts(
    folder: Path, target: Path, heading: str = "name", left_out: Iterable[tuple[str, str]] = ()
) -> tuple[int, int]:
    """Merge the parts of all ranks by index into one file and a list of what has no prediction; then remove them.

    The file appears as a whole, in place of one that was there before. A kill leaves it, or the parts.

    Args:
        folder: The parts.
        target: The file, `.csv` or `.parquet`.
        heading: Of the first column.
        left_out: Names and reasons of more samples without a prediction; they head the list.

    Returns:
        Samples in the file, and in the list.
    """
    parts = sorted(folder.glob(PARTS))
    first: dict[str, list[Any]] = next((record["columns"] for part in parts for record in records(part)), {})
    kinds = {heading: str} | {key: type(values[0]) for key, values in first.items()}
    new, new_list = folder / "table.new", folder / "list.new"
    counts = [0, 0]
    with ExitStack() as stack:
        out = stack.enter_context(new_list.open("w", newline="", encoding="utf-8", errors="surrogateescape"))
        listed = csv.writer(out)
        listed.writerow([heading, "reason"])
        for name, reason in left_out:
            listed.writerow([name, reason])
            counts[1] += 1

        def predicted() -> Iterator[list[Any]]:
            last = -1
            for index, name, values, reason in heapq.merge(*map(rows_of, parts), key=lambda row: row[0]):
                if index <= last:  # it filled up a rank's last batch, or two processes wrote the same batch
                    continue
                last = index
                counts[bool(reason)] += 1
                if reason:
                    listed.writerow([name, reason])
                else:
                    yield [name, *values]

        TABLES[target.suffix](new, kinds, predicted())
    new.replace(target)
    if counts[1]:
        new_list.replace(list_beside(target))
    else:
        list_beside(target).unlink(missing_ok=True)
    remove_parts(folder)
    return counts[0], counts[1]


def write_csv(path: Path, kinds: Mapping[str, type], rows: Iterable[list[Any]]) -> None:
    """Write a CSV with a header; numbers with six decimals."""
    # a file's name need not be UTF-8; its bytes are written as they are
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        table = csv.writer(out)
        table.writerow(kinds)
        for row in rows:
            table.writerow([value if isinstance(value, str) else f"{value:.6f}" for value in row])


def write_parquet(path: Path, kinds: Mapping[str, type], rows: Iterable[list[Any]]) -> None:
    """Write Parquet: words as strings, numbers as float32."""
    import pyarrow  # comes with datasets; only who asks for Parquet needs it
    import pyarrow.parquet

    types = {key: pyarrow.string() if kind is str else pyarrow.float32() for key, kind in kinds.items()}
    schema = pyarrow.schema(types)
    rows = iter(rows)
    with pyarrow.parquet.ParquetWriter(path, schema) as out:
        while some := list(itertools.islice(rows, ROW_GROUP)):
            columns = (
                [value.encode(errors="surrogateescape").decode(errors="replace") for value in column]
                if isinstance(column[0], str)
                else column
                for column in zip(*some, strict=True)
            )
            out.write_table(pyarrow.table([*map(pyarrow.array, columns, types.values())], schema=schema))


TABLES = {".csv": write_csv, ".parquet": write_parquet}
