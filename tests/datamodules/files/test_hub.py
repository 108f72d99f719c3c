"""Data sets of the Hugging Face hub and of files in its layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from datamodules import HuggingFaceTexts
from datamodules.files.hub import class_label_names, load_splits, row_namer


def test_what_the_hub_does_not_have_is_a_sentence() -> None:
    with pytest.raises(FileNotFoundError, match="no data set nobody/nothing: expected a name on the hub"):
        HuggingFaceTexts("nobody/nothing").read_splits()


def source(files: dict[str, str]) -> dict[str, Any]:
    return {"path": "parquet", "name": None, "data_files": files, "revision": None}


def labelled(path: Path, names: list[str]) -> str:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    table.to_parquet(str(path))
    return str(path)


def test_splits_are_named_and_checked(own_folder: Path) -> None:
    files = {"train": labelled(own_folder / "a.parquet", ["x", "y"])}
    tables = load_splits(source(files), {"train": "train", "test": None}, ["text", "label"])
    assert list(tables) == ["train"] and tables["train"]["text"][:] == ["a", "b"]
    assert class_label_names(tables["train"], "label") == ["x", "y"]
    assert class_label_names(tables["train"], "text") is None
    with pytest.raises(ValueError, match="no split 'val' in parquet: it has train"):
        load_splits(source(files), {"val": "val"}, [])
    with pytest.raises(ValueError, match="no column 'label2' in split 'train' of parquet: it has text, label"):
        load_splits(source(files), {"train": "train"}, ["label2"])


def test_files_of_one_data_set_have_one_order_of_classes(own_folder: Path) -> None:
    labelled(own_folder / "a.parquet", ["x", "y"])
    labelled(own_folder / "b.parquet", ["y", "x"])
    files = {"train": str(own_folder / "*.parquet")}
    with pytest.raises(ValueError, match=r"b.parquet: the classes of 'label' are y, x, and elsewhere x, y"):
        load_splits(source(files), {"train": "train"}, ["label"])


def test_a_row_is_named_by_its_split() -> None:
    assert row_namer("some/set", "train")(3) == "some/set, split 'train', row 3"
