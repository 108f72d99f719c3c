"""A table of one's own with several label columns: images by their paths, or texts; masks as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .images.several import Columns, SeveralTasks
from .images.sources import ImageFiles, ImageSource, check_files_exist
from .labels.columns import check_kinds, is_empty, labels_of, tasks_of
from .labels.tasks import Task, TaskKind, hide, label_facts
from .sampling.draws import Batch, Draw
from .text_files import TextFiles
from .texts.rows import expand, rows_of
from .texts.tokens import TokenBatches

Files = str | list[str] | None


class Cells:
    """The cells of some columns, row after row, and where each row stands.

    Args:
        files: Tables.
        columns: Those wanted.
        strict: Whether a row that can't be read is an error; else its cells are empty.
        **options: Those of `rows_of`.
    """

    def __init__(self, files: str | list[str], columns: Sequence[str], *, strict: bool = True, **options: Any) -> None:
        self.places: list[tuple[Path, int]] = []
        self.columns: dict[str, list[Any]] = {name: [] for name in columns}
        for file in expand(files):
            for line, row, problem in rows_of(file, columns, **options):
                if problem and strict:
                    raise ValueError(f"{file}, line {line}: {problem}")
                self.places.append((file, line))
                for name, cells in self.columns.items():
                    cells.append(None if problem else row.get(name))

    def where(self, row: int) -> str:
        file, line = self.places[row]
        return f"{file}, {'row' if file.suffix == '.parquet' else 'line'} {line}"


class ImageColumns(SeveralTasks):
    """Images and their labels in a CSV, TSV, JSON lines or Parquet table.

    Contents, licence, source: yours. A row has an image's path and, in columns of their own, its labels:

        image,breed,weight,traits,outline
        a.jpg,collie,21.5,"calm,long hair",a_mask.png
        b.jpg,,18,[],

    An empty cell is a label that is not known; a list that is empty, `[]`, says that no label applies. A mask is a
    grey or palette PNG of its image's size, whose values are the classes' numbers; 255 marks what is not known.
    Paths are relative to `root`. Splits: a file each; without one for validation, `val_share` of the training rows is
    held out, in each class of the first column of classes alike.

    Args:
        train_file: Table, pattern such as `data/*.csv`, or a list of them.
        val_file: For validation, if there is one.
        test_file: For the test, if there is one.
        predict_file: Images to predict, labels not needed; those of the test, or else of validation, if not given.
        labels: Column -> `classification`, `multi_label`, `regression` or `segmentation`.
        image_column: Column of the paths.
        class_names: Column -> names in the order of the labels; the training rows' labels if not given, but for masks.
        label_separator: Between several labels in a cell.
        root: Folder that paths begin at; that of the table if not given.
        **kwargs: Those of `ImageDataModule`.
    """

    def __init__(
        self,
        train_file: Files = None,
        val_file: Files = None,
        test_file: Files = None,
        predict_file: Files = None,
        labels: dict[str, TaskKind] | None = None,
        image_column: str = "image",
        class_names: dict[str, list[str]] | None = None,
        label_separator: str = ",",
        root: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.files = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        self.kinds, self.image_column, self.root = labels or {}, image_column, root
        check_kinds(self.kinds)
        self.given_names, self.label_separator = class_names or {}, label_separator
        self.cells: dict[str, Cells] = {}

    def read(self, split: str) -> Cells:
        """A split's table, read once."""
        if split not in self.cells:
            if not (files := self.files[split]):
                raise ValueError("data.train_file is not set: give a CSV, TSV, JSON lines or Parquet file")
            self.cells[split] = Cells(files, [self.image_column, *(self.kinds if split != "predict" else ())])
        return self.cells[split]

    @cached_property
    def tasks(self) -> dict[str, Task]:  # type: ignore[override]
        return tasks_of(
            self.kinds, lambda name: self.read("train").columns[name], self.given_names, self.label_separator
        )

    @property
    def class_names(self) -> list[str]:
        """Of the first column of classes, which splits are stratified by; the last name stands for no label."""
        first = next((task for task in self.tasks.values() if task.kind == "classification"), None)
        return [*(first.class_names if first else ()), "none"]

    def read_splits(self) -> dict[str, ImageSource]:
        return {split: self.images(split) for split, files in self.files.items() if files or split == "train"}

    def images(self, split: str) -> ImageSource:
        """A split's images, with their labels as `columns`."""
        cells = self.read(split)
        for row, path in enumerate(cells.columns[self.image_column]):
            if is_empty(path):
                raise ValueError(f"{cells.where(row)}: there is no path of an image")
        paths = self.paths(cells, self.image_column)
        check_files_exist(paths, f"{self.image_column} in {self.files[split]} and data.root say where they are")
        found = Columns()
        for name, task in self.tasks.items() if split != "predict" else ():
            if task.kind == "segmentation":
                masks = self.paths(cells, name)
                check_files_exist(
                    [path for path in masks if path], f"{name} in {self.files[split]} says where they are"
                )
                found.masks[name] = MaskFiles(masks, task.outputs)
                found.masked[name] = torch.tensor([bool(path) for path in masks])
            else:
                given = name in self.given_names
                found.values[name] = labels_of(
                    task, cells.columns[name], cells.where, given=given, separator=self.label_separator
                )
        classes = [
            found.values[name] for name, task in self.tasks.items() if task.kind == "classification" and found.values
        ]
        last = len(self.class_names) - 1
        strata = classes[0].where(classes[0] >= 0, last) if classes else torch.full((len(paths),), last)
        images = ImageFiles(paths, strata)
        images.columns = found  # type: ignore[attr-defined]
        return images

    def paths(self, cells: Cells, column: str) -> list[str]:
        """Of the files that a column names; empty where a cell is."""
        rows = zip(cells.columns[column], cells.places, strict=True)
        return ["" if is_empty(cell) else str(Path(self.root or file.parent) / str(cell)) for cell, (file, _) in rows]


