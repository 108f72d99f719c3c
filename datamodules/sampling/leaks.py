"""The same content in several splits, or under several labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Place = tuple[str, int]  # a split's name and the position in it


def counts_of(labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Samples in all and of each class, where each has one."""
    if labels.ndim > 1 or labels.is_floating_point() or not class_names:
        return {"samples": len(labels), "classes": {}}
    counts = torch.bincount(labels[labels >= 0], minlength=len(class_names)).tolist()
    return {"samples": len(labels), "classes": dict(zip(class_names, counts, strict=True))}


def quantiles(values: npt.ArrayLike) -> dict[str, int]:
    """Least, median, 95 % and largest."""
    found = np.asarray(values)
    if not found.size:
        return {}
    marks = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {name: round(float(np.quantile(found, share))) for name, share in marks.items()}


def groups_of(keys: Iterable[tuple[bytes, Place]]) -> list[list[Place]]:
    """Places that share a key, where several do."""
    found: dict[bytes, list[Place]] = defaultdict(list)
    for key, place in keys:
        found[key].append(place)
    return [places for places in found.values() if len(places) > 1]


def leaks(groups: list[list[Place]]) -> dict[str, int]:
    """How many groups reach over each pair of splits, as `train, test`."""
    found: Counter[str] = Counter()
    for group in groups:
        names = list(dict.fromkeys(split for split, _ in group))
        found.update(f"{a}, {b}" for number, a in enumerate(names) for b in names[number + 1 :])
    return dict(found)


def conflicts(groups: list[list[Place]], splits: dict[str, Any]) -> int:
    """How many groups of the same content have more than one label."""
    return sum(len({str(splits[split].labels[index].tolist()) for split, index in group}) > 1 for group in groups)
