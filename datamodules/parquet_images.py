"""Images in Parquet files, on a disk or far away: more of them than anyone wants to copy first."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .images.base import ImageDataModule
from .images.batches import Decoding
from .images.row_groups import RowGroups, RowNamer, Shard, blocks_of, labels_of, read_shards
from .images.sources import ImageSource, Subset, flattened
from .labels.values import label_numbers, learn_classes
from .sampling.draws import Batch
from .sampling.samplers import BlockSampler, EpochSampler
from .sampling.seeds import hash_seed

log = logging.getLogger(__name__)


class ParquetImages(ImageDataModule):
    """Images in Parquet files that are read as they are needed, each row group once an epoch and by one rank.

    Contents, licence, source: the files'. Layout: Hugging Face's, a column of encoded images, as bytes or as
    `{bytes, path}`, and one of labels: whole numbers, with the names that the file's metadata give them, or names.
    Splits: the files of each. Without `val_files`, row groups of the training files that hold `val_share` of them are
    for validation; the test falls back on these with a warning.

    At the start footers and labels are read, and no image. An epoch permutes the row groups, and samples among
    `shuffle_rows` neighbours of that order: files whose rows are sorted by class should be shuffled once, when they are
    written. The row groups of these neighbours are held in memory, still encoded. Ranks get equal numbers of steps,
    whatever the sizes of files and row groups; a run resumed during an epoch continues with the sample that was next.

    Args:
        train_files: A file, a pattern or several of these: paths or addresses (`hf://`, `s3://`, `https://`).
        val_files: The same for validation.
        test_files: The same for the test.
        image_column: Column of images.
        label_column: Column of labels.
        shuffle_rows: Samples of a rank among which the order is random.
        **kwargs: Those of `ImageDataModule`; `fold` and `balance`, which need any sample at any time, are refused.
    """

    def __init__(
        self,
        train_files: str | list[str],
        val_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        image_column: str = "image",
        label_column: str = "label",
        shuffle_rows: int = 4096,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.fold is not None:
            raise ValueError("data.fold needs single samples; Parquet files are read by row groups: set data.val_files")
        if self.balance:
            raise ValueError(
                "data.balance needs single samples, not the row groups of Parquet: set model.class_weights"
            )
        self.files = {"train": train_files, "val": val_files, "test": test_files}
        self.image_column, self.label_column, self.shuffle_rows = image_column, label_column, shuffle_rows

    @cached_property
    def shards(self) -> dict[str, list[Shard]]:
        """The files of each split, as far as their footers and labels say."""
        return {
            split: read_shards([files] if isinstance(files, str) else files, self.image_column, self.label_column)
            for split, files in self.files.items()
            if files
        }

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The names in the metadata of the first file; else the sorted values of all training files."""
        shards = self.shards["train"]
        return shards[0].names or learn_classes(labels_of(shards))

    def read_splits(self) -> dict[str, ImageSource]:
        splits: dict[str, ImageSource] = {
            split: RowGroups(
                shards, self.image_column, label_numbers(labels_of(shards), self.class_names, RowNamer(shards))
            )
            for split, shards in self.shards.items()
        }
        if "val" not in splits:
            train = splits["train"]
            held_out = self._held_out(blocks_of(train))
            splits["train"] = Subset(train, (~held_out).nonzero().flatten())
            splits["val"] = Subset(train, held_out.nonzero().flatten())
            missing = set(train.labels.tolist()) - set(splits["train"].labels.tolist())
            if missing:
                raise ValueError(
                    f"no training image of class {self.class_names[min(missing)]!r} is left when whole row groups "
                    f"are held out for validation: set data.val_files, or shuffle the rows when the files are written"
                )
        return splits

    def _held_out(self, blocks: np.ndarray[Any, Any]) -> torch.Tensor:
        """Truth values, `(n,)`: whole row groups at random, about `val_share` of the samples."""
        count = int(blocks[-1]) + 1
        if count < 2:
            raise ValueError("the training files have one row group, and none can be held out: set data.val_files")
        order = np.random.default_rng(hash_seed(self.seed, count)).permutation(count)
        ends = np.cumsum(np.bincount(blocks)[order])
        chosen = order[: min(int(np.searchsorted(ends, self.val_share * len(blocks))) + 1, count - 1)]
        return torch.from_numpy(np.isin(blocks, chosen))

    def _dataset(self, split: str, *, train: bool) -> Dataset[Batch]:
        """Where images are read from the files, with room for the row groups that are read by turns."""
        dataset = super()._dataset(split, train=train)
        if isinstance(dataset, Decoding):
            source, rows = flattened(dataset.images)
            assert isinstance(source, RowGroups)
            dataset.images = Subset(source.with_room(self.shuffle_rows if train else 0), rows)
        return dataset

    def _sampler(
        self, split: str, dataset: Dataset[Batch], shuffle: bool, world: int, rank: int
    ) -> EpochSampler | BlockSampler:
        if not isinstance(dataset, Decoding):
            return super()._sampler(split, dataset, shuffle, world, rank)
        return BlockSampler(
            blocks_of(dataset.images),
            batch_size=self.batch_size,
            window=self.shuffle_rows,
            shuffle=shuffle,
            seed=self.seed,
            num_replicas=world,
            rank=rank,
        )
