"""Any Hugging Face data set of images: from the hub, from Parquet files, or from a folder in its layout."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from .files.hub import class_label_names, load_splits, row_namer
from .images.base import ImageDataModule
from .images.sources import ImageSource, decode
from .labels.values import check_each, class_numbers, learn_classes


class HuggingFaceImages(ImageDataModule):
    """Images that the `datasets` library reads.

    Contents, licence, source: the data set's. Folder: the library's cache, or the files given.
    Splits: `train_split`, and `val_split` and `test_split` where they are named; else `val_share` of the
    training split is held out, and testing falls back on it with a warning.

    Args:
        path: Name on the hub such as `uoft-cs/cifar10`, a local folder, or a format such as `parquet` or
            `imagefolder` together with `data_files`.
        name: Configuration of the data set, where it has several.
        data_files: Split name to file, or to a list or pattern of files.
        revision: Commit or tag on the hub; pin it to get the same data again.
        image_column: Column of images.
        label_column: Column of class labels: a ClassLabel, whole numbers, or names.
        train_split: Name of the split to train on.
        val_split: Name of the validation split, if there is one.
        test_split: Name of the test split, if there is one.
        **kwargs: Those of `ImageDataModule`.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        data_files: dict[str, str | list[str]] | None = None,
        revision: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source: dict[str, Any] = {"path": path, "name": name, "data_files": data_files, "revision": revision}
        self.image_column, self.label_column = image_column, label_column
        self.split_names = {"train": train_split, "val": val_split, "test": test_split}

    @cached_property
    def tables(self) -> dict[str, Any]:
        """The splits as `datasets.Dataset`, images still encoded; downloads them if they are not there."""
        import datasets  # slow to import: only where it is used

        tables = load_splits(self.source, self.split_names, [self.image_column, self.label_column])
        image = datasets.Image(decode=False)
        return {split: table.cast_column(self.image_column, image) for split, table in tables.items()}

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The ClassLabel's names; else the sorted values of the training split."""
        return class_label_names(self.tables["train"], self.label_column) or learn_classes(self._values("train"))

    def prepare_data(self) -> None:
        self.tables  # noqa: B018  a cached property: reading it is the work

    def read_splits(self) -> dict[str, ImageSource]:
        """Read the labels; images stay encoded in the memory-mapped table."""
        splits: dict[str, ImageSource] = {}
        for split, table in self.tables.items():
            names, where = class_label_names(table, self.label_column), self._where(split)
            labels = class_numbers(self._values(split), names, self.class_names, where)
            splits[split] = TableImages(table, self.image_column, labels, f"{self.source['path']}/{split}")
        return splits

    def _values(self, split: str) -> list[Any]:
        """The label column at once: row by row is far slower."""
        values: list[Any] = self.tables[split].data[self.label_column].to_pylist()
        check_each(values, self._where(split))
        return values

    def _where(self, split: str) -> Callable[[int], str]:
        return row_namer(self.source["path"], self.split_names[split])


class TableImages:
    """Encoded images in a column of a `datasets.Dataset`, cast to `Image(decode=False)`.

    `source` begins the name of an image that has none.
    """

    def __init__(self, table: Any, column: str, labels: torch.Tensor, source: str) -> None:
        self.table, self.column, self.labels, self.source = table, column, labels, source

    def cell(self, index: int) -> dict[str, Any] | None:
        """Encoded bytes and path of a row, without reading its other columns."""
        return self.table.data[self.column][index].as_py()  # type: ignore[no-any-return]

    def read(self, index: int) -> Image.Image:
        cell = self.cell(index)
        if cell is None:
            raise ValueError(f"row {index} of {self.source} has no image")
        file = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
        return decode(file, f"row {index} of {self.source}")

    def name(self, index: int) -> str:
        """The file name stored with the image, or the row."""
        cell = self.cell(index)
        return (cell and cell["path"]) or f"{self.source}/{index}"

    def fingerprint(self) -> str:
        return str(self.table._fingerprint)
