"""Oxford-IIIT Pet in the true format of its archives."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from datamodules import OxfordPets
from tests.official_archives import trimap, write_oxford_pets


def test_pets_have_outlines(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_oxford_pets(own_folder, monkeypatch)
    data = OxfordPets(own_folder, image_size=32)
    data.prepare_data()
    data.setup("fit")
    for split, index in (("train", 5), ("test", 3)):
        number = int(Path(data.sample_names(split)(index)).stem[-1])
        found = data.trimap(split, index)
        assert found.size == data.splits[split].read(index).size
        assert found.tobytes() == Image.open(io.BytesIO(trimap(number))).tobytes()
