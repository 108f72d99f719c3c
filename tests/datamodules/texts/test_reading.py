"""Texts and labels from rows, and what is wrong with those that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from datamodules import TextFiles
from datamodules.texts import reading
from datamodules.texts.rows import rows_of
from tests.datamodules.conftest import write_lines


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
    path = write_lines(own_folder, "text,label", "first,good", line, *last)
    with pytest.raises(ValueError, match=f"a.csv, {words}.*on_error=skip"):
        TextFiles(path, label_column="label").read_splits()
    data = TextFiles(path, on_error="skip")
    train = data.read_splits()["train"]
    assert train.skipped == 1 and len(train) == 1 + len(last)
    assert train.text(len(train) - 1) == ("last" if last else "first")
    assert data.class_names == (["bad", "good"] if last else ["good"]), "a row that is left out has no say"


def test_json_with_a_text_that_is_no_string_and_a_label_that_is_missing(own_folder: Path) -> None:
    lines = ('{"text": "a", "label": 1}', '{"text": 5, "label": 1}', '{"text": "b"}')
    data = TextFiles(write_lines(own_folder, *lines, name="a.jsonl"), on_error="skip")
    assert data.read_splits()["train"].skipped == 2
    with pytest.raises(ValueError, match="line 2: the text is int, not a string .and 1 row more"):
        TextFiles(data.files["train"]).read_splits()


def test_scores(own_folder: Path) -> None:
    path = write_lines(own_folder, "text,label", "a,1.5", "b,-2", "c,much", "d,nan")
    data = TextFiles(path, problem_type="regression", on_error="skip")
    assert data.num_classes == 1 and data.class_names == ["label"]
    assert data.read_splits()["train"].labels.tolist() == [1.5, -2.0]
    with pytest.raises(ValueError, match="line 4: the score is 'much', not a number"):
        TextFiles(path, problem_type="regression").read_splits()


def test_a_file_is_read_once_and_again_when_it_changes(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return rows_of(*args, **options)

    monkeypatch.setattr(reading, "rows_of", counted)
    path = write_lines(own_folder, "text,label", "a,x", "once,y")
    for _ in range(2):
        assert len(TextFiles(path).read_splits()["train"]) == 2
    assert len(calls) == 1
    write_lines(own_folder, "text,label", "a,x", "once,y", "more,y")
    assert len(TextFiles(path).read_splits()["train"]) == 3
    assert len(calls) == 2


def test_a_file_with_nothing_in_it(own_folder: Path) -> None:
    with pytest.raises(ValueError, match="no column 'text'"):
        TextFiles(write_lines(own_folder, "")).read_splits()
    with pytest.raises(ValueError, match="no text in it can be used"):
        TextFiles(write_lines(own_folder, "text,label")).read_splits()


def test_a_label_with_two_minus_signs_is_a_word(own_folder: Path) -> None:
    Path("a.csv").write_text("text,label\na,--1\nb,-1\n")
    assert TextFiles("a.csv").class_names == ["-1", "--1"]


@pytest.mark.parametrize("score", ["1e39", "1_000", "inf", "nan"])
def test_scores_that_are_none(own_folder: Path, score: str) -> None:
    Path("a.csv").write_text(f"text,label\na,1.5\nb,{score}\n")
    with pytest.raises(ValueError, match="line 3: the score is"):
        TextFiles("a.csv", problem_type="regression").read_splits()
