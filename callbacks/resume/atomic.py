"""Checkpoints that are saved atomically."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

HOST = socket.gethostname().split(".")[0]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves checkpoints so that a kill at any moment leaves the old file or the new one, and never a part.

    A file is written beside its target, flushed to the disk and moved into place; Lightning's own way leads through the
    temporary folder, from where a move to another file system can be interrupted. Nothing is held twice in memory.
    What a killed process left behind is removed at the next save. Remote paths are left to Lightning. Checkpoints are
    loaded with `weights_only=True` unless told otherwise, since a pickle can run code.

    `ExactResume` installs it. Alone: `Trainer(plugins=[AtomicCheckpointIO()])`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save one file."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_atomically(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        """Load one file."""
        return super().load_checkpoint(path, map_location, weights_only is not False)


def save_atomically(what: Any, path: Path) -> None:
    """`torch.save` that never leaves a part of a file at `path`, nor one of an earlier, killed call beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(".*.checkpoint-part"):
        if _is_stale(left_over):
            left_over.unlink(missing_ok=True)
    new = path.with_name(f".{path.name[:100]}.{HOST}.{os.getpid()}.checkpoint-part")
    try:
        with new.open("wb") as file:
            torch.save(what, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the name, too, has to reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _is_stale(file: Path) -> bool:
    """Whether a temporary file is abandoned: its process is gone, or on another host and silent for an hour."""
    host, pid = file.name.split(".")[-3:-1]
    try:
        if host != HOST or os.name != "posix":
            return time.time() - file.stat().st_mtime > 3600
        os.kill(int(pid), 0)
    except (ProcessLookupError, FileNotFoundError):
        return True
    except PermissionError:  # it is another user's
        pass
    return False
