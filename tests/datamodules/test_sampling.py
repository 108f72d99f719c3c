from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.sampling import EpochSampler, counter_uniform, hash_seed, splitmix64


def test_splitmix64_is_the_published_generator() -> None:
    # First outputs of SplitMix64 seeded with 0 and with 1234567, as its authors' reference gives them.
    assert int(splitmix64(np.array([0], np.uint64))[0]) == 0xE220A8397B1DCDAF
    assert int(splitmix64(np.array([1234567], np.uint64))[0]) == 6457827717110365317


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


def test_ranks_share_one_permutation_that_changes_with_the_epoch() -> None:
    def order(epoch: int, ranks: int) -> list[int]:
        samplers = [EpochSampler(10, shuffle=True, seed=1, num_replicas=ranks, rank=r) for r in range(ranks)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        return [draw.row for together in zip(*samplers, strict=True) for draw in together]

    assert order(0, 2) == order(0, 1)
    assert order(1, 1) != order(0, 1)
    assert sorted(order(1, 2)) == list(range(10))
