"""Log lines of this folder's callbacks, and names in them: listed, counted, corrected."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

log = logging.getLogger(__package__)


def say(text: str, *values: Any) -> None:
    """Log information here or, where this logger shows none, once through Lightning's."""
    (log.info if log.isEnabledFor(logging.INFO) else rank_zero_info)(text, *values)


def some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Number of elements of these parameters."""
    return sum(parameter.numel() for parameter in parameters)


def counted(parameters: set[nn.Parameter]) -> str:
    """How many tensors and elements, in words."""
    return f"{len(parameters)} tensors, {count(parameters):,} parameters"


def did_you_mean(pattern: str, names: Iterable[str]) -> str:
    """A clause with the nearest name or part of a name, or nothing."""
    parts = {part for name in names for part in (name, *name.split("."))}
    close_ones = difflib.get_close_matches(re.sub(r"[\^$\\]", "", pattern), sorted(parts), n=1)
    return f"; did you mean {close_ones[0]!r}?" if close_ones else ""
