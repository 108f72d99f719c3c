"""What every image data set here shares: splits, loaders, augmentation, and what to do with a broken image.

A data set's own file says only where its images and labels are (`read_splits`). This file turns them into
batches:

    {"image": float in [0, 1], (batch, 3, size, size), channels-last,
     "label": int64, (batch,); -100 marks a sample that only fills up a rank's last batch,
     "index": int64, (batch,), position in the split: `datamodule.sample_names(split)[index]` names it,
     "target": only with mixup or cutmix: class probabilities, (batch, classes),
     "unreadable": only in predict: (index, reason) of each image that is black since it cannot be read}

Normalisation belongs to the model, which knows its backbone: batches can't be normalised wrongly here.

Two ways lead to a batch. Small images (digits, CIFAR) lie decoded in memory as one uint8 tensor and are
augmented as whole batches on the model's device. Large ones are decoded in worker processes, each sample
augmented by torchvision. Either way, what happens to a sample is a function of (seed, epoch, index).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..sampling.draws import Batch, Draw, collate_whole
from ..sampling.samplers import BlockSampler, EpochSampler, ranks_of
from ..sampling.splits import check_state, split_state, split_train
from . import augment as batchwise
from .batches import Decoding, InMemory, Precomputed, Strength, nothing_readable, sample_transform
from .decoding import RULES, evaluation_crop
from .inspection import inspect_images
from .sources import ImageArray, ImageSource, Subset, check_labels, flattened

log = logging.getLogger(__name__)

MEMORY_LIMIT_BYTES = 2**30  # decoded images up to this size are held in memory ...
MEMORY_LIMIT_PIXELS = 96  # ... if they are at most this wide: larger ones profit from random resized crops


class ImageDataModule(LightningDataModule):
    """Base of the image data modules; a subclass gives `class_names` and `read_splits`.

    Args:
        batch_size: Images per training batch and rank.
        eval_batch_size: The same for validation, test and prediction; twice `batch_size` if not given.
        image_size: Side in pixels of what the model sees. `None`: a recipe's CLI fills in the backbone's.
        augment: Strength of the training augmentation: none, light, standard or strong.
        mixup: Beta parameter of mixup, 0 for off; 0.2 is usual.
        cutmix: Beta parameter of CutMix, 0 for off; 1.0 is usual.
        val_share: Part of the training images held out for validation where the data set has no split for it.
        fold: Hold out fold k of n for validation, as [k, n] with k from 0, in place of `val_share`: n runs validate on
            every training sample once, and another seed gives other folds. The rows are in each checkpoint.
        limit_per_class: At most so many training images of each class, for few-image experiments.
        balance: Draw as many images of each class in every epoch, rare ones several times (see `balanced_order`);
            an alternative to class weights in the loss.
        seed: Decides the split, the order and the augmentation.
        num_workers: Decoding processes. `None`: the cores this process may use, shared among the ranks, at
            most 8; none where images lie in memory.
        in_memory: Whether to decode everything once and hold it in memory. `None`: if images are at most
            96 px wide and all of them take at most 1 GiB. What is predicted is decoded as it comes.
        on_error: What to do with an image that cannot be read: `raise`, or `skip` it and count it. `None`: skip in
            `predict`, where a batch then has a black one in its place and says so in `unreadable`; else raise.
    """

    flip = True  # whether a mirrored image keeps its meaning
    official_train_size: int | None = None  # what a data set's own lists have for training
    predict_from = 0  # batches of each rank that are predicted already, and not given again

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        image_size: int | None = None,
        augment: Strength = "standard",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        val_share: float = 0.1,
        fold: tuple[int, int] | None = None,
        limit_per_class: int | None = None,
        balance: bool = False,
        seed: int = 0,
        num_workers: int | None = None,
        in_memory: bool | None = None,
        on_error: Literal["raise", "skip"] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, not {batch_size}")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or 2 * batch_size
        self.image_size, self.augment, self.mixup, self.cutmix = image_size, augment, mixup, cutmix
        self.val_share, self.fold = val_share, fold
        self.limit_per_class, self.seed = limit_per_class, seed
        self.balance = balance
        self.num_workers, self.in_memory, self.on_error = num_workers, in_memory, on_error
        self.splits: dict[str, ImageSource] = {}
        self.cut_rows: dict[str, list[int]] = {}
        self.decoded: dict[str, Tensor] = {}
        self.features: dict[str, Tensor] = {}
        self.skipped: set[str] = set()
        self.omitted: list[str] = []  # what lies with the images and is in no split, in words

    @property
    def class_names(self) -> list[str]:
        """Names in the order of the labels; known before `setup`."""
        raise NotImplementedError

    def read_splits(self) -> dict[str, ImageSource]:
        """The data set's images: `train` and whichever of `val`, `test` and `predict` exist."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def expected_samples(self) -> int | None:
        """Training images of an official data set, before any file is there; `None` of others."""
        return None if self.official_train_size is None else self.train_size_after_split(self.official_train_size)

    def train_size_after_split(self, samples: int, *, own_val: bool = False) -> int:
        """How many of so many training images are left to train on; with `own_val` none are held out."""
        kept = samples if own_val else samples * (1 - (1 / self.fold[1] if self.fold else self.val_share))
        return round(min(kept, self.num_classes * self.limit_per_class) if self.limit_per_class else kept)

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class, after `setup`."""
        return torch.bincount(self.splits["train"].labels, minlength=self.num_classes).tolist()

    def sample_names(self, split: str) -> Callable[[int], str]:
        return self.splits[split].name

    def setup(self, stage: str | None = None) -> None:
        """Split, limit and check what `read_splits` finds; decode it where it is to lie in memory."""
        if self.splits:
            return
        self.omitted.clear()
        splits = self.read_splits()
        for name, images in splits.items():
            if not len(images.labels):
                raise ValueError(f"the {name} split has no images: add some, or remove it")
            check_labels(images, self.class_names)
        if "train" in splits:
            split_train(splits, splits["train"].labels, Subset, self)
            splits.setdefault("predict", splits.get("test", splits["val"]))
        self.splits = splits
        self.cut_rows = rows_of(splits)  # before images that cannot be read drop out
        counts = ", ".join(f"{len(part.labels)} {name}" for name, part in splits.items() if name != "predict")
        log.info("data: %s images of %d classes", counts or len(splits["predict"].labels), self.num_classes)
        for sentence in self.omitted:
            log.warning("data: omitted: %s", sentence)
        for name in ("val", "test"):
            seen = set(splits[name].labels.tolist()) if name in splits else set(range(self.num_classes))
            unseen = [label for number, label in enumerate(self.class_names) if number not in seen]
            if unseen:
                some = ", ".join(unseen[:5]) + (" ..." if len(unseen) > 5 else "")
                log.warning("data: %s has no image of %s: its metrics say nothing about them", name, some)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled and augmented."""
        return self._loader("train", train=True, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """In order; every image counts once, also over several ranks."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """As validation. Without a test split this is the validation split, and a warning says so."""
        if "test" not in self.splits:
            log.warning("no test split: testing on the validation images, which chose the checkpoint")
            return self._loader("val")
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """As test, over the images to be predicted: by default the test split's; from batch `predict_from` on."""
        for name in ("test", "val"):
            if self.splits.get(name) is self.splits["predict"]:
                log.warning("data.predict_root is not set: predicting the %s images", name)
        loader = self._loader("predict")
        loader.sampler.start = self.predict_from * self.eval_batch_size  # type: ignore[attr-defined]
        return loader

    def fingerprint(self, split: str) -> str:
        """Changes with the images and labels of a split, as far as file sizes and times tell."""
        images = self.splits[split]
        digest = hashlib.sha256(b"%d" % RULES + images.labels.numpy().tobytes())
        source, rows = flattened(images)
        digest.update(rows.numpy().tobytes())
        digest.update(source.fingerprint().encode())
        return digest.hexdigest()

    def view_dataloader(self, split: str, view: int | None) -> DataLoader[Batch]:
        """Every image of a split once, in order: as in evaluation, or augmented as in epoch `view`."""
        loader = self._loader(split, train=view is not None, shuffle=False, world=1, rank=0)
        loader.sampler.set_epoch(view or 0)  # type: ignore[attr-defined]
        return loader

    def fisher_dataloader(self) -> DataLoader[Batch]:
        """The training images as they are, for a callback that takes stock of the finished fit."""
        return self.view_dataloader("train", None)

    def batch(self, split: str, rows: Sequence[int]) -> Batch:
        dataset: Any = self._dataset(split, train=False)
        return cast(Batch, dataset.__getitems__([Draw(0, row) for row in rows]))

    def inspect(self) -> dict[str, Any]:
        """What `recipes doctor` says: see `inspection.inspect_images`; to be called after `setup`."""
        splits = {name: part for name, part in self.splits.items() if name != "predict"}
        few = sum(len(part.labels) for part in splits.values()) < 2_000
        workers = (0 if few else min(8, _cores())) if self.num_workers is None else self.num_workers
        return inspect_images(splits, self.class_names, workers) | {"left_out": self.omitted}

    def _loader(
        self, split: str, *, train: bool = False, shuffle: bool = False, world: int | None = None, rank: int = 0
    ) -> DataLoader[Batch]:
        if world is None:
            world, rank = ranks_of(self.trainer)
        dataset: Dataset[Batch]
        if split in self.features:
            dataset = Precomputed(self.features[split], self.splits[split].labels)
        else:
            dataset = self._dataset(split, train=train)
        sampler = self._sampler(split, dataset, shuffle, world, rank)
        workers = 0
        if isinstance(dataset, Decoding):
            local_ranks = self.trainer.num_devices if self.trainer else 1
            workers = min(8, _cores() // local_ranks) if self.num_workers is None else self.num_workers
        return DataLoader(
            dataset,
            batch_size=self.batch_size if train else self.eval_batch_size,
            sampler=sampler,
            drop_last=shuffle and len(sampler) >= self.batch_size,  # a last batch of one would break BatchNorm
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate_whole,
        )

    def _sampler(
        self, split: str, dataset: Dataset[Batch], shuffle: bool, world: int, rank: int
    ) -> EpochSampler | BlockSampler:
        labels = self.splits[split].labels
        balance = labels if shuffle and self.balance else None
        return EpochSampler(
            len(labels), shuffle=shuffle, seed=self.seed, num_replicas=world, rank=rank, balance=balance
        )

    def _dataset(self, split: str, *, train: bool) -> Dataset[Batch]:
        images = self.splits[split]
        size = self.image_size or 224
        in_memory = self.in_memory
        if split == "predict":
            in_memory = decoded_already(images, size)
        elif in_memory is None:
            in_memory = size <= MEMORY_LIMIT_PIXELS and len(images.labels) * size * size * 3 <= MEMORY_LIMIT_BYTES
        if in_memory:
            if split not in self.decoded:
                self.decoded[split] = self._decode_all(split, size)
            return InMemory(self.decoded[split], self.splits[split].labels, train=train, seed=self.seed)
        transform = sample_transform(self.augment, size, train=train, flip=self.flip)
        on_error: Literal["raise", "skip", "blank"] = self.on_error or "raise"
        if split == "predict" and self.on_error != "raise":
            on_error = "blank"
        return Decoding(images, transform, train=train, seed=self.seed, on_error=on_error)

    def _decode_all(self, split: str, size: int) -> Tensor:
        """uint8, `(n, size, size, 3)`; without the images that cannot be read, if these are to be skipped."""
        images = self.splits[split]
        if decoded_already(images, size):
            return images.images.pixels[images.rows] if isinstance(images, Subset) else images.pixels  # type: ignore[attr-defined, no-any-return]
        pixels = torch.empty(len(images.labels), size, size, 3, dtype=torch.uint8)
        readable: list[int] = []
        for index in range(len(pixels)):
            try:
                image = images.read(index)
            except ValueError as error:
                if self.on_error != "skip":
                    raise
                self.skipped.add(str(error))
                continue
            pixels[len(readable)] = torch.from_numpy(np.array(evaluation_crop(image, size)))
            readable.append(index)
        if not readable:
            raise nothing_readable(len(pixels), sorted(self.skipped)[0])
        if len(readable) < len(pixels):
            self.splits[split] = Subset(images, torch.tensor(readable, dtype=torch.long))
        return pixels[: len(readable)]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """On the model's device: augmentation of images from memory, uint8 to float, mixup and CutMix."""
        self.skipped.update(batch.pop("skipped", ()))
        if "image" not in batch:
            return batch
        seed, uniform = batch.pop("seed", None), batch.pop("uniform", None)
        if uniform is not None:
            batch["image"] = batchwise.augment(batch["image"], uniform, self.augment, flip=self.flip)
        batch["image"] = batchwise.to_float(batch["image"])
        if seed is not None and (self.mixup or self.cutmix):
            target = batchwise.soft_targets(batch["label"], self.num_classes)
            batch["image"], batch["target"] = batchwise.mix(
                batch["image"], target, mixup=self.mixup, cutmix=self.cutmix, seed=seed
            )
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint should tell about the data: class names, sizes, the split."""
        return {**split_state(self), "image_size": self.image_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, self)


def decoded_already(images: ImageSource, size: int) -> bool:
    """Whether a collection, or the one that it is a part of, lies in memory in the size that is asked for."""
    source = images.images if isinstance(images, Subset) else images
    return isinstance(source, ImageArray) and source.pixels.shape[1:3] == (size, size)


def rows_of(splits: dict[str, ImageSource]) -> dict[str, list[int]]:
    """Which rows of the original training set are in `train` and `val`, where they were cut from it."""
    found = {}
    for name in {"train", "val"} & splits.keys():
        source, rows = flattened(splits[name])
        if source is not splits[name]:
            found[name] = rows.tolist()
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
