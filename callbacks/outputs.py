"""What a classifier says of the samples of a split: found in its steps, gathered from all ranks, kept in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LABELS = ("label", "labels", "target", "targets", "y")  # keys of an output or a batch under which labels are looked for

Outputs: TypeAlias = tuple[Tensor, Tensor, Tensor]  # logits (n, classes), labels (n,) and rows (n,), -1 where not known


class Predictions(NamedTuple):
    """What a net said of the samples of a split, in the order of the split."""

    logits: Tensor  # float32, (n, classes)
    labels: Tensor  # int64, (n,)
    rows: Tensor  # int64, (n,), position in the split; -1 where batches have none
    names: list[str]  # of the samples; empty where the data module gives none


def classified(outputs: Any, batch: Any, output: Tensor | None) -> Outputs | None:
    """Logits, labels and indices of a batch, without samples that only fill it up; nothing where these are no classes.

    Args:
        outputs: What the step returned.
        batch: What it was given.
        output: Logits, `(batch, classes)`, where the step returned none.
    """
    given = outputs if isinstance(outputs, Mapping) else {}
    logits = given.get("logits", output)
    labels = next(
        (place[key] for place in (given, batch) if isinstance(place, Mapping) for key in LABELS if key in place), None
    )
    if labels is None and isinstance(batch, (list, tuple)) and len(batch) > 1:
        labels = batch[1]
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        return None
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != len(logits):
        return None
    index = given.get("index", batch.get("index") if isinstance(batch, Mapping) else None)
    index = torch.full_like(labels, -1) if index is None else index
    known = labels >= 0
    return logits[known].detach().float().cpu(), labels[known].cpu(), index[known].cpu()


def gathered(parts: Sequence[Outputs], ranks: int) -> Outputs | None:
    """The parts of all ranks as one, in the order of the index, each sample once."""
    mine = tuple(torch.cat(column) for column in zip(*parts, strict=True)) if parts else None
    everyone = [mine]
    if ranks > 1:
        everyone = [None] * ranks
        torch.distributed.all_gather_object(everyone, mine)
    there = [part for part in everyone if part is not None]
    if not there:
        return None
    logits, labels, index = (torch.cat(column) for column in zip(*there, strict=True))
    if int(index.min()) >= 0 if len(index) else False:
        order = index.argsort(stable=True)
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = index[order][1:] != index[order][:-1]  # a rank's last batch may be filled up with others' samples
        logits, labels, index = (column[order[first]] for column in (logits, labels, index))
    return logits, labels, index


def save_predictions(path: Path, found: Predictions) -> None:
    """Write them; another process sees all of the file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = "\0".join(found.names).encode(errors="surrogateescape")
    tensors = {"logits": found.logits, "labels": found.labels, "rows": found.rows}
    tensors["names"] = torch.frombuffer(bytearray(names or b"\0"), dtype=torch.uint8)
    beside = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
    beside.replace(path)


def load_predictions(path: Path) -> Predictions:
    """Read what `save_predictions` wrote."""
    with safe_open(str(path), "pt") as file:
        logits, labels, index, names = (file.get_tensor(key) for key in ("logits", "labels", "rows", "names"))
    text = bytes(names.numpy()).decode(errors="surrogateescape")
    return Predictions(logits, labels, index, text.split("\0") if text != "\0" else [])
