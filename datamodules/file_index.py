"""The files below a folder: listed once, and then known as long as no folder has changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

MANY = 50_000  # below, listing them again is as fast as reading what was noted


def list_files(root: str | Path, suffixes: tuple[str, ...]) -> Sequence[str]:
    """Paths below a folder, relative to it, sorted; without those whose name begins with a dot.

    No file is opened or asked for its size. Of many files a note is kept in torch's cache, with the times at which
    folders changed: a second start asks the folders alone. The paths then lie in a mapped file, not in memory.

    Args:
        root: The folder.
        suffixes: Endings of files, in lower case, such as `.jpg`.
    """
    root = os.path.abspath(root)  # noqa: PTH100  # symbolic links stay
    key = hashlib.sha256(json.dumps([root, sorted(suffixes)]).encode()).hexdigest()[:32]
    note = Path(torch.hub.get_dir()).parent / "folders" / f"{key}.arrow"
    with contextlib.suppress(OSError, ValueError, KeyError):  # none, or one that is broken: it is made again
        return MappedPaths(note, root)
    folders: dict[str, int] = {}
    paths: list[str] = []
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
    paths.sort()
    if len(paths) >= MANY:
        # a disk that is full or not ours to write on, names that are no text, a folder that is being filled: no note
        with contextlib.suppress(OSError, ValueError):
            write_note(note, paths, folders)
            return MappedPaths(note, root)
    return paths


def write_note(note: Path, paths: list[str], folders: dict[str, int]) -> None:
    """Write paths and the times of change of folders; another process sees all of it or nothing."""
    import pyarrow

    note.parent.mkdir(parents=True, exist_ok=True)
    beside = note.with_name(f"{note.name}.{os.getpid()}")
    table = pyarrow.table({"path": pyarrow.array(paths, pyarrow.large_string())})
    content = hashlib.sha256("\0".join(paths).encode()).hexdigest()
    table = table.replace_schema_metadata({"folders": json.dumps(folders), "content": content})
    try:
        with pyarrow.OSFile(str(beside), "wb") as out, pyarrow.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
        beside.replace(note)
    finally:
        beside.unlink(missing_ok=True)


class MappedPaths(Sequence[str]):
    """Paths in a note that was written before.

    Args:
        note: The file.
        root: The folder whose files are noted.

    Raises:
        OSError, ValueError, KeyError: There is no note, it cannot be read, or a folder has changed since.
    """

    def __init__(self, note: Path, root: str) -> None:
        self.note = note
        self._open()
        folders = json.loads(self.schema.metadata[b"folders"])
        for folder, changed in folders.items():
            if os.stat(f"{root}/{folder}").st_mtime_ns != changed:
                raise ValueError(f"{root}/{folder} has changed")

    def _open(self) -> None:
        import pyarrow

        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(self.note))).read_all()
        self.schema, self.column = table.schema, table["path"].combine_chunks()
        self.content = self.schema.metadata[b"content"]

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: Any) -> Any:
        found = self.column[index]
        return found.to_pylist() if isinstance(index, slice) else found.as_py()

    def __getstate__(self) -> dict[str, Any]:
        return {"note": self.note, "content": self.content}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.note = state["note"]
        self._open()
        if self.content != state["content"]:  # rows would be other files than the labels are of
            raise RuntimeError(f"{self.note} was written anew while a run was reading it; start the run again")
