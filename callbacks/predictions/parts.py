"""What lies beside a file of predictions until all are made: parts, their note, and how they become one table."""

from __future__ import annotations

import csv
import hashlib
import heapq
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

NOTE, PARTS = "made_of.json", "rank*.jsonl"
ROW_GROUP = 8192  # rows of Parquet in memory


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
