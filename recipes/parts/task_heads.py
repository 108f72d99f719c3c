"""What is put on a trunk for each task: a head for classes or numbers, a decoder for masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .decoder import Decoder, blocks_for_masks
from .heads import HeadKind, build_head
from .losses import LossKind
from .tasks import TaskKind


@dataclass
class Head:
    """What is put on the trunk for a task.

    Args:
        kind: What the task must be, if it is to be checked: classification, multi_label, regression or segmentation.
        weight: Factor on its loss.
        loss: Of classes: `cross_entropy` or `focal`.
        label_smoothing: Of classes: probability spread evenly over all.
        head: `linear`, `mlp` or `cosine`; not of masks.
        hidden: Width of the hidden layer of `mlp`, and of a mask's decoder.
        dropout: Probability of dropping a feature before each linear layer.
        blocks: Of masks: the trunk's blocks whose maps are decoded, finest first; of each resolution the last if not
            given.
    """

    kind: TaskKind | None = None
    weight: float = 1.0
    loss: LossKind = "cross_entropy"
    label_smoothing: float = 0.0
    head: HeadKind = "linear"
    hidden: int = 64
    dropout: float = 0.0
    blocks: list[str] | None = None


def chosen_heads(heads: Mapping[str, Head | dict[str, Any]] | None, tasks: Mapping[str, Any]) -> dict[str, Head]:
    """The heads that are asked for, in the order of the tasks.

    Raises:
        ValueError: There is no such task, or it is of another kind.
    """
    given = {name: Head(**head) if isinstance(head, dict) else head for name, head in (heads or {}).items()}
    for name, head in given.items():
        if name not in tasks:
            raise ValueError(f"model.heads.{name}: the data have no such task; there are {', '.join(tasks)}")
        if head.kind not in (None, tasks[name]["kind"]):
            raise ValueError(f"model.heads.{name}.kind is {head.kind}, and the data's is {tasks[name]['kind']}")
    return {name: given.get(name, Head()) for name in tasks if name in given or not given}


def map_blocks(name: str, head: Head, shapes: Mapping[str, Sequence[int]], side: int) -> list[str]:
    """The blocks whose maps a mask's head decodes, finest first.

    Args:
        name: Of the task.
        head: Its head.
        shapes: Block -> shape of its map; none of a trunk without places.
        side: Of the image.

    Raises:
        ValueError: The trunk has no places; or one of the blocks has none.
    """
    if not shapes:
        raise ValueError(f"model.heads.{name}: this trunk has no places; masks are for images")
    unknown = set(head.blocks or ()) - set(shapes)
    if unknown:
        raise ValueError(
            f"model.heads.{name}.blocks: {min(unknown)!r} is no block with places; there are {', '.join(shapes)}"
        )
    return head.blocks or blocks_for_masks(shapes, side)


def build_task_head(head: Head, width: int | Sequence[int], outputs: int) -> nn.Module:
    """The module: on features of one width, or on maps of several."""
    if isinstance(width, int):
        return build_head(head.head, width, outputs, hidden=head.hidden, dropout=head.dropout)
    return Decoder(width, outputs, head.hidden, head.dropout)
