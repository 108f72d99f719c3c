"""Seeds that are a function of progress."""

from __future__ import annotations

import random
import sys

import torch

WORD = (1 << 64) - 1
EPOCH, VALIDATION, ITERATOR, BATCH = range(4)  # kinds of seeds


def counter_seed(*counters: int) -> int:
    """Mix whole numbers into a seed in [0, 2**64); their order matters.

    SplitMix64: Steele et al. 2014, https://doi.org/10.1145/2714064.2660195
    """
    word = 0
    for counter in counters:
        word = _mix(word ^ _mix(counter & WORD))
    return word


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def reseed(seed: int) -> None:
    """Seed torch on the CPU and on the GPU in use, `random`, and numpy if something has imported it.

    `torch.manual_seed` does the first two as well, but takes ten times as long where there is no GPU.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed & 0xFFFFFFFF)
