"""Sample order and randomness as pure functions of counters, so that there is no state to save.

A shuffled loader with augmentation is usually a stream of random numbers: to resume it exactly, every
generator in every worker would have to be saved and put back. Here nothing is: the order of an epoch is a
function of (seed, epoch) and the augmentation of one sample a function of (seed, epoch, index).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

IGNORED = -100  # the label of a sample that fills up a rank's last batch; torch's losses ignore it by default


class Draw(NamedTuple):
    """One sample as the sampler asks for it: which, in which epoch, and whether only to fill up a batch."""

    epoch: int
    row: int
    is_padding: bool = False


def splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix each 64-bit word so that near counters give unrelated bits (Steele et al. 2014,
    https://doi.org/10.1145/2714064.2660195).
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_seed(*counters: int) -> int:
    """Mix any number of counters into a seed in [0, 2**63) for a generator; their order matters."""
    word = np.zeros(1, np.uint64)
    for counter in counters:
        word = splitmix64(word ^ splitmix64(np.array([counter % 2**64], np.uint64)))
    return int(word[0] >> np.uint64(1))


def counter_uniform(seed: int, epoch: int, index: npt.ArrayLike, draws: int) -> Tensor:
    """Uniform numbers in [0, 1) for each sample, a function of (seed, epoch, index) alone.

    Args:
        seed: The run's seed.
        epoch: The epoch.
        index: Sample indices, `(n,)`.
        draws: Numbers per sample.

    Returns:
        float32, `(n, draws)`.
    """
    start = np.uint64(hash_seed(seed, epoch))
    samples = splitmix64(np.asarray(index).astype(np.uint64) ^ start)
    words = splitmix64(samples[:, None] + np.arange(draws).astype(np.uint64))
    return torch.from_numpy((words >> np.uint64(40)).astype(np.float32) / np.float32(2**24))  # 24 bits fill a float32


class EpochSampler(DistributedSampler[Draw]):
    """Deals out the samples of an epoch to the ranks, in an order that depends on (seed, epoch) only.

    Lightning calls `set_epoch` before each epoch and leaves a `DistributedSampler` as it is. All ranks get the
    same number of samples. While training (`shuffle=True`) the few that are missing are drawn twice, as in
    torch; in evaluation they come marked as padding, so that no metric counts a sample twice.

    Args:
        size: Number of samples in the data set.
        shuffle: Whether to permute, differently in each epoch.
        seed: Seed of the permutation.
        num_replicas: Number of ranks.
        rank: This rank.
    """

    def __init__(self, size: int, *, shuffle: bool, seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(size), num_replicas, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size = size

    def __iter__(self) -> Iterator[Draw]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(hash_seed(self.seed, self.epoch))
            order = torch.randperm(self.size, generator=generator).tolist()
        else:
            order = list(range(self.size))
        for position in range(self.rank, self.total_size, self.num_replicas):
            is_padding = position >= self.size and not self.shuffle
            yield Draw(self.epoch, order[position % self.size], is_padding)
