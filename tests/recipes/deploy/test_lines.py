"""Places on a line are what they say, bit for bit at the ends, with statistics of their own between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.deploy.lines import Mixing, Options, cells, line
from recipes.parts.checkpoints import load_checkpoint

pytestmark = pytest.mark.slow


def test_the_ends_are_the_nets_bit_for_bit(old_and_new: tuple[str, str]) -> None:
    old, new = (Path(run, "checkpoints", "best.ckpt") for run in old_and_new)
    mixing = Mixing([old, new], Options(at=[0.0, 1.0]))
    first, last = load_checkpoint(old)["state_dict"], load_checkpoint(new)["state_dict"]
    heads = {name for name in last if name.startswith("head")}
    for a, wanted in ((0.0, first), (1.0, last)):
        mixing.mixture.make(mixing.weights(a), remeasure=False)
        found = mixing.mixture.net.model.state_dict()
        assert found.keys() == last.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, (last if name in heads else wanted)[name]), name
        assert all(torch.equal(tensor, found[name]) for name, tensor in mixing.between(a) and found.items())
    report = line(Mixing([old, new], Options(at=[1.0], out=Path("whole"))))
    assert report["at"] == 1.0
    kept = load_checkpoint(report["facts"]["checkpoint"])["state_dict"]
    assert all(torch.equal(tensor, last[name]) for name, tensor in kept.items())


def test_statistics_of_batches_are_the_mixtures_own(old_and_new: tuple[str, str]) -> None:
    mixing = Mixing([Path(run) for run in old_and_new], Options(at=[0.5]))
    assert mixing.mixture.remeasured
    mixing.mixture.make(mixing.weights(0.5), remeasure=False)
    mean = {k: v.clone() for k, v in mixing.mixture.net.model.state_dict().items() if k.endswith("running_mean")}
    mixing.mixture.make(mixing.weights(0.5))
    anew = mixing.mixture.net.model.state_dict()
    assert not any(torch.equal(anew[name], tensor) for name, tensor in mean.items())
    mixing.mixture.make(mixing.weights(0.5))
    again = mixing.mixture.net.model.state_dict()
    assert all(torch.equal(again[name], anew[name]) for name in mean), "the same images each time"


def test_a_row_holds_the_figure_its_gain_and_the_interval() -> None:
    assert cells({"other": 0.9123, "gain": 0.01, "interval": (-0.002, 0.02)}) == ["0.912", "+0.010", "-0.002 to +0.020"]
