"""Random numbers are a function of counters, and the same in every version."""

from __future__ import annotations

import numpy as np
import torch

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
