"""Any Hugging Face data set of texts: from the hub or from a folder in its layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from .files.hub import class_label_names, load_splits, row_namer
from .labels.values import (
    IGNORED,
    check_each,
    class_numbers,
    learn_classes,
    learn_multi_label_classes,
    multi_hot,
    positions,
    several_labels,
    several_numbers,
    width_of_indicators,
)
from .texts.base import TextDataModule
from .texts.tokens import Texts


class HuggingFaceTexts(TextDataModule):
    """Texts that the `datasets` library reads.

    Contents, licence, source: the data set's. Folder: the library's cache, or the files given.
    Splits: `train_split`, and `val_split` and `test_split` where they are named; else `val_share` of the training
    split is held out, and testing falls back on it with a warning. GLUE's test splits have no labels (-1): name none.

    Args:
        path: Name on the hub such as `nyu-mll/glue`, a local folder, or a format such as `parquet` together with
            `data_files`.
        name: Configuration of the data set, where it has several, such as `sst2`.
        data_files: Split name to file, or to a list or pattern of files.
        revision: Commit or tag on the hub; pin it to get the same data again.
        text_column: Column of the text, or the two columns of a pair.
        label_column: Column of labels: a ClassLabel, whole numbers, names, a list of names or 0 and 1 for each class,
            or a score; None for texts without.
        train_split: Name of the split to train on.
        val_split: Name of the validation split, if there is one.
        test_split: Name of the test split, if there is one.
        **kwargs: Those of `TextDataModule`.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        data_files: dict[str, str | list[str]] | None = None,
        revision: str | None = None,
        text_column: str | list[str] = "text",
        label_column: str | None = "label",
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source: dict[str, Any] = {"path": path, "name": name, "data_files": data_files, "revision": revision}
        self.text_columns = [text_column] if isinstance(text_column, str) else list(text_column)
        if len(self.text_columns) not in (1, 2):
            raise ValueError(f"data.text_column must be one column or two; received {self.text_columns}")
        self.label_column = label_column
        self.split_names = {"train": train_split, "val": val_split, "test": test_split}

    @cached_property
    def tables(self) -> dict[str, Any]:
        """The splits as `datasets.Dataset`; downloads them if they are not there."""
        labels = [] if self.label_column is None else [self.label_column]
        return load_splits(self.source, self.split_names, [*self.text_columns, *labels])

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The ClassLabel's names; else the training texts' labels, numbers in numerical order."""
        if self.label_column is None:
            return []
        if self.problem_type == "regression":
            return [self.label_column]
        if (names := class_label_names(self.tables["train"], self.label_column)) is not None:
            return names
        learn = learn_classes if self.problem_type == "single_label_classification" else learn_multi_label_classes
        return learn(self.labels_of("train"))

    def place(self, split: str) -> Callable[[int], str]:
        return row_namer(self.source["path"], self.split_names[split])

    def labels_of(self, split: str) -> list[Any]:
        """A split's labels as they are stored; one that is missing, or of another kind, is an error."""
        values: list[Any] = self.tables[split].data[self.label_column].to_pylist()
        where = self.place(split)
        if self.problem_type == "single_label_classification":
            check_each(values, where)
            return values
        for row, value in enumerate(values):
            if self.problem_type == "regression":
                problem = "" if value is not None and math.isfinite(float(value)) else f"the score is {value}"
            else:
                values[row], problem = several_labels(value, ",")
            if problem:
                raise ValueError(f"{where(row)}: {problem}")
        return values

    def read_splits(self) -> dict[str, Texts]:
        return {split: self.texts(split, table) for split, table in self.tables.items()}

    def texts(self, split: str, table: Any) -> Texts:
        """A split; an empty text is an error that names its row."""
        import pyarrow.compute  # comes with datasets

        where = self.place(split)
        for column in self.text_columns:
            empty = pyarrow.compute.equal(pyarrow.compute.utf8_trim_whitespace(table.data[column]), "").fill_null(True)
            if (first := empty.index(True).as_py()) >= 0:
                raise ValueError(f"{where(first)}: the text is empty")
        renamed = dict(zip(self.text_columns, ("text", "pair"), strict=False))
        texts = table.select_columns(self.text_columns).rename_columns(renamed)
        if self.label_column is None:
            return Texts(texts, torch.full((len(texts),), IGNORED))
        values = self.labels_of(split)
        if self.problem_type == "regression":
            return Texts(texts, torch.tensor([float(value) for value in values]))
        known, names = self.class_names, class_label_names(table, self.label_column)
        if self.problem_type == "single_label_classification":
            return Texts(texts, class_numbers(values, names, known, where))
        if names is not None:
            hot = multi_hot(values, len(known), where, lambda flat, at: positions(flat, names, known, at))
            return Texts(texts, hot)
        indicators = width_of_indicators(self.labels_of("train")) is not None
        return Texts(texts, several_numbers(values, known, where, indicators=indicators))
