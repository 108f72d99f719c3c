"""The lines that go with an export read images as evaluation does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.images.decoding import evaluation_crop
from recipes.deploy.check import check_reading, write_odd_images
from recipes.deploy.formats import shorter_side
from recipes.deploy.samples import pixels
from recipes.deploy.snippets import IMAGES, PIXELS
from tests.conftest import picture


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (97, 98), (60, 40), (333, 1000), (128, 128), (127, 129)])
@pytest.mark.parametrize("side", [32, 96, 128])
def test_the_lines_for_a_picture_crop_as_evaluation_does(own_folder: Path, size: tuple[int, int], side: int) -> None:
    found: dict[str, Any] = {}
    exec(PIXELS.format(size=side, shorter_side=shorter_side(side)), found)
    picture(1, *size).save("it.png")
    expected = np.array(evaluation_crop(Image.open("it.png"), side)).transpose(2, 0, 1).astype(np.float32) / 255
    assert np.array_equal(found["pixels"]("it.png"), expected)


@pytest.mark.parametrize("side", [32, 128])
def test_the_lines_for_a_picture_read_as_evaluation_does(own_folder: Path, side: int) -> None:
    Path("it").mkdir()
    Path("it/pixels.py").write_text(PIXELS.format(size=side))
    files = write_odd_images(own_folder, side)
    found: dict[str, Any] = {"folder": "it", "files": files}
    exec(IMAGES, found)
    for file, image in zip(files, found["images"], strict=True):
        expected = pixels(file, file, side).numpy().astype(np.float32) / 255
        assert np.array_equal(image, expected) and 0.1 < image.mean() < 0.95, file
    check_reading(Path("it"), side)
