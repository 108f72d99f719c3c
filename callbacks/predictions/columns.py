"""A batch of predictions as columns of words and numbers, and its masks as pictures."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def columns(
    prediction: Mapping[str, Tensor], class_names: Sequence[str] | None = None, task: str = ""
) -> dict[str, list[Any]]:
    """A batch of predictions as columns of names, and of numbers with six decimals, by their headings.

    Args:
        prediction: As of `PredictionWriter`; `index` is omitted.
        class_names: Names in the order of the labels; numbers if not given.
        task: One of several, whose name the headings begin with.
    """

    def name(label: int) -> str:
        return class_names[label] if class_names else str(label)

    found: dict[str, list[Any]] = {}
    for key, values in prediction.items():
        if key == "index":
            continue
        heading = f"{task}_{key}" if task else key
        if task and key in ("label", "number"):
            heading = task
        if key.split("_")[0] == "label":
            rows: list[Any] = values.tolist()
            if values.ndim == 2:
                found[heading] = ["|".join(name(n) for n, is_so in enumerate(row) if is_so) for row in rows]
            else:
                found[heading] = [name(label) for label in rows]
        elif values.ndim == 2:
            for label, column in enumerate(values.T.tolist()):
                found[f"{heading}({name(label)})"] = [round(value, 6) for value in column]
        else:
            found[heading] = [round(value, 6) for value in values.tolist()]
    return found


def save_masks(masks: Tensor, folder: Path, index: Sequence[int]) -> list[str]:
    """Save masks, uint8 `(batch, height, width)`, as grey PNG files named by their index; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{one:06d}.png" for one in index]
    for mask, path in zip(masks.cpu(), paths, strict=True):
        path.write_bytes(grey_png(mask))
    return [path.relative_to(folder.parents[1]).as_posix() for path in paths]


def grey_png(pixels: Tensor) -> bytes:
    """A PNG of 8 bits, of uint8 `(height, width)`."""
    height, width = pixels.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + checksum

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])  # grey, no tricks
    lines = torch.cat([pixels.new_zeros(height, 1), pixels], 1).contiguous()  # each line says how it is filtered: not
    packed = zlib.compress(lines.numpy().tobytes())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
