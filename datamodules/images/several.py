"""Images with several labels each: classes, several of them, numbers, masks.

Batches have, beside what `base` says,

    {"labels": {task: labels of the batch, as `labels.tasks.Task` says, with a mark where one is not known}}

On its way to the model's device a mask is a fourth channel of its image, so that both are moved as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from ..labels.tasks import UNKNOWN_PIXEL, Task, hide, label_facts
from ..labels.values import IGNORED
from ..sampling.draws import Batch, Draw
from . import augment as batchwise
from .base import ImageDataModule
from .batches import Decoding, Strength
from .decoding import evaluation_crop
from .sources import ImageSource, flattened


@dataclass
class Columns:
    """The labels of a collection's images.

    Args:
        values: Task -> its labels, `(n,)` or `(n, classes)`.
        masks: Task -> what gives an image's mask, grey and of the image's size: class numbers, 255 where not known;
            None where there is no mask.
        masked: Task -> whether an image has a mask, `(n,)`; not given where all have.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Callable[[int], Image.Image | None]] = field(default_factory=dict)
    masked: dict[str, Tensor] = field(default_factory=dict)


class Scene(NamedTuple):
    """An image and its masks, None for one that it has not."""

    image: Image.Image
    masks: Sequence[Image.Image | None]


class SeveralTasks(ImageDataModule):
    """Base of data modules whose images have several labels; a subclass gives `tasks`, too, and
    the collections that `read_splits` makes have `columns`.

    Any of a sample's labels may be missing. A sample that only fills up a rank's last batch, or cannot be read, has
    none. `strong` augmentation jitters colours here, for TrivialAugment has no way to move a mask.
    """

    @property
    def tasks(self) -> dict[str, Task]:
        """What is learnt; known before `setup`."""
        raise NotImplementedError

    def columns(self, source: ImageSource) -> Columns:
        """The labels of a collection that `read_splits` gave, or cut subsets from: its attribute of this name."""
        return source.columns  # type: ignore[attr-defined, no-any-return]

    @property
    def label_facts(self) -> dict[str, dict[str, float]]:
        """Of the training images' labels: the share that is known; of numbers their mean and spread. After `setup`."""
        source, rows = flattened(self.splits["train"])
        columns = self.columns(source)
        found = label_facts(self.tasks, {name: values[rows] for name, values in columns.values.items()})
        for name in columns.masks:
            found[name] = {"known": float(columns.masked[name][rows].float().mean()) if columns.masked else 1.0}
        return found

    def _dataset(self, split: str, *, train: bool) -> Dataset[Batch]:
        images: Any = super()._dataset(split, train=train)
        source, rows = flattened(self.splits[split])  # without those that could not be decoded
        columns = self.columns(source)
        if isinstance(images, Decoding) and columns.masks:
            images.images = WithMasks(images.images, list(columns.masks.values()), rows)  # type: ignore[assignment]
            images.transform = SceneTransform(
                self.augment if train else "none", self.image_size or 224, self.flip, len(columns.masks)
            )
        return WithLabels(images, {name: values[rows] for name, values in columns.values.items()})

    def _decode_all(self, split: str, size: int) -> Tensor:
        pixels = super()._decode_all(split, size)
        source, rows = flattened(self.splits[split])
        masks = self.columns(source).masks.values()
        if not masks:
            return pixels
        found = torch.empty(len(rows), size, size, len(masks), dtype=torch.uint8)
        for place, row in enumerate(rows.tolist()):
            for channel, read in enumerate(masks):
                found[place, :, :, channel] = as_tensor(read(row), size)
        return torch.cat([pixels, found], 3)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """As of all images; masks are moved with theirs, and get torch's mark where they are not known."""
        names = [name for name, task in self.tasks.items() if task.kind == "segmentation"]
        if "image" not in batch or batch["image"].shape[1] == 3 or not names:
            return super().on_after_batch_transfer(batch, dataloader_idx)
        uniform = batch.pop("uniform", None)
        if uniform is not None:
            batch["image"] = batchwise.move(batch["image"], uniform, self.augment, flip=self.flip)
        masks = batch["image"][:, 3:].long()
        masks.masked_fill_(masks == UNKNOWN_PIXEL, IGNORED)
        masks[batch["label"] == IGNORED] = IGNORED
        batch["labels"] |= dict(zip(names, masks.unbind(1), strict=True))
        batch["image"] = batch["image"][:, :3].contiguous(memory_format=torch.channels_last)
        if uniform is not None:
            batch["image"] = batchwise.recolour(batch["image"], uniform, self.augment)
        return super().on_after_batch_transfer(batch, dataloader_idx)


