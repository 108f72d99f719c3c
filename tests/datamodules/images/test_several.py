"""Images with several labels: a mask goes wherever its image goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.images.several import Columns, Scene, SceneTransform, SeveralTasks, WithMasks, as_tensor
from datamodules.images.sources import ImageFiles, ImageSource
from datamodules.labels.tasks import Task
from datamodules.sampling.seeds import hash_seed


def scene(seed: int, width: int = 60, height: int = 44) -> Image.Image:
    """A white rectangle on black: of the image itself and of its mask."""
    rng = np.random.default_rng(seed)
    left, top = rng.integers(4, 20, 2)
    pixels = np.zeros((height, width), np.uint8)
    pixels[top : top + 18, left : left + 26] = 255
    return Image.fromarray(pixels)


class Rectangles(SeveralTasks):
    """Files of rectangles, with masks; every fourth has none, every third no size."""

    flip = True

    def __init__(self, root: Path, count: int = 24, **options: Any) -> None:
        super().__init__(**options)
        self.root, self.count = root, count

    @property
    def class_names(self) -> list[str]:
        return ["even", "odd"]

    @property
    def tasks(self) -> dict[str, Task]:
        return {
            "parity": Task("classification", ("even", "odd")),
            "size": Task("regression"),
            "mask": Task("segmentation", ("ground", "rectangle")),
        }

    def read_splits(self) -> dict[str, ImageSource]:
        paths = [str(self.root / f"{number}.png") for number in range(self.count)]
        for number, path in enumerate(paths):
            scene(number).save(path)
        images = ImageFiles(paths, torch.arange(self.count) % 2)
        size = torch.arange(float(self.count))
        size[::3] = torch.nan

        def mask(row: int) -> Image.Image | None:
            return scene(row).point(lambda value: value // 255) if row % 4 else None

        there = torch.arange(self.count) % 4 > 0
        images.columns = Columns(  # type: ignore[attr-defined]
            {"parity": images.labels, "size": size}, {"mask": mask}, {"mask": there}
        )
        return {"train": images}


def agreement(batch: dict[str, Any]) -> Tensor:
    """Share of known pixels whose mask says what the image shows."""
    shown, mask = batch["image"].mean(1) > 0.5, batch["labels"]["mask"]
    same = (shown == (mask == 1)) & (mask >= 0)
    return same.flatten(1).sum(1) / (mask >= 0).flatten(1).sum(1)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("strength", ["none", "light", "standard"])
def test_a_mask_is_moved_with_its_image(tmp_path: Path, strength: Any, in_memory: bool) -> None:
    data = Rectangles(tmp_path, image_size=64, augment=strength, in_memory=in_memory, batch_size=8, num_workers=0)
    data.setup()
    seen, before = 0, set()
    for epoch in (0, 1):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for batch in loader:
            batch = data.on_after_batch_transfer(batch, 0)
            assert batch["image"].shape[1:] == (3, 64, 64) and batch["image"].dtype == torch.float32
            mask = batch["labels"]["mask"]
            assert mask.dtype == torch.int64 and set(mask.unique().tolist()) <= {-100, 0, 1}
            known = (mask >= 0).flatten(1).any(1)
            rows = [int(Path(data.sample_names("train")(row)).stem) for row in batch["index"].tolist()]
            assert known.tolist() == [row % 4 > 0 for row in rows]
            assert agreement(batch)[known].min() > 0.95  # edges are bilinear here, nearest there
            assert batch["labels"]["size"].isnan().tolist() == [row % 3 == 0 for row in rows]
            assert batch["labels"]["parity"].tolist() == [row % 2 for row in rows]
            seen += int(known.sum())
            before |= {(row, tuple(mask[place].flatten().tolist())) for place, row in enumerate(rows)}
    assert seen > 20
    if strength != "none":
        assert len(before) > len({row for row, _ in before}), "another epoch, another place"


def test_strong_augmentation_changes_colours_of_images_and_places_of_both(tmp_path: Path) -> None:
    for in_memory in (True, False):
        data = Rectangles(tmp_path, image_size=32, augment="strong", in_memory=in_memory, num_workers=0)
        data.setup()
        batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        known = (batch["labels"]["mask"] >= 0).flatten(1).any(1)
        assert agreement(batch)[known].median() > 0.9, "but for a rectangle that is erased"


def test_evaluation_marks_what_fills_up_a_rank_and_tells_what_is_known(tmp_path: Path) -> None:
    data = Rectangles(tmp_path, image_size=32, val_share=0.3, eval_batch_size=8, num_workers=0)
    data.setup()
    loader = data._loader("val", world=3, rank=2)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    padding = torch.cat([batch["label"] for batch in batches]) == -100
    labels = {name: torch.cat([batch["labels"][name] for batch in batches]) for name in data.tasks}
    assert padding.any() and not padding.all()
    assert labels["parity"][padding].eq(-100).all() and labels["size"][padding].isnan().all()
    assert labels["mask"][padding].eq(-100).all() and (labels["parity"][~padding] >= 0).all()
    facts = data.label_facts
    rows = [int(Path(data.sample_names("train")(row)).stem) for row in range(len(data.splits["train"].labels))]
    assert facts["parity"] == {"known": 1.0}
    assert facts["mask"]["known"] == pytest.approx(sum(row % 4 > 0 for row in rows) / len(rows))
    numbers = torch.tensor([float(row) for row in rows if row % 3])
    assert facts["size"]["mean"] == pytest.approx(float(numbers.mean()))
    assert facts["size"]["spread"] == pytest.approx(float(numbers.std()))


def test_an_image_that_cannot_be_read_takes_its_labels_along(tmp_path: Path) -> None:
    for in_memory in (True, False):
        data = Rectangles(tmp_path, image_size=32, on_error="skip", in_memory=in_memory, num_workers=0, augment="none")
        data.setup()
        bad = data.sample_names("train")(3)
        Path(bad).write_bytes(b"no image")
        rows = []
        for batch in data.train_dataloader():
            batch = data.on_after_batch_transfer(batch, 0)
            known = (batch["labels"]["mask"] >= 0).flatten(1).any(1)
            assert agreement(batch)[known].min() > 0.97, "masks stand with their own images"
            rows += [data.sample_names("train")(row) for row in batch["index"].tolist()]
        assert bad not in rows and len(rows) > 10


def test_a_mask_of_another_size_names_its_image(tmp_path: Path) -> None:
    scene(0).save(tmp_path / "a.png")
    images = ImageFiles([str(tmp_path / "a.png")], [0])
    with_masks = WithMasks(images, [lambda row: scene(0, 10, 44)], torch.tensor([0]))
    with pytest.raises(ValueError, match=r"a.png: its mask has 10 x 44 pixels, the image 60 x 44"):
        with_masks.read(0)


def test_places_are_those_of_an_image_without_masks(tmp_path: Path) -> None:
    from datamodules.images.batches import sample_transform

    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    for strength in ("none", "light", "standard"):
        alone = sample_transform(strength, 32, train=True)  # type: ignore[arg-type]
        both = SceneTransform(strength, 32, True, 1)  # type: ignore[arg-type]
        for seed in range(5):
            torch.manual_seed(hash_seed(seed))
            expected = alone(photograph)
            torch.manual_seed(hash_seed(seed))
            assert torch.equal(both(Scene(photograph, [None]))[:3], expected)
    assert (as_tensor(None, 8) == 255).all() and as_tensor(None, 8).shape == (8, 8)


def test_what_is_asked_for_and_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError):
        SeveralTasks().tasks  # noqa: B018
