"""The learning rate used is schedule(t) x ramp(t), exactly, whatever the schedule and however the run is made."""

from __future__ import annotations

import csv
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, IterableDataset

from callbacks import GradualUnfreezing, LRWarmup
from callbacks import warmup as warmup_file
from callbacks.unfreezing import gradual as unfreezing_file
from callbacks.warmup import phase_of_groups, ramp
from recipes.parts.schedules import Cosine, OneCycle
from tests.nets import Net, data, fit, same, without_dropout


class Rates(Callback):
    """The learning rates and momenta that each optimiser step really used, and those a monitor would show."""

    def __init__(self) -> None:
        self.used: list[list[float]] = []
        self.shown: list[list[float]] = []
        self.steps: list[int] = []
        self.momenta: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        def keep(optimizer: Any, args: Any, kwargs: Any) -> None:
            self.used.append([float(group["lr"]) for group in optimizer.param_groups])
            self.steps.append(trainer.global_step)
            group = optimizer.param_groups[0]
            self.momenta.append(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))

        trainer.optimizers[0].register_step_pre_hook(keep)

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.shown.append([float(group["lr"]) for group in trainer.optimizers[0].param_groups])


SGD = partial(torch.optim.SGD, momentum=0.9)
SCHEDULES: dict[str, Any] = {
    "none": None,
    "lambda": partial(schedulers.LambdaLR, lr_lambda=lambda step: 1.0 / (1 + step)),
    "multiplicative": partial(schedulers.MultiplicativeLR, lr_lambda=lambda step: 0.97),
    "step": partial(schedulers.StepLR, step_size=5),
    "multistep": partial(schedulers.MultiStepLR, milestones=[3, 9]),
    "constant": partial(schedulers.ConstantLR, total_iters=5),
    "linear": partial(schedulers.LinearLR, total_iters=10),
    "exponential": partial(schedulers.ExponentialLR, gamma=0.95),
    "polynomial": partial(schedulers.PolynomialLR, total_iters=40),
    "cosine": partial(schedulers.CosineAnnealingLR, T_max=48),
    "restarts": partial(schedulers.CosineAnnealingWarmRestarts, T_0=10),
    "one-cycle": partial(schedulers.OneCycleLR, max_lr=1e-2, total_steps=48),
    "cyclic": partial(schedulers.CyclicLR, base_lr=1e-3, max_lr=1e-2, step_size_up=7),
    "plateau": partial(schedulers.ReduceLROnPlateau, patience=0, threshold=10.0),
    "sequential": lambda optimizer: schedulers.SequentialLR(
        optimizer,
        [schedulers.LinearLR(optimizer, total_iters=5), schedulers.CosineAnnealingLR(optimizer, T_max=40)],
        milestones=[5],
    ),
    "chained": lambda optimizer: schedulers.ChainedScheduler(
        [schedulers.LinearLR(optimizer, total_iters=5), schedulers.CosineAnnealingLR(optimizer, T_max=40)]
    ),
}


def used(callbacks: list[Any], net: Net, **options: Any) -> Rates:
    lrs = Rates()
    fit([*callbacks, lrs], net, **options)
    return lrs


# The ramp


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential"])
def test_the_ramp_rises_from_above_zero_to_one(shape: Any) -> None:
    values = [ramp(step, 10, shape) for step in range(12)]
    assert 0.0 < values[0] < 0.1
    assert values == sorted(values)
    assert values[9] < 1.0 == values[10] == values[11]
    assert ramp(0, 0) == 1.0


