"""How names are listed and corrected in messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the nearest known word, or those of that name in any folder; or nothing."""
    known = list(known)
    near = [k for k in known if k.rsplit("/")[-1] == word] or get_close_matches(word, known, n=1, cutoff=0.5)
    near = near or [k for k in known if k.rsplit("/")[-1] == word.rsplit("/")[-1]][:1]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, for "did you mean"; None when nothing is like it.

    Where several are as near, the first: `resnet50` for `resnet5`, not `resnet56`.
    """

    def likeness(other: str) -> float:
        return SequenceMatcher(None, name.lower(), other.lower()).ratio()

    nearest = max(known, key=likeness, default="")
    return nearest if likeness(nearest) > 0.6 else None


def some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
