"""Rows of every format: JSON lines, Parquet, plain lines, and several files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules import TextFiles
from tests.datamodules.conftest import write_lines


@pytest.mark.parametrize(("line", "words"), [("[1]", "expected an object, found list"), ("{", "not JSON")])
def test_json_that_is_none(own_folder: Path, line: str, words: str) -> None:
    path = write_lines(own_folder, '{"text": "a", "label": 1}', line, name="a.jsonl")
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: {words}"):
        TextFiles(path).read_splits()


def test_several_files_and_patterns(own_folder: Path) -> None:
    write_lines(own_folder, "text,label", "a,x", name="part1.csv")
    write_lines(own_folder, "text,label", "b,y", ",", name="part2.csv")
    with pytest.raises(ValueError, match="part2.csv, line 3"):
        TextFiles("part*.csv").read_splits()
    assert len(TextFiles("part*.csv", on_error="skip").read_splits()["train"]) == 2
    with pytest.raises(ValueError, match="expected one of .csv, .tsv"):
        TextFiles(write_lines(own_folder, "a", name="a.doc")).read_splits()


def test_one_json_line_without_a_label_is_one_row(own_folder: Path) -> None:
    rows: list[Any] = [{"text": "a"}, {"text": "b", "label": "x"}, {"label": "x", "text": "c"}]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="a.jsonl, line 1: there is no label"):
        TextFiles("a.jsonl").read_splits()
    train = TextFiles("a.jsonl", on_error="skip").read_splits()["train"]
    assert [train.text(row) for row in range(2)] == ["b", "c"] and train.skipped == 1
    with pytest.raises(ValueError, match="no column 'lable', but 'text', 'label'; did you mean 'label'"):
        TextFiles("a.jsonl", label_column="lable", on_error="skip").read_splits()


def test_a_file_is_read_by_its_ending_though_another_was_read_before(own_folder: Path) -> None:
    content = 'text\nfoo bar\n"quoted"\n\nlast\n'
    read = {}
    for ending in ("csv", "txt"):
        Path(f"one.{ending}").write_text(content)
        texts = TextFiles(predict_file=f"one.{ending}", class_names=["x", "y"]).read_splits()["predict"]
        read[ending] = [texts.text(row) for row in range(len(texts))]
    assert read == {"csv": ["foo bar", "quoted", "last"], "txt": ["text", "foo bar", '"quoted"', "last"]}


def test_a_file_that_two_patterns_mean_is_read_once(own_folder: Path) -> None:
    Path("m1.csv").write_text("text,label\na,x\nb,y\n")
    assert len(TextFiles(["m1.csv", "m*.csv"]).read_splits()["train"]) == 2
