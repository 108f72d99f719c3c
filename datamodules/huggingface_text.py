"""Any Hugging Face data set of texts: from the hub or from a folder in its layout."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from .huggingface import load_splits
from .sampling import IGNORED
from .text import TextDataModule, Texts, label_numbers


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
        """The ClassLabel's names; else the sorted values of the training split."""
        if self.label_column is None:
            return []
        if self.problem_type == "regression":
            return [self.label_column]
        feature = self.tables["train"].features[self.label_column]
        feature = getattr(feature, "feature", feature)
        if hasattr(feature, "names"):
            return list(feature.names)
        values = self.tables["train"].data[self.label_column].to_pylist()
        found = {one for value in values for one in (value if isinstance(value, list) else [value])}
        return [str(value) for value in sorted(found)]

    def read_splits(self) -> dict[str, Texts]:
        """Labels into memory; texts stay in the memory-mapped table."""
        return {split: self.texts(split, table) for split, table in self.tables.items()}

    def texts(self, split: str, table: Any) -> Texts:
        """A split; an empty text is an error that names its row."""
        import pyarrow.compute  # comes with datasets

        where = f"{self.source['path']}, split {self.split_names[split]!r}, row"
        for column in self.text_columns:
            empty = pyarrow.compute.equal(pyarrow.compute.utf8_trim_whitespace(table.data[column]), "").fill_null(True)
            if (first := empty.index(True).as_py()) >= 0:
                raise ValueError(f"{where} {first}: the text is empty")
        names = dict(zip(self.text_columns, ("text", "pair"), strict=False))
        texts = table.select_columns(self.text_columns).rename_columns(names)
        if self.label_column is None:
            return Texts(texts, torch.full((len(texts),), IGNORED))
        values = table.data[self.label_column].to_pylist()
        if self.problem_type == "regression":
            return Texts(texts, torch.tensor(values, dtype=torch.float32))
        known = self.class_names
        if self.problem_type == "single_label_classification":
            return Texts(texts, label_numbers([str(value) for value in values], known, lambda row: f"{where} {row}"))
        hot = torch.zeros(len(values), len(known))
        rows = np.repeat(np.arange(len(values)), [len(value) for value in values])
        flat = [str(one) for value in values for one in value]
        hot[rows, label_numbers(flat, known, lambda at: f"{where} {rows[at]}")] = 1
        return Texts(texts, hot)
