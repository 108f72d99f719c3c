"""Texts and labels in files of one's own: CSV, TSV, JSON lines, Parquet; for prediction also one text a line."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .archives import digest
from .sampling import IGNORED
from .text import MANY, TextDataModule, Texts, cached_table, label_numbers, progress_bars

READER = 1  # part of the cache's key: to be raised when the same file is read otherwise
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")


class TextFiles(TextDataModule):
    """Texts and labels in files.

    Contents, licence, source: yours. Formats by their endings: `.csv` and `.tsv` with a header, `.jsonl` with an
    object a line, `.parquet`; `.txt` with a text a line and no labels. Splits: a file each, or several by a list or
    pattern; without one for validation, `val_share` of the training texts is held out, in each class alike.
    Classes are fixed by the training texts: in numerical order where all are whole numbers, else in alphabetical.
    Several labels of one text are a list, or a word with `label_separator` between them; a score is a number.

    A row that cannot be right (a text that is empty or not UTF-8, a field too many or too few, no label) is an error
    that names file and line, or is skipped and counted; `left_out` lists these.

    Args:
        train_file: File, pattern such as `data/*.csv`, or a list of them.
        val_file: For validation, if there is one.
        test_file: For the test, if there is one.
        predict_file: Texts to predict; those of the test, or else of validation, if not given.
        text_column: Column of the text, or the two columns of a pair.
        label_column: Column of the label; None for texts without.
        label_separator: Between several labels of one text.
        class_names: Names of the classes, in the order of the training texts' labels. `None`: the labels themselves.
        quoted: Whether a field may be in double quotes, with separators and line breaks in it. `None`: in CSV, not
            in TSV.
        encoding: Of CSV, TSV, JSON lines and text.
        on_error: What to do with a row that cannot be right: `raise`, or `skip` it and count it. `None`: skip among
            the texts to predict, else raise.
        **kwargs: Those of `TextDataModule`.
    """

    def __init__(
        self,
        train_file: str | list[str] | None = None,
        val_file: str | list[str] | None = None,
        test_file: str | list[str] | None = None,
        predict_file: str | list[str] | None = None,
        text_column: str | list[str] = "text",
        label_column: str | None = "label",
        label_separator: str = ",",
        class_names: list[str] | None = None,
        quoted: bool | None = None,
        encoding: str = "utf-8",
        on_error: Literal["raise", "skip"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.files = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        self.text_columns = [text_column] if isinstance(text_column, str) else list(text_column)
        if len(self.text_columns) not in (1, 2):
            raise ValueError(f"data.text_column must be one column or two; received {self.text_columns}")
        self.label_column, self.label_separator = label_column, label_separator
        self.given_names, self.quoted, self.encoding, self.on_error = class_names, quoted, encoding, on_error

    @cached_property
    def labels_found(self) -> list[str]:
        """The training texts' different labels, sorted."""
        table = self.table("train")
        right = [not problem for problem in table.data["problem"].to_pylist()]
        values = itertools.compress(table.data["label"].to_pylist(), right)
        found = {value for row in values for value in row} if self.many else set(values)
        return sorted(found, key=lambda name: (0, int(name), "") if name.lstrip("-").isdecimal() else (1, 0, name))

    @property
    def many(self) -> bool:
        """Whether a text may have several labels."""
        return self.problem_type == "multi_label_classification"

    @property
    def class_names(self) -> list[str]:
        """Those given, or the training texts' labels."""
        if self.label_column is None:
            return []
        if self.problem_type == "regression":
            return [self.label_column]
        return self.given_names or self.labels_found

    def read_splits(self) -> dict[str, Texts]:
        """All files that are given; to predict with classes that are known, the texts to predict are enough."""
        splits = {}
        for split, pattern in self.files.items():
            if pattern is None and (split != "train" or self.given_names):
                continue
            try:
                table = self.table(split)
            except FileNotFoundError:
                if split == "predict" or not (self.given_names and self.files["predict"]):
                    raise
                continue
            splits[split] = self.checked(split, table)
        return splits

    def checked(self, split: str, table: Any) -> Texts:
        """A split without the rows that cannot be right, or an error that names the first."""
        problems = table.data["problem"].to_pylist()
        bad = [row for row, problem in enumerate(problems) if problem]
        if bad and not (self.on_error == "skip" or (self.on_error is None and split == "predict")):
            more = f" (and {len(bad) - 1:,} rows more)" if len(bad) > 1 else ""
            raise ValueError(
                f"{self.where(split, table, bad[0])}: {problems[bad[0]]}{more}; data.on_error=skip leaves out such rows"
            )
        rows = np.delete(np.arange(len(problems)), bad) if bad else None
        if not len(problems) - len(bad):
            raise ValueError(f"{self.files[split]}: no text in it can be used")
        labels = table.data["label"]
        values = (labels if rows is None else labels.take(rows)).to_pylist()
        numbers = self.numbers(
            split, values, lambda at: self.where(split, table, at if rows is None else int(rows[at]))
        )
        return Texts(table, numbers, None if rows is None else torch.from_numpy(rows), len(bad))

    def left_out(self, split: str) -> Iterator[tuple[str, str]]:
        """File and line of each row of a split's own file that is skipped, and what is wrong with it."""
        if self.files.get(split):
            table = self.table(split)
            for row, problem in enumerate(table.data["problem"].to_pylist()):
                if problem:
                    yield self.where(split, table, row), problem

    def numbers(self, split: str, values: list[Any], where: Callable[[int], str]) -> torch.Tensor:
        """Labels as torch wants them; none in what is to be predicted."""
        unknown = split == "predict" or self.label_column is None
        if self.problem_type == "regression":
            return torch.tensor(values, dtype=torch.float32)
        if not self.many:
            if unknown:
                return torch.full((len(values),), IGNORED)
            return label_numbers(values, self.class_names, where)
        hot = torch.zeros(len(values), self.num_classes)
        if not unknown:
            rows = [row for row, names in enumerate(values) for _ in names]
            flat = label_numbers(
                [name for names in values for name in names], self.class_names, lambda at: where(rows[at])
            )
            hot[rows, flat] = 1
        return hot

    def where(self, split: str, table: Any, row: int) -> str:
        """File and line, or row, of a row of a table."""
        path = expand(self.files[split] or ())[table.data["file"][row].as_py()]
        return f"{path}, {'row' if path.suffix == '.parquet' else 'line'} {table.data['line'][row].as_py()}"

    def table(self, split: str) -> Any:
        """A split's rows in the cache of the `datasets` library, under a key of content and options."""
        import datasets  # slow to import: only where it is used

        if not (pattern := self.files[split]):
            raise ValueError("data.train_file is not set: give a CSV, TSV, JSON lines or Parquet file")
        files = expand(pattern)
        options: dict[str, Any] = {
            "text_columns": tuple(self.text_columns),
            "label_column": None if split == "predict" else self.label_column,
            "problem_type": self.problem_type,
            "label_separator": self.label_separator,
            "quoted": self.quoted,
            "encoding": self.encoding,
        }
        key = self.digest(READER, options, [digest(file) for file in files])
        label = {
            "multi_label_classification": datasets.List(datasets.Value("string")),
            "regression": datasets.Value("float64"),
        }
        features = {
            **{name: datasets.Value("string") for name in ("text", "pair")[: len(self.text_columns)]},
            "label": label.get(self.problem_type, datasets.Value("string")),
            "file": datasets.Value("int32"),
            "line": datasets.Value("int64"),
            "problem": datasets.Value("string"),
        }
        with progress_bars(sum(file.stat().st_size for file in files) > 200 * MANY):
            return cached_table(key, datasets.Features(features), functools.partial(read_files, files, **options))


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
    for path in found:
        if path.suffix not in FORMATS:
            raise ValueError(f"{path}: the ending says what a file is; expected one of {', '.join(FORMATS)}")
    return found


