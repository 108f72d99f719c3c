"""Pictures in Parquet files, on a disk or far away: more of them than anyone wants to copy first."""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import json
import logging
import math
import os
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from .images.base import ImageDataModule
from .images.batches import Batch, Decoding
from .images.sources import Pictures, Subset, decode, flattened
from .labels.values import check_each, label_numbers, learn_classes, positions
from .sampling.samplers import BlockSampler, EpochSampler, hash_seed
from .texts.rows import class_labels

log = logging.getLogger(__name__)

ATTEMPTS = 3  # to read from a server


class ParquetImages(ImageDataModule):
    """Pictures in Parquet files that are read as they are needed, each row group once an epoch and by one rank.

    Contents, licence, source: the files'. Layout: Hugging Face's, a column of encoded pictures, as bytes or as
    `{bytes, path}`, and one of labels: whole numbers, with the names that the file's metadata give them, or names.
    Splits: the files of each. Without `val_files`, row groups of the training files that hold `val_share` of them are
    for validation; the test falls back on these with a warning.

    At the start footers and labels are read, and no picture. An epoch permutes the row groups, and samples among
    `shuffle_rows` neighbours of that order: files whose rows are sorted by class should be shuffled once, when they are
    written. The row groups of these neighbours are held in memory, still encoded. Ranks get equal numbers of steps,
    whatever the sizes of files and row groups; a run resumed amid an epoch goes on with the sample that was next.

    Args:
        train_files: A file, a pattern or several of these: paths or addresses (`hf://`, `s3://`, `https://`).
        val_files: The same for validation.
        test_files: The same for the test.
        image_column: Column of pictures.
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
            raise ValueError("data.fold needs single samples, and Parquet files are read by row groups: name val_files")
        if self.balance:
            raise ValueError(
                "data.balance needs single samples, and Parquet files are read by row groups: take model.class_weights"
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

    def read_splits(self) -> dict[str, Pictures]:
        """Labels, and where each picture lies."""
        splits: dict[str, Pictures] = {
            split: RowGroups(
                shards,
                self.image_column,
                label_numbers(labels_of(shards), self.class_names, RowNamer(shards)),
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
                    f"no training picture of class {self.class_names[min(missing)]!r} is left when whole row groups "
                    f"are held out for validation: name data.val_files, or shuffle the rows when the files are written"
                )
        return splits

    def _held_out(self, blocks: np.ndarray[Any, Any]) -> torch.Tensor:
        """Truth values, `(n,)`: whole row groups at random, about `val_share` of the samples."""
        count = int(blocks[-1]) + 1
        if count < 2:
            raise ValueError("the training files have one row group, and none can be held out: name data.val_files")
        order = np.random.default_rng(hash_seed(self.seed, count)).permutation(count)
        ends = np.cumsum(np.bincount(blocks)[order])
        chosen = order[: min(int(np.searchsorted(ends, self.val_share * len(blocks))) + 1, count - 1)]
        return torch.from_numpy(np.isin(blocks, chosen))

    def _dataset(self, split: str, *, train: bool) -> Dataset[Batch]:
        """Where pictures are read from the files, with room for the row groups that are read by turns."""
        dataset = super()._dataset(split, train=train)
        if isinstance(dataset, Decoding):
            source, rows = flattened(dataset.pictures)
            assert isinstance(source, RowGroups)
            dataset.pictures = Subset(source.with_room(self.shuffle_rows if train else 0), rows)
        return dataset

    def _sampler(
        self, split: str, dataset: Dataset[Batch], shuffle: bool, world: int, rank: int
    ) -> EpochSampler | BlockSampler:
        """By row groups, where pictures are read from the files."""
        if not isinstance(dataset, Decoding):
            return super()._sampler(split, dataset, shuffle, world, rank)
        return BlockSampler(
            blocks_of(dataset.pictures),
            batch_size=self.batch_size,
            window=self.shuffle_rows,
            shuffle=shuffle,
            seed=self.seed,
            num_replicas=world,
            rank=rank,
        )


class Shard(NamedTuple):
    """What the footer and the labels of a Parquet file say."""

    path: str
    rows: list[int]  # of each row group
    labels: list[Any]  # names, where the file's metadata have them; else what the column holds
    names: list[str] | None  # of the classes
    digest: str  # of the footer


def labels_of(shards: Sequence[Shard]) -> list[Any]:
    """The labels of all rows."""
    return [label for shard in shards for label in shard.labels]


class RowNamer:
    """Names a row of several files by its file and the row in it.

    Args:
        shards: The files.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.paths = [shard.path for shard in shards]
        self.starts = [0, *accumulate(len(shard.labels) for shard in shards)]

    def __call__(self, row: int) -> str:
        """Of a row of all, counted through."""
        shard = bisect_right(self.starts, row) - 1
        return f"{self.paths[shard]}#{row - self.starts[shard]}"


