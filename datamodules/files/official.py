"""Data sets of files that torchvision downloads, checks and lists: the same with sentences, and nothing missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..images.sources import PictureFiles, check_there


def download(kind: Any, root: Path, folder: Path, archives: str) -> None:
    """Have torchvision's class download what is not there.

    Args:
        kind: torchvision's class.
        root: What it is given.
        folder: The data set's own, below.
        archives: What can be put there by hand, and where it comes from.

    Raises:
        FileNotFoundError: Neither the files nor the network are there.
    """
    try:
        kind(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{kind.__name__} is not in {root} and cannot be downloaded ({error}). Put {archives} into {folder}, or "
            "set data.root to where it is."
        ) from error


def listed(kind: Any, root: Path, folder: Path, splits: Sequence[str]) -> PictureFiles:
    """The files of some of the splits of torchvision's class.

    Raises:
        FileNotFoundError: One is not there.
    """
    parts = [kind(str(root), split=split) for split in splits]
    paths = [str(path) for part in parts for path in getattr(part, "_image_files", None) or part._images]
    check_there(paths, f"remove {folder}, and it is unpacked again")
    return PictureFiles(paths, [label for part in parts for label in part._labels])