def read_files(
    files: Sequence[Path],
    text_columns: Sequence[str],
    label_column: str | None,
    problem_type: str,
    label_separator: str,
    quoted: bool | None,
    encoding: str,
) -> Iterator[dict[str, Any]]:
    """Rows with `text`, `pair` for two columns, `label`, `file`, `line` and, where one cannot be right, `problem`.

    Raises:
        ValueError: A column that is not there, or a file that is not of its format at all.
    """
    columns = [*text_columns, *([label_column] if label_column else [])]
    line = 0
    for number, file in enumerate(files):
        for line, row, problem in rows_of(file, columns, quoted, encoding):
            texts = [row.get(name) for name in text_columns]
            label, wrong = (
                read_label(row.get(label_column), problem_type, label_separator) if label_column else (None, "")
            )
            problem = problem or next(filter(None, map(text_problem, texts)), "") or wrong
            yield {
                **dict(zip(("text", "pair"), ["" if problem else text for text in texts], strict=False)),
                "label": label if label is not None else NO_LABEL[problem_type],
                "file": number,
                "line": line,
                "problem": problem,
            }
    if not line:
        raise ValueError(f"{', '.join(map(str, files))}: no text in it can be used")


NO_LABEL: dict[str, Any] = {"single_label_classification": "", "multi_label_classification": [], "regression": math.nan}