class MaskFiles:
    """The masks of images, by their row; a value that is no class is an error that names the file."""

    def __init__(self, paths: Sequence[str], classes: int) -> None:
        self.paths, self.classes = paths, classes

    def __call__(self, row: int) -> Image.Image | None:
        if not (path := self.paths[row]):
            return None
        try:
            with Image.open(path) as opened:
                opened.load()
                if opened.mode not in ("L", "P", "1", "I", "I;16"):
                    raise ValueError(f"expected one number a pixel, found the mode {opened.mode}")
                values = torch.from_numpy(np.array(opened).astype(np.int64))
        except Exception as error:  # decoders raise a dozen kinds
            raise ValueError(f"cannot read the mask {path}: {error}") from error
        wrong = values[(values >= self.classes) & (values != 255)]
        if len(wrong):
            raise ValueError(
                f"the mask {path} has the value {int(wrong[0])}; there are {self.classes} classes, 0 to "
                f"{self.classes - 1}, and 255 for what is not known"
            )
        return Image.fromarray(values.to(torch.uint8).numpy())


class TextColumns(TextFiles):
    """Texts and their labels in a CSV, TSV, JSON lines or Parquet table, each label in a column of its own.

    As `ImageColumns`, with a text, or a pair of texts, in place of an image, and without masks. Batches are those of
    `texts.base`, and have `labels`, by task, beside.

    Args:
        labels: Column -> `classification`, `multi_label` or `regression`.
        class_names: Column -> names in the order of the labels; the training rows' labels if not given.
        **kwargs: Those of `TextFiles`, but for its one label.
    """

    def __init__(
        self, labels: dict[str, TaskKind] | None = None, class_names: dict[str, list[str]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(label_column=None, **kwargs)
        self.kinds: dict[str, TaskKind] = labels or {}
        check_kinds(self.kinds)
        if "segmentation" in self.kinds.values():
            raise ValueError("data.labels: a text has no mask; segmentation is for images")
        self.given_classes = class_names or {}
        self.cells: dict[str, Cells] = {}

    def read(self, split: str) -> Cells:
        """A split's label columns, read once, row for row as `table` has its texts."""
        if split not in self.cells:
            options = {"separator": self.separator, "quoted": self.quoted, "encoding": self.encoding}
            if not (files := self.files[split]):
                raise ValueError("data.train_file is not set: give a CSV, TSV, JSON lines or Parquet file")
            self.cells[split] = Cells(files, list(self.kinds), strict=False, **options)
        return self.cells[split]

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """What is learnt; known before `setup`."""
        cells = lambda name: self.read("train").columns[name]  # noqa: E731
        return tasks_of(self.kinds, cells, self.given_classes, self.label_separator)

    def labels(self, split: str) -> dict[str, Tensor]:
        """Task -> labels of a split's texts; none of texts to predict."""
        files = self.files.get(split) or self.files["train"]
        source = next(name for name, given in self.files.items() if given is files)
        if source == "predict":
            return {}
        cells, rows = self.read(source), self.splits[split].rows
        found = {}
        for name, task in self.tasks.items():
            given = name in self.given_classes
            whole = labels_of(task, cells.columns[name], cells.where, given=given, separator=self.label_separator)
            found[name] = whole if rows is None else whole[rows]
        return found

    @property
    def label_facts(self) -> dict[str, dict[str, float]]:
        """As of images with several labels."""
        return label_facts(self.tasks, self.labels("train"))

    def _dataset(self, split: str) -> TokenBatches:
        plain = super()._dataset(split)
        return LabelledTokens(plain, self.labels(split))


class LabelledTokens(TokenBatches):
    """Batches of tokens with several labels, `(n,)` or `(n, classes)` each."""

    def __init__(self, tokens: TokenBatches, values: dict[str, Tensor]) -> None:
        super().__init__(tokens.texts, tokens.tokens, tokens.pad, tokens.max_length)
        self.values = values

    def __getitems__(self, draws: list[Draw]) -> Batch:
        batch = super().__getitems__(draws)
        batch["labels"] = {name: values.index_select(0, batch["index"]) for name, values in self.values.items()}
        hide(batch["labels"], torch.tensor([draw.is_padding for draw in draws]))
        return batch
