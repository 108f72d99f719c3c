"""Zeros that are chosen exactly, stay zeros under all that moves weights, and are what is saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from callbacks import EMA, Freeze, Prune
from callbacks.pruning import cubic_sparsity, magnitude_masks, n_of_m_mask, pack, unpack
from tests.nets import Net, data, fit

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5)


def zeros_of(net: LightningModule, callback: Prune) -> float:
    weights = [dict(net.named_parameters())[name] for name in callback.weights]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_the_share_follows_the_cubic() -> None:
    assert [cubic_sparsity(step, 2, 6, 0.8) for step in (0, 2, 6, 9)] == [0.0, 0.0, 0.8, 0.8]
    assert cubic_sparsity(4, 2, 6, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))
    assert cubic_sparsity(0, 0, 0, 0.8) == 0.8


def test_masks_leave_out_the_smallest_exactly() -> None:
    weights = {"a": torch.tensor([[3.0, -1.0], [0.0, 2.0]]), "b": torch.tensor([[-0.5, 9.0, 1.0, 1.0]])}
    together = magnitude_masks(weights, 0.5)
    assert together["a"].tolist() == [[True, False], [False, True]], "of equal ones the first go"
    assert together["b"].tolist() == [[False, True, False, True]]
    each = magnitude_masks(weights, 0.5, by_layer=True)
    assert each["a"].tolist() == [[True, False], [False, True]] and int(each["b"].sum()) == 2
    ties = {"a": torch.ones(10, 10)}
    assert int(magnitude_masks(ties, 0.37)["a"].sum()) == 63


def test_two_of_four_are_the_largest_of_their_inputs() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.0, 0.0, 5.0, 0.1]])
    assert n_of_m_mask(weight, 2, 4).tolist() == [[False, True, False, True, False, False, True, True]]
    torch.manual_seed(0)
    kernel = torch.randn(6, 8, 3, 3)
    mask = n_of_m_mask(kernel, 2, 4)
    assert (mask.view(6, 2, 4, 3, 3).sum(2) == 2).all()
    with pytest.raises(ValueError, match="6 inputs can't be divided into groups of 4"):
        n_of_m_mask(torch.ones(2, 6), 2, 4)


@pytest.mark.parametrize("shape", [(3,), (8,), (5, 7), (2, 3, 3, 3)])
def test_bits_are_packed_and_unpacked(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    mask = torch.rand(shape) > 0.5
    assert pack(mask).numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack(pack(mask), shape), mask)


class Watch(Callback):
    """The share of zeros after each step, in each validation, and the gradients that clipping sees."""

    def __init__(self, prune: Prune) -> None:
        self.prune, self.shares, self.validated, self.gradients = prune, list[float](), list[float](), list[bool]()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.shares.append(zeros_of(pl_module, self.prune))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated.append(zeros_of(pl_module, self.prune))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.note())

    def note(self) -> None:
        for name, mask in self.prune.masks.items():
            gradient = self.prune.weights[name].grad
            self.gradients.append(gradient is None or not bool((gradient * ~mask).any()))


@pytest.mark.parametrize("others", [[], [EMA(0.9)]], ids=["alone", "with EMA"])
def test_what_is_zero_stays_zero_and_is_saved(others: list[Any], own_folder: Path) -> None:
    """Under weight decay and momentum; an average would bring back what the weights were."""
    prune = Prune(0.8, end=12, every_n_steps=2)
    watch = Watch(prune)
    keep = ModelCheckpoint(dirpath="kept", filename="best", monitor="val/loss", save_last=True)
    net = fit([*others, prune, watch, keep], Net(ADAMW), max_epochs=4, enable_checkpointing=True, gradient_clip_val=0.1)
    assert watch.shares[:2] == [0.0, 0.0] and watch.shares == sorted(watch.shares)
    total = sum(w.numel() for w in prune.weights.values())
    assert watch.shares[13] == round(0.8 * total) / total == watch.shares[-1] == zeros_of(net, prune)
    assert all(watch.gradients)
    assert watch.validated[-1] == watch.shares[-1]
    for name in ("best", "last"):
        state = torch.load(f"kept/{name}.ckpt", weights_only=True)["state_dict"]
        zeros = sum(int((state[name] == 0).sum()) for name in prune.weights)
        assert zeros / total == watch.shares[-1], name
    assert torch.equal(net.head["up"].weight, net.mix.weight), "tied weights are one"


def test_the_best_of_a_net_with_more_weights_is_forgotten(own_folder: Path) -> None:
    class Rising(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.log("val/loss", float(self.trainer.current_epoch), batch_size=1)

    prune, stop = Prune(0.5, end=13, every_n_steps=3), EarlyStopping("val/loss", patience=2)
    keep = ModelCheckpoint(dirpath="kept", filename="{epoch}", monitor="val/loss")
    net = fit([prune, stop, keep], Rising(), max_epochs=4, enable_checkpointing=True)
    assert [path.name for path in Path("kept").iterdir()] == ["epoch=1.ckpt"]
    assert keep.best_model_score == 1.0 and net.trainer.current_epoch == 4


def test_frozen_weights_keep_all(own_folder: Path) -> None:
    prune = Prune(0.5, end=0)
    net = fit([Freeze(train_last_blocks=1), prune], Net(ADAMW), max_epochs=1)
    assert (net.stem.weight != 0).all() and (net.head["out"].weight == 0).any()


def test_what_is_opened_late_loses_its_share_then(own_folder: Path) -> None:
    class Opens(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            pl_module.stem.weight.requires_grad = trainer.global_step >= 3

    prune, net = Prune(0.5, end=0, by_layer=True), Net(ADAMW)
    net.stem.weight.requires_grad = False
    fit([Opens(), prune], net, max_epochs=1)
    assert float((net.stem.weight == 0).float().mean()) == 0.5
    assert zeros_of(net, prune) == pytest.approx(0.5, abs=0.01)


def test_at_once_two_of_four_and_only_what_is_asked_for(own_folder: Path) -> None:
    net = fit([Prune(n_of_m=(2, 4), end=0, exclude="stem|out")], Net(ADAMW), max_epochs=1)
    assert (net.stem.weight != 0).all() and (net.head["out"].weight != 0).all()
    for weight in (net.layer1.conv.weight, net.mix.weight):
        assert (n_of_m_mask(weight, 2, 4) | (weight == 0)).all() and (weight == 0).float().mean() == 0.5
    with pytest.raises(ValueError, match=r"stem\.weight: 3 inputs can't be divided into groups of 4; leave it out"):
        fit([Prune(n_of_m=(2, 4), end=0)], max_epochs=1)


def test_a_run_that_ends_too_early_says_so(own_folder: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 5

    with pytest.raises(UserWarning, match=r"ended at step 5, before step 9: 0\.\d+ of the weights are zero"):
        fit([Prune(0.5, end=9, every_n_steps=2), Stop()], max_epochs=1, limit_val_batches=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs a sparsity"),
        ({"sparsity": 0.5, "n_of_m": (2, 4)}, "not both"),
        ({"sparsity": 1.0}, "above 0 and below 1"),
        ({"n_of_m": (4, 4)}, "the first the smaller"),
        ({"sparsity": 0.5, "every_n_steps": 0}, "1 or more"),
    ],
)
def test_a_value_out_of_range_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Prune(**options)


def test_what_cannot_be_done_is_refused_before_the_first_step(own_folder: Path) -> None:
    for prune, words in (
        (Prune(0.5, pattern="nothing"), "no weight of a linear layer or convolution matches 'nothing'"),
        (Prune(0.5, begin=5, end=3), "from step 5 to step 3"),
        (Prune(0.5, end=99), "to step 99, and the run has 6"),
    ):
        with pytest.raises(ValueError, match=words):
            fit([prune], train=data(24), max_epochs=1)
