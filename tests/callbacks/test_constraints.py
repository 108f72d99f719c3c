from __future__ import annotations

import csv
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from callbacks.constraints import Constrain, RateBounds, bound_norms_, clamp_

Build = Callable[[Any], Optimizer]
PLAIN = partial(SGD, lr=0.5)


class Net(LightningModule):
    """A tied weight, a frozen layer, a transposed kernel; two named groups; a recursive schedule on demand."""

    def __init__(self, build: Build = PLAIN, scheduled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.frozen = nn.ConvTranspose1d(1, 2, 1), nn.Linear(12, 12)
        self.again, self.tied, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.tied.weight = self.again.weight
        self.frozen.requires_grad_(False)
        self.build, self.scheduled = build, scheduled

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tied(self.again(self.frozen(self.up(x[:, None]).flatten(1))))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ranks = slice(self.global_rank, None, self._trainer.world_size if self._trainer else 1)
        x, y = batch[0][ranks], batch[1][ranks]  # with several ranks, each has its share of the same batch
        return nn.functional.cross_entropy(self(x).float(), y)

    def configure_optimizers(self) -> Any:
        if self.build is LBFGS:
            return LBFGS(list(self.parameters()))
        head = list(self.head.parameters())
        body = [p for p in self.parameters() if all(p is not other for other in head)]
        optimizer = self.build([{"params": body, "name": "body"}, {"params": head, "name": "head"}])
        for group in optimizer.param_groups:
            group["lr"] = deepcopy(group["lr"])  # torch gives all groups one tensor
        if not self.scheduled:
            return optimizer
        schedule = {"scheduler": CosineAnnealingLR(optimizer, 8), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    x, y = 3 * torch.randn(32, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def trainer(*callbacks: Callback, epochs: int = 1, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return Trainer(**{"accelerator": "cpu", "max_epochs": epochs, "callbacks": list(callbacks), **quiet, **options})


def fit(*callbacks: Callback, net: Net | None = None, **options: Any) -> Net:
    net = net or Net()
    trainer(*callbacks, **options).fit(net, loader())
    return net


def by_hand(after: Callable[[Net], Any], accumulate: int = 1) -> Net:
    net = Net()
    optimizer = net.configure_optimizers()
    batches = list(loader())
    with torch.no_grad():
        after(net)
    for first in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        for batch in batches[first : first + accumulate]:
            (net.training_step(batch, 0) / accumulate).backward()
        optimizer.step()
        with torch.no_grad():
            after(net)
    return net


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


def assert_same(one: nn.Module, other: nn.Module, atol: float = 1e-6) -> None:
    for (name, p), q in zip(weights(one).items(), weights(other).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# the maths


def test_values_are_moved_to_the_nearest_in_the_range() -> None:
    for minimum, maximum, wanted in (
        (-1.0, 2.0, [-1.0, 0.5, 2.0]),
        (0.0, None, [0.0, 0.5, 3.0]),
        (None, 0.0, [-3.0, 0.0, 0.0]),
    ):
        tensor = torch.tensor([-3.0, 0.5, 3.0])
        clamp_([tensor], minimum, maximum)
        assert tensor.tolist() == wanted
    clamp_([], 0.0, 1.0)


def test_norms_are_those_of_rows_filters_and_whole_vectors() -> None:
    tensor = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    bound_norms_(tensor, 0.0, 1.0)
    torch.testing.assert_close(tensor, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    bound_norms_(tensor, 1.0, 1.0)
    torch.testing.assert_close(tensor, torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]]))
    kernel = torch.randn(3, 5, 2, 2)
    for dim in (0, 1):
        other = kernel.clone()
        bound_norms_(other, 0.0, 0.7, dim)
        assert all(unit.norm() == pytest.approx(0.7, rel=1e-5) for unit in other.unbind(dim))
    vector = torch.tensor([3.0, 4.0])
    bound_norms_(vector, 0.0, 1.0, 1)
    torch.testing.assert_close(vector, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("least", [0.0, 1.0])
def test_what_holds_is_not_moved_again_by_a_bit(dtype: torch.dtype, least: float) -> None:
    tensor = torch.randn(50, 4608, dtype=torch.float64).mul(torch.rand(50, 1)).to(dtype)
    bound_norms_(tensor, least, 1.0)
    again = tensor.clone()
    bound_norms_(again, least, 1.0)
    assert torch.equal(tensor, again)
    norms = tensor.double().norm(dim=1)
    assert norms.max() < 1.0 + max(2e-5, 2 * torch.finfo(dtype).eps)
    assert least == 0.0 or norms.min() > 1.0 - max(2e-5, 2 * torch.finfo(dtype).eps)


# Constrain


def clamp_and_bound(net: Net) -> None:
    net.head.weight.clamp_(-0.1, 0.15)
    net.again.weight.mul_((0.5 / net.again.weight.norm(dim=1, keepdim=True)).clamp(max=1.0))
    net.up.weight.div_(net.up.weight.norm(dim=(0, 2), keepdim=True))


def three() -> list[Callback]:
    return [
        Constrain("head.weight", -0.1, 0.15),
        Constrain("again.weight", max_norm=0.5),
        Constrain("up.w", unit_norm=True),
    ]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_several_hold_from_before_the_first_step_and_after_each(accumulate: int) -> None:
    net = fit(*three(), accumulate_grad_batches=accumulate)
    assert_same(net, by_hand(clamp_and_bound, accumulate), 1e-5)
    assert net.head.weight.min().item() == pytest.approx(-0.1) and net.head.weight.max().item() == pytest.approx(0.15)


def test_the_first_batch_sees_constrained_weights_and_the_log_names_them(caplog: pytest.LogCaptureFixture) -> None:
    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            assert pl_module.head.weight.abs().max() <= 0.1

    with caplog.at_level("INFO", "callbacks.constraints"):
        fit(Look(), Constrain(r"head", -0.1, 0.1))
    moved = "Constrain('head') moved, before the first step: head.weight, head.bias"
    assert moved in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "callbacks.constraints"):
        fit(Constrain("head", -10, 10))
    assert "moved" not in caplog.text


def test_a_range_comes_before_the_norm() -> None:
    row = Net().head.weight.detach().clamp(0.0, 0.2)
    wanted = row * (0.3 / row.norm(dim=1, keepdim=True)).clamp(max=1.0)
    net, callback = Net(), Constrain("head.weight", 0.0, 0.2, max_norm=0.3)
    fake: Any = SimpleNamespace(strategy=None, optimizers=[], is_global_zero=False)
    callback.on_train_start(fake, net)
    torch.testing.assert_close(net.head.weight.detach(), wanted)
    assert (wanted.norm(dim=1) < 0.29).any() and (wanted.norm(dim=1) > 0.299).any()


def test_what_is_frozen_is_not_touched_until_it_opens() -> None:
    class Open(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            pl_module.frozen.requires_grad_(True)

    original = weights(Net())["frozen.weight"]
    assert original.abs().max() > 0.05
    assert torch.equal(fit(Constrain(".", -0.05, 0.05)).frozen.weight, original)
    assert fit(Constrain(".", -0.05, 0.05), Open()).frozen.weight.abs().max() <= 0.05


class Nudge(Callback):
    """Another callback that moves weights after the update, listed behind the constraint."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: pl_module.head.weight.data.add_(5.0))


def test_it_acts_after_all_others_and_before_checkpoints() -> None:
    constrain, nudge, checkpoint = Constrain("head", maximum=0.1), Nudge(), ModelCheckpoint("here")
    plan, net = trainer(constrain, nudge, checkpoint, enable_checkpointing=True), Net()
    plan.fit(net, loader())
    ours = [c for c in plan.callbacks if c in (constrain, nudge, checkpoint)]  # type: ignore[attr-defined]
    assert ours == [nudge, constrain, checkpoint]
    assert net.head.weight.max() <= 0.1


SETS = {"constrain": three, "bounds": lambda: [RateBounds(0.01, 0.05)]}
sets = pytest.mark.parametrize("name", SETS)


@pytest.mark.slow
@sets
def test_two_ranks_are_equal_and_what_one_process_gives(name: str, tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            torch.save(weights(pl_module), tmp_path / f"{trainer.global_rank}.pt")

    fit(*SETS[name](), Save(), devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
    for key, value in weights(fit(*SETS[name]())).items():
        torch.testing.assert_close(ranks[0][key], value, rtol=0, atol=1e-5)


@sets
def test_resumed_is_uninterrupted_bit_for_bit(name: str) -> None:
    build = partial(AdamW, lr=0.1)
    whole = fit(*SETS[name](), net=Net(build, True), epochs=2)
    half = trainer(*SETS[name](), epochs=1)
    half.fit(Net(build, True), loader())
    half.save_checkpoint("half.ckpt")
    resumed = Net(build, True)
    trainer(*SETS[name](), epochs=2).fit(resumed, loader(), ckpt_path="half.ckpt", weights_only=True)
    assert_same(whole, resumed, 0.0)


@pytest.mark.slow
@sets
def test_one_instance_serves_two_fits(name: str) -> None:
    callbacks = SETS[name]()
    fit(*callbacks, net=Net(partial(SGD, lr=0.01)))
    assert_same(fit(*callbacks), fit(*SETS[name]()), 0.0)


@sets
def test_bf16_a_scaler_with_a_fused_optimiser_and_lbfgs(name: str) -> None:
    assert_same(fit(*SETS[name]()), fit(*SETS[name](), precision="bf16-mixed"), 0.1)
    fused = partial(AdamW, lr=0.1, eps=0.01, fused=True)
    one, other = Net(fused), Net(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit(*SETS[name](), net=one)
    fit(*SETS[name](), net=other, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert_same(one, other, 0.02)
    net = fit(Constrain("head.w", -0.1, 0.1), RateBounds(maximum=0.1), net=Net(LBFGS), limit_train_batches=2)
    assert net.head.weight.abs().max() <= 0.1


@sets
def test_an_interrupted_fit_leaves_no_hooks(name: str) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ZeroDivisionError

    plan = trainer(*SETS[name](), Stop())
    with pytest.raises(ZeroDivisionError):
        plan.fit(Net(), loader())
    optimizer: Any = plan.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


# RateBounds


class Used(Callback):
    """The learning rates that updates have used."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lrs: list[list[float]] = []
        optimizer = trainer.optimizers[0]
        optimizer.register_step_pre_hook(self.look)

    def look(self, optimizer: Optimizer, *_: Any) -> None:
        self.lrs.append([float(group["lr"]) for group in optimizer.param_groups])


class WarmUp(Callback):
    """Scales learning rates around the update, first of all callbacks, as LRWarmup does."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        optimizer.register_step_pre_hook(lambda optimizer, *_: self.scale(optimizer, trainer.global_step))
        optimizer.register_step_post_hook(self.put_back)

    def scale(self, optimizer: Optimizer, step: int) -> None:
        self.own = [float(group["lr"]) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            lr = group["lr"] * min(1.0, (step + 1) / 4)
            group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else group.update(lr=lr)

    def put_back(self, optimizer: Optimizer, *_: Any) -> None:
        for group, own in zip(optimizer.param_groups, self.own, strict=True):
            group["lr"].fill_(own) if isinstance(group["lr"], Tensor) else group.update(lr=own)


def schedule(base: float = 0.5) -> list[float]:
    """The learning rates of the recursive schedule, alone."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=base)
    cosine, lrs = CosineAnnealingLR(optimizer, 8), []
    for _ in range(8):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    return lrs


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("minimum", [0.1, 0.5])  # 0.5 is the base learning rate itself
def test_rates_are_bounded_in_the_update_alone_and_schedules_and_warm_ups_go_on(tensor: bool, minimum: float) -> None:
    used, maximum = Used(), max(minimum, 0.4)
    net = Net(partial(SGD, lr=torch.tensor(0.5) if tensor else 0.5), scheduled=True)
    plan = trainer(WarmUp(), RateBounds(minimum, maximum), used)
    plan.fit(net, loader())
    warmed = [lr * min(1.0, (step + 1) / 4) for step, lr in enumerate(schedule())]
    wanted = [min(max(lr, minimum), maximum) for lr in warmed]
    assert [lrs[0] for lrs in used.lrs] == pytest.approx(wanted)
    assert [lrs[1] for lrs in used.lrs] == pytest.approx(wanted)
    assert float(plan.optimizers[0].param_groups[0]["lr"]) == pytest.approx(0.0, abs=1e-9)  # the end of the cosine


def test_only_the_groups_of_the_pattern_are_bounded_and_the_monitor_shows_the_schedule() -> None:
    used, logger = Used(), CSVLogger(".", name="", version="")
    bounds = [RateBounds(maximum=0.2, pattern="^body$"), RateBounds(0.3, pattern="^head$")]
    fit(*bounds, used, LearningRateMonitor(), net=Net(scheduled=True), logger=logger, log_every_n_steps=1)
    lrs = schedule()
    assert [body for body, _ in used.lrs] == pytest.approx([min(lr, 0.2) for lr in lrs])
    assert [head for _, head in used.lrs] == pytest.approx([max(lr, 0.3) for lr in lrs])
    rows = csv.DictReader(Path("metrics.csv").read_text().splitlines())
    assert [float(row["lr-SGD/body"]) for row in rows] == pytest.approx(lrs)


def test_the_log_says_when_a_bound_begins_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "callbacks.constraints"):
        fit(RateBounds(maximum=0.4, pattern="head"), net=Net(scheduled=True))
    lines = [record.getMessage() for record in caplog.records if record.name == "callbacks.constraints"]
    assert lines == ["learning rate of group 'head': 0.5 -> 0.4", "learning rate of group 'head': 0.346"]


def test_a_frozen_group_is_left_alone() -> None:
    net, used = Net(), Used()
    net.head.requires_grad_(False)
    fit(RateBounds(maximum=0.1), used, net=net)
    assert used.lrs == [[0.1, 0.5]] * 8


@pytest.mark.parametrize("tensor", [False, True])
def test_a_step_cut_short_leaves_the_schedules_rate(tensor: bool) -> None:
    class Broken(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise ZeroDivisionError

    class PutsBack(WarmUp):
        def on_exception(self, trainer: Trainer, *_: Any) -> None:
            self.put_back(trainer.optimizers[0])

    for callbacks in ([PutsBack()], []):
        plan = trainer(*callbacks, RateBounds(maximum=0.1))
        with pytest.raises(ZeroDivisionError):
            plan.fit(Broken(partial(SGD, lr=torch.tensor(0.5) if tensor else 0.5)), loader())
        assert float(plan.optimizers[0].param_groups[0]["lr"]) == 0.5


def test_steps_that_a_scaler_skips_leave_the_schedules_rate() -> None:
    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    net = fit(RateBounds(maximum=0.1), Look(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert_same(net, Net(), 0.0)


def test_what_cannot_be_is_refused() -> None:
    for options, message in (
        ({}, "Constrain has nothing to do; give minimum, maximum, max_norm or unit_norm"),
        ({"minimum": 1, "maximum": 0}, "expected minimum <= maximum, received 1 and 0"),
        ({"max_norm": 0.0}, "expected max_norm above 0, received 0.0"),
        ({"unit_norm": True, "minimum": 0.0}, "unit_norm leaves nothing to max_norm and breaks a range; give it alone"),
        (
            {"max_norm": 1.0, "minimum": 0.5},
            "a norm is bounded by scaling towards 0, .* from 0.5 to None; drop max_norm",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Constrain("head", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pattern 'haed.weight' matches no parameter; did you mean 'head.weight'?"):
        fit(Constrain("haed.weight", 0.0))
    with pytest.raises(ValueError, match="pattern 'zzz' matches no group; there are body, head"):
        fit(RateBounds(maximum=0.1, pattern="zzz"))
    with pytest.raises(ValueError, match="group 'head' is bounded twice; make the patterns disjoint"):
        fit(RateBounds(maximum=0.1), RateBounds(0.01, pattern="head"))
    with pytest.raises(ValueError, match="expected a minimum of 0 or more and a bound, received 0.0 and inf"):
        RateBounds()
    with pytest.raises(ValueError, match="expected minimum <= maximum, received 0.2 and 0.1"):
        RateBounds(0.2, 0.1)


def test_sharded_parameters_are_refused() -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    fake: Any = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match="Constrain needs whole parameters, received ModelParallelStrategy"):
        Constrain("head", 0.0).on_train_start(fake, Net())


def test_several_instances_have_keys_of_their_own() -> None:
    assert len({callback.state_key for callback in three()}) == 3
    assert "pattern" in RateBounds(0.1).state_key and "max_norm" in Constrain("a", max_norm=1.0).state_key
