"""Data sets that torchvision downloads and lists, by a class that stands in for one of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.files.official import download, read_official


class Listed:
    """As torchvision's classes: a folder, and for a split its files and labels."""

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        if download:
            raise RuntimeError("no route to host")
        self._images = sorted(Path(root, split).glob("*.jpg"))
        self._labels = [int(path.stem) for path in self._images]


def tree(root: Path) -> Path:
    for name in ("train/0.jpg", "train/1.jpg", "val/2.jpg", "test/1.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    return root


def test_a_split_may_be_made_of_several(tmp_path: Path) -> None:
    found = read_official(Listed, tree(tmp_path), tmp_path, {"train": ["train", "val"], "test": ["test"]})
    assert {split: images.labels.tolist() for split, images in found.items()} == {"train": [0, 1, 2], "test": [1]}
    assert found["train"].name(2) == str(tmp_path / "val" / "2.jpg")


def test_a_file_that_is_listed_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree(tmp_path) / "train" / "1.jpg").unlink()
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [self / "0.jpg", self / "1.jpg"])
    with pytest.raises(FileNotFoundError, match=r"1 of 2 files are missing, first .*1.jpg: remove .*unpacked again"):
        read_official(Listed, tmp_path, tmp_path, {"train": ["train"]})


def test_a_failed_download_says_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Listed is not in .*no route to host.*Put all.tar into .*data.root"):
        download(Listed, tmp_path, tmp_path / "listed", "all.tar")
