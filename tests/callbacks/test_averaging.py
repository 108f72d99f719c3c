from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks.averaging import EMA, Interpolation, ema_, interpolate, warmed_up
from callbacks.resume.callback import ExactResume

Weights = dict[str, Tensor]


class Net(LightningModule):
    """BatchNorm, LayerNorm, tied weights, a frozen layer, a buffer that is not saved; notes what it is run with."""

    def __init__(self, optimizer: str = "adamw", dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.first, self.tied, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.tied.weight = self.first.weight
        self.bn, self.ln, self.dropout = nn.BatchNorm1d(6), nn.LayerNorm(6), nn.Dropout(dropout)
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.optimizer = optimizer
        self.seen: list[tuple[str, Weights]] = []
        self.fail_in_validation = False

    def loss(self, batch: Any, stage: str) -> Tensor:
        self.seen.append((stage, weights_of(self)))
        x, y = batch
        self.scratch += 1.0
        x = self.ln(self.dropout(torch.relu(self.bn(self.first(self.frozen(x))))))
        return nn.functional.cross_entropy(self.head(torch.tanh(self.tied(x))).float(), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.fail_in_validation and not self.trainer.sanity_checking:
            raise RuntimeError("broken")
        loss = self.loss(batch, "validate")
        self.log("val/loss", loss, sync_dist=self.trainer.world_size > 1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch, "test")

    def configure_optimizers(self) -> Any:
        kinds: dict[str, Callable[..., Any]] = {
            "adamw": partial(torch.optim.AdamW, lr=0.05),
            "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            "lbfgs": partial(torch.optim.LBFGS, lr=0.1, max_iter=3),
        }
        return kinds[self.optimizer]([p for p in self.parameters() if p.requires_grad or self.optimizer != "lbfgs"])


def weights_of(net: nn.Module) -> Weights:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def loader(dtype: torch.dtype = torch.float32, shuffle: bool = False) -> DataLoader[Any]:
    x = torch.randn(28, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x.to(dtype), torch.arange(28) % 3), 4, shuffle=shuffle)


class Raw(Callback):
    """The raw weights after every optimiser step; the first entry is the start."""

    def __init__(self) -> None:
        self.after: list[Weights] = []
        self.step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after.append(weights_of(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.after.append(weights_of(pl_module))


def fit(
    *callbacks: Callback, net: Net | None = None, ckpt_path: Path | str | None = None, **options: Any
) -> tuple[Trainer, Net]:
    net = net or Net()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if not any(isinstance(callback, Checkpoint) for callback in callbacks):
        quiet["enable_checkpointing"] = False
    trainer = Trainer(**{**quiet, "max_epochs": 2, "num_sanity_val_steps": 0, **options}, callbacks=list(callbacks))
    dtype = torch.bfloat16 if options.get("precision") == "bf16-true" else torch.float32
    torch.manual_seed(0)
    trainer.fit(net, loader(dtype, shuffle=True), loader(dtype), ckpt_path=ckpt_path)
    return trainer, net


def is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def average_of(raw: Iterable[Weights], decay: float = 0.999, warmup: bool = True) -> Weights:
    """By the book, in double precision; what is whole numbers is that of the last step."""
    average: Weights = {}
    for update, weights in enumerate(raw, -1):
        d = min(decay, (1 + update) / (10 + update)) if warmup else decay
        for name, weight in weights.items():
            if is_float(weight) and name in average:
                average[name] = d * average[name] + (1 - d) * weight.double()
            else:
                average[name] = weight.double() if is_float(weight) else weight
    return average


def close(one: Weights, other: Weights, tolerance: float = 1e-5) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[n].double(), other[n].double(), atol=tolerance, rtol=tolerance) for n in one)


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# The maths


def test_the_moving_average_has_its_closed_form() -> None:
    average = [torch.tensor([1.0]), torch.zeros(2, 3)]
    for _ in range(5):
        ema_(average, [torch.tensor([3.0]), torch.ones(2, 3)], 0.9)
    assert torch.allclose(average[0], torch.tensor([3.0 - 2.0 * 0.9**5]))
    assert torch.allclose(average[1], torch.full((2, 3), 1.0 - 0.9**5))


def test_an_average_of_what_does_not_change_is_exact() -> None:
    weights = [torch.randn(1000)]
    average = [weights[0].clone()]
    for decay in (0.1, 0.9, 0.999):
        ema_(average, weights, decay)
    assert torch.equal(average[0], weights[0])


def test_the_average_takes_weights_of_another_precision() -> None:
    average = [torch.ones(3)]
    ema_(average, [torch.full((3,), 1.5, dtype=torch.bfloat16)], 0.999)
    assert torch.allclose(average[0], torch.tensor(1.0005))


def test_the_decay_is_short_at_first() -> None:
    assert [round(warmed_up(0.999, t), 3) for t in (0, 1, 2, 90, 100_000)] == [0.1, 0.182, 0.25, 0.91, 0.999]
    assert warmed_up(0.05, 0) == 0.05


def test_an_interpolation_has_its_ends() -> None:
    old, new = torch.randn(50), torch.randn(50)
    assert torch.equal(interpolate([new], [old], 0.0)[0], old)
    assert torch.equal(interpolate([new], [old], 1.0)[0], new)
    assert torch.allclose(interpolate([new], [old], 0.3)[0], 0.3 * new + 0.7 * old)


# The moving average in a fit


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
        {"val_check_interval": 3},
        {"num_sanity_val_steps": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_module_ends_with_the_average_by_the_book(optimizer: str, options: dict[str, Any]) -> None:
    raw = Raw()
    _, net = fit(EMA(0.8), raw, net=Net(optimizer), **options)
    assert len(raw.after) == (1 + 6 if "accumulate_grad_batches" in options else 1 + 14)
    assert close(weights_of(net), average_of(raw.after, 0.8))
    assert not close(weights_of(net), raw.after[-1], 1e-3)


def test_lbfgs_updates_the_average_once_per_step() -> None:
    raw, ema = Raw(), EMA(0.8)
    _, net = fit(ema, raw, net=Net("lbfgs"))
    assert ema.updates == 14 and close(weights_of(net), average_of(raw.after, 0.8), 1e-4)


@pytest.mark.parametrize("every", [2, 3])
def test_updates_come_every_so_many_steps(every: int) -> None:
    raw, ema = Raw(), EMA(0.8, every_n_steps=every)
    _, net = fit(ema, raw)
    chosen = raw.after[::every]
    assert ema.updates == 14 // every
    for name, value in average_of(chosen, 0.8).items():
        if is_float(value):
            assert torch.allclose(net.state_dict()[name].double(), value, atol=1e-5)


def test_without_warm_up_the_decay_is_constant() -> None:
    raw = Raw()
    _, net = fit(EMA(0.8, warmup=False), raw)
    assert close(weights_of(net), average_of(raw.after, 0.8, warmup=False))


@pytest.mark.parametrize("callback", [EMA(0.8), Interpolation(0.5)], ids=["ema", "interpolation"])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2, "accumulate_grad_batches": 3}], ids=str)
def test_training_goes_on_bitwise_as_without(callback: Callback, options: dict[str, Any]) -> None:
    alone, averaged = Raw(), Raw()
    fit(alone, net=Net(dropout=0.3), **options)
    fit(averaged, callback, net=Net(dropout=0.3), num_sanity_val_steps=2, **options)
    assert all(same(one, other) for one, other in zip(alone.after, averaged.after, strict=True))


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 3}], ids=str)
def test_validation_sees_the_average_and_training_the_raw_weights(options: dict[str, Any]) -> None:
    raw = Raw()
    _, net = fit(EMA(0.8), raw, **options)
    steps = 0
    for stage, weights in net.seen:
        if stage == "train":
            float_ones = [name for name in weights if "running" not in name]  # this step's BatchNorm comes first
            assert all(torch.equal(weights[name], raw.after[steps][name]) for name in float_ones)
            steps += 1
        else:
            assert close(weights, average_of(raw.after[: steps + 1], 0.8))
    assert steps == 14 and any(stage == "validate" for stage, _ in net.seen)


