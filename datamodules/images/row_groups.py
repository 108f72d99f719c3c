"""Images in the row groups of Parquet files, read one group at a time."""

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
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from ..labels.values import check_each, class_labels, positions
from ..sampling.samplers import BlockSampler
from .sources import ImageSource, decode, flattened

log = logging.getLogger(__name__)
ATTEMPTS = 3  # to read from a server


class Shard(NamedTuple):
    """What the footer and the labels of a Parquet file say."""

    path: str
    rows: list[int]  # of each row group
    labels: list[Any]  # names, where the file's metadata have them; else what the column holds
    names: list[str] | None  # of the classes
    digest: str  # of the footer


class RowGroups:
    """Encoded images in the row groups of Parquet files; labels `(n,)`."""

    def __init__(self, shards: Sequence[Shard], column: str, labels: torch.Tensor) -> None:
        self.shards, self.column, self.labels = shards, column, labels
        self.places = [(number, group) for number, shard in enumerate(shards) for group in range(len(shard.rows))]
        sizes = [size for shard in shards for size in shard.rows]
        self.starts = [0, *accumulate(sizes)][:-1]
        self.name = RowNamer(shards)
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
        """A row's encoded image: bytes, or bytes and path."""
        group = bisect_right(self.starts, index) - 1
        return self._group(group)[index - self.starts[group]].as_py()

    def _group(self, group: int) -> Any:
        """The image column of a row group; the one that was used longest ago makes room."""
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
        name, path = self.name(index), None
        try:
            cell = self.cell(index)
        except ValueError as error:
            raise ValueError(
                f"cannot read the image {name}: {error}. Write the file again, or set data.on_error to skip"
            ) from error
        if isinstance(cell, dict):
            cell, path = cell["bytes"], cell.get("path")
        if isinstance(cell, str):
            cell, path = None, cell
        if cell is None:
            raise ValueError(f"{name} has no image" + (f", only a path, {path}" if path else ""))
        return decode(io.BytesIO(cell), name)

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([(shard.path, shard.digest) for shard in self.shards]).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is held: a spawned worker reads for itself."""
        return {**self.__dict__, "_held": OrderedDict()}


def blocks_of(images: ImageSource) -> np.ndarray[Any, Any]:
    """The row group that each sample lies in, `(n,)`, counted from 0 without gaps."""
    source, rows = flattened(images)
    assert isinstance(source, RowGroups)
    return np.unique(np.searchsorted(source.starts, rows.numpy(), side="right"), return_inverse=True)[1]


def read_shards(patterns: Sequence[str], image_column: str, label_column: str) -> list[Shard]:
    """Footers and labels of Parquet files, in the order of the patterns, those of a pattern sorted.

    Patterns are paths, addresses, or either with `*`.

    Raises:
        FileNotFoundError: A pattern that matches nothing.
        ValueError: A file that is no Parquet, or lacks a column.
    """
    paths = [path for pattern in patterns for path in expand(pattern)]
    with ThreadPoolExecutor(16) as pool:  # far away, time is spent waiting
        shards = list(pool.map(lambda path: read_shard(path, image_column, label_column), paths))
    bare = [shard.path for shard in shards if shard.names is None]
    if 0 < len(bare) < len(shards):
        raise ValueError(f"{bare[0]} has no class names, but other files do: write all with one ClassLabel")
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
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    rows, sizes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
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
            log.warning("%s: %s; retrying in %d s", path, reason, 2**attempt)
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
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error


def labels_of(shards: Sequence[Shard]) -> list[Any]:
    """The labels of all rows."""
    return [label for shard in shards for label in shard.labels]


class RowNamer:
    """Names a row of several files, counted through, by its file and the row in it."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.paths = [shard.path for shard in shards]
        self.starts = [0, *accumulate(len(shard.labels) for shard in shards)]

    def __call__(self, row: int) -> str:
        shard = bisect_right(self.starts, row) - 1
        return f"{self.paths[shard]}#{row - self.starts[shard]}"
