"""Predictions of a split: found in a module's steps, gathered from all ranks, saved to a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LABELS = ("label", "labels", "target", "targets", "y")  # keys of labels in an output or a batch

Outputs: TypeAlias = tuple[Tensor, Tensor, Tensor]  # logits, labels and rows of `Predictions`


class Predictions(NamedTuple):
    """Logits and labels of a split's samples, in the order of the split."""

    logits: Tensor  # float32, (n, classes), (n, labels) or, of a score, (n, 1)
    labels: Tensor  # a class: int64, (n,); several labels: 0 or 1 as float32, (n, labels); a score: float32, (n,)
    rows: Tensor  # int64, (n,), position in the split; -1 where batches have none
    names: list[str]  # of the samples; empty where the data module gives none

    @property
    def kind(self) -> str:
        """What is predicted: `classes`, `labels` or `scores`."""
        return "classes" if not self.labels.is_floating_point() else "labels" if self.labels.ndim == 2 else "scores"

    def part(self, chosen: Tensor) -> Predictions:
        """Those of the samples with a truth value, `(n,)`."""
        names = [name for name, is_in in zip(self.names, chosen.tolist(), strict=False) if is_in]
        return Predictions(self.logits[chosen], self.labels[chosen], self.rows[chosen], names)


def find_outputs(outputs: Any, batch: Any, output: Tensor | None, classes: int | None = None) -> Outputs | None:
    """Logits, labels and rows of a batch without ignored samples; None where there are no logits and labels.

    Integer labels are classes; floats are several labels where they are as many as the logits, and scores where there
    is one of each.

    Args:
        outputs: What the step returned.
        batch: What it was given.
        output: Logits, `(batch, classes)`, where the step returned none.
        classes: How many there are, where known: an output of another width is no logits.
    """
    given = outputs if isinstance(outputs, Mapping) else {}
    places = [place for place in (given, batch) if isinstance(place, Mapping)]
    logits = given.get("logits", output if classes is None or output is None or output.shape[1] == classes else None)
    labels = next((place[key] for place in places for key in LABELS if key in place), None)
    if labels is None and isinstance(batch, (list, tuple)) and len(batch) == 2:
        labels = batch[1]
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or logits.ndim not in (1, 2):
        return None
    logits = logits[:, None] if logits.ndim == 1 else logits
    if labels.is_floating_point():
        labels = labels.detach()
        if logits.shape[1] == 1 and labels.shape in (logits.shape, logits.shape[:1]):
            labels = labels.flatten().float()
            known = labels.isfinite()
        elif logits.shape[1] > 1 and labels.shape == logits.shape:
            known = labels.isfinite().all(1)
            if not torch.isin(labels[known], torch.tensor([0.0, 1.0]).to(labels)).all():
                return None
            labels = labels.float()
        else:
            return None
    elif labels.ndim == 1 and logits.shape[1] > 1 and len(labels) == len(logits):
        labels = labels.long()
        known = (labels >= 0) & (labels < logits.shape[1])  # 255, too, means ignored in many data sets
    else:
        return None
    rows = next((place["index"] for place in places if "index" in place), None)
    if not isinstance(rows, Tensor) or rows.shape != labels.shape[:1] or rows.is_floating_point():
        rows = torch.full((len(labels),), -1, device=labels.device)
    return logits[known].detach().float().cpu(), labels[known].cpu(), rows[known].long().cpu()


def gather_names(mine: Iterable[str], ranks: int) -> list[str]:
    """The names that any rank has, in one order."""
    everyone: list[Any] = [sorted(mine)]
    if ranks > 1:
        everyone = [None] * ranks
        torch.distributed.all_gather_object(everyone, sorted(mine))
    return sorted({name for names in everyone for name in names})


def gather_outputs(parts: Sequence[Outputs], ranks: int) -> Outputs | None:
    """The batches of all ranks as one, in the order of the index, each sample once."""
    mine = tuple(torch.cat(column) for column in zip(*parts, strict=True)) if parts else None
    everyone = [mine]
    if ranks > 1:
        everyone = [None] * ranks
        torch.distributed.all_gather_object(everyone, mine)
    there = [part for part in everyone if part is not None]
    if not there:
        return None
    logits, labels, index = (torch.cat(column) for column in zip(*there, strict=True))
    if len(index) and int(index.min()) >= 0:
        order = index.argsort(stable=True)
        first = torch.ones(len(order), dtype=torch.bool)
        if ranks > 1:  # a rank's last batch may be padded with others' samples
            first[1:] = index[order][1:] != index[order][:-1]
        logits, labels, index = (column[order[first]] for column in (logits, labels, index))
    return logits, labels, index


def save_predictions(path: Path, found: Predictions, step: int | None) -> None:
    """Save predictions of an optimiser step; another process sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = json.dumps(found.names).encode()
    tensors = {"logits": found.logits, "labels": found.labels, "rows": found.rows}
    tensors["names"] = torch.frombuffer(bytearray(names), dtype=torch.uint8)
    beside = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, {"step": str(step)})
    beside.replace(path)


def load_predictions(path: Path, step: int | None = None) -> Predictions | None:
    """Load what `save_predictions` saved; None if it is of another step than asked for."""
    with safe_open(str(path), "pt") as file:
        if step is not None and (file.metadata() or {}).get("step") != str(step):
            return None
        logits, labels, rows, names = (file.get_tensor(key) for key in ("logits", "labels", "rows", "names"))
    return Predictions(logits, labels, rows, json.loads(bytes(names.numpy())))
