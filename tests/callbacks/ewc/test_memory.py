"""The file that a task leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from callbacks.ewc.callback import EWC
from callbacks.ewc.fisher import fisher_diagonal
from callbacks.ewc.memory import load_memory, save_memory
from callbacks.ewc.samples import choose_samples
from tests.callbacks.ewc.conftest import Net, fit, largest_difference, learnt, task, weights


def test_the_file_holds_fisher_anchor_and_how_they_were_made() -> None:
    model, path = learnt(samples=40, task="blobs")
    memory = load_memory(path)
    assert memory.tasks == [
        {
            "name": "blobs",
            "samples": 40,
            "estimator": "exact",
            "draws": 1,
            "normalised": False,
            "mean": pytest.approx(float(torch.cat([t.flatten() for t in memory.fisher.values()]).mean())),
        }
    ]
    assert all(torch.equal(t, memory.anchor[name]) for name, t in weights(model).items())
    data = task(0)
    chosen = choose_samples(data.targets, 64, 40, 0)  # type: ignore[attr-defined]
    expected, _ = fisher_diagonal(model, [data.tensors[0][chosen]], dict(model.named_parameters()), module=model)
    assert largest_difference(memory.fisher, expected) < 1e-5
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "ewc-fisher 1"
    assert not list(Path().glob("*.part"))


def test_a_fisher_that_would_hold_nothing_or_break_everything_is_refused() -> None:
    _, path = learnt()
    for number, words in (
        (0.0, "is zero everywhere, so the penalty would hold nothing"),
        (math.nan, "negative or non-finite values"),
    ):
        memory = load_memory(learnt()[1])
        memory.fisher = {name: torch.full_like(t, number) for name, t in memory.fisher.items()}
        save_memory(path, memory)
        with pytest.raises(ValueError, match=words):
            fit(Net(), 1, EWC(load=path))

    class Constant(Net):
        def logits(self, batch: Any) -> Tensor:
            return self(batch[0]).detach() + 0 * self.head.bias

    with pytest.raises(ValueError, match="after 64 samples: the Fisher is zero everywhere"):
        fit(Constant(), 0, EWC())


def test_files_that_are_none_are_refused() -> None:
    with pytest.raises(FileNotFoundError, match="no Fisher at gone.safetensors; a fit with EWC"):
        fit(Net(), 1, EWC(load="gone.safetensors"))
    Path("text.safetensors").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="text.safetensors is not a safetensors file"):
        fit(Net(), 1, EWC(load="text.safetensors"))
    save_file({"weight": torch.ones(1)}, "weights.safetensors")
    with pytest.raises(ValueError, match="weights.safetensors holds no Fisher of this kind"):
        fit(Net(), 1, EWC(load="weights.safetensors"))


def test_file_names_and_shapes_are_in_its_header() -> None:
    _, path = learnt()
    assert set(load_file(path)) == {
        f"{kind}/{name}" for kind in ("fisher", "anchor") for name, _ in Net().named_parameters()
    }
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["tasks"])[0]["samples"] == 64