def text_problem(text: Any) -> str:
    """What is wrong with a text, or nothing."""
    if not isinstance(text, str):
        return f"the text is {type(text).__name__}, not a string" if text is not None else "there is no text"
    if not text.strip():
        return "the text is empty"
    return "" if is_text(text) else "the text is not in the encoding that data.encoding names"


def is_text(text: str) -> bool:
    """Whether all of it could be decoded: what could not is there as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_label(value: Any, problem_type: str, separator: str) -> tuple[Any, str]:
    """A label in the form of its problem type, and what is wrong with it, or nothing."""
    if problem_type == "regression":
        try:
            score = float(value)
        except (TypeError, ValueError):
            return None, f"the score is {value!r}, not a number"
        return score, "" if math.isfinite(score) else f"the score is {value!r}"
    if problem_type == "multi_label_classification":
        names = value if isinstance(value, list) else str("" if value is None else value).split(separator)
        found = [str(name).strip() for name in names if str(name).strip()]
        if not all(map(is_text, found)):
            return [], "a label is not in the encoding that data.encoding names"
        return found, ""
    label = "" if value is None else str(value).strip()
    if not is_text(label):
        return "", "the label is not in the encoding that data.encoding names"
    return label, "" if label else "there is no label"


def rows_of(
    file: Path, columns: Sequence[str], quoted: bool | None, encoding: str
) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Line or row number, values by column, and what is wrong, of each row of a file of any format."""
    if file.suffix == ".parquet":
        import pyarrow.parquet  # comes with datasets

        table = pyarrow.parquet.ParquetFile(file)
        check_columns(file, columns, table.schema_arrow.names)
        rows = (row for batch in table.iter_batches(columns=list(columns)) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield number, row, ""
        return
    # what is not in the encoding is kept as lone surrogates, so that the error can name its line
    with file.open(
        encoding="utf-8-sig" if encoding == "utf-8" else encoding, errors="surrogateescape", newline=""
    ) as lines:
        if file.suffix == ".txt":
            for number, line in enumerate(lines, 1):
                yield number, {columns[0]: line.rstrip("\r\n")}, ""
        elif file.suffix == ".jsonl":
            yield from rows_of_json(file, lines, columns)
        else:
            yield from rows_of_csv(file, lines, columns, quoted)


def rows_of_json(file: Path, lines: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any], str]]:
    """An object a line; a column that no object so far has is an error."""
    known = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, {}, f"not JSON ({error.msg})"
            continue
        if not isinstance(row, dict):
            yield number, {}, f"expected an object, found {type(row).__name__}"
            continue
        if not known:
            check_columns(file, columns, list(row))
            known = True
        yield number, row, ""


def rows_of_csv(
    file: Path, lines: Iterable[str], columns: Sequence[str], quoted: bool | None
) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Fields with commas or tabs between them, below a header."""
    tabs = file.suffix == ".tsv"
    quoting = csv.QUOTE_MINIMAL if (not tabs if quoted is None else quoted) else csv.QUOTE_NONE
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # torch's C long on Windows; 128 kB are a short book
    reader = csv.reader(lines, delimiter="\t" if tabs else ",", quoting=quoting, strict=True)  # type: ignore[arg-type]
    header = next(reader, [])
    check_columns(file, columns, header)
    places = {name: header.index(name) for name in columns}
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield line, {}, f"not CSV ({error}); is a double quote in it not closed or not doubled?"
            continue
        if fields is None:
            return
        if not fields:
            continue  # an empty line
        if len(fields) != len(header):
            yield (
                line,
                {},
                f"{len(fields)} fields, and the header has {len(header)}; is a separator in the text not quoted?",
            )
        else:
            yield line, {name: fields[place] for name, place in places.items()}, ""


def check_columns(file: Path, columns: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a file without a column that is needed."""
    for name in columns:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{file} has no column {name!r}, but {', '.join(map(repr, known))}{hint}")