def test_other_callbacks_find_the_average_at_the_end_of_training_and_raw_weights_after_a_validation() -> None:
    class Looks(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert same(weights_of(pl_module), raw.after[-1])

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert close(weights_of(pl_module), average_of(raw.after, 0.8))

    raw = Raw()
    fit(Looks(), EMA(0.8), raw)


def test_one_call_updates_all(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    lerp = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: calls.append(len(args[0])) or lerp(*args))
    fit(EMA(0.8))
    own = 3 + 2 + 2 + 2 + 2  # first, tied (bias), head, bn, ln; the tied weight once
    assert calls == [own] * 14


def test_frozen_parameters_take_nothing_and_stay_exact() -> None:
    ema = EMA(0.8)
    before = Net().frozen.weight.detach().clone()
    _, net = fit(ema)
    assert not [name for name in ema.kept if name.startswith("frozen")]
    assert torch.equal(net.frozen.weight, before)


def test_a_parameter_that_is_opened_begins_its_average_then() -> None:
    class Open(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if trainer.global_step == 5:
                pl_module.get_submodule("frozen").requires_grad_(True)

    raw = Raw()
    _, net = fit(EMA(0.8, warmup=False), Open(), raw)
    late = average_of(raw.after[5:], 0.8, warmup=False)
    assert torch.allclose(net.frozen.weight.double(), late["frozen.weight"], atol=1e-6)
    assert not torch.equal(raw.after[5]["frozen.weight"], raw.after[-1]["frozen.weight"])


def test_buffers_that_are_not_saved_and_counters_are_left_alone() -> None:
    ema = EMA(0.8)
    _, net = fit(ema)
    assert "scratch" not in ema.kept and "bn.running_mean" in ema.kept
    assert net.scratch[0] == 1 + len(net.seen), "counted through"
    assert net.bn.num_batches_tracked == 14


def test_a_buffer_that_is_replaced_is_followed() -> None:
    class Replaces(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.register_buffer("bias", self.get_buffer("bias") + 1.0)
            return super().training_step(batch, batch_idx)

    net = Replaces()
    net.register_buffer("bias", torch.zeros(1))
    fit(EMA(0.8, warmup=False), net=net, max_epochs=1)
    value = 0.0
    for number in range(1, 8):
        value = 0.8 * value + 0.2 * number
    assert net.get_buffer("bias").item() == pytest.approx(value)


def test_a_step_that_the_scaler_skips_is_no_update() -> None:
    class Overflows(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.global_step in (0, 3):
                grad = pl_module.get_parameter("head.weight").grad
                assert grad is not None
                grad.fill_(float("inf"))

    raw, ema = Raw(), EMA(0.8)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))  # type: ignore[arg-type]
    _, net = fit(Overflows(), ema, raw, plugins=[plugin], limit_val_batches=0)
    assert ema.updates == 12
    made = [weights for number, weights in enumerate(raw.after) if number not in (1, 4)]
    parameters = {name: value for name, value in average_of(made, 0.8).items() if "bn." not in name}
    assert all(torch.allclose(net.state_dict()[n].double(), value, atol=1e-5) for n, value in parameters.items())


def test_half_precision_weights_are_averaged_in_float32() -> None:
    ema = EMA(0.999, warmup=False)
    raw = Raw()
    _, net = fit(ema, raw, precision="bf16-true", max_epochs=8)
    assert {kept.dtype for kept in ema.kept.values()} == {torch.float32}
    assert net.head.weight.dtype == torch.bfloat16
    expected = average_of(raw.after, 0.999, warmup=False)
    assert torch.allclose(ema.kept["head.weight"].double(), expected["head.weight"], atol=1e-5)
    assert torch.equal(net.head.weight, ema.kept["head.weight"].bfloat16())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # inside torch.compile
def test_a_compiled_module_is_validated_with_the_average() -> None:
    raw = Raw()
    net = Net()
    net.head = torch.compile(net.head, backend="eager")  # type: ignore[assignment]
    fit(EMA(0.8), raw, net=net)
    last = [weights for stage, weights in net.seen if stage == "validate"][-1]
    assert close(last, average_of(raw.after, 0.8)) and close(weights_of(net), last)


def test_two_ranks_hold_the_same_average(tmp_path: Path) -> None:
    class Keep(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            torch.save((weights_of(pl_module), raw.after), tmp_path / f"{trainer.global_rank}.pt")

    raw = Raw()
    save = ModelCheckpoint(tmp_path, "last")
    fit(EMA(0.8), raw, Keep(), save, devices=2, strategy="ddp_fork", limit_val_batches=1)
    (one, steps), (two, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    own = [name for name in one if "running" not in name]  # each rank's statistics are its own, as ever under DDP
    assert all(torch.equal(one[name], two[name]) for name in own)
    assert close({name: one[name] for name in own}, {name: average_of(steps, 0.8)[name] for name in own})
    assert same(torch.load(tmp_path / "last.ckpt")["state_dict"], one)


# Checkpoints


KINDS: dict[str, Callable[[], Any]] = {"ema": partial(EMA, 0.8), "interpolation": partial(Interpolation, 0.4)}


def expected(kind: str, raw: list[Weights]) -> Weights:
    if kind == "ema":
        return average_of(raw, 0.8)
    return {
        name: 0.4 * new.double() + 0.6 * raw[0][name].double() if is_float(new) else new
        for name, new in raw[-1].items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_testing_the_best_checkpoint_in_the_same_process_sees_averaged_weights(kind: str, tmp_path: Path) -> None:
    # Lightning's WeightAveraging tests the raw weights here.
    raw = Raw()
    best = ModelCheckpoint(tmp_path, monitor="val/loss", mode="max", save_top_k=1)  # the first one, as a rule
    trainer, net = fit(KINDS[kind](), raw, best)
    saved = torch.load(best.best_model_path)
    of_best = expected(kind, raw.after[: saved["global_step"] + 1])

    trainer.test(net, loader(), verbose=False)
    assert close(net.seen[-1][1], expected(kind, raw.after)), "as the fit left it"
    trainer.test(net, loader(), ckpt_path="best", verbose=False)
    assert net.seen[-1][0] == "test" and close(net.seen[-1][1], of_best)
    trainer.validate(net, loader(), ckpt_path="best", verbose=False)
    assert net.seen[-1][0] == "validate" and close(net.seen[-1][1], of_best)
    assert close(weights_of(net), of_best), "it is left there"
    trainer.save_checkpoint(tmp_path / "of_best.ckpt")
    tested = torch.load(tmp_path / "of_best.ckpt")
    assert close(tested["state_dict"], of_best)
    assert not {"EMA", "Interpolation"} & tested["callbacks"].keys(), "the raw weights of another step"

    plain = Net()
    plain.load_state_dict(saved["state_dict"])
    assert close(weights_of(plain), of_best)
    without = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        without.test(plain, loader(), ckpt_path=best.best_model_path, verbose=False)
    assert close(plain.seen[-1][1], of_best), "also without the callback"


class SaveEverywhere(Checkpoint):
    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def save(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{self.count}.ckpt")
            self.count += 1

    on_train_batch_end = on_validation_batch_start = on_validation_end = on_train_epoch_end = on_train_end = save


@pytest.mark.parametrize("kind", KINDS)
def test_every_checkpoint_holds_averaged_weights_and_the_raw_ones_beside_them(kind: str, tmp_path: Path) -> None:
    raw, save = Raw(), SaveEverywhere(tmp_path)
    fit(KINDS[kind](), raw, save, max_epochs=1, limit_val_batches=1)
    assert save.count == 7 + 1 + 1 + 1 + 1
    for number in range(save.count):
        checkpoint = torch.load(tmp_path / f"{number}.ckpt", weights_only=True)
        steps = raw.after[: checkpoint["global_step"] + 1]
        assert close(checkpoint["state_dict"], expected(kind, steps))
        assert torch.equal(checkpoint["state_dict"]["tied.weight"], checkpoint["state_dict"]["first.weight"])
        state = checkpoint["callbacks"]["EMA" if kind == "ema" else "Interpolation"]
        assert all(torch.equal(weight, steps[-1][name]) for name, weight in state["raw"].items())
        assert "head.weight" in state["raw"] and "tied.weight" not in state["raw"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3, "val_check_interval": 3}], ids=str)
def test_resumed_anywhere_weights_and_average_are_bitwise_those_of_the_uninterrupted_run(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    def run(*callbacks: Callback, **more: Any) -> tuple[Weights, dict[str, Any], dict[str, Any]]:
        callback = KINDS[kind]()
        trainer, net = fit(callback, *callbacks, ExactResume(3), net=Net(dropout=0.3), **options, **more)
        return weights_of(net), callback.state_dict(), trainer.optimizers[0].state_dict()["state"]

    save = SaveEverywhere(tmp_path)
    weights, state, optimizer = run(save)
    for number in range(0, save.count, 3):
        again, state_again, optimizer_again = run(ckpt_path=tmp_path / f"{number}.ckpt")
        assert same(again, weights) and state_again["updates"] == state["updates"]
        assert same(state_again["raw"], state["raw"]) and same(state_again["kept"], state["kept"])
        assert all(same(optimizer_again[key], optimizer[key]) for key in optimizer)


def test_a_run_that_is_over_when_it_is_resumed_leaves_the_averaged_weights(tmp_path: Path) -> None:
    raw = Raw()
    trainer, net = fit(EMA(0.8), raw)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert close(torch.load(tmp_path / "end.ckpt")["state_dict"], average_of(raw.after, 0.8)), "saved by hand"
    _, again = fit(EMA(0.8), ckpt_path=tmp_path / "end.ckpt")
    assert same(weights_of(net), weights_of(again))
    longer = Raw()
    fit(EMA(0.8), longer, max_epochs=3, ckpt_path=tmp_path / "end.ckpt")
    assert same(longer.after[0], raw.after[-1]), "training goes on from the raw weights"


def test_half_precision_resumes_with_the_average_in_float32(tmp_path: Path) -> None:
    ema, again = EMA(0.99), EMA(0.99)
    save = SaveEverywhere(tmp_path)
    fit(ema, save, ExactResume(3), precision="bf16-true")
    fit(again, ExactResume(3), precision="bf16-true", ckpt_path=tmp_path / "4.ckpt")
    assert same(ema.kept, again.kept) and ema.kept["head.weight"].dtype == torch.float32
    assert torch.load(tmp_path / "4.ckpt")["state_dict"]["head.weight"].dtype == torch.bfloat16


def test_after_an_exception_in_validation_the_module_and_the_checkpoint_are_right(tmp_path: Path) -> None:
    class SaveOnException(Checkpoint):
        def on_exception(self, trainer: Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "broken.ckpt")

    raw, net = Raw(), Net()
    net.fail_in_validation = True
    with pytest.raises(RuntimeError, match="broken"):
        fit(EMA(0.8), raw, SaveOnException(), net=net)
    assert same(weights_of(net), raw.after[-1])
    saved = torch.load(tmp_path / "broken.ckpt")
    assert close(saved["state_dict"], average_of(raw.after, 0.8))
    assert torch.equal(saved["callbacks"]["EMA"]["raw"]["head.weight"], raw.after[-1]["head.weight"])


def test_hooks_are_gone_after_the_fit_and_after_an_exception() -> None:
    trainer, _ = fit(EMA(0.8))
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    net, ema = Net(), EMA(0.8)
    net.fail_in_validation = True
    with pytest.raises(RuntimeError, match="broken"):
        fit(ema, net=net)
    assert ema.handles == []


@pytest.mark.slow
def test_one_instance_serves_two_fits() -> None:
    ema = EMA(0.8)
    _, one = fit(ema)
    _, two = fit(ema)
    assert same(weights_of(one), weights_of(two))
    pickle.dumps(EMA(0.9)), pickle.dumps(Interpolation(0.3))


# Interpolation in a fit


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_module_ends_between_start_and_end(share: float) -> None:
    raw = Raw()
    _, net = fit(Interpolation(share), raw)
    start, end = raw.after[0], raw.after[-1]
    for name, value in weights_of(net).items():
        between = share * end[name].double() + (1 - share) * start[name].double()
        assert torch.allclose(value.double(), between if is_float(value) else end[name].double(), atol=1e-6)
    if share == 1.0:
        assert same(weights_of(net), end)
    evaluated = [weights for stage, weights in net.seen if stage == "validate"]
    assert torch.allclose(
        evaluated[0]["head.bias"], share * raw.after[7]["head.bias"] + (1 - share) * start["head.bias"]
    )


# Refusals


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"decay must be at least 0 and below 1; received 1; 0.999 is usual"):
        EMA(1.0)
    with pytest.raises(ValueError, match="every_n_steps must be 1 or more; received 0"):
        EMA(0.9, every_n_steps=0)
    with pytest.raises(
        ValueError, match=r"share must be from 0 \(where the fit began\) to 1 \(fine-tuned\); received 1.5"
    ):
        Interpolation(1.5)


def test_checkpoints_that_would_hold_raw_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="save_weights_only=True callbacks cannot change .* in place of EMA's; leave it off"
    ):
        fit(EMA(), ModelCheckpoint(tmp_path, save_weights_only=True))


@pytest.mark.parametrize("other", [Interpolation(), EMA(0.5), WeightAveraging()], ids=["own", "twice", "lightning"])
def test_a_second_callback_that_replaces_the_weights_is_refused(other: Callback) -> None:
    class Another(EMA): ...

    with pytest.raises(ValueError, match="would both replace the weights; use one of them"):
        fit(Another(), other)


def test_strategies_that_divide_the_weights_are_refused() -> None:
    class Fake:
        strategy = FSDPStrategy()
        callbacks: list[Callback] = []

    with pytest.raises(
        ValueError, match="averages whole tensors; FSDPStrategy divides them among ranks: use DDP or one"
    ):
        EMA().setup(Fake(), Net(), "fit")  # type: ignore[arg-type]


def test_a_checkpoint_without_an_average_begins_one_with_a_warning(tmp_path: Path) -> None:
    fit(SaveEverywhere(tmp_path))
    raw = Raw()
    with pytest.warns(UserWarning, match="the checkpoint holds nothing of EMA: it begins with its weights"):
        _, net = fit(EMA(0.8), raw, ckpt_path=tmp_path / "8.ckpt")
    assert close(weights_of(net), average_of(raw.after, 0.8))


def test_an_average_of_another_module_is_refused(tmp_path: Path) -> None:
    fit(EMA(0.8), SaveEverywhere(tmp_path))
    checkpoint = torch.load(tmp_path / "8.ckpt")
    checkpoint["callbacks"]["EMA"]["kept"]["old.weight"] = torch.zeros(2)
    torch.save(checkpoint, tmp_path / "8.ckpt")
    with pytest.raises(ValueError, match=r"EMA of the checkpoint holds 'old.weight', which the module lacks \(1 such"):
        fit(EMA(0.8), ckpt_path=tmp_path / "8.ckpt")


def test_a_run_that_ends_before_the_first_update_keeps_its_trained_weights(tmp_path: Path) -> None:
    """Whatever would hold the average holds the raw weights: the validated, the saved, those after the fit."""
    plain = Net()
    fit(net=plain, max_epochs=2)
    net = Net()
    save = ModelCheckpoint(dirpath=tmp_path, filename="last", save_last=False)
    with pytest.warns(
        UserWarning, match=r"EMA never averaged: .* before the first update at step 50; .* lower every_n"
    ):
        fit(EMA(0.9, every_n_steps=50), save, net=net, max_epochs=2)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, net.state_dict()[name]), name
    saved = torch.load(tmp_path / "last.ckpt")["state_dict"]
    assert all(torch.equal(weight, saved[name]) for name, weight in weights_of(plain).items() if name in saved)
    seen = [[weights for stage, weights in one.seen if stage == "validate"][-1] for one in (plain, net)]
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])


def test_twice_is_refused() -> None:
    with pytest.raises((ValueError, RuntimeError), match="more than one stateful callback of type `EMA`|both replace"):
        fit(EMA(0.9), EMA(0.99))
    with pytest.raises(ValueError, match="EMA and Interpolation would both replace the weights"):
        fit(EMA(0.9), Interpolation(0.5))
