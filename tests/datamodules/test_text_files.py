"""Files of texts: every format reads the same, and what is wrong is named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch

from datamodules import TextFiles
from tests.datamodules.conftest import write_lines

ROWS = [("a fine film", "good"), ('he said "no", twice', "bad"), ("two\nlines", "good"), ("déjà vu", "bad")]


def write(folder: Path, suffix: str) -> str:
    path = folder / f"texts{suffix}"
    if suffix == ".csv":
        quoted = ['"{}",{}'.format(text.replace('"', '""'), label) for text, label in ROWS]
        path.write_text("\n".join(["text,label", *quoted]), encoding="utf-8")
    elif suffix == ".tsv":
        lines = ["{}\t{}".format(text.replace("\n", " "), label) for text, label in ROWS]
        path.write_text("\n".join(["text\tlabel", *lines, ""]), encoding="utf-8")
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS))
    else:
        texts, labels = zip(*ROWS, strict=True)
        datasets.Dataset.from_dict({"text": texts, "label": labels}).to_parquet(str(path))
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_reads_the_same(own_folder: Path, suffix: str) -> None:
    data = TextFiles(write(own_folder, suffix))
    assert data.class_names == ["bad", "good"] and data.num_classes == 2
    train = data.read_splits()["train"]
    assert train.labels.tolist() == [1, 0, 1, 0]
    expected = [text.replace("\n", " ") if suffix == ".tsv" else text for text, _ in ROWS]
    assert [train.text(index) for index in range(4)] == expected


def test_lines_are_those_of_the_file_where_texts_have_several(own_folder: Path) -> None:
    path = write_lines(own_folder, "text,label", '"one', 'two",good', "", "three,,")
    with pytest.raises(ValueError, match="a.csv, line 5: 3 fields"):
        TextFiles(path).read_splits()


def test_a_column_that_is_not_there(own_folder: Path) -> None:
    with pytest.raises(ValueError, match="a.csv has no column 'text', but 'txet', 'label'; did you mean 'txet'?"):
        TextFiles(write_lines(own_folder, "txet,label", "a,b")).read_splits()


def test_a_label_that_the_training_texts_lack_is_named_with_its_line(own_folder: Path) -> None:
    train = write_lines(own_folder, "text,label", "a,x", "b,y", name="train.csv")
    val = write_lines(own_folder, "text,label", "a,x", "b,z", name="val.csv")
    with pytest.raises(ValueError, match="val.csv, line 3: label 'z' is not among the classes .* x, y"):
        TextFiles(train, val_file=val).read_splits()


def test_numbers_sort_as_numbers_and_can_be_given_names(own_folder: Path) -> None:
    path = write_lines(own_folder, "text,label", "a,10", "b,9", "c,0")
    assert TextFiles(path).class_names == ["0", "9", "10"]
    path = write_lines(own_folder, "text,label", "a,1", "b,0")
    data = TextFiles(path, class_names=["negative", "positive"])
    assert data.read_splits()["train"].labels.tolist() == [1, 0] and data.class_names == ["negative", "positive"]


def test_several_labels(own_folder: Path) -> None:
    path = write_lines(own_folder, "text,label", 'a,"red, green"', "b,", "c,red")
    data = TextFiles(path, problem_type="multi_label_classification")
    assert data.class_names == ["green", "red"]
    assert data.read_splits()["train"].labels.tolist() == [[1, 1], [0, 0], [0, 1]]
    path = write_lines(own_folder, '{"text": "a", "label": ["x", "y"]}', '{"text": "b", "label": []}', name="a.jsonl")
    data = TextFiles(path, problem_type="multi_label_classification")
    assert data.read_splits()["train"].labels.tolist() == [[1, 1], [0, 0]]


def test_pairs(own_folder: Path) -> None:
    path = write_lines(own_folder, "a,b,label", "one,two,x", "three,,y")
    with pytest.raises(ValueError, match="line 3: the text is empty"):
        TextFiles(path, text_column=["a", "b"]).read_splits()
    data = TextFiles(path, text_column=["a", "b"], on_error="skip")
    assert data.read_splits()["train"].text(0) == "one | two"
    with pytest.raises(ValueError, match="one column or two"):
        TextFiles(path, text_column=["a", "b", "label"])


def test_raw_texts_to_predict_need_no_training_file(own_folder: Path) -> None:
    path = own_folder / "raw.txt"
    path.write_text("first text\r\nsecond text\n")
    data = TextFiles("not/there.csv", predict_file=str(path), class_names=["a", "b"])
    splits = data.read_splits()
    assert list(splits) == ["predict"] and splits["predict"].text(1) == "second text"
    assert splits["predict"].labels.tolist() == [-100, -100]
    with pytest.raises(FileNotFoundError, match="no file not/there.csv"):
        TextFiles("not/there.csv", predict_file=str(path)).read_splits()


def test_labels_are_not_asked_of_what_is_to_be_predicted(own_folder: Path) -> None:
    train = write_lines(own_folder, "text,label", "a,x", "b,y", name="train.csv")
    new = write_lines(own_folder, "text", "c", name="new.csv")
    splits = TextFiles(train, predict_file=new, problem_type="multi_label_classification").read_splits()
    assert torch.equal(splits["predict"].labels, torch.zeros(1, 2))
