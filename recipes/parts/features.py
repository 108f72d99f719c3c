"""Features of a frozen backbone, computed once and trained on many times.

While a backbone is frozen and its images are not augmented, every epoch computes the same features. Here
they are computed once, or once for each of k augmented views, into a memory-mapped file whose name is a hash
of all they depend on: other weights, data or transforms find no file, and memory stays bounded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .losses import labelled

Batch = dict[str, Any]


def fingerprint(module: nn.Module, *facts: Any) -> str:
    """Hash of a module's weights, bit by bit, and of whatever else its features depend on.

    Args:
        module: Its parameters and buffers count.
        *facts: Plain values: data set, split, transform, seed.

    Returns:
        16 hexadecimal digits.
    """
    return digest_of(module.state_dict(), *facts)


def digest_of(tensors: Mapping[str, Tensor], *facts: Any) -> str:
    """The same of tensors by name, in their order."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@torch.no_grad()
def extract(found_in: Callable[[Batch], Tensor], views: Sequence[Iterable[Batch]], samples: int, file: Path) -> Tensor:
    """Compute something of every view of every sample, into a file; or read the file where it exists.

    The file appears under its name only when it is complete: an interrupted run leaves nothing wrong.

    Args:
        found_in: A batch to features or logits, `(batch, width)`; by a net in evaluation mode.
        views: For each view, batches with `index`, on the net's device, that together hold each of the samples once,
            in any order; a `label` of -100 marks one that does not count.
        samples: Their number.
        file: Where the features are kept; its name should be a `fingerprint` of all they depend on.

    Returns:
        float32, `(views, samples, width)`, memory-mapped.

    Raises:
        ValueError: A view does not hold every sample.
    """
    shape = (len(views), samples, -1)
    if file.is_file():
        return _mapped(file, file.stat().st_size // 4).view(shape)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.part")
    values: Tensor | None = None
    for view, batches in enumerate(views):
        seen = torch.zeros(samples, dtype=torch.bool)
        for batch in batches:
            found, index = found_in(batch).float().cpu(), batch["index"].cpu()
            if values is None:
                values = _mapped(unfinished, len(views) * samples * found.shape[1]).view(shape)
            values[view, index] = found
            seen[index[labelled(batch["label"]).cpu()] if "label" in batch else index] = True
        if not seen.all():
            raise ValueError(f"{int(seen.sum())} of {samples} samples came in view {view}: features would be missing")
    if values is None:
        raise ValueError("there is no view to extract features from")
    unfinished.replace(file)
    return values


def _mapped(file: Path, size: int) -> Tensor:
    return torch.from_file(str(file), shared=True, size=size, dtype=torch.float32)
