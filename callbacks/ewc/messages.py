"""What EWC says, and how it lists and corrects names."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

log = logging.getLogger(__package__)


def say(text: str, *values: Any) -> None:
    """To this project's log or, where that shows no information, to where Lightning says things, once."""
    (log.info if log.isEnabledFor(logging.INFO) else rank_zero_info)(text, *values)


def some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause with the nearest known name, or nothing."""
    close = difflib.get_close_matches(re.sub(r"[\^$\\]", "", word), sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
