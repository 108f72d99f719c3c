"""The examples in docstrings run, in a project that is nobody's in particular."""

from __future__ import annotations

import doctest
import importlib
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import callbacks
from tests.test_layout import MODULES

EXAMPLES = [
    example
    for name in MODULES
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name)
    if example.examples and name.startswith("callbacks.")
]


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer1, self.layer2 = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer2(self.layer1(self.embedding(x)).relu()).relu()))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"index": batch[2], "label": self(batch[0]).argmax(1)}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(callbacks.layerwise_param_groups(self, lr=0.01), lr=0.01, momentum=0.9)


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        labels = torch.arange(24) % 3
        return DataLoader(TensorDataset(torch.randn(24, 4) + labels[:, None], labels, torch.arange(24)), batch_size=4)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:.*last.*:UserWarning")  # of a checkpoint that is not there yet
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")  # two fits, one after the other
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_runs(example: doctest.DocTest, capsys: pytest.CaptureFixture[str]) -> None:
    quiet: Any = partial(
        Trainer, max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    data = Data()
    example.globs |= vars(callbacks) | {"Trainer": quiet, "ModelCheckpoint": ModelCheckpoint, "model": Model()}
    example.globs |= {"data": data, "data_a": data, "data_b": data}
    found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
    assert found.attempted and not found.failed, capsys.readouterr().out
