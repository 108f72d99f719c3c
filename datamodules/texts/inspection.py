"""What `recipes doctor` reports of texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
from tqdm.auto import tqdm

from ..sampling.leaks import Place, conflicts, counts_of, groups_of, leaks, quantiles

MOJIBAKE = re.compile("\ufffd|Ã[\x80-\xbf]|â€|Â[\xa0-\xbf]|ï»¿")


def inspect_texts(
    splits: dict[str, Any], class_names: Sequence[str], lengths: dict[str, npt.NDArray[Any]], cut: dict[str, float]
) -> dict[str, Any]:
    """All that `recipes doctor` reports of texts, as plain values.

    `lengths` are tokens of each text, `cut` the share of texts longer than is kept, both by split.

    Returns:
        `splits`, each with counts; `short` and `encoding`, lists of split, text and reason; `exact`, groups of
        (split, text) that are the same but for case and space.
    """
    texts = {split: [part.text(index) for index in range(len(part))] for split, part in splits.items()}
    exact = groups_of(
        (" ".join(text.casefold().split()).encode(), (split, index))
        for split, some in texts.items()
        for index, text in enumerate(tqdm(some, desc=f"inspecting {split}", unit=" texts"))
    )

    def words(place: Place) -> list[str]:
        return [place[0], " ".join(texts[place[0]][place[1]].split())]

    places = [(split, index) for split, some in texts.items() for index in range(len(some))]
    labels = {split: part.labels for split, part in splits.items()}
    return {
        "kind": "texts",
        "splits": {split: counts_of(labels[split], class_names) for split in splits},
        "unreadable": [],
        "short": [[*words(p), "one character"] for p in places if len(texts[p[0]][p[1]].strip()) < 2],
        "encoding": [[*words(p), "read in a wrong encoding"] for p in places if MOJIBAKE.search(texts[p[0]][p[1]])],
        "exact": [[words(place) for place in group] for group in exact],
        "leaks": leaks(exact),
        "conflicts": conflicts(exact, splits),
        "lengths": {split: quantiles(some) for split, some in lengths.items()},
        "cut": {split: round(share, 4) for split, share in cut.items()},
    }
