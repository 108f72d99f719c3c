"""The rows of files of texts, one by one, with what is wrong with each: CSV, TSV, JSON lines, Parquet, plain lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..labels.values import class_labels
from .delimited import Dialect, Row, Swallows, looks_quoted, rows_of_csv
from .opening import check_columns, decoded, opened

log = logging.getLogger(__name__)
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")


def rows_of(
    file: Path,
    columns: Sequence[str],
    *,
    separator: str | None = None,
    quoted: bool | None = None,
    encoding: str = "utf-8",
    swallows: Swallows | None = None,
) -> Iterator[Row]:
    """Line or row number, values by column, and what is wrong, of each row of a file, whose ending tells the format.

    Args:
        file: To read.
        columns: Those wanted.
        separator: Between the fields of CSV and TSV. `None`: a comma, and a tab.
        quoted: Whether their fields may be in double quotes. `None`: in CSV; in TSV where the file shows it.
        encoding: Of text; a byte order mark counts more.
        swallows: Decides for a row over several lines, and those of its inner lines that have as many fields as the
            header, whether these are rows that a stray quote has swallowed. `None`: nobody can tell.

    Raises:
        ValueError: A column that does not exist, or a file that is not of its format at all.
    """
    if file.suffix == ".parquet":
        yield from rows_of_parquet(file, columns)
        return
    with opened(file, encoding) as whole:
        lines = decoded(file, whole)
        if file.suffix == ".txt":
            for number, line in enumerate(lines, 1):
                yield number, {columns[0]: line.rstrip("\r\n")}, ""
        elif file.suffix == ".jsonl":
            yield from rows_of_json(file, lines, columns)
        else:
            between = separator or ("\t" if file.suffix == ".tsv" else ",")
            if quoted is None:
                quoted = file.suffix != ".tsv" or looks_quoted(file, between, encoding)
                if quoted and file.suffix == ".tsv":
                    log.info("%s: fields in double quotes", file)
            yield from rows_of_csv(file, lines, columns, Dialect(between, quoted), swallows)


def rows_of_parquet(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a Parquet file, from 1; integers of a ClassLabel as the names that this file's metadata give them."""
    import pyarrow.parquet  # comes with datasets

    table = pyarrow.parquet.ParquetFile(file)
    check_columns(file, columns, table.schema_arrow.names)
    names = class_labels(table.schema_arrow.metadata)
    rows = (row for batch in table.iter_batches(columns=list(columns)) for row in batch.to_pylist())
    for number, row in enumerate(rows, 1):
        for column in names.keys() & row.keys():
            row[column] = named(row[column], names[column])
        yield number, row, ""


def named(label: Any, names: Sequence[str]) -> Any:
    """The name of a position, or those of several; None for one that has none."""
    if isinstance(label, list):
        return [named(one, names) for one in label]
    return names[label] if label is not None and 0 <= label < len(names) else None


def rows_of_json(file: Path, lines: Iterable[str], columns: Sequence[str]) -> Iterator[Row]:
    """An object a line; a column that none of them has is an error."""
    known: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            yield number, {}, f"not JSON ({getattr(error, 'msg', error)})"
            continue
        if not isinstance(row, dict):
            yield number, {}, f"expected an object, found {type(row).__name__}"
            continue
        known |= dict.fromkeys(row)
        yield number, row, ""
    if known:
        check_columns(file, columns, list(known))


def expand(pattern: str | Sequence[str]) -> list[Path]:
    """The files of a path, a pattern or a list of them, sorted; a FileNotFoundError where there are none, a ValueError
    for a format that is not known.
    """
    found: list[Path] = []
    for one in [pattern] if isinstance(pattern, str) else pattern:
        path = Path(one)
        matches = (
            [path] if path.is_file() else sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
        )
        if not matches:
            raise FileNotFoundError(f"no file {one}: expected a path or a pattern of {', '.join(FORMATS)} files")
        found += matches
    found = list(dict.fromkeys(found))  # two patterns may mean one file
    for path in found:
        if path.suffix not in FORMATS:
            raise ValueError(f"{path}: the ending must tell the format; expected one of {', '.join(FORMATS)}")
    return found
