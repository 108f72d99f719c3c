"""What several ranks need when parameters open: a new DDP wrapper, a comparison of weights."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn


def rewrap(trainer: Trainer, pl_module: LightningModule) -> None:
    """Under DDP, wrap the module anew: the reducer knows the parameters that train at the time of wrapping only.

    All ranks must call it at the same step, between an update and the next forward pass.
    """
    strategy: Any = trainer.strategy
    if is_kind(strategy, "DDPStrategy"):
        for parameter in pl_module.parameters():
            parameter.grad = None  # may be a view into the old reducer's buckets
        strategy.model = pl_module
        gc.collect()  # the old reducer's hooks leave the parameters only when it dies
        strategy.configure_ddp()


def compare_ranks(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raises a RuntimeError where weights differ between ranks."""
    if trainer.world_size > 1:
        own = int(weight_hash(pl_module.parameters()))
        if not trainer.strategy.reduce_boolean_decision(own == trainer.strategy.broadcast(own)):
            raise RuntimeError(
                f"step {trainer.global_step}: weights differ between ranks, so each trains a model of its own; was a "
                "parameter changed on one rank only, or ignored by DDP's reduction?"
            )


def weight_hash(parameters: Iterable[nn.Parameter]) -> Tensor:
    """A sum over the bits of all elements, each tensor weighted by its place; one integer."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = [p.detach().contiguous().view(integers[p.element_size()]) for p in parameters]
    return torch.stack([place * b.sum(dtype=torch.int64) for place, b in enumerate(bits, 1)]).sum()


def check_strategy(trainer: Trainer) -> None:
    """Raises a ValueError for strategies under which opening parameters later would go wrong."""
    if not is_kind(trainer.strategy, "DDPStrategy", "SingleDeviceStrategy"):
        raise ValueError(
            f"GradualUnfreezing works on one device and under DDP; {type(trainer.strategy).__name__} fixes what "
            "trains when it shards the module: use ddp, or Freeze for what never trains"
        )


def is_kind(thing: Any, *names: str) -> bool:
    """Whether it is of one of these classes or derived from one, in lightning or in pytorch_lightning."""
    return any(kind.__name__ in names for kind in thing.__class__.__mro__)
