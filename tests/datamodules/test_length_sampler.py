"""Batches of like length: every sample once, equal steps on all ranks, another order in each epoch."""

from __future__ import annotations

import numpy as np
import pytest

from datamodules.sampling import Draw, LengthSampler, cuts

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
