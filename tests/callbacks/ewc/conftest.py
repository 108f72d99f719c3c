"""Nets, tasks and fits of the EWC tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from callbacks.ewc.callback import EWC

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative to the largest number of each tensor; what is zero but for rounding counts as zero."""
    assert one.keys() == other.keys()
    floor = 1e-10 * max(float(t.abs().max()) for t in other.values())
    return max(float((one[n] - other[n]).abs().max() / (other[n].abs().max() + floor)) for n in one)


def regression(classes: int = 4, width: int = 6) -> tuple[nn.Linear, Tensor, dict[str, Tensor]]:
    """A softmax regression, its inputs, and the diagonal of its Fisher in closed form."""
    model = nn.Linear(width, classes)
    x = torch.randn(64, width)
    p = model(x).detach().softmax(1)
    spread = p * (1 - p)  # E (1[y = k] - p_k)^2
    return model, x, {"weight": spread.T @ x.square() / len(x), "bias": spread.mean(0)}


class Net(LightningModule):
    """A small classifier with BatchNorm and dropout, a head of its own and two parameter groups."""

    def __init__(
        self,
        lr: float = 0.1,
        dropout: float = 0.0,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        classes: int = 3,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 16), nn.BatchNorm1d(16)
        )
        self.head = nn.Linear(16, classes)
        self.lr, self.optimizer = lr, optimizer
        self.seen: list[dict[str, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [{"params": self.body.parameters(), "lr": self.lr / 2}, {"params": self.head.parameters()}]
        return self.optimizer(groups) if self.optimizer else torch.optim.SGD(groups, lr=self.lr)


def task(which: int, samples: int = 64, classes: int = 3) -> TensorDataset:
    """Blobs whose classes lie elsewhere in each task."""
    generator = torch.Generator().manual_seed(which)
    centres = 2 * torch.randn(classes, 6, generator=generator)
    y = torch.arange(samples) % classes
    data = TensorDataset(centres[y] + torch.randn(samples, 6, generator=generator), y)
    data.targets = y  # type: ignore[attr-defined]
    return data


def loader(which: int, batch_size: int = 16, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(task(which), batch_size, **kwargs)


def fit(model: LightningModule, which: int, *callbacks: Callback, batch_size: int = 16, **kwargs: Any) -> Trainer:
    trainer = Trainer(**{**QUIET, "max_epochs": 3, "callbacks": list(callbacks), "log_every_n_steps": 1, **kwargs})
    trainer.fit(model, loader(which, batch_size))
    return trainer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def learnt(path: str = "a.safetensors", **kwargs: Any) -> tuple[Net, Path]:
    """A net after task A, and its Fisher."""
    torch.manual_seed(5)
    model = Net()
    fit(model, 0, EWC(save=path, **kwargs))
    return model, Path(path)


class Noisy(Dataset[Any]):
    """A transform that draws from torch's and Python's global generators."""

    def __init__(self) -> None:
        self.inner = task(0)
        self.targets = self.inner.targets  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        x, y = self.inner[index]
        return x + torch.randn(6) * random.random(), y


def still() -> Net:
    """A net that training leaves as it is."""
    torch.manual_seed(5)
    model = Net(lr=0.0)
    model.body[4].momentum = 0.0
    return model
