"""Rendered shapes: the same everywhere, and their labels true."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from datamodules import Shapes
from datamodules.shapes import COLOURS, KINDS, boundary, render


def test_they_are_the_same_on_every_machine_and_whatever_the_seed() -> None:
    pixels, masks, _ = render(60, 24, (0.2, 0.7), 0.1)
    assert pixels.shape == (60, 24, 24, 3) and pixels.dtype == np.uint8 and set(np.unique(masks)) == {0, 1}
    again = render(60, 24, (0.2, 0.7), 0.1)[0]
    assert np.array_equal(pixels, again)
    assert hashlib.sha256(masks.tobytes()).hexdigest()[:16] == "373838a1da9f1fe2"
    one, other = Shapes(images=240, side=24, image_size=24, seed=0), Shapes(images=240, side=24, image_size=24, seed=1)
    for data in (one, other):
        data.setup()
    assert one.fingerprint("test") == other.fingerprint("test") and one.fingerprint("val") != other.fingerprint("val")


def test_labels_say_what_is_seen() -> None:
    pixels, masks, labels = render(600, 48, (0.3, 0.8), 0.0)
    sizes = []
    for mask in masks:
        y, x = np.nonzero(mask)
        points = list(zip(y, x, strict=True))
        sizes.append(max(math.dist(one, other) for one in points for other in points[::7]) / 48)
    circles = labels["shape"] == list(KINDS).index("circle")
    assert np.abs(np.array(sizes)[circles] - labels["size"][circles]).max() < 0.06
    areas = masks.mean((1, 2)) / (labels["size"] / 2) ** 2
    by_kind = [float(areas[labels["shape"] == kind].mean()) for kind in range(len(KINDS))]
    assert by_kind[list(KINDS).index("circle")] == pytest.approx(math.pi, rel=0.02)
    assert by_kind[list(KINDS).index("square")] == pytest.approx(2, rel=0.03)
    assert by_kind[list(KINDS).index("triangle")] == pytest.approx(3 * math.sqrt(3) / 4, rel=0.04)
    for number in range(40):
        colour = pixels[number][masks[number] == 1].mean(0) / 255
        assert ((colour > 0.45) == (labels["colours"][number] == 1)).all()
    assert labels["colours"].sum(1).min() >= 1 and np.bincount(labels["shape"]).tolist() == [100] * 6


def test_a_boundary_goes_through_arms_and_waists() -> None:
    arms, waist = np.array(5), np.array(0.4)
    half = math.pi / 5
    found = boundary(np.array([0.0, 2 * half, half, -half]), arms, waist)
    np.testing.assert_allclose(found, [1, 1, 0.4, 0.4], atol=1e-6)


def test_labels_are_missing_where_they_are_to_be() -> None:
    data = Shapes(images=400, side=24, image_size=24, known={"outline": 0.25, "size": 0.5, "colours": 0.0})
    data.setup()
    facts = data.label_facts
    assert facts["outline"]["known"] == pytest.approx(0.25, abs=0.05)
    assert facts["size"]["known"] == pytest.approx(0.5, abs=0.05) and facts["colours"]["known"] == 0
    assert facts["shape"]["known"] == 1
    batch = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    labels = batch["labels"]
    assert not labels["size"].isnan().any() and not (labels["outline"] == -100).any(), "the test tells all"
    assert labels["colours"].shape[1] == len(COLOURS)
    assert labels["outline"].shape == (len(batch["index"]), 24, 24)
    assert torch.equal(labels["shape"], batch["label"])


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="data.images must be at least 24, data.side 16; not 10 and 64"):
        Shapes(images=10)
    with pytest.raises(ValueError, match="data.known: there is no task 'form'; there are shape, size, colours"):
        Shapes(known={"form": 0.5})
    with pytest.raises(ValueError, match="data.sizes must be two numbers between 0 and 1, the smaller first"):
        Shapes(sizes=(0.7, 0.2))
