"""The same content in several splits, or under several labels."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from datamodules.sampling.leaks import conflicts, counts_of, groups_of, leaks, quantiles

KEYS = [(b"a", ("train", 0)), (b"b", ("train", 1)), (b"a", ("val", 0)), (b"a", ("test", 2)), (b"b", ("train", 3))]


def test_groups_are_counted_for_each_pair_of_splits() -> None:
    groups = groups_of(iter([*KEYS, (b"alone", ("val", 5))]))
    assert groups == [[("train", 0), ("val", 0), ("test", 2)], [("train", 1), ("train", 3)]]
    assert leaks(groups) == {"train, val": 1, "train, test": 1, "val, test": 1}


def test_a_group_of_two_labels_is_a_conflict() -> None:
    splits = {
        "train": SimpleNamespace(labels=torch.tensor([0, 1, 1, 0])),
        "val": SimpleNamespace(labels=torch.tensor([0])),
        "test": SimpleNamespace(labels=torch.tensor([1, 1, 0])),
    }
    assert conflicts(groups_of(iter(KEYS)), splits) == 1


def test_classes_are_counted_where_each_sample_has_one() -> None:
    assert counts_of(torch.tensor([0, 2, 2, -100]), ["a", "b", "c"]) == {
        "samples": 4,
        "classes": {"a": 1, "b": 0, "c": 2},
    }
    assert counts_of(torch.zeros(4, 3), ["a", "b", "c"]) == {"samples": 4, "classes": {}}


def test_quantiles_are_whole_numbers() -> None:
    assert quantiles([4, 1, 2, 3]) == {"min": 1, "median": 2, "p95": 4, "max": 4}
    assert quantiles([]) == {}
