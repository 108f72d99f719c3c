"""Random numbers that are a function of seed, epoch and sample, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WORD = 2**64 - 1  # keeps the lowest 64 bits


def splitmix64(x: Any) -> Any:
    """Mix a 64-bit word, or each of a uint64 array, so that near counters give unrelated bits (Steele et al. 2014,
    https://doi.org/10.1145/2714064.2660195).
    """
    x = x + 0x9E3779B97F4A7C15 & WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


def hash_seed(*counters: int) -> int:
    """Mix any number of counters into a seed in [0, 2**63) for a generator; their order matters."""
    word: int = 0
    for counter in counters:
        word = splitmix64(word ^ splitmix64(counter))  # plain ints: numpy takes ten times as long for one
    return word >> 1


def counter_uniform(seed: int, epoch: int, index: npt.ArrayLike, draws: int) -> Tensor:
    """Uniform numbers in [0, 1), a function of (seed, epoch, index) alone: float32, `(n, draws)` for indices `(n,)`."""
    start = np.uint64(hash_seed(seed, epoch))
    samples = splitmix64(np.asarray(index).astype(np.uint64) ^ start)
    words = splitmix64(samples[:, None] + np.arange(draws).astype(np.uint64))
    return torch.from_numpy((words >> np.uint64(40)).astype(np.float32) / np.float32(2**24))  # 24 bits fill a float32
