"""Several ranks: reduced bytes, compared weights, refused strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from callbacks import GradualUnfreezing
from callbacks.unfreezing.blocks import find_blocks
from callbacks.unfreezing.ranks import check_strategy, weight_hash
from tests.callbacks.unfreezing.conftest import two_ranks
from tests.nets import Net, quiet


def test_sharding_strategies_are_refused() -> None:
    trainer = quiet()
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(ValueError, match="FSDPStrategy fixes what trains"):
        check_strategy(trainer)


@pytest.mark.slow
def test_frozen_bytes_are_not_reduced(tmp_path: Path) -> None:
    one, _ = two_ranks(tmp_path, [GradualUnfreezing(every_steps=4)], Net())
    moved: dict[int, int] = {}
    for step, size in one["bytes"]:
        moved[step] = moved.get(step, 0) + size
    sizes = [sum(p.numel() * 4 for p in members.values()) for members in find_blocks(Net()).values()][::-1]
    assert [moved[step] for step in (1, 5, 9, 13, 17)] == [sum(sizes[: n + 1]) for n in range(5)]


@pytest.mark.slow
def test_replicas_that_differ_stop_the_run(tmp_path: Path) -> None:
    class Drift(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
            if trainer.global_rank == 1 and trainer.global_step == 2:
                pl_module.stem.bias.data[0] += 1e-6  # type: ignore[union-attr, operator]

    with pytest.raises(Exception, match="step 4: weights differ between ranks"):
        two_ranks(tmp_path, [GradualUnfreezing(every_steps=4), Drift()], Net())


def test_the_hash_sees_one_bit_and_a_swap() -> None:
    one, two = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
    before = weight_hash([one, two])
    assert weight_hash([two, one]) != before
    one.data[3] = torch.nextafter(one.data[3], torch.tensor(9.0))
    assert weight_hash([one, two]) != before
