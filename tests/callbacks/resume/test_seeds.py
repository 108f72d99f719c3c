"""Seeds that are a function of progress."""

from __future__ import annotations

import random

import numpy as np
import torch

from callbacks.resume.seeds import counter_seed, reseed


def test_seeds_differ_by_every_counter_and_their_order() -> None:
    seeds = {counter_seed(*counters) for counters in [(), (0,), (1,), (0, 0), (1, 2), (2, 1), (2, 1, 0), (-1,)]}
    assert len(seeds) == 8 and all(0 <= seed < 2**64 for seed in seeds)
    low = torch.tensor([counter_seed(7, step) % 2**32 for step in range(4000)], dtype=torch.float64) / 2**32
    assert abs(low.mean() - 0.5) < 0.02 and abs(low.var() - 1 / 12) < 0.004, "torch's CPU generator takes 32 bits"
    assert counter_seed(7, 2, 1, 5, 0, 0) == 13857407508119580281, (
        "another one would change runs that are resumed by a later version"
    )


def test_reseeding_covers_torch_python_and_numpy() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    reseed(2**64 - 1)
    first = draw()
    assert draw() != first
    reseed(2**64 - 1)
    assert draw() == first
