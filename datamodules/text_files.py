"""Texts and labels in files of one's own: CSV, TSV, JSON lines, Parquet; for prediction also one text a line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal

import torch

from .files.archives import digest
from .labels.values import (
    IGNORED,
    label_numbers,
    learn_classes,
    learn_multi_label_classes,
    several_numbers,
    width_of_indicators,
)
from .texts.base import TextDataModule
from .texts.cache import MANY, cached_table, progress_bars
from .texts.reading import read_files
from .texts.rows import expand
from .texts.tokens import Texts

READER = 2  # part of the cache's key: to be raised when the same file is read otherwise


class TextFiles(TextDataModule):
    """Texts and labels in files.

    Contents, licence, source: yours. Formats by their endings: `.csv` and `.tsv` with a header, `.jsonl` with an
    object a line, `.parquet`; `.txt` with a text a line and no labels. Splits: a file each, or several by a list or
    pattern; without one for validation, `val_share` of the training texts is held out, in each class alike.
    Classes are the training texts' labels, numbers in numerical order, then words in alphabetical. A number is a name
    like any other and `1.0` the same as `1`; a label that no training text has is an error, whatever `on_error` says.
    Several labels of one text are a list, a word with `label_separator` between them, or 0 and 1 for each class; a
    score is a number.

    A row that cannot be right (a text that is empty or not UTF-8, a field too many or too few, no label) is an error
    that names file and line, or is skipped and counted; `left_out` lists these. A double quote that is not closed
    costs its own row, not those below it.

    Args:
        train_file: File, pattern such as `data/*.csv`, or a list of them.
        val_file: For validation, if there is one.
        test_file: For the test, if there is one.
        predict_file: Texts to predict; those of the test, or else of validation, if not given.
        text_column: Column of the text, or the two columns of a pair.
        label_column: Column of the label; None for texts without.
        label_separator: Between several labels of one text.
        class_names: Names of the classes; labels are these, or whole numbers that count in them from 0, unless one of
            the names is a number itself. `None`: the training texts' labels.
        separator: Between fields. `None`: a comma in CSV, a tab in TSV.
        quoted: Whether a field may be in double quotes, with separators and line breaks in it. `None`: in CSV, and in
            TSV where the file's beginning shows it.
        encoding: Of CSV, TSV, JSON lines and text; a byte order mark counts more.
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
        separator: str | None = None,
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
        self.given_names, self.on_error = class_names, on_error
        self.separator, self.quoted, self.encoding = separator, quoted, encoding

    @cached_property
    def training_labels(self) -> list[Any]:
        """Labels of the training texts that can be used, as the files have them."""
        return usable(self.table("train"))[1]

    @cached_property
    def labels_found(self) -> list[str]:
        if self.many:
            return learn_multi_label_classes(self.training_labels, self.label_separator)
        return learn_classes(self.training_labels)

    @property
    def many(self) -> bool:
        """Whether a text may have several labels."""
        return self.problem_type == "multi_label_classification"

    @property
    def class_names(self) -> list[str]:
        if self.label_column is None:
            return []
        if self.problem_type == "regression":
            return [self.label_column]
        return self.given_names or self.labels_found

    def read_splits(self) -> dict[str, Texts]:
        """All files that are given; to predict with classes that are known, the texts to predict are enough."""
        splits = {}
        doing = self.trainer.state.fn if self.trainer else None
        enough = self.files["predict"] and self.given_names and doing and doing.value == "predict"
        for split, pattern in self.files.items():
            if enough and split != "predict":
                continue
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
        rows, values = usable(table)
        bad = [row for row, problem in enumerate(problems) if problem]
        if bad and not (self.on_error == "skip" or (self.on_error is None and split == "predict")):
            more = f" (and {len(bad) - 1:,} row{'s' * (len(bad) > 2)} more)" if len(bad) > 1 else ""
            raise ValueError(
                f"{self.where(split, table, bad[0])}: {problems[bad[0]]}{more}; data.on_error=skip skips such rows"
            )
        if not rows:
            raise ValueError(f"{self.files[split]}: no text in it can be used")
        numbers = self.numbers(split, values, lambda at: self.where(split, table, rows[at]))
        return Texts(table, numbers, torch.tensor(rows) if bad else None, len(bad))

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
        if unknown:
            return torch.zeros(len(values), self.num_classes) if self.many else torch.full((len(values),), IGNORED)
        given = bool(self.given_names) and not self.names_learnt
        if not self.many:
            return label_numbers(values, self.class_names, where, given=given)
        shown = self.training_labels if self.files["train"] and not self.names_learnt else values
        indicators = width_of_indicators(shown) is not None
        return several_numbers(values, self.class_names, where, indicators=indicators, given=given)

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
        }
        for name in ("problem_type", "label_separator", "separator", "quoted", "encoding"):
            options[name] = getattr(self, name)
        key = self.digest(READER, options, [(file.suffix, digest(file)) for file in files])
        string = datasets.Value("string")
        label = {"multi_label_classification": datasets.List(string), "regression": datasets.Value("float64")}
        features = {
            **dict.fromkeys(("text", "pair")[: len(self.text_columns)], string),
            "label": label.get(self.problem_type, string),
            **{"file": datasets.Value("int32"), "line": datasets.Value("int64"), "problem": string},
        }
        with progress_bars(sum(file.stat().st_size for file in files) > 200 * MANY):
            return cached_table(key, datasets.Features(features), functools.partial(read_files, files, **options))


def usable(table: Any) -> tuple[list[int], list[Any]]:
    """Rows of a table that nothing is wrong with, and their labels as the files have them."""
    rows = [row for row, problem in enumerate(table.data["problem"].to_pylist()) if not problem]
    labels = table.data["label"].to_pylist()
    return rows, [labels[row] for row in rows]
