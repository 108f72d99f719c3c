"""Predictions are written whole, also by a run that goes on after an end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import PredictionWriter
from callbacks.predictions.parts import records
from tests.nets import Net, data, quiet


@pytest.mark.parametrize("name", ["out.txt", "out"])
def test_other_endings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"ending in .csv or .parquet; received out"):
        PredictionWriter(name)


class Doubling(LightningModule):
    """Gives each number and its double."""

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        return {"index": batch, "double": 2 * batch}


class Stop(Exception):
    """Stands in for whatever ends a program."""


class Numbers(LightningDataModule):
    """Ten numbers, in batches of three, without anything that the writer can use."""

    def __init__(self, until: int = 10) -> None:
        super().__init__()
        self.until, self.given = until, 0

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(10), batch_size=3, collate_fn=self.collate)  # type: ignore[arg-type]

    def collate(self, numbers: list[int]) -> Tensor:
        self.given += 1
        if numbers[-1] >= self.until:
            raise Stop
        return torch.tensor(numbers)


class Known(Numbers):
    """The same, that can begin amid them and has names."""

    predict_from = 0
    sample_kind = "number"

    def predict_dataloader(self) -> DataLoader[Any]:
        rest = range(3 * self.predict_from, 10)
        return DataLoader(rest, batch_size=3, collate_fn=self.collate)  # type: ignore[arg-type]

    def sample_names(self, split: str) -> Any:
        return lambda index: f"no. {index}"

    def fingerprint(self, split: str) -> str:
        return "ten numbers"

    def left_out(self, split: str) -> Iterator[tuple[str, str]]:
        yield "no. 10", "too large"


def predict(data: LightningDataModule, **options: Any) -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    writer = PredictionWriter("out.csv")
    trainer = Trainer(accelerator="cpu", callbacks=[writer], **quiet, **options)
    trainer.predict(Doubling(), datamodule=data, return_predictions=False)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("kind", [Numbers, Known])
def test_any_data_module_goes_on_after_an_end(own_folder: Path, kind: type[Numbers]) -> None:
    predict(kind())
    expected = Path("out.csv").read_bytes()
    assert len(expected.splitlines()) == 11
    Path("out.csv").unlink()
    with pytest.raises(Stop):
        predict(kind(until=6))
    assert [record["batch"] for record in records(Path("out.csv.parts/rank0.0.jsonl"))] == [0, 1]
    data = kind()
    predict(data)
    assert Path("out.csv").read_bytes() == expected and not Path("out.csv.parts").exists()
    assert data.given == (2 if kind is Known else 4)
    assert Path("out.unreadable.csv").exists() == (kind is Known)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_all_done_and_not_merged(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr("callbacks.predictions.callback.merge_parts", lambda *_: (_ for _ in ()).throw(Stop()))
        predict(Known())
    data = Known()
    predict(data)
    assert data.given == 0 and len(Path("out.csv").read_text().splitlines()) == 11


def test_a_strangers_predictions_without_an_index_are_told_what_is_missing() -> None:
    class Plain(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0])

    with pytest.raises(ValueError, match="needs a dictionary with `index`.*from Plain.predict_step; received Tensor"):
        quiet(callbacks=[PredictionWriter("it.csv")]).predict(Plain(), data(8))