def test_the_linear_ramp_is_the_one_of_the_papers() -> None:
    assert [ramp(step, 3) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


# Any schedule


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using")
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_rate_is_schedule_times_ramp_to_the_last_bit(name: str, interval: str) -> None:
    if name == "plateau" and interval == "step":
        pytest.skip("it needs a metric, which comes once per epoch")
    net = partial(Net, SGD, SCHEDULES[name], interval)
    plain = used([], net()).used
    warm = used([LRWarmup(steps=20)], net())
    assert len(plain) == 48
    assert warm.used == [[lr * ramp(t, 20) for lr in lrs] for t, lrs in enumerate(plain)]
    assert warm.shown == warm.used  # what LearningRateMonitor sees


@pytest.mark.slow
@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW, partial(torch.optim.LBFGS, lr=0.1, max_iter=2)])
def test_the_update_is_made_at_the_learning_rate_that_is_shown(make: Any) -> None:
    """Lightning's backward pass is part of the optimiser's step; nothing may restore it before the update."""
    ramped = partial(schedulers.LambdaLR, lr_lambda=lambda step: ramp(step, 20))
    assert same(fit([LRWarmup(steps=20)], Net(make, by_block=False)), fit([], Net(make, ramped, by_block=False)))


def test_transformers_own_schedule() -> None:
    transformers = pytest.importorskip("transformers")
    linear = partial(transformers.get_linear_schedule_with_warmup, num_warmup_steps=0, num_training_steps=48)
    plain, warm = used([], Net(SGD, linear)).used, used([LRWarmup(share=0.25)], Net(SGD, linear)).used
    assert warm == [[lr * ramp(t, 12) for lr in lrs] for t, lrs in enumerate(plain)]
    assert min(map(min, warm)) > 0.0  # theirs begins with a step at a learning rate of 0, ours does not


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "fp16"])
def test_optimiser_steps_are_counted(accumulate: int, precision: str) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    if precision == "fp16":
        options["plugins"] = [MixedPrecision("16-mixed", "cpu")]
    else:
        options["precision"] = precision
    cosine = partial(schedulers.CosineAnnealingLR, T_max=16)
    plain, warm = (used(c, Net(SGD, cosine), **options) for c in ([], [LRWarmup(steps=8)]))
    shown = plain.shown[::accumulate]
    assert warm.used == [[lr * ramp(t, 8) for lr in shown[t]] for t in warm.steps]
    assert len(warm.used) > 8


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the very first step is skipped
def test_a_step_that_the_scaler_skips_leaves_the_schedule_alone() -> None:
    def run(callbacks: list[Any]) -> Rates:
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**24))
        return used(callbacks, Net(SGD, partial(schedulers.CosineAnnealingLR, T_max=48)), plugins=[plugin])

    plain, warm = run([]), run([LRWarmup(steps=20)])
    assert 10 < len(warm.used) < 48
    assert warm.used == [[lr * ramp(t, 20) for lr in plain.shown[t]] for t in warm.steps]


def test_lbfgs() -> None:
    make = partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    assert [r for (r,) in used([LRWarmup(steps=4)], Net(make, by_block=False), max_epochs=1).used[:5]] == [
        0.1 * ramp(t, 4) for t in range(5)
    ]


@pytest.mark.parametrize("length", [{"epochs": 1}, {"share": 0.25}, {"steps": 12}, {"epochs": 0.5}])
def test_length_in_steps_epochs_or_share(length: dict[str, Any]) -> None:
    warmup = LRWarmup(**length)
    fit([warmup])
    assert warmup.length == (6 if length == {"epochs": 0.5} else 12)


@pytest.mark.slow
def test_momentum_warms_up_and_comes_back() -> None:
    cycle = partial(schedulers.OneCycleLR, max_lr=1e-2, total_steps=48)
    for make, scheduler in ((SGD, None), (torch.optim.AdamW, None), (SGD, cycle)):
        plain = used([], Net(make, scheduler)).momenta
        warm = used([LRWarmup(steps=10, momentum=0.5)], Net(make, scheduler)).momenta
        assert warm == [0.5 + (own - 0.5) * ramp(t, 10) for t, own in enumerate(plain)]


