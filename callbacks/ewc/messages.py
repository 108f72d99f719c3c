"""Log lines of EWC, and names in them: listed, corrected."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

log = logging.getLogger(__package__)


def say(text: str, *values: Any) -> None:
    """Log information here or, where this logger shows none, once through Lightning's."""
    (log.info if log.isEnabledFor(logging.INFO) else rank_zero_info)(text, *values)


def some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause with the nearest known name, or nothing."""
    close = difflib.get_close_matches(re.sub(r"[\^$\\]", "", word), sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
