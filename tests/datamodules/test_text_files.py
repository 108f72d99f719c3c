"""Files of texts: every format reads the same, and what is wrong is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from datamodules import TextFiles
from datamodules.texts import reading
from datamodules.texts.rows import rows_of

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


def csv(folder: Path, *lines: str | bytes, name: str = "a.csv") -> str:
    path = folder / name
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return str(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("one,two,three", "line 3: 3 fields, and the header has 2"),
        ("one", "line 3: 1 fields"),
        ("  ,good", "line 3: the text is empty"),
        ("fine,", "line 3: there is no label"),
        (b"caf\xe9,good", "line 3: the text is not in the encoding"),
        (b"fine,caf\xe9", "line 3: the label is not in the encoding"),
        ('"open,good', "line 3: not CSV"),
    ],
)
def test_a_row_that_cannot_be_right_is_named_or_skipped(own_folder: Path, line: str | bytes, words: str) -> None:
    last = [] if line == '"open,good' else ["last,bad"]  # a quote that is not closed takes the rest of the file
    path = csv(own_folder, "text,label", "first,good", line, *last)
    with pytest.raises(ValueError, match=f"a.csv, {words}.*on_error=skip"):
        TextFiles(path, label_column="label").read_splits()
    data = TextFiles(path, on_error="skip")
    train = data.read_splits()["train"]
    assert train.skipped == 1 and len(train) == 1 + len(last)
    assert train.text(len(train) - 1) == ("last" if last else "first")
    assert data.class_names == (["bad", "good"] if last else ["good"]), "a row that is left out has no say"


def test_lines_are_those_of_the_file_where_texts_have_several(own_folder: Path) -> None:
    path = csv(own_folder, "text,label", '"one', 'two",good', "", "three,,")
    with pytest.raises(ValueError, match="a.csv, line 5: 3 fields"):
        TextFiles(path).read_splits()


@pytest.mark.parametrize(("line", "words"), [("[1]", "expected an object, found list"), ("{", "not JSON")])
def test_json_that_is_none(own_folder: Path, line: str, words: str) -> None:
    path = csv(own_folder, '{"text": "a", "label": 1}', line, name="a.jsonl")
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: {words}"):
        TextFiles(path).read_splits()


def test_json_with_a_text_that_is_no_string_and_a_label_that_is_missing(own_folder: Path) -> None:
    lines = ('{"text": "a", "label": 1}', '{"text": 5, "label": 1}', '{"text": "b"}')
    data = TextFiles(csv(own_folder, *lines, name="a.jsonl"), on_error="skip")
    assert data.read_splits()["train"].skipped == 2
    with pytest.raises(ValueError, match="line 2: the text is int, not a string .and 1 row more"):
        TextFiles(data.files["train"]).read_splits()


def test_a_column_that_is_not_there(own_folder: Path) -> None:
    with pytest.raises(ValueError, match="a.csv has no column 'text', but 'txet', 'label'; did you mean 'txet'?"):
        TextFiles(csv(own_folder, "txet,label", "a,b")).read_splits()


def test_a_label_that_the_training_texts_lack_is_named_with_its_line(own_folder: Path) -> None:
    train = csv(own_folder, "text,label", "a,x", "b,y", name="train.csv")
    val = csv(own_folder, "text,label", "a,x", "b,z", name="val.csv")
    with pytest.raises(ValueError, match="val.csv, line 3: label 'z' is not among the classes .* x, y"):
        TextFiles(train, val_file=val).read_splits()


def test_numbers_sort_as_numbers_and_can_be_given_names(own_folder: Path) -> None:
    path = csv(own_folder, "text,label", "a,10", "b,9", "c,0")
    assert TextFiles(path).class_names == ["0", "9", "10"]
    path = csv(own_folder, "text,label", "a,1", "b,0")
    data = TextFiles(path, class_names=["negative", "positive"])
    assert data.read_splits()["train"].labels.tolist() == [1, 0] and data.class_names == ["negative", "positive"]


def test_several_labels(own_folder: Path) -> None:
    path = csv(own_folder, "text,label", 'a,"red, green"', "b,", "c,red")
    data = TextFiles(path, problem_type="multi_label_classification")
    assert data.class_names == ["green", "red"]
    assert data.read_splits()["train"].labels.tolist() == [[1, 1], [0, 0], [0, 1]]
    path = csv(own_folder, '{"text": "a", "label": ["x", "y"]}', '{"text": "b", "label": []}', name="a.jsonl")
    data = TextFiles(path, problem_type="multi_label_classification")
    assert data.read_splits()["train"].labels.tolist() == [[1, 1], [0, 0]]


def test_scores(own_folder: Path) -> None:
    path = csv(own_folder, "text,label", "a,1.5", "b,-2", "c,much", "d,nan")
    data = TextFiles(path, problem_type="regression", on_error="skip")
    assert data.num_classes == 1 and data.class_names == ["label"]
    assert data.read_splits()["train"].labels.tolist() == [1.5, -2.0]
    with pytest.raises(ValueError, match="line 4: the score is 'much', not a number"):
        TextFiles(path, problem_type="regression").read_splits()


def test_pairs(own_folder: Path) -> None:
    path = csv(own_folder, "a,b,label", "one,two,x", "three,,y")
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


def test_several_files_and_patterns(own_folder: Path) -> None:
    csv(own_folder, "text,label", "a,x", name="part1.csv")
    csv(own_folder, "text,label", "b,y", ",", name="part2.csv")
    with pytest.raises(ValueError, match="part2.csv, line 3"):
        TextFiles("part*.csv").read_splits()
    assert len(TextFiles("part*.csv", on_error="skip").read_splits()["train"]) == 2
    with pytest.raises(ValueError, match="expected one of .csv, .tsv"):
        TextFiles(csv(own_folder, "a", name="a.doc")).read_splits()


def test_a_file_is_read_once_and_again_when_it_changes(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return rows_of(*args, **options)

    monkeypatch.setattr(reading, "rows_of", counted)
    path = csv(own_folder, "text,label", "a,x", "once,y")
    for _ in range(2):
        assert len(TextFiles(path).read_splits()["train"]) == 2
    assert len(calls) == 1
    csv(own_folder, "text,label", "a,x", "once,y", "more,y")
    assert len(TextFiles(path).read_splits()["train"]) == 3
    assert len(calls) == 2


def test_a_file_with_nothing_in_it(own_folder: Path) -> None:
    with pytest.raises(ValueError, match="no column 'text'"):
        TextFiles(csv(own_folder, "")).read_splits()
    with pytest.raises(ValueError, match="no text in it can be used"):
        TextFiles(csv(own_folder, "text,label")).read_splits()


def test_a_mark_at_the_beginning_is_no_part_of_the_first_column(own_folder: Path) -> None:
    path = csv(own_folder, b"\xef\xbb\xbftext,label", "a,x")
    assert TextFiles(path).class_names == ["x"]


def test_another_encoding(own_folder: Path) -> None:
    path = csv(own_folder, "text,label", "café,x".encode("latin-1"))
    assert TextFiles(path, encoding="latin-1").read_splits()["train"].text(0) == "café"


def test_labels_are_not_asked_of_what_is_to_be_predicted(own_folder: Path) -> None:
    train = csv(own_folder, "text,label", "a,x", "b,y", name="train.csv")
    new = csv(own_folder, "text", "c", name="new.csv")
    splits = TextFiles(train, predict_file=new, problem_type="multi_label_classification").read_splits()
    assert torch.equal(splits["predict"].labels, torch.zeros(1, 2))
