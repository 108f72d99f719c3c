"""The rows of files of texts, one by one, with what is wrong with each: CSV, TSV, JSON lines, Parquet, plain lines."""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

log = logging.getLogger(__name__)

Row: TypeAlias = tuple[int, dict[str, Any], str]  # its line, from 1; values by column; what is wrong with it
Swallows: TypeAlias = Callable[[dict[str, Any], list[dict[str, Any]], int], bool]  # a row, rows in it, lines in it
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
MARKS = {  # bytes at the beginning of a file that tell its encoding; UTF-32's begin with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
LONGEST = 10_000  # lines of one field; what goes on for longer is a quote that nobody closed
SAMPLE = 1_000  # lines with a quote, from which one sees whether a file's fields are quoted


class Dialect(NamedTuple):
    """How fields are written.

    Args:
        separator: Between fields.
        quoted: Whether a field may be in double quotes, with separators, line ends and doubled quotes in it.
    """

    separator: str
    quoted: bool

    def reader(self, lines: Iterable[str]) -> Any:
        """The standard library's, which raises for a quote that is out of place."""
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # torch's C long on Windows; 128 kB are a short book
        quoting = csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE
        return csv.reader(lines, delimiter=self.separator, quoting=quoting, strict=True)  # type: ignore[arg-type]

    def fields(self, line: str) -> list[str] | None:
        """Of one line alone; None where it is no row of its own."""
        try:
            return next(self.reader([line]), [])
        except csv.Error:
            return None


def rows_of(
    file: Path,
    columns: Sequence[str],
    *,
    separator: str | None = None,
    quoted: bool | None = None,
    encoding: str = "utf-8",
    swallows: Swallows | None = None,
) -> Iterator[Row]:
    """Line or row number, values by column, and what is wrong, of each row of a file of any format.

    Args:
        file: Its ending says what it is.
        columns: Those wanted.
        separator: Between the fields of CSV and TSV. `None`: a comma, and a tab.
        quoted: Whether their fields may be in double quotes. `None`: in CSV; in TSV where the file shows it.
        encoding: Of text; a mark at the file's beginning counts more.
        swallows: Of a row over several lines, and of those of the lines between its first and last that have as many
            fields as the header, whether these are rows that a stray quote has swallowed. `None`: nobody can tell.

    Raises:
        ValueError: A column that is not there, or a file that is not of its format at all.
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


def opened(file: Path, encoding: str) -> Any:
    """A file of text; what is not in the encoding is kept as lone surrogates, so that an error can name its line.

    Raises:
        ValueError: No such encoding, or zero bytes in a file of one that has none.
    """
    try:
        name = codecs.lookup(encoding).name
    except LookupError:
        raise ValueError(f"data.encoding: {encoding!r} is not known; expected utf-8, latin-1, cp1252 ...") from None
    with file.open("rb") as raw:
        head = raw.read(4096)
    name = next((marked for mark, marked in MARKS.items() if head.startswith(mark)), name)
    wide = name.startswith(("utf-16", "utf-32"))
    if not wide and b"\0" in head:
        raise ValueError(f"{file} has zero bytes: is it UTF-16? Then data.encoding must be utf-16-le or utf-16-be")
    return file.open(encoding=name, errors="surrogatepass" if wide else "surrogateescape", newline="")


def decoded(file: Path, lines: Iterable[str]) -> Iterator[str]:
    """The lines of a file; bytes that no error handler can take are an error that names it."""
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in the encoding that data.encoding names ({error.reason})") from error


def is_text(text: str) -> bool:
    """Whether all of it could be decoded: what could not is there as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


def class_labels(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Names of the classes of each column that Hugging Face's metadata call a ClassLabel, or a list of these."""
    features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    inner = {name: value.get("feature", value) for name, value in features.items() if isinstance(value, dict)}
    return {name: list(value["names"]) for name, value in inner.items() if isinstance(value, dict) and "names" in value}


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


def rows_of_csv(
    file: Path,
    lines: Iterable[str],
    columns: Sequence[str],
    dialect: Dialect,
    swallows: Swallows | None = None,
) -> Iterator[Row]:
    """Rows below a header.

    A double quote that is not closed, or not doubled, costs its own line and no other: reading goes on at the next one.
    Where such a quote meets another one further down, what lies between looks like a field with line ends; it is not
    taken for one if `swallows` tells rows in it. Where nobody can tell, a warning names the line.
    """
    window = Window(lines)
    reader = dialect.reader(window)
    try:
        header: list[str] = next(reader, [])
    except csv.Error as error:
        raise ValueError(f"{file}: the header is not CSV ({error})") from error
    check_columns(file, columns, header, dialect.separator)
    places = {name: header.index(name) for name in columns}

    def row_of(fields: Sequence[str] | None) -> dict[str, str] | None:
        if fields is None or len(fields) != len(header):
            return None
        return {name: fields[place] for name, place in places.items()}

    def swallowed(line: int, row: dict[str, str] | None, taken: Sequence[str]) -> bool:
        """Whether a record of several lines has taken rows in."""
        alone = [found for text in taken[1:-1] if (found := row_of(dialect.fields(text))) is not None]
        if row is None or len(header) < 2:
            return False
        if swallows is not None:
            return swallows(row, alone, len(taken) - 2)
        if len(alone) > 2 and 2 * len(alone) > len(taken) - 2:
            log.warning("%s, line %d: a field goes on for %d lines that look like rows", file, line, len(taken))
        return False

    torn = False  # the lines after a broken one may be its rest
    while True:
        line = window.next_record()
        try:
            fields = next(reader, None)
            problem = ""
        except csv.Error as error:
            fields, problem = [], f"not CSV ({error}); is a double quote in it not closed or not doubled?"
        taken = window.taken
        if fields is None:
            return
        if not problem and not fields:
            continue  # an empty line
        row = row_of(fields)
        if not problem and len(taken) > 1 and swallowed(line, row, taken):
            problem = f"a field goes on for {len(taken)} lines that look like rows; is a double quote in it not closed?"
        if problem:
            window.put_back(taken[1:])
            torn = True
            yield line, {}, problem
            continue
        if torn and dialect.quoted and sum(part.count('"') for part in taken) % 2:
            yield line, {}, "a double quote is left over; is this the rest of the broken row before?"
            continue
        torn = False
        if row is None:
            count = f"{len(fields)} fields, and the header has {len(header)}"
            yield line, {}, f"{count}; is a separator in the text not quoted?"
        else:
            yield line, row, ""


class Window:
    """Lines for a reader, which remembers those of the record at hand, and takes some of them back.

    Args:
        lines: Of a file.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines, self.waiting, self.taken, self.number = iter(lines), deque[str](), list[str](), 0

    def __iter__(self) -> Window:
        return self

    def __next__(self) -> str:
        if len(self.taken) >= LONGEST:
            raise csv.Error(f"a field of more than {LONGEST:,} lines")
        line = self.waiting.popleft() if self.waiting else next(self.lines)
        self.taken.append(line)
        return line

    def next_record(self) -> int:
        """Forget the lines taken so far; the number, from 1, of the one that comes next."""
        self.number += len(self.taken)
        self.taken = []
        return self.number + 1

    def put_back(self, lines: Sequence[str]) -> None:
        """Give the last lines out again."""
        self.waiting.extendleft(reversed(lines))
        del self.taken[len(self.taken) - len(lines) :]


def looks_quoted(file: Path, separator: str, encoding: str) -> bool:
    """Whether fields of a TSV are in double quotes, as pandas writes some of them, or such quotes are parts of texts.

    Args:
        file: To look at: its header, and its first lines with a quote, wherever they are.
        separator: Between fields.
        encoding: As in `opened`.
    """
    with opened(file, encoding) as whole:
        lines = decoded(file, whole)
        head = [next(lines, ""), *itertools.islice((line for line in lines if '"' in line), SAMPLE)]
    header, *rows = [line.rstrip("\r\n").split(separator) for line in head]
    columns = zip(*(row for row in rows if len(row) == len(header)), strict=True)
    if any(map(wrapped, header)) or (len(rows) > 1 and any(all(map(wrapped, column)) for column in columns)):
        return not any(problem for *_, problem in rows_of_csv(file, head[:1], [], Dialect(separator, True)))
    as_they_are, quoted = (
        sum(bool(problem) for *_, problem in rows_of_csv(file, head, [], Dialect(separator, way)))
        for way in (False, True)
    )
    doubled = any('""' in field and field[0] == '"' for row in rows for field in row)
    return quoted < as_they_are or (quoted == as_they_are and doubled)


def wrapped(field: str) -> bool:
    """Whether a field begins and ends with a double quote."""
    return len(field) > 1 and field[0] == field[-1] == '"'


def check_columns(file: Path, columns: Sequence[str], known: Sequence[str], separator: str | None = None) -> None:
    """Refuse a file without a column that is needed.

    Args:
        file: For the error.
        columns: Those needed.
        known: Those there.
        separator: That the header was split at.
    """
    for name in columns:
        if list(known).count(name) > 1:
            raise ValueError(f"{file} has several columns {name!r}: give them names of their own")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            header = (separator or "").join(known)
            for other in "\t;,|".replace(separator, "") if separator else "":
                if name in [column.strip('" ') for column in header.split(other)]:
                    hint = f": set data.separator to {other!r}, which is between its fields"
            raise ValueError(f"{file} has no column {name!r}, but {', '.join(map(repr, known))}{hint}")


def expand(pattern: str | Sequence[str]) -> list[Path]:
    """The files of a path, a pattern or a list of them, sorted.

    Raises:
        FileNotFoundError: There are none.
        ValueError: A format that is not known.
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
            raise ValueError(f"{path}: the ending says what a file is; expected one of {', '.join(FORMATS)}")
    return found
