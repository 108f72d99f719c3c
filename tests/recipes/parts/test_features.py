from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recipes.parts.features import extract, fingerprint


def batches(images: torch.Tensor, order: list[int], size: int = 4) -> Iterator[dict[str, Any]]:
    for start in range(0, len(order), size):
        index = torch.tensor(order[start : start + size])
        yield {"image": images[index], "index": index}


def test_features_lie_where_their_sample_is_whatever_the_order(tmp_path: Path) -> None:
    images = torch.rand(10, 3, 4, 4)
    views = [batches(images, list(range(10))), batches(1 - images, list(range(10))[::-1])]
    values = extract(lambda batch: batch["image"].flatten(1), views, 10, tmp_path / "a.f32")
    assert torch.equal(values, torch.stack([images.flatten(1), (1 - images).flatten(1)]))


def test_a_finished_file_is_read_and_nothing_computed(tmp_path: Path) -> None:
    images = torch.rand(6, 3, 2, 2)
    first = extract(lambda batch: batch["image"].flatten(1), [batches(images, list(range(6)))], 6, tmp_path / "a.f32")

    def never(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("computed again")

    again = extract(never, [batches(images, list(range(6)))], 6, tmp_path / "a.f32")
    assert torch.equal(first, again)


def test_a_missing_sample_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="5 of 6 samples came in view 0"):
        extract(
            lambda batch: batch["image"].flatten(1),
            [batches(torch.rand(6, 3, 2, 2), list(range(5)))],
            6,
            tmp_path / "a.f32",
        )
    assert not (tmp_path / "a.f32").exists()


def test_what_stands_for_a_sample_is_none(tmp_path: Path) -> None:
    """A black picture without a label, and one that comes in place of another."""
    images = torch.rand(4, 3, 2, 2)
    black = {"image": images[2:], "index": torch.tensor([2, 3]), "label": torch.tensor([0, -100])}
    again = {"image": images[:2], "index": torch.tensor([0, 0]), "label": torch.tensor([0, 0])}
    for odd, count in ((black, 3), (again, 3)):
        rest = [{"image": images[i : i + 1], "index": torch.tensor([i]), "label": torch.tensor([1])} for i in range(4)]
        rest = [batch for batch in rest if batch["index"] not in ((0, 1) if odd is again else (2, 3))]
        with pytest.raises(ValueError, match=f"{count} of 4 samples came in view 0"):
            extract(lambda batch: batch["image"].flatten(1), [[odd, *rest]], 4, tmp_path / "a.f32")


def test_the_fingerprint_changes_with_weights_buffers_and_facts() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    first = fingerprint(net, "train", 32)
    assert fingerprint(net, "train", 32) == first
    assert fingerprint(net, "train", 64) != first
    with torch.no_grad():
        net[1].running_mean += 1e-6  # type: ignore[operator]
    assert fingerprint(net, "train", 32) != first
