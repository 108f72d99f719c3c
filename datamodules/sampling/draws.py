"""What a sampler asks a data set for, and what every data set here returns: whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..labels.values import IGNORED

Batch: TypeAlias = dict[str, Any]


class Draw(NamedTuple):
    """One sample as the sampler asks for it: which, in which epoch, and whether only to fill up a batch.

    Where a sampler asks for a sample several times in an epoch, `repeat` counts them.
    """

    epoch: int
    row: int
    is_padding: bool = False
    repeat: int = 0

    @property
    def counter(self) -> int:
        """What randomness is a function of, beside seed and epoch: a repeated sample is augmented anew."""
        return self.row + (self.repeat << 40)


def drawn_labels(draws: Sequence[Draw], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the draws, `(batch,)`, and their labels; -100, or NaN for floats, where a draw only fills up a batch."""
    index = torch.tensor([draw.row for draw in draws])
    found = labels[index]
    found[torch.tensor([draw.is_padding for draw in draws])] = torch.nan if found.is_floating_point() else IGNORED
    return index, found


def collate_whole(batch: Any) -> Any:
    """Collate nothing: torch's loader calls a data set's `__getitems__`, which here returns a whole batch."""
    return batch
