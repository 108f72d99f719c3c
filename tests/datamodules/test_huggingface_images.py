"""Tables of images: each label is the right class, or its row is named."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from datamodules import HuggingFaceImages, ParquetImages
from datamodules.images.base import ImageDataModule
from tests.conftest import picture, write_parquet


def test_mistakes_in_a_table_get_a_sentence(tmp_path: Path) -> None:
    files = {"train": str(write_parquet(tmp_path / "a.parquet", 6))}
    with pytest.raises(ValueError, match="no split 'test' in parquet: it has train"):
        HuggingFaceImages("parquet", data_files=files).setup()
    with pytest.raises(ValueError, match="no column 'img' in split 'train' of parquet: it has image, label"):
        HuggingFaceImages("parquet", data_files=files, image_column="img", test_split=None).setup()
    with pytest.raises(FileNotFoundError, match=r"no data set .*nowhere\.parquet"):
        HuggingFaceImages("parquet", data_files={"train": str(tmp_path / "nowhere.parquet")}).setup()
    with pytest.raises(FileNotFoundError, match="no data set some/thing: expected a name on the hub"):
        HuggingFaceImages("some/thing").setup()


def test_labels_may_be_names_or_numbers(tmp_path: Path) -> None:
    import datasets

    for labels, names in ((["wasp", "ant"] * 4, ["ant", "wasp"]), ([7, 3] * 4, ["3", "7"])):
        path = str(tmp_path / f"{names[0]}.parquet")
        cells = [{"bytes": None, "path": str(tmp_path / f"{n}.png")} for n in range(8)]
        for number, cell in enumerate(cells):
            picture(number).save(cell["path"])
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.Value("string" if names[0] == "ant" else "int64")}
        )
        datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features).to_parquet(path)
        data = HuggingFaceImages("parquet", data_files={"train": path}, test_split=None, val_share=0.25, image_size=16)
        data.setup()
        assert data.class_names == names
        assert sorted(data.splits["train"].images.labels.tolist()) == [0] * 4 + [1] * 4  # type: ignore[attr-defined]


def table(path: Path, labels: list[Any], kind: Any = None) -> str:
    """Images and labels in Parquet: a ClassLabel of these names, a type of `datasets`, or without metadata."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    picture(0, 16, 16).save(buffer, "PNG")
    cells = [{"bytes": buffer.getvalue(), "path": None}] * len(labels)
    if kind is None:
        pq.write_table(pa.table({"image": cells, "label": labels}), path)
    else:
        feature = datasets.ClassLabel(names=kind) if isinstance(kind, list) else datasets.Value(kind)
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features).to_parquet(str(path))
    return str(path)


LABELS: dict[str, tuple[Any, Any, list[str], list[int] | str]] = {  # training, test; classes, test's numbers or words
    "gaps": ([1, 2, 4, 5], [4, 1, 5], ["1", "2", "4", "5"], [2, 0, 3]),
    "a number that training lacks": (
        [1, 2, 4, 5],
        [4, 3],
        ["1", "2", "4", "5"],
        "1.*: label '3' is not among the classes of the training data",
    ),
    "numbers by value": ([10, 9, 100], [100, 9], ["9", "10", "100"], [2, 0]),
    "leading zeros": (["01", "02", "10"], ["10", "01"], ["01", "02", "10"], [2, 0]),
    "zeros lost in one": (
        ["01", "02"],
        [1, 2],
        ["01", "02"],
        "0.*: label '1' is not among the classes of the training data",
    ),
    "whole floats and integers": ([1.0, 2.0, 4.0], [4, 1], ["1", "2", "4"], [2, 0]),
    "integers and whole floats": ([1, 2, 4], [4.0, 1.0], ["1", "2", "4"], [2, 0]),
    "numbers as words": ([1, 2, 4], ["4", "1"], ["1", "2", "4"], [2, 0]),
    "a name that training lacks": (
        ["a", "b"],
        ["b", "c"],
        ["a", "b"],
        "1.*: label 'c' is not among the classes of the training data",
    ),
    "nothing in the test": ([1, 2], [1, None], ["1", "2"], "1.*: there is no label"),
    "nothing in training": ([1, None, 2], [1], ["1", "2"], "1.*: there is no label"),
    "NaN": ([1.0, 2.0], [1.0, float("nan")], ["1", "2"], "1.*: there is no label"),
    "digits as ClassLabel": (([0, 1, 2], ["5", "1", "2"]), ([2, 0], ["5", "1", "2"]), ["5", "1", "2"], [2, 0]),
    "1 and 0": (([0, 1], ["1", "0"]), ([1, 0], ["1", "0"]), ["1", "0"], [1, 0]),
    "a ClassLabel without label": (([0, 1], ["a", "b"]), ([1, None], ["a", "b"]), ["a", "b"], "1.*: there is no label"),
    "a list": ([["a"], ["b"]], [["a"]], ["a"], "0.*: the label is a list"),
}


@pytest.mark.parametrize("module", ["HuggingFaceImages", "ParquetImages"])
@pytest.mark.parametrize("kind", LABELS)
def test_a_label_is_the_right_class_or_its_row_is_named(tmp_path: Path, kind: str, module: str) -> None:
    (train, test, names, expected), options = LABELS[kind], {"image_size": 16, "num_workers": 0}
    train, test = (part if isinstance(part, tuple) else (part, None) for part in (train, test))
    paths = {"train": table(tmp_path / "a.parquet", *train), "test": table(tmp_path / "b.parquet", *test)}
    data: ImageDataModule
    if module == "ParquetImages":
        data = ParquetImages(paths["train"], val_files=paths["train"], test_files=paths["test"], **options)
    else:
        data = HuggingFaceImages("parquet", data_files=paths, val_split="train", **options)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            data.setup()
        return
    data.setup()
    assert data.class_names == names
    assert data.splits["test"].labels.tolist() == expected


def test_labels_of_images_in_a_csv(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    files = {}
    for split, labels in (("train", [1, 2, 4, 2]), ("test", [4, 1]), ("strange", [4, 3]), ("gap", [4, ""])):
        lines = [f"{tmp_path}/a.png,{label}" for label in labels]
        (tmp_path / f"{split}.csv").write_text("\n".join(["image,label", *lines]))
        files[split] = str(tmp_path / f"{split}.csv")
    data = HuggingFaceImages("csv", data_files=files, image_size=16, val_split="train")
    data.setup()
    assert data.class_names == ["1", "2", "4"] and data.splits["test"].labels.tolist() == [2, 0]
    assert data.splits["test"].read(0).size == (48, 40)
    for split, words in (
        ("strange", "split 'strange', row 1: label '3' is not among"),
        ("gap", "split 'gap', row 1: there is no label"),
    ):
        with pytest.raises(ValueError, match=words):
            HuggingFaceImages("csv", data_files=files, image_size=16, test_split=split).setup()
