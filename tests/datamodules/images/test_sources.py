"""Sources of images: what cannot be read, and labels that cannot be, are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules import ImageFolder
from datamodules.images.sources import decode
from tests.conftest import write_folder


def test_text_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read the image a\.jpg"):
        decode(str(tmp_path / "a.jpg"), "a.jpg")


def test_a_label_out_of_range_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f", ("train", "val", "test"))
    data = ImageFolder(root, image_size=32)
    splits = data.read_splits()
    splits["test"].labels[3] = -1
    data.read_splits = lambda: splits  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"label -1 of .*\.jpg is out of range: there are 3 classes"):
        data.setup()
