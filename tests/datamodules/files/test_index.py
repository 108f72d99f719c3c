"""Listing many files: what is noted is what is there, and a note that is out of date or broken does no harm."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.files import index as file_index
from datamodules.files.index import MappedPaths, list_files, list_tree
from datamodules.images.sources import ImageFiles

SUFFIXES = (".jpg", ".png")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five images, and what is none; six files count as many."""
    monkeypatch.setattr(file_index, "MANY", 5)
    root = tmp_path / "tree"
    for name in ("a/1.jpg", "a/deep/2.JPG", "b/3.png", "b-c/4.jpg", "0.jpg", "a/x.txt", "a/.5.jpg", ".git/6.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def notes() -> list[Path]:
    return list((Path(torch.hub.get_dir()).parent / "folders").glob("*"))


def count_listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    listed: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: listed.append(str(place)) or scan(place))
    return listed


def test_images_are_found_at_any_depth_and_sorted(tree: Path) -> None:
    assert list(list_files(tree, SUFFIXES)) == ["0.jpg", "a/1.jpg", "a/deep/2.JPG", "b-c/4.jpg", "b/3.png"]


def test_a_second_start_asks_the_folders_alone(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list_files(tree, SUFFIXES)
    listed = count_listings(monkeypatch)
    second = list_files(tree, SUFFIXES)
    assert not listed
    assert list(second) == list(first)
    assert second[1:3] == ["a/1.jpg", "a/deep/2.JPG"] and second[-1] == "b/3.png"
    assert list(list_files(tree, (".jpg",))) != list(first), "other endings, another note"
    assert list(pickle.loads(pickle.dumps(second))) == list(first), "workers read the same note"
    assert len(pickle.dumps(second)) < 1000


@pytest.mark.parametrize("change", ["new", "gone", "new folder"])
def test_a_change_is_seen(tree: Path, change: str) -> None:
    before = list(list_files(tree, SUFFIXES))
    if change == "new":
        (tree / "a" / "deep" / "7.jpg").touch()
    elif change == "gone":
        (tree / "b" / "3.png").unlink()
    else:
        (tree / "c").mkdir()
        (tree / "c" / "8.jpg").touch()
    expected = {"new": {"a/deep/7.jpg"}, "gone": {"b/3.png"}, "new folder": {"c/8.jpg"}}[change]
    assert set(before) ^ set(list_files(tree, SUFFIXES)) == expected


@pytest.mark.parametrize("content", [b"", b"no arrow", None])
def test_a_broken_note_is_made_again(tree: Path, content: bytes | None) -> None:
    before = list(list_files(tree, SUFFIXES))
    for note in notes():
        note.write_bytes(note.read_bytes()[:200] if content is None else content)
    assert list(list_files(tree, SUFFIXES)) == before
    assert isinstance(list_files(tree, SUFFIXES), MappedPaths)


def test_a_disk_that_is_full_costs_only_time(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_index, "save_listing", full)
    assert list_files(tree, SUFFIXES) == ["0.jpg", "a/1.jpg", "a/deep/2.JPG", "b-c/4.jpg", "b/3.png"]


def test_names_that_are_no_text(tree: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    (tree / "a" / name).touch()
    for _ in range(2):
        assert f"a/{name}" in list_files(tree, SUFFIXES)
    assert ImageFiles([str(tree / "a" / name)], [0]).fingerprint()


def test_a_folder_that_changes_meanwhile(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = file_index.save_listing

    def and_then_another(*args: Any) -> None:
        write(*args)
        (tree / "a" / "later.jpg").touch()

    monkeypatch.setattr(file_index, "save_listing", and_then_another)
    assert len(list_files(tree, SUFFIXES)) == 5
    monkeypatch.undo()
    monkeypatch.setattr(file_index, "MANY", 5)
    assert len(list_files(tree, SUFFIXES)) == 6


def test_a_worker_does_not_read_another_note_than_its_run(tree: Path) -> None:
    found = pickle.dumps(list_files(tree, SUFFIXES))
    (tree / "a" / "0.jpg").touch()
    list_files(tree, SUFFIXES)
    with pytest.raises(RuntimeError, match="changed while a run was reading it"):
        pickle.loads(found)


def test_files_of_other_endings_are_counted_in_the_note_too(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/notes.txt", "a/deep/more.TXT", "README", os.fsdecode(b"odd.caf\xe9")):
        (tree / name).touch()
    listed, others = list_tree(tree, SUFFIXES)
    paths = list(listed)
    found = Counter(path.suffix.lower() for path in tree.rglob("*") if path.is_file() and path.name[0] != ".")
    assert others == {ending: count for ending, count in found.items() if ending not in SUFFIXES}
    assert others[""] and others[os.fsdecode(b".caf\xe9")] == 1
    monkeypatch.setattr(file_index, "MANY", 1)
    for _ in range(2):
        again = list_tree(tree, SUFFIXES)
        assert isinstance(again[0], MappedPaths)
        assert (list(again[0]), again[1]) == (paths, others)


def test_few_files_leave_no_note(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_index, "MANY", 6)
    before = notes()
    list_files(tree, SUFFIXES)
    assert notes() == before
