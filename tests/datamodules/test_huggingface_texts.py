"""Texts that the datasets library reads: labels of every kind, and errors with their row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from datamodules import HuggingFaceTexts
from tests.tiny_encoders import write_text_parquet


def parquet(folder: Path, columns: dict[str, list[Any]], **options: Any) -> HuggingFaceTexts:
    path = folder / "train.parquet"
    datasets.Dataset.from_dict(columns).to_parquet(str(path))
    return HuggingFaceTexts("parquet", data_files={"train": str(path)}, **options)


def test_a_class_label_brings_its_names(own_folder: Path) -> None:
    files = {
        split: str(write_text_parquet(own_folder / f"{split}.parquet", 12, "sentence"))
        for split in ("train", "validation")
    }
    data = HuggingFaceTexts("parquet", data_files=files, text_column="sentence", val_split="validation")
    assert data.class_names == ["bad", "good"]
    data.setup("fit")
    assert len(data.splits["train"]) == len(data.splits["val"]) == 12
    assert data.splits["train"].labels.tolist() == [0, 1] * 6
    assert data.splits["train"].text(0).startswith("a dull")


def test_names_several_labels_scores_and_pairs(own_folder: Path) -> None:
    data = parquet(own_folder, {"text": ["a", "b"], "label": ["y", "x"]})
    assert data.class_names == ["x", "y"] and data.read_splits()["train"].labels.tolist() == [1, 0]
    data = parquet(own_folder, {"text": ["a", "b"], "label": [[2], [0, 1]]}, problem_type="multi_label_classification")
    assert data.class_names == ["0", "1", "2"]
    assert data.read_splits()["train"].labels.tolist() == [[0, 0, 1], [1, 1, 0]]
    data = parquet(
        own_folder, {"text": ["a", "b"], "score": [0.5, 2.0]}, problem_type="regression", label_column="score"
    )
    assert data.num_classes == 1 and data.read_splits()["train"].labels.tolist() == [0.5, 2.0]
    data = parquet(own_folder, {"one": ["a"], "two": ["b"], "label": [0]}, text_column=["one", "two"])
    assert data.read_splits()["train"].text(0) == "a | b"
    data = parquet(own_folder, {"text": ["a", "b"]}, label_column=None)
    assert data.class_names == [] and len(data.read_splits()["train"]) == 2


def test_what_is_wrong_is_named_with_its_row(own_folder: Path) -> None:
    with pytest.raises(ValueError, match="split 'train', row 1: the text is empty"):
        parquet(own_folder, {"text": ["a", " "], "label": [0, 1]}).read_splits()
    with pytest.raises(ValueError, match="row 0: the text is empty"):
        parquet(own_folder, {"text": [None, "a"], "label": [0, 1]}).read_splits()
    with pytest.raises(ValueError, match="no column 'text' in split 'train' of parquet: it has sentence, label"):
        parquet(own_folder, {"sentence": ["a"], "label": [0]}).read_splits()
    label = datasets.ClassLabel(names=["x", "y"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    path = own_folder / "hidden.parquet"
    datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features).to_parquet(str(path))
    with pytest.raises(ValueError, match="row 0: label '-1' is not among the classes"):
        HuggingFaceTexts("parquet", data_files={"train": str(path)}).read_splits()
