"""What the callbacks cost per step, and what freezing saves: ResNet-18, 64 px, batch 32, on random pictures.

    python -m benchmarks.callbacks

Every way is a fit of the same steps in one process, in turn; what counts is the median step, without the first.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

from benchmarks.measure import write_result
from callbacks import Freeze, GradualUnfreezing, LRWarmup, StopOnNonFinite, layerwise_param_groups

STEPS, ROUNDS, BATCH = 20, 3, 32


class Net(LightningModule):
    """A plain ResNet-18."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet18(num_classes=10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(layerwise_param_groups(self, lr=1e-4, weight_decay=0.01), fused=True)


class Clock(Callback):
    """CPU and wall seconds of each step."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())


def steps(callbacks: list[Callback]) -> tuple[list[float], list[float]]:
    """CPU and wall seconds of the steps of one fit, without the first few."""
    torch.manual_seed(0)
    batch = torch.randn(BATCH, 3, 64, 64), torch.arange(BATCH) % 10
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[*callbacks, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), DataLoader([batch] * STEPS, batch_size=None))  # type: ignore[arg-type]
    cpu, wall = ([b - a for a, b in itertools.pairwise(times[4:])] for times in (clock.cpu, clock.wall))
    return cpu, wall


def work(last_blocks: int) -> int:
    """Floating-point operations of a forward and a backward pass with only so many blocks trained."""
    model = Net()
    if last_blocks < 6:
        Freeze(train_last_blocks=last_blocks).freeze(model)
    with FlopCounterMode(display=False) as counter:
        model.training_step((torch.randn(BATCH, 3, 64, 64), torch.arange(BATCH) % 10), 0).backward()
    return counter.get_total_flops()


def run() -> None:
    """Measure and write."""
    everything_open = partial(GradualUnfreezing, at=[1], blocks_per_phase=None)
    ways: dict[str, Callable[[], list[Callback]]] = {
        "plain": list,
        "unfreezing": lambda: [everything_open()],
        "warmup": lambda: [LRWarmup(steps=15)],
        "guards": lambda: [StopOnNonFinite()],
        "all three": lambda: [everything_open(), LRWarmup(steps=15), StopOnNonFinite()],
        **{f"last {n} of 6 blocks": partial(lambda n: [Freeze(train_last_blocks=n)], n) for n in (1, 2, 3, 4, 5)},
    }
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, make in ways.items():
            for times, found in zip((cpu, wall), steps(make()), strict=True):
                times[name] += found
    plain = statistics.median(cpu["plain"]), statistics.median(wall["plain"])
    figures: dict[str, Any] = {"plain_step_ms": round(plain[1] * 1e3, 1), "steps": (STEPS - 5) * ROUNDS}
    for name in ways:
        ratios = {
            "cpu": round(statistics.median(cpu[name]) / plain[0], 4),
            "wall": round(statistics.median(wall[name]) / plain[1], 4),
        }
        if name.startswith("last"):
            ratios["work"] = round(work(int(name.split()[1])) / work(6), 4)
        figures[name] = ratios
    write_result("callbacks", figures)


if __name__ == "__main__":
    run()
