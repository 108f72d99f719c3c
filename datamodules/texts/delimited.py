"""Rows of CSV and TSV, with what is wrong with each; a quote that nobody closed swallows none."""

from __future__ import annotations

import csv
import itertools
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from .opening import check_columns, decoded, opened

log = logging.getLogger(__name__)
Row: TypeAlias = tuple[int, dict[str, Any], str]  # its line, from 1; values by column; what is wrong with it
Swallows: TypeAlias = Callable[[dict[str, Any], list[dict[str, Any]], int], bool]  # a row, rows in it, lines in it
LONGEST = 10_000  # lines of one field; what goes on for longer is a quote that nobody closed
SAMPLE = 1_000  # lines with a quote, from which one sees whether a file's fields are quoted


class Dialect(NamedTuple):
    """How fields are separated, and whether one may be in double quotes, with separators and line ends in it."""

    separator: str
    quoted: bool

    def reader(self, lines: Iterable[str]) -> Any:
        """The standard library's, which raises for a quote that is out of place."""
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # torch's C long on Windows; 128 kB are a short book
        quoting = csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE
        return csv.reader(lines, delimiter=self.separator, quoting=quoting, strict=True)  # type: ignore[arg-type]

    def fields(self, line: str) -> list[str] | None:
        """Of one line alone; None where it is not a row by itself."""
        try:
            return next(self.reader([line]), [])
        except csv.Error:
            return None


def rows_of_csv(
    file: Path, lines: Iterable[str], columns: Sequence[str], dialect: Dialect, swallows: Swallows | None = None
) -> Iterator[Row]:
    """Rows below a header.

    A double quote that is not closed, or not doubled, costs its own line and no other: reading goes on at the next one.
    Where such a quote meets another one further down, what lies between looks like a field with line ends, but is not
    taken for one if `swallows` recognises rows in it. Without `swallows` a warning names the line.
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
    """Lines for a reader, which remembers those of the record at hand, and takes some of them back."""

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
        self.waiting.extendleft(reversed(lines))
        del self.taken[len(self.taken) - len(lines) :]


def looks_quoted(file: Path, separator: str, encoding: str) -> bool:
    """Whether fields of a TSV are in double quotes, as pandas writes some of them, or such quotes are parts of texts:
    by its header and its first lines with a quote, wherever they are.
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
