"""Data sets that give whole batches: from memory, from files decoded one by one, or of features.

torch's loader calls `__getitems__` with the draws of a batch, where a data set has it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from ..labels.values import IGNORED
from ..sampling.draws import Batch, Draw, drawn_labels
from ..sampling.seeds import counter_uniform, hash_seed
from .augment import DRAWS
from .decoding import evaluation_crop
from .sources import ImageSource

Strength: TypeAlias = Literal["none", "light", "standard", "strong"]
Sample: TypeAlias = tuple[Tensor, int, int]  # image, label, row


def sample_transform(strength: Strength, size: int, *, train: bool, flip: bool = True) -> Callable[[Any], Tensor]:
    """Transforms of torchvision from a PIL image to uint8 `(3, size, size)`.

    | strength | training |
    |---|---|
    | none | as in evaluation: `evaluation_crop` |
    | light | evaluation's crop, mirrored with probability 1/2 |
    | standard | random resized crop, mirrored |
    | strong | standard, TrivialAugment (Müller & Hutter 2021), a rectangle erased in a quarter of them |
    """
    steps: list[Any] = [v2.Lambda(partial(evaluation_crop, size=size))]
    if train and strength in ("standard", "strong"):
        crop = v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True)
        if strength == "standard":
            return partial(crop_and_mirror, crop=crop, flip=flip)
        steps = [crop]
    if train and strength != "none" and flip:
        steps.append(v2.RandomHorizontalFlip())
    if train and strength == "strong":
        steps.append(v2.TrivialAugmentWide())
    steps.append(v2.PILToTensor())
    if train and strength == "strong":
        steps.append(v2.RandomErasing(0.25))
    transform: Callable[[Any], Tensor] = v2.Compose(steps)
    return transform


def crop_and_mirror(image: Image.Image, crop: v2.RandomResizedCrop, flip: bool) -> Tensor:
    """As torchvision's transforms one after the other, from the same random numbers, without their many checks.

    torch resizes in a third of PIL's time, so the whole image becomes a tensor first.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not ours to write on
        whole = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)
    place = crop.make_params([whole])
    part: Tensor = VF.resized_crop_image(whole, **place, size=crop.size, antialias=True)
    return part.flip(2) if flip and torch.rand(1) < 0.5 else part


class InMemory(Dataset[Batch]):
    """Decoded images, uint8 `(n, height, width, 3)`, fetched as a batch by one index operation.

    While training, batches hold random numbers, for augmentation by them.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, *, train: bool, seed: int) -> None:
        self.pixels, self.labels, self.train, self.seed = pixels, labels, train, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        index, labels = drawn_labels(draws, self.labels)
        images = self.pixels.index_select(0, index).permute(0, 3, 1, 2)
        batch: Batch = {"image": images, "label": labels, "index": index}
        if self.train:
            epoch = draws[0].epoch
            batch["seed"] = hash_seed(self.seed, epoch, draws[0].row)
            batch["uniform"] = counter_uniform(self.seed, epoch, [draw.counter for draw in draws], DRAWS)
        return batch


class Decoding(Dataset[Batch]):
    """Images decoded and augmented one by one, in a worker process.

    The transform, from a PIL image to uint8 `(3, size, size)`, may draw from torch's global generator. While training,
    batches hold a seed for mixing. `on_error` decides about an unreadable image: `raise`; `skip`, omit it from its
    batch and name it in `skipped`; or `blank`, put a black one in its place, so that batches keep their size, and list
    its index and the reason in `unreadable`. Where `skip` leaves nothing of a batch, one to train on holds the next
    images that can be read, one to evaluate a black one without a label.
    """

    def __init__(
        self,
        images: ImageSource,
        transform: Callable[[Any], Tensor],
        *,
        train: bool,
        seed: int,
        on_error: Literal["raise", "skip", "blank"],
    ) -> None:
        self.images, self.transform, self.train = images, transform, train
        self.seed, self.on_error = seed, on_error

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        samples, skipped, unreadable = [], [], []
        for draw in draws:
            try:
                samples.append(self.sample(draw))
            except ValueError as error:
                if self.on_error == "raise":
                    raise
                if self.on_error == "skip":
                    skipped.append(str(error))
                    continue
                unreadable.append((draw.row, str(error.__cause__ or error)))
                samples.append(self.blank(draw))
        if not samples:
            samples = self.replacements(draws, skipped[0])
        images, labels, index = zip(*samples, strict=True)
        shape = (len(images), *images[0].shape)
        whole = torch.empty(shape, dtype=images[0].dtype, memory_format=torch.channels_last)
        for image, place in zip(images, whole, strict=True):
            place.copy_(image)  # a plain copy: PIL's images have their channels last, too
        batch: Batch = {"image": whole, "label": torch.tensor(labels), "index": torch.tensor(index)}
        if self.train:
            batch["seed"] = hash_seed(self.seed, draws[0].epoch, draws[0].row)
        if skipped:
            batch["skipped"] = skipped
        if unreadable:
            batch["unreadable"] = unreadable
        return batch

    def blank(self, draw: Draw) -> Sample:
        return self.transform(Image.new("RGB", (1, 1))), IGNORED, draw.row

    def replacements(self, draws: list[Draw], reason: str) -> list[Sample]:
        """What stands for a batch of nothing readable; a ValueError where nothing else can be read, either."""
        found: list[Sample] = []
        for step in range(1, len(self)):
            try:
                found.append(self.sample(draws[-1]._replace(row=(draws[-1].row + step) % len(self))))
            except ValueError:
                continue
            if not self.train:
                return [self.blank(draws[0])]
            if len(found) == len(draws):
                break
        if not found:
            raise nothing_readable(len(draws), reason)
        return found

    def sample(self, draw: Draw) -> Sample:
        """One image, augmented by what (seed, epoch, index) decides; torch's generator is left as it was."""
        decoded = self.images.read(draw.row)
        generator = torch.default_generator  # torch.manual_seed would look for GPUs, each time
        before = generator.get_state()
        generator.manual_seed(hash_seed(self.seed, draw.epoch, draw.counter))
        try:
            image = self.transform(decoded)
        finally:
            generator.set_state(before)
        label = IGNORED if draw.is_padding else int(self.images.labels[draw.row])
        return image, label, draw.row


def nothing_readable(count: int, reason: str) -> ValueError:
    """The error where images are to be skipped, and then none is left."""
    return ValueError(f"no image of a batch of {count} can be read, nor any other of its split; the first: {reason}")


class Precomputed(Dataset[Batch]):
    """Features `(views, samples, width)` in place of images; epoch e trains on view e modulo their number."""

    def __init__(self, values: Tensor, labels: Tensor) -> None:
        self.values, self.labels = values, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        index, labels = drawn_labels(draws, self.labels)
        view = draws[0].epoch % len(self.values)
        return {"features": self.values[view].index_select(0, index), "label": labels, "index": index}
