"""What is reported of texts: repeats over splits, texts of one character, and a wrong encoding."""

from __future__ import annotations

import numpy as np
import torch

from datamodules.texts.inspection import inspect_texts
from datamodules.texts.tokens import Texts


def texts(lines: list[str], labels: list[int]) -> Texts:
    import datasets

    return Texts(datasets.Dataset.from_dict({"text": lines}), torch.tensor(labels))


def test_texts_are_inspected_over_all_splits() -> None:
    splits = {
        "train": texts(["A fine  film", "x", "déjà vu", "poor"], [1, 0, 1, 0]),
        "test": texts(["a fine film", "cafÃ© noir"], [0, 1]),
    }
    lengths = {"train": np.array([3, 1, 2, 9]), "test": np.array([3, 4])}
    found = inspect_texts(splits, ["bad", "good"], lengths, {"train": 0.25, "test": 0.0})
    assert found["splits"]["train"] == {"samples": 4, "classes": {"bad": 2, "good": 2}}
    assert found["exact"] == [[["train", "A fine film"], ["test", "a fine film"]]], "but for case and space"
    assert found["leaks"] == {"train, test": 1} and found["conflicts"] == 1
    assert found["short"] == [["train", "x", "one character"]]
    assert found["encoding"] == [["test", "cafÃ© noir", "read in a wrong encoding"]]
    assert found["lengths"]["train"] == {"min": 1, "median": 2, "p95": 8, "max": 9}
    assert found["cut"] == {"train": 0.25, "test": 0.0}
