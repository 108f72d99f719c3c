"""Freezing and opening: what trains, what does not, and that no way of running changes it."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

from callbacks import ExactResume, Freeze, GradualUnfreezing, PhaseAwareEarlyStopping, layerwise_param_groups
from tests.callbacks.unfreezing.conftest import Watch, two_ranks
from tests.nets import BLOCKS, Net, data, fit, same, without_dropout


def test_frozen_blocks_keep_weights_statistics_and_modes() -> None:
    watch = Watch()

    class Rude(Net):
        def on_train_epoch_start(self) -> None:
            self.train()  # what many modules do, and what undoes a single call of eval()

    net = fit([GradualUnfreezing(every_steps=6), watch], Rude())
    assert [sorted(watch.open[s]) for s in (0, 6)] == [["head"], ["head", "mix"]]
    for block, opened in (("layer2", 12), ("layer1", 18)):
        for name in ("conv.weight", "norm.weight", "norm.running_mean", "norm.num_batches_tracked"):
            assert watch.first_change(f"{block}.{name}") == opened, name
    assert watch.first_change("stem.weight") == 24
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
        partial(torch.optim.RMSprop, lr=0.01, momentum=0.9),
        partial(torch.optim.LBFGS, lr=0.1, max_iter=2),
    ],
)
def test_no_optimizer_moves_what_is_frozen(make: Any) -> None:
    watch = Watch()
    fit([GradualUnfreezing(every_steps=10), watch], Net(make, by_block=False))
    assert watch.first_change("layer2.conv.weight") == 20
    assert watch.first_change("head.out.weight") == 1


# When blocks open


@pytest.mark.parametrize(
    ("arguments", "openings"),
    [
        ({"every_epochs": 1, "blocks_per_phase": 2}, [0, 12, 24]),
        ({"every_steps": 5}, [0, 5, 10, 15, 20]),
        ({"over_share": 0.5}, [0, 6, 12, 18, 24]),
        ({}, [0, 6, 12, 18, 24]),
        ({"at": [0.25, 30]}, [0, 12, 30]),
        ({"every_epochs": 1, "blocks_per_phase": None}, [0, 12]),
        ({"every_steps": 7, "blocks_at_start": 3, "blocks_per_phase": 2}, [0, 7]),
    ],
)
def test_phases_open_where_they_should(arguments: dict[str, Any], openings: list[int]) -> None:
    watch, unfreezing = Watch(), GradualUnfreezing(**arguments)
    fit([unfreezing, watch])
    assert unfreezing.opening_steps == openings
    counts = [len(names) for names in watch.open]
    assert [0, *(s for s in range(1, 48) if counts[s] > counts[s - 1])] == openings
    assert counts[-1] == len(BLOCKS)


def test_steps_are_optimiser_steps_under_accumulation() -> None:
    watch = Watch()
    fit([GradualUnfreezing(every_steps=2), watch], accumulate_grad_batches=3)
    counts = [len(names) for names in watch.open]
    assert [s for s in range(1, 48) if counts[s] > counts[s - 1]] == [6, 12, 18, 24]


def test_order_may_be_turned_or_given() -> None:
    watch = Watch()
    fit([GradualUnfreezing(every_steps=5, order="bottom_up"), watch])
    assert watch.open[0] == {"stem"}
    watch = Watch()
    fit([GradualUnfreezing(every_steps=5, order=["head", "stem", "layer2", "layer1", "mix"]), watch])
    assert watch.open[5] == {"head", "stem"}


class Scripted(Net):
    """Logs a metric from a list."""

    values = (5.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 2.0)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counter", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.counter += 1
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("score", self.values[min(self.trainer.current_epoch, 7)])


def test_a_phase_opens_when_a_metric_stops_improving() -> None:
    unfreezing = GradualUnfreezing(monitor="score", patience=1, blocks_per_phase=2)
    fit([unfreezing], Scripted(), max_epochs=8)
    assert unfreezing.opening_steps == [0, 48, 84]  # bad in epochs 2, 3 and 5, 6, the best starting anew


class Falling(Scripted):
    values = (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)


@pytest.mark.parametrize("options", [{"mode": "max"}, {"min_delta": 1.5}], ids=str)
def test_what_falls_by_1_may_be_no_improvement(options: dict[str, Any]) -> None:
    unfreezing = GradualUnfreezing(monitor="score", patience=0, **options)
    fit([unfreezing], Falling(), max_epochs=8)
    assert unfreezing.opening_steps == [0, 24, 48, 72]


def test_the_first_rank_decides_for_all() -> None:
    class Second(SingleDeviceStrategy):
        """As on a rank whose own metric improves, while that of the first does not."""

        def broadcast(self, obj: Any, src: int = 0) -> Any:
            return 1.0 if isinstance(obj, float) else obj

    unfreezing = GradualUnfreezing(monitor="score", patience=0)
    fit([unfreezing], Falling(), strategy=Second("cpu"), accelerator="auto")
    assert unfreezing.opening_steps == [0, 24]


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match=r"monitor 'acc' is not logged; logged are val/loss"):
        fit([GradualUnfreezing(monitor="acc")])


def test_the_best_weights_come_back_before_the_next_phase() -> None:
    watch = Watch()
    fit([GradualUnfreezing(monitor="score", patience=1, blocks_per_phase=2, restore_best=True), watch], Scripted())

    class Check(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 48:
                self.found = pl_module.head["out"].weight.detach().clone()  # type: ignore[index]
                self.counter = pl_module.counter.clone()  # type: ignore[operator, union-attr]

    check = Check()
    unfreezing = GradualUnfreezing(monitor="score", patience=1, blocks_per_phase=2, restore_best=True)
    fit([unfreezing, check], Scripted(), max_epochs=5)
    assert torch.equal(check.found, watch.weights[23]["head.out.weight"])  # epoch 1 had the best score
    assert check.counter == 24


@pytest.mark.slow
@pytest.mark.parametrize(
    "saving", [{"save_on_train_epoch_end": True}, {"every_n_train_steps": 12}], ids=["after", "before validation"]
)
def test_a_resumed_run_decides_as_the_uninterrupted_one(tmp_path: Path, saving: dict[str, Any]) -> None:
    """In any epoch: best value, bad validations and best weights of every open block come back."""

    def run(*callbacks: Any, **options: Any) -> tuple[Net, list[int]]:
        ways = {"monitor": "score", "patience": 0, "restore_best": True, "blocks_per_phase": 2}
        unfreezing = GradualUnfreezing(**ways)  # type: ignore[arg-type]
        net = fit([ExactResume(1), unfreezing, *callbacks], Scripted(), max_epochs=8, **options)
        return net, unfreezing.opening_steps

    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, **saving)
    whole, openings = run(keep, enable_checkpointing=True)
    assert openings == [0, 36, 72]
    for epoch in range(7):
        resumed, openings = run(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert openings == [0, 36, 72], epoch
        assert same(whole, resumed), epoch


# Refused early


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"every_epochs": 1, "every_steps": 1}, "every_epochs and every_steps; give one"),
        ({"every_steps": 0}, "must be at least 1"),
        ({"blocks_at_start": 0}, "blocks_at_start must be at least 1"),
        ({"over_share": 1.5}, "over_share must lie between 0 and 1"),
        ({"at": [5, 0.5]}, "ascending shares"),
        ({"restore_best": True}, "restore_best needs monitor"),
        ({"monitor": "acc", "mode": "maximum"}, "mode must be min or max; received 'maximum'"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GradualUnfreezing(**arguments)


def test_a_phase_beyond_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"would open at step 48, but the run has 48 optimiser steps"):
        fit([GradualUnfreezing(every_epochs=1)])


def test_an_early_stop_before_the_last_phase_is_refused() -> None:
    with pytest.raises(ValueError, match=r"EarlyStopping on val/loss \(patience 1\) could end the run"):
        fit([GradualUnfreezing(every_steps=8), EarlyStopping("val/loss", patience=1)])
    fit([GradualUnfreezing(every_steps=8), EarlyStopping("val/loss", patience=2)])
    fit([GradualUnfreezing(every_steps=8), EarlyStopping("val/loss", patience=1)], min_epochs=3)
    fit([GradualUnfreezing(every_steps=8), PhaseAwareEarlyStopping("val/loss", patience=1)])


def test_a_share_of_an_endless_run_is_refused() -> None:
    with pytest.raises(ValueError, match="a share of the run needs its length"):
        GradualUnfreezing(over_share=0.5).boundaries(3, float("inf"))


def test_an_optimizer_that_lacks_parameters_is_refused() -> None:
    class Lacking(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.head.parameters())

    with pytest.raises(ValueError, match=r"in no group of the optimiser: mix\.bias, .* and 6 more"):
        fit([GradualUnfreezing(every_steps=2)], Lacking())


def test_a_parameter_in_two_optimizers_is_refused() -> None:
    class Twice(Net):
        def configure_optimizers(self) -> Any:
            self.automatic_optimization = False
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self, self.head)]

    with pytest.raises(ValueError, match="a parameter is in two groups of the optimisers; give configure_optimizers"):
        fit([GradualUnfreezing(every_steps=2)], Twice())


def test_an_optimizer_of_trainable_parameters_alone_gets_all() -> None:
    class Filtering(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])

    watch = Watch()
    fit([GradualUnfreezing(every_steps=6), watch], Filtering())
    assert watch.first_change("stem.weight") == 24


def test_an_opened_block_without_gradient_stops_the_run() -> None:
    class Detached(Net):
        def forward(self, x: Any) -> Any:
            with torch.no_grad():
                x = self.layer1(self.stem(x))
            x = self.layer2(x).mean((2, 3))
            return self.head["out"](self.head["up"](self.norm(torch.relu(self.mix(x)))))

    with pytest.raises(RuntimeError, match=r"layer1 opened at step 6, but no gradient reaches layer1\.conv\.weight"):
        fit([GradualUnfreezing(every_steps=2)], Detached())


def test_a_parameter_without_gradient_in_a_block_that_has_some_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Spare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mix.register_parameter("spare", nn.Parameter(torch.ones(2)))

    fit([GradualUnfreezing(every_steps=2)], Spare())
    assert "no gradient reaches mix.spare: forward() does not use it" in caplog.text


def test_what_never_opened_is_named(caplog: pytest.LogCaptureFixture) -> None:
    fit([GradualUnfreezing(monitor="score", blocks_per_phase=2)], Scripted(), max_epochs=5)
    assert "the run ended before these opened: layer1, stem" in caplog.text


# The neighbours' faults


def run_to(epoch: int, folder: Path, callbacks: list[Any], **options: Any) -> Path:
    """A run that is cut off at the end of an epoch; its checkpoint."""

    class Cut(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == epoch

    keep = ModelCheckpoint(dirpath=folder, filename="cut", save_on_train_epoch_end=True, enable_version_counter=False)
    fit([*callbacks, Cut(), keep], enable_checkpointing=True, **options)
    return folder / "cut.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("way", [{"every_epochs": 1}, {"every_steps": 10}, {"every_steps": 12}])
def test_resume_before_at_and_after_each_opening(tmp_path: Path, epoch: int, way: dict[str, int]) -> None:
    """A resumed run opens what the uninterrupted one had open, in the last of its phases too."""

    def net() -> Net:
        return without_dropout(Net())  # resuming its randomness is another callback's work

    whole = fit([GradualUnfreezing(**way)], net(), max_epochs=6)
    checkpoint = run_to(epoch, tmp_path, [GradualUnfreezing(**way)], net=net(), max_epochs=6)
    unfreezing = GradualUnfreezing(**way)
    resumed = fit([unfreezing], net(), ckpt_path=checkpoint, max_epochs=6)
    assert same(whole, resumed)
    assert unfreezing.opening_steps == [way.get("every_steps", 12) * n for n in range(5)]


def test_state_is_plain(tmp_path: Path) -> None:
    callback = GradualUnfreezing(monitor="score", restore_best=True, blocks_per_phase=2)
    path = run_to(1, tmp_path, [callback], net=Scripted())
    saved = torch.load(path, weights_only=True)["callbacks"]
    (state,) = [value for key, value in saved.items() if "GradualUnfreezing" in key]
    assert state["opening_steps"] == [0]
    assert "head.out.weight" in state["best_weights"]


@pytest.mark.slow
def test_one_object_serves_two_fits() -> None:
    unfreezing = GradualUnfreezing(every_steps=6)
    one, other = fit([unfreezing]), fit([unfreezing])
    assert same(one, other)
    freeze = Freeze(train_last_blocks=1)
    assert same(fit([freeze]), fit([freeze]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler",
    [
        partial(schedulers.LambdaLR, lr_lambda=lambda step: min(1.0, (step + 1) / 10)),
        partial(schedulers.OneCycleLR, max_lr=[1e-2] * 10, total_steps=48),
        partial(schedulers.CosineAnnealingWarmRestarts, T_0=8),
        partial(schedulers.ReduceLROnPlateau, min_lr=[1e-4] * 10),
    ],
    ids=["lambda", "one-cycle", "restarts", "plateau"],
)
def test_schedulers_survive_an_opening(scheduler: Any) -> None:
    watch = Watch()
    interval = "epoch" if scheduler.func is schedulers.ReduceLROnPlateau else "step"
    fit([GradualUnfreezing(every_steps=6), watch], Net(scheduler=scheduler, interval=interval))
    assert watch.first_change("stem.weight") == 24


@pytest.mark.slow
def test_swa_survives_an_opening() -> None:
    watch = Watch()
    fit([GradualUnfreezing(every_steps=6), StochasticWeightAveraging(1e-3, swa_epoch_start=3), watch])
    assert watch.first_change("stem.weight") == 24


def test_groups_learning_rates_and_decay_stay_as_configured() -> None:
    """No group is added, no learning rate overwritten, no bias decayed, no fresh norm left out."""

    class Look(Callback):
        def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
            groups = trainer.optimizers[0].param_groups
            self.seen = [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups]
            self.members = {p for g in groups for p in g["params"]}

    net, look = Net(), Look()
    wanted = layerwise_param_groups(net, lr=1e-2, layer_decay=0.9, weight_decay=0.1)
    fit([GradualUnfreezing(every_steps=6), look], net)
    assert look.seen == [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in wanted]
    assert look.members == set(net.parameters())
    assert {g["weight_decay"] for g in wanted if g["name"].endswith("no_decay")} == {0.0}
    assert [g["lr"] for g in wanted if g["name"] in ("stem", "head")] == [1e-2 * 0.9**4, 1e-2]


@pytest.mark.slow
def test_every_change_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "callbacks.unfreezing"):
        fit([GradualUnfreezing(every_steps=12)], max_epochs=5)
    lines = [record.getMessage() for record in caplog.records if record.name == "callbacks.unfreezing"]
    assert lines[0] == "unfreezing: phases of blocks, inferred: head | mix | layer2 | layer1 | stem"
    assert lines[1] == "unfreezing: step 0, epoch 0: head open, 3 tensors, 44 parameters at lr 0.01; 1 of 5 blocks"
    assert lines[3].startswith("unfreezing: step 24, epoch 2: layer2 open, 3 tensors, 592 parameters at lr 0.0081;")


# Two ranks


class Halved(Net):
    """Each of two ranks takes every second sample, in order; one process takes twice the batch."""

    def train_dataloader(self) -> Any:
        world = self.trainer.world_size
        return DataLoader(data().dataset, 8 // world, sampler=range(self.trainer.global_rank, 48, world))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("make", [partial(torch.optim.SGD, lr=0.05, momentum=0.9), torch.optim.AdamW])
def test_ranks_agree_with_each_other_and_with_one_process(tmp_path: Path, accumulate: int, make: Any) -> None:
    def net() -> Net:
        return without_dropout(Halved(make, batch_norm=False))

    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5, "max_epochs": 6}
    options |= {"use_distributed_sampler": False, "train": None}
    every = GradualUnfreezing(every_steps=4 if accumulate == 1 else 2)
    one, other = two_ranks(tmp_path, [every], net(), **options)
    alone = fit([every], net(), **options).state_dict()
    assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())
    assert max((alone[name] - tensor).abs().max() for name, tensor in one["weights"].items()) < 1e-5
    assert one["dead"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiling takes a minute on a processor")
def test_a_compiled_net_trains_what_opens() -> None:
    net, watch = Net(), Watch()
    net.compile()
    fit([GradualUnfreezing(every_steps=6), watch], net)
    assert watch.first_change("stem.weight") == 24


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4, 24])
@pytest.mark.parametrize(("options", "epochs"), [({"every_epochs": 1}, [0, 1, 2]), ({"over_share": 0.75}, None)])
def test_a_resume_with_another_batch_size(tmp_path: Path, batch: int, options: Any, epochs: Any) -> None:
    """After 1 of 4 epochs of 12 steps: epochs stay epochs, shares are of the steps done and the steps left."""
    save = ModelCheckpoint(dirpath=tmp_path, filename="one", save_on_train_epoch_end=True)
    options = {**options, "blocks_per_phase": 2}
    fit([GradualUnfreezing(**options), save, Stop()], enable_checkpointing=True)
    unfreezing, per_epoch = GradualUnfreezing(**options), 48 // batch
    fit([unfreezing], train=data(48, batch), ckpt_path=tmp_path / "one.ckpt")
    total = 12 + 3 * per_epoch
    if epochs is None:
        wanted = [0, *(max(math.ceil(0.75 * total * n / 2 - 1e-9), 12) for n in (1, 2))]
    else:
        wanted = [0, 12, 12 + per_epoch]
    assert unfreezing.opening_steps == wanted


class Stop(Callback):
    """After the first epoch."""

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        trainer.should_stop = True


def test_an_early_stop_is_reckoned_with_short_last_accumulations() -> None:
    """10 batches, 4 a step: 3 steps an epoch, so that the stop comes at step 6 at the earliest."""
    stop = EarlyStopping("val/loss", patience=1)
    options: dict[str, Any] = {"train": data(40), "accumulate_grad_batches": 4, "max_epochs": 5}
    fit([GradualUnfreezing(at=[5]), stop], **options)
    with pytest.raises(ValueError, match="could end the run"):
        fit([GradualUnfreezing(at=[6]), stop], **options)
