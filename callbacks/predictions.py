"""Write predictions to a CSV or Parquet file as they are made: in constant memory, in order, from several ranks.

A run that is killed at any moment goes on where it stopped. Until all is predicted, finished batches lie in a folder
beside the file, `<file>.parts`: for each rank and each start of the program a file of JSON lines, one per batch. A
batch whose line was cut off is predicted again, so the result has the same bytes as that of a run never killed.
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
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

log = logging.getLogger(__name__)

NOTE, PARTS = "made_of.json", "rank*.jsonl"
ROW_GROUP = 8192  # rows of Parquet in memory


class PredictionWriter(Callback):
    """Writes a row for each sample that `Trainer.predict` goes through.

    `predict_step` must return a dictionary of tensors: `index` `(batch,)`, and the columns: `label`, `label_2`, ...: a
    class number `(batch,)` or truth values `(batch, classes)`, written as names; `probability` or another number
    `(batch,)`; `p`, a number for each class, `(batch, classes)`, written to as many columns. Each rank must get its
    samples with ascending indices; one that pads a batch is written once.

    Of the data module it uses what is there:

    - `sample_names("predict")` gives a sample's name by its index, for the first column, headed `sample_kind`;
    - `class_names`, in the order of the labels;
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
        record = {"batch": self.batch, "index": index, "name": names, "columns": columns(outputs, self.class_names)}
        self._append(record | {"unreadable": unreadable})
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


def columns(prediction: Mapping[str, Tensor], class_names: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """A batch of predictions as columns of names, and of numbers with six decimals, by their headings.

    Args:
        prediction: As of `PredictionWriter`; `index` is omitted.
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
    """All that predictions depend on besides the weights, as plain values; the samples as a hash."""
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
    """Make the folder of parts, with a note of what they depend on; where it exists, compare.

    Returns:
        Why what lies there is not the beginning of these predictions; empty if it is.
    """
    note = folder / NOTE
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # none, or one whose removal was interrupted
        remove_parts(folder)
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{NOTE}.new"
        new.write_text(json.dumps(made_of, indent=1), encoding="utf-8")
        new.replace(note)
        return ""
    now = json.loads(json.dumps(made_of))
    other = next((key for key in {**now, **before} if now.get(key) != before.get(key)), None)
    if other is None:
        return ""
    made = {"inputs": "of another list of inputs", "class names": "with other class names"}
    return refusal(folder, made.get(other, f"with {other} {before.get(other)}, and it is {now.get(other)} now"))


def refusal(folder: Path, made: str) -> str:
    """Why unfinished predictions cannot be continued."""
    return (
        f"{folder} holds unfinished predictions that were made {made}: name another file, or remove that folder to "
        "begin again"
    )


def remove_parts(folder: Path) -> None:
    """Remove a folder of parts, the note first: without it the others are ignored."""
    for path in (folder / NOTE, *folder.glob(PARTS), *folder.glob("*.new")):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def records(part: Path) -> Iterator[dict[str, Any]]:
    """The batches of a part."""
    return (line for line in whole_lines(part) if "batch" in line)


def whole_lines(part: Path) -> Iterator[dict[str, Any]]:
    """The lines of a part, up to one that was cut off."""
    with part.open("rb") as lines:
        for line in lines:
            try:
                if not line.endswith(b"\n"):
                    return
                yield json.loads(line)
            except ValueError:  # the machine, too, may have gone down
                return


def batches_done(parts: Iterable[Path]) -> int:
    """How many batches of a rank are finished, counted from the first."""
    return max((record["batch"] + 1 for part in parts for record in records(part)), default=0)


def rows_of(part: Path) -> Iterator[tuple[int, str, list[Any], str]]:
    """Index, name, values and reason for a missing prediction, of each sample of a part."""
    for record in records(part):
        reasons = dict(record["unreadable"])
        for index, name, *values in zip(record["index"], record["name"], *record["columns"].values(), strict=True):
            yield index, name, values, reasons.get(index, "")


def list_beside(target: Path) -> Path:
    """Where the samples without a prediction are listed."""
    return target.with_suffix(".unreadable.csv")


def check_ranks(folder: Path, ranks: int) -> None:
    """Raises a FileNotFoundError where the parts of a rank are missing."""
    for rank in range(ranks):
        if not any(folder.glob(f"rank{rank}.*.jsonl")):
            raise FileNotFoundError(
                f"{folder} has no predictions of rank {rank}: name a file in a folder that all machines share"
            )


def merge_parts(
    folder: Path, target: Path, heading: str = "name", omitted: Iterable[tuple[str, str]] = ()
) -> tuple[int, int]:
    """Merge the parts of all ranks by index into one file and a list of samples without a prediction; remove them.

    The file appears at once, in place of an older one. A kill leaves it, or the parts.

    Args:
        folder: The parts.
        target: The file, `.csv` or `.parquet`.
        heading: Of the first column.
        omitted: Names and reasons of more samples without a prediction; they head the list.

    Returns:
        Number of samples in the file, and in the list.
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
        for name, reason in omitted:
            listed.writerow([name, reason])
            counts[1] += 1

        def predicted() -> Iterator[list[Any]]:
            last = -1
            for index, name, values, reason in heapq.merge(*map(rows_of, parts), key=lambda row: row[0]):
                if index <= last:  # padding of a rank's last batch, or a batch that two processes wrote
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
    # file names need not be UTF-8; their bytes are written as they are
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        table = csv.writer(out)
        table.writerow(kinds)
        for row in rows:
            table.writerow([value if isinstance(value, str) else f"{value:.6f}" for value in row])


def write_parquet(path: Path, kinds: Mapping[str, type], rows: Iterable[list[Any]]) -> None:
    """Write Parquet: names as strings, numbers as float32."""
    import pyarrow  # comes with datasets; needed for Parquet only
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
