"""Batches of like length: every sample once, equal steps on all ranks, another order in each epoch."""

from __future__ import annotations

import numpy as np
import pytest

from datamodules.sampling.draws import Draw
from datamodules.sampling.samplers import LengthSampler, balanced_rows, cuts

LENGTHS = np.random.default_rng(0).integers(1, 17, 1003) * 8


def sampler(train: bool = True, ranks: int = 1, rank: int = 0, tokens: int | None = None) -> LengthSampler:
    return LengthSampler(LENGTHS, batch_size=16, tokens=tokens, shuffle=train, seed=3, num_replicas=ranks, rank=rank)


def rows(batches: list[list[Draw]]) -> list[int]:
    return [draw.row for batch in batches for draw in batch]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("tokens", [None, 512])
def test_an_epoch_has_every_sample_once(train: bool, tokens: int | None) -> None:
    batches = list(sampler(train, tokens=tokens))
    assert sorted(rows(batches)) == list(range(1003))
    assert len(batches) == len(sampler(train, tokens=tokens))
    assert max(map(len, batches)) <= 16


def test_batches_hold_texts_of_like_length() -> None:
    padded = sum(max(LENGTHS[draw.row] for draw in batch) * len(batch) for batch in sampler())
    assert padded < 1.02 * LENGTHS.sum()
    assert len({len(batch) for batch in sampler()}) <= 2, "but for one sample, batches are equally large"


def test_epochs_differ_and_come_again() -> None:
    one = sampler()
    first = list(one)
    one.set_epoch(1)
    second = list(one)
    assert first != second and len(first) == len(second)
    assert {frozenset(rows([batch])) for batch in first}.isdisjoint({frozenset(rows([batch])) for batch in second}), (
        "other companions, not only another order"
    )
    one.set_epoch(0)
    assert list(one) == first
    widths = [max(LENGTHS[draw.row] for draw in batch) for batch in first]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("tokens", [None, 512])
def test_ranks_have_equal_steps_and_share_out_the_samples(ranks: int, tokens: int | None) -> None:
    for train in (True, False):
        parts = [list(sampler(train, ranks, rank, tokens)) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        for step in zip(*parts, strict=True):
            assert len({len(batch) for batch in step}) == 1
        counted = [draw.row for part in parts for batch in part for draw in batch if not draw.is_padding]
        assert set(counted) == set(range(1003))
        if not train:
            assert len(counted) == 1003, "nothing counts twice in a metric"


def test_no_batch_has_more_tokens_than_allowed() -> None:
    batches = list(sampler(tokens=512))
    assert max(max(LENGTHS[draw.row] for draw in batch) * len(batch) for batch in batches) <= 512
    for epoch in range(3):
        one = sampler(tokens=512)
        one.set_epoch(epoch)
        assert len(list(one)) == len(batches)


def test_a_text_longer_than_the_limit_is_a_batch_of_its_own() -> None:
    assert cuts(np.array([8, 8, 100, 200]), 16, 50, 1).tolist() == [0, 2, 3, 4]


def test_the_longest_come_first_in_evaluation() -> None:
    widths = [max(LENGTHS[draw.row] for draw in batch) for batch in sampler(train=False)]
    assert widths == sorted(widths, reverse=True)


def test_fewer_samples_than_ranks() -> None:
    parts = [list(LengthSampler([8], batch_size=4, shuffle=False, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert parts == [[[Draw(0, 0)]], [[Draw(0, 0, is_padding=True)]]]


LABELS = np.random.default_rng(1).choice(4, 1003, p=[0.7, 0.2, 0.07, 0.03])


def balanced(epoch: int = 0, ranks: int = 1, rank: int = 0, tokens: int | None = None) -> LengthSampler:
    one = LengthSampler(
        *(LENGTHS,),
        **{"batch_size": 16, "tokens": tokens, "shuffle": True, "seed": 3},
        **{"num_replicas": ranks, "rank": rank, "balance": LABELS},
    )
    one.set_epoch(epoch)
    return one


@pytest.mark.parametrize("tokens", [None, 512])
def test_a_balanced_epoch_has_as_many_of_each_class(tokens: int | None) -> None:
    seen, steps = set(), set()
    for epoch in range(6):
        batches = list(balanced(epoch, tokens=tokens))
        drawn = rows(batches)
        assert sorted(np.bincount(LABELS[drawn]).tolist()) == [250, 251, 251, 251]
        times = np.bincount(drawn, minlength=1003)
        for label in range(4):
            own = times[label == LABELS]
            assert own.max() - own.min() <= 1, "each as often as the others of its class, but for one"
        draws = [(draw.row, draw.repeat) for batch in batches for draw in batch]
        assert len(set(draws)) == len(draws), "a repeated one says so"
        if tokens:
            assert max(max(LENGTHS[draw.row] for draw in batch) * len(batch) for batch in batches) <= tokens
        steps.add(len(batches))
        seen |= set(drawn)
    assert steps == {len(balanced(tokens=tokens))}, "every epoch has as many steps as was planned"
    frequent = np.flatnonzero(LABELS == 0)
    assert len(seen & set(frequent.tolist())) > 0.9 * len(frequent), "each epoch draws others"


def test_a_balanced_epoch_is_cut_by_length_and_comes_again() -> None:
    batches = list(balanced(2))
    drawn = LENGTHS[rows(batches)]
    assert sum(max(LENGTHS[draw.row] for draw in batch) * len(batch) for batch in batches) < 1.02 * drawn.sum()
    assert list(balanced(2)) == batches != list(balanced(3))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("tokens", [None, 512])
def test_ranks_share_a_balanced_epoch(ranks: int, tokens: int | None) -> None:
    parts = [list(balanced(1, ranks, rank, tokens)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    for step in zip(*parts, strict=True):
        assert len({len(batch) for batch in step}) == 1
    counts = np.bincount(LABELS[[row for part in parts for row in rows(part)]])
    assert counts.max() - counts.min() <= 1 + (ranks - 1) * len(parts[0]), "but for what fills up the last of a step"
    once = {(draw.row, draw.repeat) for part in parts for batch in part for draw in batch}
    assert len(once) == 1003


def test_evaluation_is_never_balanced() -> None:
    one = LengthSampler(LENGTHS, batch_size=16, shuffle=False, balance=LABELS)
    assert sorted(rows(list(one))) == list(range(1003))


def test_no_epoch_is_longer_than_the_longest_that_may_be_drawn() -> None:
    generator = np.random.default_rng(5)
    longest = np.sort(LENGTHS[balanced_rows(LABELS, LENGTHS)[0]])
    for _ in range(20):
        assert (np.sort(LENGTHS[balanced_rows(LABELS, LENGTHS, generator)[0]]) <= longest).all()
    assert longest.sum() < 1.02 * np.mean([LENGTHS[label == LABELS].mean() for label in range(4)]) * 1003
