"""Splits: stratified, seeded, in folds or by groups, and the same on resume."""

from __future__ import annotations

import pytest
import torch

from datamodules import Digits
from datamodules.sampling.splits import grouped_split, hold_out, limit_per_class, stratified_split


def test_stratified_split_is_seeded_and_proportional() -> None:
    labels = torch.tensor([0] * 100 + [1] * 10 + [2])
    kept, held_out = stratified_split(labels, 0.2, seed=0)
    assert torch.bincount(labels[held_out], minlength=3).tolist() == [20, 2, 0], "a single sample stays in training"
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(111))
    assert torch.equal(stratified_split(labels, 0.2, seed=0)[1], held_out)
    assert not torch.equal(stratified_split(labels, 0.2, seed=1)[1], held_out)
    with pytest.raises(ValueError, match="between 0 and 1, not 1"):
        stratified_split(labels, 1, seed=0)


def test_folds_hold_every_sample_once_and_every_class_alike() -> None:
    labels = torch.tensor([0] * 40 + [1] * 13 + [2] * 2)
    folds = [hold_out(labels, 0.1, (number, 5), seed=0) for number in range(5)]
    assert torch.cat([held_out for _, held_out in folds]).sort().values.tolist() == list(range(55))
    for kept, held_out in folds:
        assert len(held_out) == 11
        assert labels[held_out].bincount()[0] == 8
        assert labels[held_out].bincount()[1] in (2, 3)
        assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(55))
    assert not torch.equal(hold_out(labels, 0.1, (0, 5), seed=1)[1], folds[0][1]), "repeated with other seeds"
    for wrong in ((5, 5), (-1, 5), (0, 1)):
        with pytest.raises(ValueError, match=r"data.fold takes a number from 0 and how many there are"):
            hold_out(labels, 0.1, wrong, seed=0)


def test_groups_are_held_out_as_a_whole() -> None:
    sizes = {"a": 30, "b": 5, "c": 5, "d": 10, "e": 40, "f": 4, "g": 6}  # a to d are of class 0, e to g of class 1
    groups = [name for name, size in sizes.items() for _ in range(size)]
    labels = torch.tensor([int(name > "d") for name in groups])
    kept, held_out = grouped_split(labels, groups, 0.2, seed=0)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(100))
    assert not {groups[row] for row in kept} & {groups[row] for row in held_out}
    assert labels[held_out].bincount().tolist() == [10, 10], "a fifth of each class, where groups allow it"
    assert torch.equal(grouped_split(labels, groups, 0.2, seed=0)[1], held_out)
    assert any(not torch.equal(grouped_split(labels, groups, 0.2, seed)[1], held_out) for seed in range(1, 5))
    assert not len(grouped_split(labels, groups, 0.01, seed=0)[1]), "never more than the share"
    with pytest.raises(ValueError, match="between 0 and 1"):
        grouped_split(labels, groups, 1, seed=0)


def test_fewer_images_are_a_subset_of_more() -> None:
    labels = torch.arange(100) % 3
    few, more = (set(limit_per_class(labels, k, seed=0).tolist()) for k in (2, 5))
    assert len(few) == 6 and len(more) == 15 and few < more


def test_another_split_is_refused_on_resume() -> None:
    first = Digits(image_size=8, seed=0)
    first.setup("fit")
    state = first.state_dict()
    same = Digits(image_size=8, seed=0)
    same.setup("fit")
    same.load_state_dict(state)
    other = Digits(image_size=8, seed=1)
    other.setup("fit")
    with pytest.raises(ValueError, match=r"split is not the checkpoint's .* data\.seed"):
        other.load_state_dict(state)
