"""Encodings of text files, and columns that are missing or there twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules import TextFiles
from tests.datamodules.conftest import write_lines


def test_a_mark_at_the_beginning_is_no_part_of_the_first_column(own_folder: Path) -> None:
    path = write_lines(own_folder, b"\xef\xbb\xbftext,label", "a,x")
    assert TextFiles(path).class_names == ["x"]


def test_another_encoding(own_folder: Path) -> None:
    path = write_lines(own_folder, "text,label", "café,x".encode("latin-1"))
    assert TextFiles(path, encoding="latin-1").read_splits()["train"].text(0) == "café"


@pytest.mark.parametrize("declared", ["utf-8", "UTF-8", "utf8", "utf_8_sig", "latin-1"])
def test_a_byte_order_mark_is_no_part_of_a_column(own_folder: Path, declared: str) -> None:
    Path("a.csv").write_bytes(b"\xef\xbb\xbf" + "text,label\ncafé,x\n".encode())
    assert TextFiles("a.csv", encoding=declared).read_splits()["train"].text(0) == "café"


@pytest.mark.parametrize("written", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("declared", [True, False])
def test_wide_encodings(own_folder: Path, written: str, declared: bool) -> None:
    Path("a.csv").write_bytes("text,label\ndéjà vu,x\n".encode(written))
    data = TextFiles("a.csv", encoding=written if declared else "utf-8")
    if not declared and written[-2:] in ("le", "be"):
        with pytest.raises(ValueError, match=r"a.csv has zero bytes: is it UTF-16\? Then data.encoding must be utf-16"):
            data.read_splits()
    else:
        assert data.read_splits()["train"].text(0) == "déjà vu"


def test_encodings_that_are_none_or_not_the_files(own_folder: Path) -> None:
    Path("a.csv").write_bytes("text,label\nfine,x\n".encode("utf-16") + b"\x00")
    with pytest.raises(ValueError, match="a.csv is not in the encoding that data.encoding names"):
        TextFiles("a.csv").read_splits()
    with pytest.raises(ValueError, match="data.encoding: 'utf-9' is not known"):
        TextFiles("a.csv", encoding="utf-9").read_splits()


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_another_separator_is_named_and_can_be_set(own_folder: Path, mark: str) -> None:
    Path("a.csv").write_text(f"text{mark}label\nfine, really{mark}x\n")
    with pytest.raises(ValueError, match="no column 'text', but .*: set data.separator to"):
        TextFiles("a.csv").read_splits()
    assert TextFiles("a.csv", separator=mark).read_splits()["train"].text(0) == "fine, really"


def test_a_column_that_is_there_twice(own_folder: Path) -> None:
    Path("a.csv").write_text("text,label,label\na,x,y\n")
    with pytest.raises(ValueError, match="a.csv has several columns 'label'"):
        TextFiles("a.csv").read_splits()
