"""Data sets of files that torchvision downloads, checks and lists: the same with sentences, and nothing missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..images.sources import ImageFiles, ImageSource, check_files_exist


def download(kind: Any, root: Path, folder: Path, archives: str) -> None:
    """Have torchvision's class `kind` download what is missing below `root` into its folder.

    Raises:
        FileNotFoundError: Neither the files nor the network can be reached; says which archives to put there by hand.
    """
    try:
        kind(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{kind.__name__} is not in {root} and cannot be downloaded ({error}). Put {archives} into {folder}, or "
            "set data.root to where it is."
        ) from error


def read_official(kind: Any, root: Path, folder: Path, splits: Mapping[str, Sequence[str]]) -> dict[str, ImageSource]:
    """The files of torchvision's splits, several of which may be one of ours; a missing file is an error."""
    found: dict[str, ImageSource] = {}
    for split, names in splits.items():
        parts = [kind(str(root), split=name) for name in names]
        paths = [str(path) for part in parts for path in getattr(part, "_image_files", None) or part._images]
        check_files_exist(paths, f"remove {folder}, and it is unpacked again")
        found[split] = ImageFiles(paths, [label for part in parts for label in part._labels])
    return found
