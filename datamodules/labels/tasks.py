"""Several things to learn of one sample: what they are, and what stands where one is not known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from .values import IGNORED

TaskKind: TypeAlias = Literal["classification", "multi_label", "regression", "segmentation"]
UNKNOWN_PIXEL = 255  # of a mask, as in Pascal VOC


@dataclass(frozen=True)
class Task:
    """One thing to learn.

    Labels of a batch, by kind, and what marks those that are not known:

    | kind | labels | not known |
    |---|---|---|
    | classification | int64, `(batch,)` | -100 |
    | multi_label | float, 0 or 1, `(batch, classes)` | NaN |
    | regression | float, `(batch,)` | NaN |
    | segmentation | int64, `(batch, height, width)` | -100 |

    Args:
        kind: What is learnt.
        class_names: In the order of the labels; of a mask, in that of its values; none of a number.
    """

    kind: TaskKind
    class_names: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """Numbers that a net gives for it: one for each class, or one."""
        return 1 if self.kind == "regression" else len(self.class_names)


def hide(labels: Mapping[str, Tensor], rows: Tensor) -> None:
    """Make labels unknown, in place, in the rows with a truth value, `(batch,)`."""
    for values in labels.values():
        values[rows] = math.nan if values.is_floating_point() else IGNORED


def known_share(labels: Tensor) -> float:
    """Share of samples that have a label, of `(n,)` or `(n, classes)`."""
    known = ~labels.isnan() if labels.is_floating_point() else labels != IGNORED
    return float((known if known.ndim == 1 else known.any(1)).float().mean()) if len(labels) else 0.0


def spread(values: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the numbers that are known, of `(n,)`; 0 and 1 where these say nothing."""
    known = values[~values.isnan()].double()
    scale = float(known.std()) if len(known) > 1 else 0.0
    return (float(known.mean()), scale) if scale > 0 else (float(known.mean()) if len(known) else 0.0, 1.0)


def label_facts(tasks: Mapping[str, Task], labels: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Of each task's labels the share that is `known`; of numbers their `mean` and `spread`, too."""
    found = {}
    for name, values in labels.items():
        found[name] = {"known": known_share(values)}
        if tasks[name].kind == "regression":
            found[name]["mean"], found[name]["spread"] = spread(values)
    return found
