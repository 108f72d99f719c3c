"""Which samples the Fisher is taken of, their logits and labels."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from callbacks.ewc.callback import EWC
from callbacks.ewc.fisher import fisher_diagonal
from callbacks.ewc.samples import choose_samples, dataset_labels, labels_of, logits_of
from tests.callbacks.ewc.conftest import QUIET, Net, Noisy, largest_difference, loader, still, task


def test_samples_are_stratified_seeded_and_nested() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[torch.randperm(100)]
    chosen = choose_samples(labels, 100, 20, seed=1)
    assert chosen == sorted(set(chosen)) and len(chosen) == 20
    assert torch.bincount(labels[chosen]).tolist() == [12, 6, 2]
    assert chosen == choose_samples(labels.tolist(), 100, 20, seed=1) != choose_samples(labels, 100, 20, seed=2)
    assert set(chosen) < set(choose_samples(labels, 100, 40, seed=1))
    assert choose_samples(None, 100, 200, seed=1) == choose_samples(labels, 100, None, seed=1) == list(range(100))
    unknown = choose_samples(None, 100, 20, seed=1)
    assert len(set(unknown)) == 20 and unknown != list(range(20))


def test_labels_of_data_sets() -> None:
    data = TensorDataset(torch.randn(6, 2))
    assert dataset_labels(data) is None
    data.targets = [0, 1, 2, 0, 1, 2]  # type: ignore[attr-defined]
    assert dataset_labels(data).tolist() == [0, 1, 2, 0, 1, 2]  # type: ignore[union-attr]
    assert dataset_labels(Subset(data, [5, 0])).tolist() == [2, 0]  # type: ignore[union-attr]
    data.targets = ["a"] * 6  # type: ignore[attr-defined]
    assert dataset_labels(data) is None


def test_logits_and_labels_of_the_usual_batches() -> None:
    x, y = torch.randn(3, 2), torch.tensor([0, 1, 2])
    doubled = type("Doubled", (nn.Module,), {"forward": lambda self, x: 2 * x})()
    assert torch.equal(logits_of(doubled, (x, y)), 2 * x) and torch.equal(logits_of(doubled, [x, y]), 2 * x)
    assert torch.equal(logits_of(doubled, x), 2 * x) and torch.equal(
        logits_of(doubled, {"image": x, "label": y}), 2 * x
    )
    text = type(
        "Text", (nn.Module,), {"forward": lambda self, input_ids, attention_mask: SimpleNamespace(logits=3 * input_ids)}
    )()
    batch = {"input_ids": x, "attention_mask": x, "labels": y, "index": y}
    assert torch.equal(logits_of(text, batch), 3 * x)
    layer = nn.Module()
    layer.logits, layer.forward = nn.Linear(2, 3), doubled.forward  # a part of that name is not the method
    assert torch.equal(logits_of(layer, x), 2 * x)
    own = type("Own", (nn.Module,), {"logits": lambda self, batch: batch["anything"]})()
    assert torch.equal(logits_of(own, {"anything": x}), x)
    for found in (labels_of((x, y)), labels_of(batch), labels_of({"label": y})):
        assert found is y
    assert labels_of(x) is None and labels_of((x, x)) is None
    with pytest.raises(
        TypeError, match=r"does not know how Doubled computes logits of a dict with audio.*logits\(batch\)"
    ):
        logits_of(doubled, {"audio": x})
    with pytest.raises(TypeError, match="returned a tuple without logits"):
        logits_of(type("Pair", (nn.Module,), {"forward": lambda self, x: (x, x)})(), x)


def test_random_transforms_are_fixed_per_sample() -> None:
    found = []
    for batch_size, workers in ((8, 0), (64, 0), (64, 1)):
        ewc = EWC()
        data = DataLoader(Noisy(), batch_size, num_workers=workers)
        Trainer(**QUIET, max_epochs=1, callbacks=[ewc]).fit(still(), data)
        assert ewc.memory is not None
        found.append(ewc.memory.fisher)
    assert largest_difference(found[0], found[1]) < 1e-5 > largest_difference(found[0], found[2])


class Rows(Dataset[Any]):
    """Batches by keys of its own, as a sampler deals them out; single samples it knows not."""

    def __init__(self, evaluation: bool) -> None:
        self.inner, self.evaluation = task(0), evaluation
        self.labels = self.inner.targets  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.inner)

    def __getitems__(self, keys: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        assert all(kind == "row" for kind, _ in keys)
        rows = torch.tensor([row for _, row in keys])
        x = self.inner.tensors[0][rows]
        return {"image": x if self.evaluation else torch.full_like(x, torch.nan), "label": self.inner.tensors[1][rows]}


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(0)

    def fisher_dataloader(self) -> Any:
        return DataLoader(Rows(True), 16, sampler=[("row", r) for r in range(64)], collate_fn=lambda batch: batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not isinstance(batch, dict):
            return batch
        assert not self.trainer.training and self.trainer.validating
        return {**batch, "image": batch["image"] + 1}


def test_a_data_module_may_bring_its_own_samples_and_transfer_hooks() -> None:
    torch.manual_seed(5)
    model, ewc = Net(), EWC(samples=30)
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[ewc])
    trainer.fit(model, datamodule=Data())
    data = task(0)
    chosen = choose_samples(data.targets, 64, 30, 0)  # type: ignore[attr-defined]
    expected, _ = fisher_diagonal(model, [data.tensors[0][chosen] + 1], dict(model.named_parameters()), module=model)
    assert ewc.memory is not None and largest_difference(ewc.memory.fisher, expected) < 1e-5
