from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.sampling.draws import Draw
from datamodules.sampling.samplers import BlockSampler, EpochSampler, balanced_order
from datamodules.sampling.seeds import counter_uniform, hash_seed, splitmix64


def test_splitmix64_is_the_published_generator() -> None:
    # First outputs of SplitMix64 seeded with 0 and with 1234567, as its authors' reference gives them.
    assert int(splitmix64(np.array([0], np.uint64))[0]) == 0xE220A8397B1DCDAF
    assert int(splitmix64(np.array([1234567], np.uint64))[0]) == 6457827717110365317


def test_one_number_is_mixed_as_many_are() -> None:
    for x in (0, 1, 1234567, 2**63, 2**64 - 1, -1):
        assert splitmix64(x) == int(splitmix64(np.array([x % 2**64], np.uint64))[0])


def test_random_numbers_are_those_of_earlier_versions() -> None:
    """Another number would change the splits and the sample order of every run that is resumed."""
    assert [hash_seed(3, 5), hash_seed(-1), hash_seed(2**64, 7)] == [
        2884822786979095698,
        3377987053190985883,
        7943459372563724592,
    ]
    bits = (counter_uniform(3, 5, [0, 10, 2**40], 3) * 2**24).long()
    assert bits.tolist() == [[14170041, 7302806, 11481012], [2792238, 11505463, 15909186], [1676945, 7534888, 12882893]]


def test_uniform_numbers_are_a_function_of_the_counters() -> None:
    both = counter_uniform(3, 5, [10, 11], 4)
    assert torch.equal(counter_uniform(3, 5, [11], 4)[0], both[1])
    assert not torch.equal(counter_uniform(3, 6, [11], 4)[0], both[1])
    assert not torch.equal(counter_uniform(4, 5, [11], 4)[0], both[1])


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    u = counter_uniform(0, 0, np.arange(20_000), 3)
    assert u.min() >= 0 and u.max() < 1
    assert torch.allclose(u.mean(0), torch.full((3,), 0.5), atol=0.01)
    assert torch.allclose(u.var(0), torch.full((3,), 1 / 12), atol=0.002)
    assert torch.corrcoef(u.T).fill_diagonal_(0).abs().max() < 0.03
    neighbours = torch.stack([u[:-1, 0], u[1:, 0]])
    assert torch.corrcoef(neighbours)[0, 1].abs() < 0.03


def test_the_order_of_counters_matters() -> None:
    assert hash_seed(1, 2) != hash_seed(2, 1)
    assert 0 <= hash_seed(-1) < 2**63


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


def test_a_repeated_sample_is_augmented_anew() -> None:
    once, twice = Draw(0, 7), Draw(0, 7, repeat=1)
    assert once.counter == 7
    assert not torch.equal(*(counter_uniform(0, 0, [draw.counter], 4) for draw in (once, twice)))
    assert hash_seed(0, 0, once.counter) != hash_seed(0, 0, twice.counter)
