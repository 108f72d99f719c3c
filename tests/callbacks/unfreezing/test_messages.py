"""Log lines, and names in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from callbacks import Freeze, GradualUnfreezing
from callbacks.unfreezing.messages import count, counted, did_you_mean, some
from tests.nets import fit


def test_it_is_seen_where_nobody_has_configured_a_log(caplog: pytest.LogCaptureFixture) -> None:
    fit([Freeze(patterns={"^stem": False}), GradualUnfreezing(every_epochs=1, blocks_per_phase=2)])
    for words in (
        "freeze: 2 tensors",
        "unfreezing: phases of blocks",
        "unfreezing: step 12, epoch 1: mix, layer2 open",
    ):
        assert caplog.text.count(words) == 1


def test_names_are_listed_counted_and_corrected() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert did_you_mean("^layer9", ["net.layer1.weight"]) == "; did you mean 'layer1'?", "a part of a name will do"
    assert did_you_mean("zzz", ["head"]) == ""


def test_tensors_and_parameters_are_counted() -> None:
    pair = {nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(2, 3))}
    assert count(pair) == 1006
    assert counted(pair) == "2 tensors, 1,006 parameters"