class WithLabels(Dataset[Batch]):
    """A data set's batches with several labels, `(n,)` or `(n, classes)` each, in the order of its samples."""

    def __init__(self, samples: Any, values: Mapping[str, Tensor]) -> None:
        self.samples, self.values = samples, values

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        batch: Batch = self.samples.__getitems__(draws)
        batch["labels"] = {name: values.index_select(0, batch["index"]) for name, values in self.values.items()}
        hide(batch["labels"], batch["label"] == IGNORED)
        return batch


class WithMasks:
    """Images that are read with their masks; these are of the collection that `rows`, `(n,)`, were cut from."""

    def __init__(self, images: ImageSource, masks: Sequence[Callable[[int], Image.Image | None]], rows: Tensor) -> None:
        self.images, self.masks, self.rows = images, masks, rows
        self.labels, self.name, self.fingerprint = images.labels, images.name, images.fingerprint

    def read(self, index: int) -> Scene:
        image, row = self.images.read(index), int(self.rows[index])
        masks = [read(row) for read in self.masks]
        for mask in masks:
            if mask is not None and mask.size != image.size:
                sizes = f"{mask.size[0]} x {mask.size[1]} pixels, the image {image.size[0]} x {image.size[1]}"
                raise ValueError(f"{self.name(index)}: its mask has {sizes}")
        return Scene(image, masks)


class SceneTransform:
    """From an image and its masks to uint8 `(3 + masks, size, size)`.

    The same places as `sample_transform`'s, for the same random numbers; masks by their nearest pixel, 255 where there
    is none.
    """

    def __init__(self, strength: Strength, size: int, flip: bool, masks: int) -> None:
        self.strength, self.size, self.flip, self.masks = strength, size, flip, masks
        self.crop = v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True)
        self.colours = v2.ColorJitter(0.4, 0.4, 0.4)
        self.erase = v2.RandomErasing(0.25)

    def __call__(self, scene: Scene | Image.Image) -> Tensor:
        if isinstance(scene, Image.Image):  # black, in place of one that cannot be read
            scene = Scene(scene, [None] * self.masks)
        if self.strength in ("none", "light"):
            image = VF.pil_to_tensor(evaluation_crop(scene.image, self.size))
            masks = torch.stack([as_tensor(mask, self.size) for mask in scene.masks])
        else:
            whole = VF.pil_to_tensor(scene.image)
            place = self.crop.make_params([whole])
            image = VF.resized_crop_image(whole, **place, size=self.crop.size, antialias=True)
            masks = torch.stack([self.part(mask, place) for mask in scene.masks])
        if self.strength != "none" and self.flip and torch.rand(1) < 0.5:
            image, masks = image.flip(2), masks.flip(2)
        if self.strength == "strong":
            image = self.erase(self.colours(image))
        return torch.cat([image, masks])

    def part(self, mask: Image.Image | None, place: Mapping[str, Any]) -> Tensor:
        if mask is None:
            return torch.full((self.size, self.size), UNKNOWN_PIXEL, dtype=torch.uint8)
        whole = torch.from_numpy(np.array(mask.convert("L")))[None]
        moved: Tensor = VF.resized_crop_mask(whole, **place, size=self.crop.size)
        return moved[0]


def as_tensor(mask: Image.Image | None, size: int) -> Tensor:
    """The middle of a mask, as of its image, uint8 `(size, size)`; 255 where there is none."""
    if mask is None:
        return torch.full((size, size), UNKNOWN_PIXEL, dtype=torch.uint8)
    return torch.from_numpy(np.array(evaluation_crop(mask.convert("L"), size, Image.Resampling.NEAREST)))
