"""The order of samples: every sample once, equal steps on all ranks, another order in each epoch, by seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from datamodules.sampling.draws import Draw
from datamodules.sampling.samplers import BlockSampler, EpochSampler, LengthSampler, balanced_order, balanced_rows, cuts


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [9, 10, 12])
def test_evaluation_sees_every_sample_once(size: int, ranks: int) -> None:
    parts = [list(EpochSampler(size, shuffle=False, num_replicas=ranks, rank=r)) for r in range(ranks)]
    assert len({len(part) for part in parts}) == 1, "every rank has the same number of samples"
    kept = [draw.row for part in parts for draw in part if not draw.is_padding]
    assert sorted(kept) == list(range(size))


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_done_already_can_be_left_out(rank: int) -> None:
    blocks = BlockSampler([0] * 4 + [1] * 7, batch_size=2, window=4, shuffle=False, num_replicas=2, rank=rank)
    for sampler in (EpochSampler(11, shuffle=False, num_replicas=2, rank=rank), blocks):
        whole = list(sampler)
        for start in range(7):
            sampler.start = start
            assert list(sampler) == whole[start:] and len(sampler) == 6 - start
        assert len(whole) == 6


def test_ranks_share_one_permutation_that_changes_with_the_epoch() -> None:
    def order(epoch: int, ranks: int) -> list[int]:
        samplers = [EpochSampler(10, shuffle=True, seed=1, num_replicas=ranks, rank=r) for r in range(ranks)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        return [draw.row for together in zip(*samplers, strict=True) for draw in together]

    assert order(0, 2) == order(0, 1)
    assert order(1, 1) != order(0, 1)
    assert sorted(order(1, 2)) == list(range(10))


def test_a_balanced_epoch_has_as_many_of_each_class() -> None:
    labels = torch.tensor([0] * 90 + [1] * 8 + [2] * 3)
    rows, repeats = balanced_order(labels, torch.Generator().manual_seed(0))
    assert len(rows) == len(labels)
    assert sorted(labels[rows].bincount().tolist()) == [33, 34, 34]
    drawn = rows.bincount(minlength=101)
    assert set(drawn[:90].tolist()) == {0, 1}, "of the frequent class some, each once"
    assert set(drawn[90:98].tolist()) <= {4, 5} and set(drawn[98:].tolist()) <= {11, 12}, "of rare ones each as often"
    pairs = list(zip(rows.tolist(), repeats.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs), "each time as another repeat"
    assert repeats.max() == drawn.max() - 1


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_a_balanced_epoch(ranks: int) -> None:
    labels = torch.tensor([0] * 50 + [1] * 6)
    parts = []
    for rank in range(ranks):
        sampler = EpochSampler(56, shuffle=True, seed=3, num_replicas=ranks, rank=rank, balance=labels)
        sampler.set_epoch(2)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler)
    assert len({len(part) for part in parts}) == 1
    together = [draw for part in parts for draw in part][:56]
    counts = torch.bincount(labels[torch.tensor([draw.row for draw in together])])
    assert abs(counts[0] - counts[1]) <= 2
    again = EpochSampler(56, shuffle=True, seed=3, num_replicas=ranks, balance=labels)
    again.set_epoch(3)
    assert list(again) != parts[0], "another epoch, others"
    evaluation = EpochSampler(56, shuffle=False, balance=labels)
    assert [draw.row for draw in evaluation] == list(range(56))


LENGTHS = np.random.default_rng(0).integers(1, 17, 1003) * 8


def length_sampler(train: bool = True, ranks: int = 1, rank: int = 0, tokens: int | None = None) -> LengthSampler:
    return LengthSampler(LENGTHS, batch_size=16, tokens=tokens, shuffle=train, seed=3, num_replicas=ranks, rank=rank)


def rows_of(batches: list[list[Draw]]) -> list[int]:
    return [draw.row for batch in batches for draw in batch]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("tokens", [None, 512])
def test_an_epoch_has_every_sample_once(train: bool, tokens: int | None) -> None:
    batches = list(length_sampler(train, tokens=tokens))
    assert sorted(rows_of(batches)) == list(range(1003))
    assert len(batches) == len(length_sampler(train, tokens=tokens))
    assert max(map(len, batches)) <= 16


def test_batches_hold_texts_of_like_length() -> None:
    padded = sum(max(LENGTHS[draw.row] for draw in batch) * len(batch) for batch in length_sampler())
    assert padded < 1.02 * LENGTHS.sum()
    assert len({len(batch) for batch in length_sampler()}) <= 2, "but for one sample, batches are equally large"


def test_epochs_differ_and_come_again() -> None:
    one = length_sampler()
    first = list(one)
    one.set_epoch(1)
    second = list(one)
    assert first != second and len(first) == len(second)
    assert {frozenset(rows_of([batch])) for batch in first}.isdisjoint(
        {frozenset(rows_of([batch])) for batch in second}
    ), "other companions, not only another order"
    one.set_epoch(0)
    assert list(one) == first
    widths = [max(LENGTHS[draw.row] for draw in batch) for batch in first]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("tokens", [None, 512])
def test_ranks_have_equal_steps_and_share_out_the_samples(ranks: int, tokens: int | None) -> None:
    for train in (True, False):
        parts = [list(length_sampler(train, ranks, rank, tokens)) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        for step in zip(*parts, strict=True):
            assert len({len(batch) for batch in step}) == 1
        counted = [draw.row for part in parts for batch in part for draw in batch if not draw.is_padding]
        assert set(counted) == set(range(1003))
        if not train:
            assert len(counted) == 1003, "nothing counts twice in a metric"


def test_no_batch_has_more_tokens_than_allowed() -> None:
    batches = list(length_sampler(tokens=512))
    assert max(max(LENGTHS[draw.row] for draw in batch) * len(batch) for batch in batches) <= 512
    for epoch in range(3):
        one = length_sampler(tokens=512)
        one.set_epoch(epoch)
        assert len(list(one)) == len(batches)


def test_a_text_longer_than_the_limit_is_a_batch_of_its_own() -> None:
    assert cuts(np.array([8, 8, 100, 200]), 16, 50, 1).tolist() == [0, 2, 3, 4]


def test_the_longest_come_first_in_evaluation() -> None:
    widths = [max(LENGTHS[draw.row] for draw in batch) for batch in length_sampler(train=False)]
    assert widths == sorted(widths, reverse=True)


def test_fewer_samples_than_ranks() -> None:
    parts = [list(LengthSampler([8], batch_size=4, shuffle=False, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert parts == [[[Draw(0, 0)]], [[Draw(0, 0, is_padding=True)]]]


LABELS = np.random.default_rng(1).choice(4, 1003, p=[0.7, 0.2, 0.07, 0.03])


def balanced_length_sampler(epoch: int = 0, ranks: int = 1, rank: int = 0, tokens: int | None = None) -> LengthSampler:
    one = LengthSampler(
        *(LENGTHS,),
        **{"batch_size": 16, "tokens": tokens, "shuffle": True, "seed": 3},
        **{"num_replicas": ranks, "rank": rank, "balance": LABELS},
    )
    one.set_epoch(epoch)
    return one


@pytest.mark.parametrize("tokens", [None, 512])
def test_a_balanced_epoch_by_length_has_as_many_of_each_class(tokens: int | None) -> None:
    seen, steps = set(), set()
    for epoch in range(6):
        batches = list(balanced_length_sampler(epoch, tokens=tokens))
        drawn = rows_of(batches)
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
    assert steps == {len(balanced_length_sampler(tokens=tokens))}, "every epoch has as many steps as was planned"
    frequent = np.flatnonzero(LABELS == 0)
    assert len(seen & set(frequent.tolist())) > 0.9 * len(frequent), "each epoch draws others"


def test_a_balanced_epoch_is_cut_by_length_and_comes_again() -> None:
    batches = list(balanced_length_sampler(2))
    drawn = LENGTHS[rows_of(batches)]
    assert sum(max(LENGTHS[draw.row] for draw in batch) * len(batch) for batch in batches) < 1.02 * drawn.sum()
    assert list(balanced_length_sampler(2)) == batches != list(balanced_length_sampler(3))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("tokens", [None, 512])
def test_ranks_share_a_balanced_epoch_by_length(ranks: int, tokens: int | None) -> None:
    parts = [list(balanced_length_sampler(1, ranks, rank, tokens)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    for step in zip(*parts, strict=True):
        assert len({len(batch) for batch in step}) == 1
    counts = np.bincount(LABELS[[row for part in parts for row in rows_of(part)]])
    assert counts.max() - counts.min() <= 1 + (ranks - 1) * len(parts[0]), "but for what fills up the last of a step"
    once = {(draw.row, draw.repeat) for part in parts for batch in part for draw in batch}
    assert len(once) == 1003


def test_evaluation_is_never_balanced() -> None:
    one = LengthSampler(LENGTHS, batch_size=16, shuffle=False, balance=LABELS)
    assert sorted(rows_of(list(one))) == list(range(1003))


def test_no_epoch_is_longer_than_the_longest_that_may_be_drawn() -> None:
    generator = np.random.default_rng(5)
    longest = np.sort(LENGTHS[balanced_rows(LABELS, LENGTHS)[0]])
    for _ in range(20):
        assert (np.sort(LENGTHS[balanced_rows(LABELS, LENGTHS, generator)[0]]) <= longest).all()
    assert longest.sum() < 1.02 * np.mean([LENGTHS[label == LABELS].mean() for label in range(4)]) * 1003


def order(sampler: BlockSampler, epoch: int = 0) -> list[int]:
    sampler.set_epoch(epoch)
    return [draw.row for draw in sampler]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_get_equal_steps_and_share_no_sample_but_what_fills_up(ranks: int) -> None:
    blocks = np.repeat(np.arange(10), [1, 9, 4, 30, 2, 2, 17, 8, 8, 12])
    samplers = [
        BlockSampler(blocks, batch_size=4, window=16, shuffle=True, num_replicas=ranks, rank=rank)
        for rank in range(ranks)
    ]
    for epoch in range(2):
        dealt = [order(sampler, epoch) for sampler in samplers]
        assert [len(rows) for rows in dealt] == [-(-93 // ranks)] * ranks == [len(sampler) for sampler in samplers]
        seen = Counter(row for rows in dealt for row in rows)
        assert set(seen) == set(range(93)) and sum(seen.values()) - 93 < ranks
    assert order(samplers[0], 0) == order(samplers[0], 0) != order(samplers[0], 1)


def test_evaluation_sees_every_sample_once_in_its_order() -> None:
    for ranks in (1, 2, 4, 7):
        found = []
        for rank in range(ranks):
            sampler = BlockSampler(np.arange(5), batch_size=2, window=4, shuffle=False, num_replicas=ranks, rank=rank)
            found.append(list(sampler))
        assert len({len(part) for part in found}) == 1
        assert [draw.row for part in found for draw in part if not draw.is_padding] == list(range(5))


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_a_block_is_one_workers_own_but_at_the_borders_of_lanes(workers: int) -> None:
    blocks = np.repeat(np.arange(100), 50)
    rows = order(BlockSampler(blocks, batch_size=10, window=800, shuffle=True))
    readers: dict[int, set[int]] = {}
    for batch in range(500):
        for row in rows[10 * batch : 10 * batch + 10]:
            readers.setdefault(int(blocks[row]), set()).add(batch % workers)
    assert sum(map(len, readers.values())) <= 100 + BlockSampler.LANES - 1
    runs = np.flatnonzero(np.diff(rows))
    assert len(runs) > 4_000, "rows of a block come mixed"
