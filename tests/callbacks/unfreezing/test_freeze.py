"""Frozen means frozen, for the whole fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

from callbacks import Freeze, GradualUnfreezing
from callbacks.unfreezing.freeze import close, frozen_modules
from tests.callbacks.unfreezing.conftest import Watch
from tests.nets import Net, fit, quiet


def test_feature_extraction_trains_the_head_alone() -> None:
    watch = Watch()
    fit([Freeze(train_last_blocks=1), watch])
    moved = {name for name in watch.weights[0] if watch.first_change(name) < len(watch.weights)}
    assert moved == {"head.up.bias", "head.out.weight", "head.out.bias"}


def test_freeze_by_pattern_type_and_count() -> None:
    assert {name.split(".")[0] for name in Freeze(patterns={"layer": False}).chosen(Net())} == {"layer1", "layer2"}
    norms = set(Freeze(train_last_blocks=0, train_norms=True).chosen(Net()))
    assert not any("norm" in name for name in norms)
    bitfit = Freeze(train_last_blocks=1, train_biases=True).chosen(Net())
    assert bitfit
    assert not any(name.endswith("bias") or name.startswith("head.out") for name in bitfit)
    first_wins = Freeze(patterns={r"layer1\.conv": True, "layer1": False}).chosen(Net())
    assert set(first_wins) == {"layer1.norm.weight", "layer1.norm.bias"}


def test_freeze_refuses_what_does_nothing() -> None:
    with pytest.raises(ValueError, match="needs train_last_blocks"):
        Freeze()
    with pytest.raises(ValueError, match="train_last_blocks must be 0 to 5, not 9; blocks: stem"):
        fit([Freeze(train_last_blocks=9)])
    with pytest.raises(ValueError, match=r"'layer9' decides on no parameter; did you mean 'layer"):
        fit([Freeze(patterns={"layer9": False})])
    with pytest.raises(ValueError, match="nothing to train"):
        fit([Freeze(patterns={".": False})])
    with pytest.raises(ValueError, match="the blocks that it freezes have no norms or biases to train"):
        Freeze(1, train_norms=True, train_biases=True).chosen(
            nn.Sequential(*(nn.Linear(2, 2, False) for _ in range(4)))
        )


def test_freeze_reaches_what_configure_model_builds() -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.saved, self.stem = self.stem, None  # type: ignore[assignment]
            for name in ("layer1", "layer2", "mix", "norm", "head", "saved"):
                object.__setattr__(self, f"_{name}", getattr(self, name))
                delattr(self, name)

        def configure_model(self) -> None:
            if self.stem is None:
                self.stem = self._saved
                for name in ("layer1", "layer2", "mix", "norm", "head"):
                    setattr(self, name, getattr(self, f"_{name}"))

    watch = Watch()
    fit([Freeze(train_last_blocks=1), watch], Late())
    assert watch.first_change("stem.weight") == len(watch.weights) > watch.first_change("head.out.weight")


def test_no_gradient_is_left_over() -> None:
    net = Net()
    net(torch.randn(2, 3, 6, 6)).sum().backward()
    assert net.stem.weight.grad is not None
    assert close([net.stem.weight]) == {net.stem.weight}
    assert net.stem.weight.grad is None


def test_dropout_in_frozen_blocks_is_off_or_on_by_choice() -> None:
    net = Net()
    frozen = {p for name, p in net.named_parameters() if name.startswith("layer1")}
    assert net.layer1.dropout in frozen_modules(net, frozen)
    assert frozen_modules(net, frozen, dropout=True) == {net.layer1.norm}


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")
def test_modes_that_a_module_chose_itself_stay() -> None:
    net = Net()
    net.layer2.norm.eval()
    fit([GradualUnfreezing(every_steps=2)], net)
    assert not net.layer2.norm.training
    assert net.layer2.conv.training


def test_what_was_frozen_before_stays_frozen() -> None:
    net, watch = Net(), Watch()
    net.stem.requires_grad_(False)
    fit([GradualUnfreezing(every_steps=2), Freeze(patterns={"layer1": False}), watch], net)
    end = len(watch.weights)
    assert watch.first_change("stem.weight") == watch.first_change("layer1.conv.weight") == end
    assert watch.first_change("layer2.conv.weight") < end
    assert not net.stem.weight.requires_grad
    assert net.layer1.conv.weight.requires_grad


@pytest.mark.parametrize("callback", [Freeze(train_last_blocks=1), GradualUnfreezing(every_steps=6)])
def test_a_run_that_breaks_gives_the_module_back(callback: Callback) -> None:
    class Breaking(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert not self.layer1.norm.training
            assert not self.stem.weight.requires_grad
            raise RuntimeError("broken")

    net = Breaking()
    with pytest.raises(RuntimeError, match="broken"):
        fit([callback], net)
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_sync_batch_norm_stays_in_evaluation_mode() -> None:
    """The strategy converts after `setup`; what is frozen is looked for after that."""

    net, freeze = Net(), Freeze(train_last_blocks=2)
    freeze.setup(quiet(), net, "fit")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    freeze.on_fit_start(quiet(), converted)
    freeze.on_train_batch_start(quiet(), converted, None, 0)
    assert not converted.layer1.norm.training
    assert converted.norm.training


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        ([Freeze(1), Freeze(2)], "two Freeze would each unfreeze"),
        ([GradualUnfreezing(), GradualUnfreezing(every_epochs=1)], "two GradualUnfreezing would each unfreeze"),
        ([Freeze(1), BackboneFinetuning()], "Freeze and BackboneFinetuning would each unfreeze"),
        ([BackboneFinetuning(), GradualUnfreezing()], "GradualUnfreezing and BackboneFinetuning would each unfreeze"),
    ],
)
def test_two_that_freeze_are_refused(callbacks: list[Any], words: str) -> None:
    class WithBackbone(Net):
        @property
        def backbone(self) -> nn.Module:
            return self.layer1

    with pytest.raises((ValueError, RuntimeError), match=f"{words}|more than one stateful callback of type"):
        fit(callbacks, WithBackbone())
