"""A small net with everything that freezing and penalties get wrong, in a LightningModule that knows none of ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from callbacks import layerwise_param_groups

BLOCKS = ["stem", "layer1", "layer2", "mix", "head"]


class Stage(nn.Module):
    """Convolution, BatchNorm and dropout."""

    def __init__(self, width: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.GroupNorm(2, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.relu(self.norm(self.conv(x))))


class Net(LightningModule):
    """BatchNorm, LayerNorm, dropout and a tied weight; pictures `(batch, 3, 6, 6)` to logits `(batch, 4)`."""

    def __init__(
        self,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
        interval: str = "step",
        by_block: bool = True,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)  # all nets start alike
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1, self.layer2 = Stage(8, batch_norm), Stage(8, batch_norm)
        self.mix, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.ModuleDict({"up": nn.Linear(8, 8), "out": nn.Linear(8, 4)})
        self.head["up"].weight = self.mix.weight
        self.make, self.scheduler, self.interval, self.by_block = optimizer, scheduler, interval, by_block
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x))).mean((2, 3))
        return self.head["out"](self.head["up"](self.norm(torch.relu(self.mix(x)))))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        make = self.make or partial(torch.optim.AdamW, weight_decay=0.1)
        groups: Any = self.parameters()
        if self.by_block:
            groups = layerwise_param_groups(self, lr=1e-2, layer_decay=0.9, weight_decay=0.1)
        optimizer = make(groups)
        if self.scheduler is None:
            return optimizer
        config = {"scheduler": self.scheduler(optimizer), "interval": self.interval, "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def data(samples: int = 48, batch: int = 4, seed: int = 0) -> DataLoader[Any]:
    """Random pictures whose class shows in their colours; in order, so that runs can be compared."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 4
    pictures = torch.randn(samples, 3, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1) * 0.5
    return DataLoader(TensorDataset(pictures, labels), batch_size=batch)


def quiet(**options: Any) -> Trainer:
    """A trainer that writes nothing."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**settings | options)


def fit(callbacks: Any, net: Net | None = None, ckpt_path: Any = None, **options: Any) -> Net:
    """Fit a net from a fixed start on fixed data; returns it."""
    torch.manual_seed(0)
    net = net or Net()
    options.setdefault("limit_val_batches", 1)
    train = options.pop("train", data())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")  # the callback that wrote it is gone
        quiet(callbacks=callbacks, **options).fit(net, train, data(8, seed=1), ckpt_path=ckpt_path)
    return net


def without_dropout(net: Net) -> Net:
    """The net with nothing random in it."""
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all weights and buffers are bitwise equal."""
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())
