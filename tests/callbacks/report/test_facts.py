"""What a report finds out about a run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from callbacks.report.facts import as_json, balanced_subset, groups_by_block, is_better, runnable_commands, shortened
from callbacks.report.figures import (
    as_uri,
)


def test_names_lose_the_folder_that_all_lie_in() -> None:
    assert shortened(["/a/b/cat/1.jpg", "/a/b/dog/1.jpg"]) == ["cat/1.jpg", "dog/1.jpg"]
    assert shortened(["/a/b/cat/1.jpg"]) == ["1.jpg"] and shortened([]) == []
    assert shortened(["/s is a closing tag", "a text"]) == ["/s is a closing tag", "a text"]
    assert shortened(["a.jpg", "b/c.jpg"]) == ["a.jpg", "b/c.jpg"]


def test_a_checkpoint_that_is_not_there_is_not_named(own_folder: Path) -> None:
    (own_folder / "last.ckpt").touch()
    commands = {"go on": "x fit --ckpt_path last.ckpt", "use": "x predict --ckpt_path best.ckpt", "again": "x fit"}
    assert list(runnable_commands(commands)) == ["go on", "again"]


def test_small_things() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2])
    rows = balanced_subset(labels, 9)
    assert torch.bincount(labels[rows]).tolist() == [5, 3, 1] and rows.tolist() == sorted(rows.tolist())
    one, two = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = groups_by_block([{"name": "a", "params": [one]}, {"name": "a/no_decay", "params": [two]}, {"params": []}])
    assert list(groups) == ["a", "group 2"] and groups["a"][0] == [one, two]
    assert list(groups_by_block([{"name": "a/weight", "params": []}, {"name": "a/bias", "params": []}])) == [
        "a/weight",
        "a/bias",
    ]
    assert is_better(1.0, None, "max") and is_better(0.5, 1.0, "min") and not is_better(float("nan"), 1.0, "min")
    assert is_better(1.0, float("nan"), "max") and is_better(None, 1.0, "max") and not is_better(1.0, 1.0, "max")
    assert as_json({"a": (float("inf"), 1.5), 2: "x"}) == {"a": [None, 1.5], "2": "x"}
    picture = as_uri(torch.rand(1, 300, 200), torch.rand(7, 7))
    assert picture.startswith("data:image/jpeg;base64,") and len(picture) < 10_000
