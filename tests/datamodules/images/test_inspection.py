"""Copies are found, however plain the images are, and what only looks alike is left alone."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance

from datamodules.images.inspection import ImageStats, alike, image_stats, inspect_images
from datamodules.images.sources import ImageFiles


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(out).convert("RGB")


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half": lambda image: jpeg(half(image), 90),
    "compressed": lambda image: jpeg(image, 50),
    "brighter": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(1.05), 90),
    "all": lambda image: jpeg(ImageEnhance.Brightness(half(image)).enhance(1.05), 60),
}


def outline(seed: int, ground: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """A thin shape on a plain ground."""
    rng = random.Random(seed)
    image = Image.new("RGB", (128, 128), ground)
    corners = [(rng.randint(4, 123), rng.randint(4, 123)) for _ in range(rng.randint(3, 6))]
    ImageDraw.Draw(image).line([*corners, corners[0]], fill=0, width=rng.randint(2, 4))
    return image


def sign(seed: int) -> Image.Image:
    """A large ring that all have, and a small mark in it that tells them apart."""
    rng = random.Random(seed)
    image = Image.new("RGB", (128, 128), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 8, 120, 120), fill=(200, 20, 20))
    draw.ellipse((22, 22, 106, 106), fill="white")
    x, y, side = rng.randint(35, 80), rng.randint(35, 80), rng.randint(8, 25)
    (draw.rectangle if rng.random() < 0.5 else draw.ellipse)((x, y, x + side, y + side), fill=rng.choice([0, 160]))
    return image


class Held:
    """Images as they are."""

    def __init__(self, images: list[Image.Image]) -> None:
        self.images, self.labels = images, torch.zeros(len(images), dtype=torch.long)

    def read(self, index: int) -> Image.Image:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"held/{index}"

    def fingerprint(self) -> str:
        return ""


def thumbnails(images: list[Image.Image]) -> np.ndarray:
    looked: list[ImageStats] = [image_stats(Held(images), index) for index in range(len(images))]
    return np.array([one.thumbnail for one in looked])


def planted(images: list[Image.Image], each: int) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Copies of every kind that were added to these images, and pairs that are found."""
    pairs, all_of_them = set(), list(images)
    for number, copy in enumerate([copy for copy in COPIES.values() for _ in range(each)]):
        pairs.add((number, len(all_of_them)))
        all_of_them.append(copy(images[number]))
    return pairs, {(first, second) for first, second, _ in alike(thumbnails(all_of_them))}


@pytest.mark.parametrize("kind", ["outlines", "on a coloured ground", "signs"])
def test_simple_drawings_are_copies_only_where_they_are(kind: str) -> None:
    drawn: dict[str, Callable[[int], Image.Image]] = {
        "outlines": outline,
        "on a coloured ground": lambda seed: outline(seed, (240, 225, 170)),
        "signs": sign,
    }
    pairs, found = planted([drawn[kind](seed) for seed in range(200)], each=10)
    assert len(found - pairs) <= 1
    assert len(pairs & found) >= 38


def test_the_same_in_another_contrast_is_another_sign() -> None:
    black = [outline(seed) for seed in range(12)]
    grey = [Image.blend(image, Image.new("RGB", image.size, "white"), 0.6) for image in black]
    assert alike(thumbnails([*black, *grey])) == []


def test_all_of_many_copies_are_found() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 8, 10, 3), dtype=np.uint8)
    images = [Image.fromarray(values).resize((200, 160), Image.Resampling.BICUBIC) for values in noise]
    copies = [jpeg(images[3].resize((20 * k, 16 * k), Image.Resampling.LANCZOS), 40 + 5 * k) for k in range(3, 11)]
    found = alike(thumbnails([*images, *copies]))
    assert {row for first, second, _ in found for row in (first, second)} == {3, *range(20, 28)}
    assert len(found) == 9 * 8 / 2
    assert all(0.9 < likeness <= 1.0001 for *_, likeness in found)


def test_two_images_have_no_neighbours_to_be_held_against() -> None:
    assert [pair for *pair, _ in alike(thumbnails([outline(0), jpeg(half(outline(0)), 90)]))] == [[0, 1]]
    assert alike(thumbnails([outline(0), outline(1)])) == []
    assert alike(thumbnails([outline(0)])) == []


@pytest.mark.skipif("FINETUNING_DATA" not in os.environ, reason="needs real images")
@pytest.mark.parametrize("folder", ["hymenoptera/train", "grocery/val"])
def test_photographs(folder: str) -> None:
    files = sorted((Path(os.environ["FINETUNING_DATA"]) / folder).glob("*/*.jpg"))
    pairs, found = planted([Image.open(file).convert("RGB") for file in files[:200]], each=10)
    assert found == pairs, "a shop's shelves are alike, and no copies"


def test_how_alike_stands_beside_each_pair(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{name}.png") for name in ("a", "b", "half")]
    for file, image in zip(files, (outline(0), outline(1), half(outline(0))), strict=True):
        image.save(file)
    found = inspect_images({"train": ImageFiles(files, [0, 0, 0])}, ["one"], workers=0)
    assert found["rescaled"] == [[["train", files[0]], ["train", files[2]]]]
    assert len(found["similarity"]) == 1 and 0.95 < found["similarity"][0] <= 1
