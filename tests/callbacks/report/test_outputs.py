"""Predictions: found in steps, gathered from ranks, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.report.outputs import (
    Predictions,
    find_outputs,
    gather_names,
    gather_outputs,
    load_predictions,
    save_predictions,
)
from tests.callbacks.report.conftest import loaded


@pytest.mark.parametrize(
    "outputs, batch, found",
    [
        ({"logits": torch.zeros(2, 3), "label": torch.tensor([0, 2])}, None, [0, 2]),
        (None, (torch.zeros(2, 5), torch.tensor([1, 0])), [1, 0]),
        (None, {"x": 0, "labels": torch.tensor([1, -100])}, [1]),
        (None, {"x": 0}, None),
        (None, (torch.zeros(2, 5), torch.zeros(2)), None),
        (None, (torch.zeros(2, 5), torch.zeros(2, 3, dtype=torch.long)), None),
        ({"logits": torch.zeros(2, 1), "label": torch.tensor([0, 0])}, None, None),
        (None, (torch.zeros(2, 5), torch.tensor([1, 0], dtype=torch.int32)), [1, 0]),
        (None, {"x": 0, "y": torch.tensor([1, 255])}, [1]),
        (None, {"x": 0, "y": torch.tensor([1, 2]), "index": ["a.jpg", "b.jpg"]}, [1, 2]),
        (None, (torch.zeros(2, 5), torch.tensor([5, 5]), torch.tensor([1, 0])), None),
    ],
)
def test_where_logits_and_labels_are_found(outputs: Any, batch: Any, found: list[int] | None) -> None:
    made = find_outputs(outputs, batch, torch.zeros(2, 3))
    assert (None if made is None else made[1].tolist()) == found


def test_predictions_come_back_as_they_were(own_folder: Path) -> None:
    names = ["a/ä.jpg", "b\udce9.jpg", "two\nlines\0"]
    one = Predictions(torch.randn(3, 2), torch.tensor([0, 1, 1]), torch.arange(3), names)
    save_predictions(own_folder / "p" / "x.safetensors", one, 7)
    assert load_predictions(own_folder / "p" / "x.safetensors", 8) is None, "of another step"
    other = loaded(own_folder / "p" / "x.safetensors")
    assert other.names == names and all(torch.equal(*pair) for pair in zip(one[:3], other[:3], strict=True))
    save_predictions(own_folder / "x.safetensors", one._replace(names=[]), None)
    assert loaded(own_folder / "x.safetensors").names == []
    chosen = one.part(torch.tensor([True, False, True]))
    assert chosen.names == [names[0], names[2]] and chosen.rows.tolist() == [0, 2]


def test_what_fills_up_a_ranks_last_batch_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = torch.eye(3), torch.tensor([0, 1, 2]), torch.tensor([0, 2, 4])
    theirs = torch.eye(3), torch.tensor([0, 1, 0]), torch.tensor([1, 3, 0])  # of five samples, the first again

    def gather(everyone: list[Any], one: Any) -> None:
        everyone[:] = [one, theirs]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    made = gather_outputs([mine], 2)
    assert made is not None and made[2].tolist() == [0, 1, 2, 3, 4] and made[1].tolist() == [0, 0, 1, 1, 2]


def test_an_output_of_another_width_is_no_logits() -> None:
    batch = (torch.zeros(2, 5), torch.tensor([1, 0]))
    assert find_outputs(None, batch, torch.zeros(2, 16), classes=3) is None
    assert find_outputs(None, batch, torch.zeros(2, 3), classes=3) is not None


def test_names_of_one_rank_in_order() -> None:
    assert gather_names({"b": 1, "a": 2}, 1) == ["a", "b"]
