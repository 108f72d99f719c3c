"""Spies on what is open and what two ranks reduce."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from tests.nets import Net, fit


class Watch(Callback):
    """Weights, statistics and what is trainable at each optimiser step."""

    def __init__(self) -> None:
        self.open: list[set[str]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
        self.open.append({n.split(".")[0] for n, p in pl_module.named_parameters() if p.requires_grad} - {"norm"})
        self.weights.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    def first_change(self, name: str) -> int:
        """Step in which a tensor changed first; the number of steps if never."""
        steps = range(1, len(self.weights))
        return next((s for s in steps if not self.weights[s][name].equal(self.weights[s - 1][name])), len(self.weights))


class Report(Callback):
    """Each rank writes what it saw, for the test to read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        report = {"weights": pl_module.state_dict(), "bytes": getattr(strategy, "moved", []), "dead": self.dead}
        torch.save(report, self.folder / f"rank{trainer.global_rank}.pt")

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.first = weakref.ref(trainer.strategy.model)

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 0:
            self.dead = self.first() is None  # the wrapper of the beginning, and the hooks of its reducer


class Counting(DDPStrategy):
    """Counts the bytes that each step reduces."""

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.moved = getattr(self, "moved", [])

        def count(state, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations, and not as strings
            self.moved.append((self.lightning_module.trainer.global_step, bucket.buffer().numel() * 4))
            return default_hooks.allreduce_hook(None, bucket)

        self.model.register_comm_hook(None, count)  # type: ignore[union-attr, operator]


def two_ranks(tmp_path: Path, callbacks: list[Any], net: Net, **options: Any) -> list[dict[str, Any]]:
    options = {"strategy": Counting(start_method="fork"), **options}
    fit([*callbacks, Report(tmp_path)], net, devices=2, **options)
    return [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