def test_a_rate_that_is_a_tensor() -> None:
    class Tensors(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=torch.tensor(0.5, dtype=torch.float64))

    class Same(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            tensors.add(id(trainer.optimizers[0].param_groups[0]["lr"]))

    tensors: set[int] = set()
    warm = used([LRWarmup(steps=4), Same()], Tensors()).used
    assert [lr for (lr,) in warm[:6]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert len(tensors) == 1  # a compiled step reads this very one


def test_the_monitor_sees_the_rate_wherever_it_stands(tmp_path: Path) -> None:
    for callbacks in ([LearningRateMonitor(), LRWarmup(steps=4)], [LRWarmup(steps=4), LearningRateMonitor()]):
        logger = CSVLogger(tmp_path)
        fit(callbacks, Net(SGD, by_block=False), logger=logger, log_every_n_steps=1, max_epochs=1)
        rows = csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines())
        shown = {int(row["step"]): float(row["lr-SGD"]) for row in rows if row["lr-SGD"]}
        assert [shown[t] for t in range(5)] == [1e-3 * ramp(t, 4) for t in range(5)]


# A clock for each block


def test_blocks_that_open_later_warm_up_from_their_opening() -> None:
    unfreezing = GradualUnfreezing(every_steps=10)
    lrs = used([LRWarmup(steps=4), unfreezing], Net(SGD))
    opened = [40, 40, 30, 30, 20, 20, 10, 10, 0, 0]  # stem to head, each with a group of no decay
    base = [1e-2 * 0.9 ** (4 - n // 2) for n in range(10)]
    for t, seen in enumerate(lrs.used):
        expected = [b * ramp(t - o, 4) if t >= o else 0.0 for b, o in zip(base, opened, strict=True)]
        assert seen == expected, t
    assert lrs.shown == lrs.used


def test_one_clock_for_all_by_choice() -> None:
    lrs = used([LRWarmup(steps=4, per_block=False), GradualUnfreezing(every_steps=10)], Net(SGD, by_block=False))
    assert [r for (r,) in lrs.used] == [1e-3 * ramp(t, 4) for t in range(48)]


def test_a_flat_optimizer_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"group 0 holds blocks that open at different times.*layerwise_param_groups"):
        fit([LRWarmup(steps=4), GradualUnfreezing(every_steps=10)], Net(SGD, by_block=False))


def test_blocks_that_open_together_may_share_a_group() -> None:
    net = Net()
    optimizer = torch.optim.SGD([{"params": net.stem.parameters()}, {"params": net.layer1.parameters()}], lr=0.1)
    phases = [list(net.layer1.parameters()), list(net.stem.parameters())]
    assert phase_of_groups(optimizer, phases) == [1, 0]


# Resuming, and refusing


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("name", ["none", "cosine", "one-cycle", "sequential"])
def test_resume_goes_on_bitwise(tmp_path: Path, name: str, epoch: int) -> None:
    class Cut(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == epoch

    def net() -> Net:
        return without_dropout(Net(SGD, SCHEDULES[name]))

    def callbacks() -> list[Any]:
        return [LRWarmup(steps=15), GradualUnfreezing(every_steps=9)]

    whole = fit(callbacks(), net())
    keep = ModelCheckpoint(dirpath=tmp_path, filename="cut", save_on_train_epoch_end=True, enable_version_counter=False)
    fit([*callbacks(), Cut(), keep], net(), enable_checkpointing=True)
    assert same(whole, fit(callbacks(), net(), ckpt_path=tmp_path / "cut.ckpt"))


@pytest.mark.slow
def test_one_object_serves_two_fits() -> None:
    warmup = LRWarmup(steps=10)
    assert used([warmup], Net(SGD)).used == used([warmup], Net(SGD)).used


def test_rates_are_put_back_when_the_run_breaks() -> None:
    class Breaking(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == 3:
                self.seen = self.trainer.optimizers[0].param_groups[0]
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    net = Breaking(SGD, by_block=False)
    with pytest.raises(RuntimeError, match="broken"):
        fit([LRWarmup(steps=10)], net)
    assert net.seen["lr"] == 1e-3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs one of steps, epochs and share"),
        ({"steps": 3, "share": 0.1}, "needs one of"),
        ({"steps": 0}, "above 0"),
        ({"share": 1.0}, "below 1"),
        ({"steps": 3, "shape": "wavy"}, "shape must be linear, cosine or exponential; received 'wavy'"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LRWarmup(**arguments)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="a warm-up of 48 steps does not fit in a run of 48 optimiser steps"):
        fit([LRWarmup(epochs=4)])
    with pytest.raises(ValueError, match="Adadelta has no momentum"):
        fit([LRWarmup(steps=4, momentum=0.5)], Net(torch.optim.Adadelta))

    class Two(Net):
        def configure_optimizers(self) -> Any:
            self.automatic_optimization = False
            return [torch.optim.SGD(m.parameters(), 0.1) for m in (self.stem, nn.ModuleList([self.mix, self.head]))]

    with pytest.raises(ValueError, match="serves one optimiser; this module has 2"):
        fit([LRWarmup(steps=4)], Two())


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 6), (3, 9), (0.5, 2)])  # 1.5 steps are rounded to 2
def test_a_short_last_accumulation_is_a_step_of_the_warmup(epochs: float, steps: int) -> None:
    warmup = LRWarmup(epochs=epochs)
    lrs = used([warmup], Net(SGD), train=data(40), accumulate_grad_batches=4, max_epochs=4)  # 10 batches
    assert warmup.length == steps
    assert [used[-1] for used in lrs.used] == pytest.approx([1e-2 * ramp(t, steps) for t in range(12)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("batch", [1, 4, 24])
@pytest.mark.parametrize("length", [{"epochs": 2}, {"epochs": 1.5}, {"share": 0.5}, {"steps": 15}])
def test_a_resume_with_another_batch_size(tmp_path: Path, batch: int, length: dict[str, Any]) -> None:
    """After 1 of 4 epochs of 12 steps; epochs and shares are counted in steps done and steps left."""
    save = ModelCheckpoint(dirpath=tmp_path, filename="one", save_on_train_epoch_end=True)
    fit([LRWarmup(**length), save, StopAt(12)], Net(SGD), enable_checkpointing=True)
    warmup, per_epoch = LRWarmup(**length), 48 // batch
    lrs = used([warmup], Net(SGD), train=data(48, batch), ckpt_path=tmp_path / "one.ckpt")
    total = 12 + 3 * per_epoch
    wanted = {"epochs": 12 + (length.get("epochs", 0) - 1) * per_epoch, "share": total / 2, "steps": 15}[min(length)]
    assert warmup.length == round(wanted)
    assert [used[-1] for used in lrs.used] == pytest.approx([1e-2 * ramp(t, round(wanted)) for t in range(12, total)])


class Stream(IterableDataset[Any]):
    """Without a length."""

    def __iter__(self) -> Any:
        return iter(data().dataset[n] for n in range(48))


ENDLESS = [{"max_epochs": -1, "max_steps": 20}, {"max_epochs": 2}, {"max_epochs": -1, "max_time": {"seconds": 2}}]


@pytest.mark.parametrize("run", ENDLESS)
def test_data_without_a_length_need_none_for_steps(run: dict[str, Any]) -> None:
    warmup = LRWarmup(steps=4)
    unfreezing = GradualUnfreezing(every_steps=3, blocks_per_phase=2)
    train = DataLoader(Stream(), batch_size=4)
    lrs = used([warmup, unfreezing, StopAt(20)], Net(SGD), train=train, **run)
    assert unfreezing.opening_steps == [0, 3, 6]
    assert [used[-1] for used in lrs.used][:6] == pytest.approx([1e-2 * ramp(t, 4) for t in range(6)])


class StopAt(Callback):
    """Ends a run that would go on for ever."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("run", [{"max_epochs": 2}, {"max_epochs": -1}])
def test_a_share_of_a_run_without_a_length_is_refused(run: dict[str, Any]) -> None:
    train = DataLoader(Stream(), batch_size=4) if run["max_epochs"] == 2 else data()
    with pytest.raises(ValueError, match="a share of a run whose length is not known: give steps, or set max_steps"):
        fit([LRWarmup(share=0.2), StopAt(3)], train=train, **run)
    with pytest.raises(ValueError, match="a share of the run needs its length: set max_epochs or max_steps"):
        fit([GradualUnfreezing(over_share=0.5), StopAt(3)], train=train, **run)


def test_epochs_of_data_without_a_length_are_refused() -> None:
    with pytest.raises(ValueError, match="received epochs, but the data has no length: give steps"):
        fit([LRWarmup(epochs=1)], train=DataLoader(Stream(), batch_size=4), max_epochs=2)


def test_a_share_of_max_steps_needs_no_length_of_the_data() -> None:
    warmup = LRWarmup(share=0.2)
    fit([warmup], train=DataLoader(Stream(), batch_size=4), max_epochs=-1, max_steps=20)
    assert warmup.length == 4


def test_steps_are_counted_by_one_text() -> None:
    """Each callback's file must be copyable alone."""
    for name in ("steps_per_epoch", "step_at_epoch", "steps_of_run"):
        assert inspect.getsource(getattr(warmup_file, name)) == inspect.getsource(getattr(unfreezing_file, name))


class Announced(schedulers.LambdaLR):
    """A schedule by somebody else that says of its warm-up what timm's do."""

    warmup_t = 0

    def __init__(self, optimizer: Any, steps: int) -> None:
        super().__init__(optimizer, lambda step: min(1.0, (step + 1) / (steps + 1)))
        self.warmup_t = steps


def transformers_schedule(steps: int) -> Any:
    from transformers import get_linear_schedule_with_warmup

    return partial(get_linear_schedule_with_warmup, num_warmup_steps=steps, num_training_steps=48)


WARM: dict[str, tuple[Any, Any]] = {  # with a warm-up of its own, and without
    "ours": (partial(Cosine, total_steps=48, warmup=3), partial(Cosine, total_steps=48)),
    "ours, by share": (partial(OneCycle, total_steps=48, warmup=0.1), partial(OneCycle, total_steps=48)),
    "transformers": (transformers_schedule(3), transformers_schedule(0)),
    "another": (partial(Announced, steps=3), partial(Announced, steps=0)),
    "inside another": (
        lambda o: schedulers.ChainedScheduler([Cosine(o, 48, warmup=3)]),
        lambda o: schedulers.ChainedScheduler([Cosine(o, 48)]),
    ),
}


@pytest.mark.parametrize("kind", WARM)
def test_a_schedule_that_warms_up_itself_is_refused(kind: str) -> None:
    with pytest.raises(
        ValueError, match=r"LRWarmup and the warm-up of \w+ itself \(\w+=[35]\) would multiply: switch off"
    ):
        fit([LRWarmup(steps=3)], Net(SGD, WARM[kind][0]), max_epochs=1)
    fit([LRWarmup(steps=3)], Net(SGD, WARM[kind][1]), max_epochs=1)


def test_a_rise_by_a_schedules_nature_is_said(caplog: pytest.LogCaptureFixture) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    with caplog.at_level("INFO"):
        LRWarmup(steps=3).check_schedule(
            schedulers.OneCycleLR(torch.optim.SGD([parameter], lr=0.1), max_lr=0.1, total_steps=9)
        )
    assert "warm-up: multiplies the rise of OneCycleLR" in caplog.text


def test_two_warmups_are_refused() -> None:
    with pytest.raises(ValueError, match="two LRWarmup would multiply"):
        fit([LRWarmup(steps=3), LRWarmup(epochs=1)])


def test_it_is_seen_where_nobody_has_configured_a_log(caplog: pytest.LogCaptureFixture) -> None:
    fit([LRWarmup(steps=3)], max_epochs=1)
    assert caplog.text.count("warm-up: linear over 3 optimiser steps") == 1
