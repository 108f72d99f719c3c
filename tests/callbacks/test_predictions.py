from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import PredictionWriter
from callbacks.predictions import NOTE, batches_done, check_ranks, claim, columns, merge_parts, records
from tests.nets import Net, data, quiet


def part(folder: Path, name: str, *batches: dict[str, Any], first: int = 0) -> Path:
    """A file of batches as a rank writes them; each is given by index -> label."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number, rows in enumerate(batches, first):
        record = {
            "batch": number,
            "index": list(map(int, rows)),
            "name": [f"name {index}" for index in rows],
            "columns": {"label": list(rows.values()), "probability": [int(index) / 10 for index in rows]},
            "unreadable": [[int(index), "broken"] for index, label in rows.items() if label == "?"],
        }
        lines.append(json.dumps(record) + "\n")
    (folder / name).write_text("".join(lines))
    return folder / name


def read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_parts_merge_by_index_without_what_filled_up_a_batch(tmp_path: Path) -> None:
    folder = tmp_path / "out.csv.parts"
    part(folder, "rank0.0.jsonl", {"0": "x", "2": "x"}, {"4": "y"})
    part(folder, "rank1.0.jsonl", {"1": "y", "3": "?"}, {"0": "x"})
    assert merge_parts(folder, tmp_path / "out.csv", "name", [("earlier", "empty")]) == (4, 2)
    rows = [["name 0", "x", "0.000000"], ["name 1", "y", "0.100000"], ["name 2", "x", "0.200000"]]
    assert read(tmp_path / "out.csv") == [["name", "label", "probability"], *rows, ["name 4", "y", "0.400000"]]
    assert read(tmp_path / "out.unreadable.csv") == [["name", "reason"], ["earlier", "empty"], ["name 3", "broken"]]
    assert not folder.exists()


def test_one_sample_on_two_ranks_is_written_once(tmp_path: Path) -> None:
    (tmp_path / "out.unreadable.csv").write_text("of an earlier run")
    folder = tmp_path / "parts"
    for rank in (0, 1):
        part(folder, f"rank{rank}.0.jsonl", {"0": "x"})
    assert merge_parts(folder, tmp_path / "out.csv") == (1, 0)
    assert len(read(tmp_path / "out.csv")) == 2
    assert not (tmp_path / "out.unreadable.csv").exists()


def test_a_line_that_was_cut_off_anywhere_counts_for_nothing(tmp_path: Path) -> None:
    file = part(tmp_path, "rank0.0.jsonl", {"0": "a\nb"}, {"1": "c"})
    whole = file.read_bytes()
    second = whole.index(b"\n") + 1
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        assert batches_done([file]) == (1 if end >= second else 0), end
    for left in (bytes(50), bytes(50) + b"\n"):  # the machine went down: a file system may leave zeros
        file.write_bytes(whole[:second] + left)
        assert batches_done([file]) == 1
    file.write_bytes(whole[: second + 20])
    later = part(tmp_path, "rank0.1.jsonl", {"1": "c"}, {"2": "d"}, first=1)
    assert batches_done([file, later]) == 3
    merge_parts(tmp_path, tmp_path / "out.csv")
    assert [row[:2] for row in read(tmp_path / "out.csv")[1:]] == [["name 0", "a\nb"], ["name 1", "c"], ["name 2", "d"]]


def test_batches_that_a_process_wrote_after_its_successor_began_come_once(tmp_path: Path) -> None:
    """Rank 1 of a run whose rank 0 was killed may go on for a while."""
    part(tmp_path, "rank1.0.jsonl", {"1": "a"}, {"3": "b"}, {"5": "c"})
    part(tmp_path, "rank1.1.jsonl", {"3": "b"}, {"5": "c"}, {"7": "d"}, first=1)
    assert merge_parts(tmp_path, tmp_path / "out.csv") == (4, 0)


def test_a_rank_whose_parts_lie_elsewhere_is_missed(tmp_path: Path) -> None:
    part(tmp_path, "rank0.0.jsonl", {"0": "x"})
    check_ranks(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="no predictions of rank 1: name a file in a folder that all machines"):
        check_ranks(tmp_path, 2)


def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    record = {"batch": 0, "index": [0], "name": [name], "columns": {"label": ["x"]}, "unreadable": []}
    for ending in ("csv", "parquet"):
        folder = tmp_path / ending
        folder.mkdir()
        (folder / "rank0.0.jsonl").write_text(json.dumps(record) + "\n")
        merge_parts(folder, tmp_path / f"out.{ending}")
    assert b"caf\xe9.jpg" in (tmp_path / "out.csv").read_bytes()
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist() == [{"name": "caf\ufffd.jpg", "label": "x"}]


def test_parquet_holds_what_the_csv_holds(tmp_path: Path) -> None:
    batches = [{str(16 * n + k): "xy"[k % 2] for k in range(16)} for n in range(600)]  # more than a row group
    for ending in ("csv", "parquet"):
        part(tmp_path / ending, "rank0.0.jsonl", *batches)
        assert merge_parts(tmp_path / ending, tmp_path / f"out.{ending}") == (9600, 0)
    bytes_before = (tmp_path / "out.parquet").read_bytes()
    part(tmp_path / "again", "rank0.0.jsonl", *batches[:217])
    part(tmp_path / "again", "rank0.1.jsonl", *batches[217:], first=217)
    merge_parts(tmp_path / "again", tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").read_bytes() == bytes_before, "wherever it was killed"
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert [str(kind) for kind in table.schema.types] == ["string", "string", "float"]
    words = [[row["name"], row["label"], f"{row['probability']:.4f}"] for row in table.to_pylist()]
    assert words == [[*row[:2], row[2][:-2]] for row in read(tmp_path / "out.csv")[1:]]


def test_columns_are_words_and_numbers() -> None:
    prediction = {
        "index": torch.tensor([4, 5]),
        "label": torch.tensor([[True, False, True], [False, False, False]]),
        "label_2": torch.tensor([2, 0]),
        "probability": torch.tensor([0.123456789, 1.0]),
        "p": torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]),
    }
    found = columns(prediction, ["a", "b", "c"])
    assert list(found) == ["label", "label_2", "probability", "p(a)", "p(b)", "p(c)"]
    assert found["label"] == ["a|c", ""] and found["label_2"] == ["c", "a"]
    assert found["probability"] == [0.123457, 1.0] and found["p(c)"] == [0.7, 0.4]


def test_what_was_made_of_something_else_is_refused(tmp_path: Path) -> None:
    folder, facts = tmp_path / "out.csv.parts", {"inputs": "a", "class names": ["b"], "model.top_k": 1}
    assert claim(folder, facts) == claim(folder, facts) == ""
    assert "made of another list of inputs: name another file" in claim(folder, {**facts, "inputs": "x"})
    assert "made with other class names" in claim(folder, {**facts, "class names": ["x"]})
    assert "made with model.top_k 1, and it is 5 now" in claim(folder, {**facts, "model.top_k": 5})
    assert "remove that folder" in claim(folder, {**facts, "model.new": 5})
    file = part(folder, "rank0.0.jsonl", {"0": "x"})
    assert claim(folder, facts) == "" and file.exists()
    (folder / NOTE).unlink()  # it was being removed
    assert claim(folder, {**facts, "inputs": "x"}) == "" and not file.exists()


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
        patch.setattr("callbacks.predictions.merge_parts", lambda *_: (_ for _ in ()).throw(Stop()))
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