class RowGroups:
    """Encoded pictures in the row groups of Parquet files.

    Args:
        shards: The files.
        column: The picture column.
        labels: Classes, `(n,)`.
    """

    def __init__(self, shards: Sequence[Shard], column: str, labels: torch.Tensor) -> None:
        self.shards, self.column, self.labels = shards, column, labels
        self.places = [(number, group) for number, shard in enumerate(shards) for group in range(len(shard.rows))]
        sizes = [size for shard in shards for size in shard.rows]
        self.starts = [0, *accumulate(sizes)][:-1]
        self._row = RowNamer(shards)
        self.in_order = True
        self.room = 2  # row groups to hold in memory, for each lane of a BlockSampler that a worker reads
        self._held: OrderedDict[int, Any] = OrderedDict()

    def with_room(self, window: int) -> RowGroups:
        """The same with room for a `BlockSampler`'s window of so many samples; 0 for reading in order."""
        other = copy.copy(self)
        other.room = 2 + (window // BlockSampler.LANES * len(self.places) // max(1, len(self.labels)))
        other.in_order, other._held = window == 0, OrderedDict()
        return other

    def cell(self, index: int) -> Any:
        """A row's encoded picture: bytes, or bytes and path."""
        group = bisect_right(self.starts, index) - 1
        return self._group(group)[index - self.starts[group]].as_py()

    def _group(self, group: int) -> Any:
        """The picture column of a row group; the one that was used longest ago makes room."""
        if group not in self._held:
            worker = get_worker_info()
            lanes = BlockSampler.LANES // math.gcd(BlockSampler.LANES, worker.num_workers if worker else 1)
            while len(self._held) >= self.room * (1 if self.in_order else lanes):
                self._held.popitem(last=False)
            shard, number = self.places[group]
            try:
                self._held[group] = read_group(self.shards[shard].path, number, self.column)
            except ValueError as error:
                self._held[group] = error  # so that it is asked for once, and not for each row
        self._held.move_to_end(group)
        if isinstance(self._held[group], ValueError):
            raise self._held[group]
        return self._held[group]

    def read(self, index: int) -> Image.Image:
        """Decode one row."""
        try:
            cell, path = self.cell(index), None
        except ValueError as error:
            raise ValueError(
                f"cannot read the picture {self._row(index)}: {error}. Write it again, or set data.on_error to skip"
            ) from error
        if isinstance(cell, dict):
            cell, path = cell["bytes"], cell.get("path")
        if isinstance(cell, str):
            cell, path = None, cell
        if cell is None:
            raise ValueError(f"{self._row(index)} has no picture" + (f", only a path, {path}" if path else ""))
        return decode(io.BytesIO(cell), self._row(index))

    def name(self, index: int) -> str:
        """The file and the row in it."""
        return self._row(index)

    def fingerprint(self) -> str:
        """Hash of the files' footers."""
        return hashlib.sha256(json.dumps([(shard.path, shard.digest) for shard in self.shards]).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is held: a spawned worker reads for itself."""
        return {**self.__dict__, "_held": OrderedDict()}


def blocks_of(pictures: Pictures) -> np.ndarray[Any, Any]:
    """The row group that each sample lies in, `(n,)`, counted from 0 without gaps."""
    source, rows = flattened(pictures)
    assert isinstance(source, RowGroups)
    return np.unique(np.searchsorted(source.starts, rows.numpy(), side="right"), return_inverse=True)[1]


def read_shards(patterns: Sequence[str], image_column: str, label_column: str) -> list[Shard]:
    """Footers and labels of Parquet files, in the order of the patterns, those of a pattern sorted.

    Args:
        patterns: Paths, addresses, or either with `*`.
        image_column: Column that there must be.
        label_column: Column to read.

    Raises:
        FileNotFoundError: A pattern that matches nothing.
        ValueError: A file that is no Parquet, or lacks a column.
    """
    paths = [path for pattern in patterns for path in expand(pattern)]
    with ThreadPoolExecutor(16) as pool:  # far away, time is spent waiting
        shards = list(pool.map(lambda path: read_shard(path, image_column, label_column), paths))
    bare = [shard.path for shard in shards if shard.names is None]
    if 0 < len(bare) < len(shards):
        raise ValueError(f"{bare[0]} has no names of classes, and other files have: write them with one ClassLabel")
    return shards


def expand(pattern: str) -> list[str]:
    """The files that a path or address stands for."""
    import fsspec

    pattern = os.path.expanduser(pattern)  # noqa: PTH111  an address is no Path
    if "*" not in pattern:
        return [pattern]
    files, inner = fsspec.core.url_to_fs(pattern)
    found = sorted(files.glob(inner))
    if not found:
        raise FileNotFoundError(f"no file {pattern}: set data.train_files to where the Parquet files are")
    return [files.unstrip_protocol(path) if "://" in pattern else path for path in found]


def read_shard(path: str, image_column: str, label_column: str) -> Shard:
    """Footer and labels of one file."""
    file = open_parquet(path)
    for column in (image_column, label_column):
        if column not in file.schema_arrow.names:
            raise ValueError(f"no column {column!r} in {path}: it has {', '.join(file.schema_arrow.names)}")
    footer = file.metadata
    rows = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    sizes = [footer.row_group(number).total_byte_size for number in range(footer.num_row_groups)]
    labels = file.read([label_column], use_threads=False)[label_column].to_pylist()

    def where(row: int) -> str:
        return f"row {row} of {path}"

    check_each(labels, where)
    names = class_labels(file.schema_arrow.metadata).get(label_column)
    if names is not None:
        labels = [names[label] for label in positions(labels, names, names, where).tolist()]
    digest = hashlib.sha256(json.dumps([rows, sizes, labels], default=str).encode()).hexdigest()
    return Shard(path, rows, labels, names, digest)


def read_group(path: str, number: int, column: str) -> Any:
    """One column of one row group; a server that fails is asked again."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return opened(path, os.getpid()).read_row_group(number, columns=[column], use_threads=False)[column]
        except Exception as error:  # each file system has its own
            reason = " ".join(str(error).split())
            if "://" not in path or attempt == ATTEMPTS:
                raise ValueError(f"row group {number} cannot be read, {reason}") from error
            log.warning("%s: %s; asked again in %d s", path, reason, 2**attempt)
            time.sleep(2**attempt)
            opened.cache_clear()
    raise AssertionError


@functools.lru_cache(maxsize=32)
def opened(path: str, process: int) -> Any:
    """A file's footer is read once; a forked process opens it anew."""
    return open_parquet(path)


def open_parquet(path: str) -> Any:
    """A `pyarrow.parquet.ParquetFile`, on a disk or at an address."""
    import pyarrow
    import pyarrow.parquet

    try:
        if "://" not in path:
            return pyarrow.parquet.ParquetFile(path, memory_map=True)
        import fsspec

        files, inner = fsspec.core.url_to_fs(path)
        return pyarrow.parquet.ParquetFile(files.open(inner, "rb", cache_type="none"), pre_buffer=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file {path}: set data.train_files to where the Parquet files are") from error
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {error}") from error
