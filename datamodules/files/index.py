"""The files below a folder: listed once, and then known as long as no folder has changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

MANY = 50_000  # below, listing them again is as fast as reading the saved listing


def list_files(root: str | Path, suffixes: tuple[str, ...]) -> Sequence[str]:
    """Paths below a folder, relative to it, sorted; without those whose name begins with a dot."""
    return list_tree(root, suffixes)[0]


def list_tree(root: str | Path, suffixes: tuple[str, ...]) -> tuple[Sequence[str], dict[str, int]]:
    """Paths as of `list_files`, and how many files have other endings, by ending, the most frequent first.

    No file is opened or asked for its size. A listing of many files is kept in torch's cache, with the times at which
    folders changed: a second start asks the folders alone. The paths then lie in a mapped file, not in memory. Suffixes
    are in lower case, such as `.jpg`.
    """
    root = os.path.abspath(root)  # noqa: PTH100  # symbolic links stay
    key = hashlib.sha256(json.dumps([root, sorted(suffixes), "others"]).encode()).hexdigest()[:32]
    listing = Path(torch.hub.get_dir()).parent / "folders" / f"{key}.paths"
    with contextlib.suppress(OSError, ValueError, KeyError):  # none, or one that is broken: it is made again
        mapped = MappedPaths(listing, root)
        return mapped, mapped.others
    folders: dict[str, int] = {}
    paths: list[str] = []
    found: Counter[str] = Counter()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        place = os.path.join(root, folder)  # noqa: PTH118  # a million paths
        folders[folder] = os.stat(place).st_mtime_ns
        with os.scandir(place) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    continue
                if entry.is_dir():
                    waiting.append(f"{folder}{name}/")
                elif name.lower().endswith(suffixes):
                    paths.append(f"{folder}{name}")
                else:
                    found[os.path.splitext(name)[1].lower()] += 1
    paths.sort()
    others = dict(found.most_common())
    if len(paths) >= MANY:
        # a disk that is full or not ours to write on, a folder that is being filled: no listing
        with contextlib.suppress(OSError, ValueError):
            save_listing(listing, paths, folders, others)
            return MappedPaths(listing, root), others
    return paths, others


def save_listing(listing: Path, paths: list[str], folders: dict[str, int], others: dict[str, int]) -> None:
    """Save a line of facts, then the paths, each ended by a zero byte; another process sees all of it or nothing."""
    listing.parent.mkdir(parents=True, exist_ok=True)
    beside = listing.with_name(f"{listing.name}.{os.getpid()}")
    content = os.fsencode("\0".join([*paths, ""]))
    facts = json.dumps({"bytes": len(content), "folders": folders, "others": others})
    try:
        with beside.open("wb") as out:
            out.write(f"{facts}\n".encode())
            out.write(content)
        beside.replace(listing)
    finally:
        beside.unlink(missing_ok=True)


class MappedPaths(Sequence[str]):
    """Paths below a root in a listing that was saved before.

    Raises:
        OSError, ValueError, KeyError: There is no listing, it cannot be read, or a folder has changed since.
    """

    def __init__(self, listing: Path, root: str) -> None:
        self.listing = listing
        facts = self._open()
        self.others: dict[str, int] = facts["others"]
        for folder, changed in facts["folders"].items():
            if os.stat(f"{root}/{folder}").st_mtime_ns != changed:
                raise ValueError(f"{root}/{folder} has changed")

    def _open(self) -> Any:
        with self.listing.open("rb") as file:
            line = file.readline()
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        facts = json.loads(line)
        if len(self.bytes) != len(line) + facts["bytes"]:
            raise ValueError(f"{self.listing} is incomplete")
        ends = np.flatnonzero(np.frombuffer(self.bytes, np.uint8, offset=len(line)) == 0) + len(line)
        self.cuts = np.concatenate([[len(line) - 1], ends])  # a path begins after the end of the one before
        self.digest = hashlib.sha256(line).hexdigest()  # folders and when they changed: what was listed
        return facts

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return os.fsdecode(self.bytes[self.cuts[place] + 1 : self.cuts[place + 1]])

    def __getstate__(self) -> dict[str, Any]:
        return {"listing": self.listing, "digest": self.digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.listing = state["listing"]
        self._open()
        if self.digest != state["digest"]:  # rows would be other files than the labels are of
            raise RuntimeError(f"{self.listing} changed while a run was reading it; start the run again")
