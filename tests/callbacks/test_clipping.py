from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from callbacks.clipping import AGC, AutoClip, clip_norm_, clip_units_, percentile_limit, unit_norms

Build = Callable[[Any], Optimizer]
PLAIN = partial(SGD, lr=0.1)


class Net(LightningModule):
    """Kernels, a norm, a tied weight, a frozen layer and one that is never used."""

    def __init__(self, build: Build = PLAIN) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.up = (
            nn.Conv1d(1, 4, 3, padding=1, bias=False),
            nn.LayerNorm(6),
            nn.ConvTranspose1d(4, 2, 1),
        )
        self.frozen, self.again, self.tied = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.tied.weight = self.again.weight
        self.head, self.unused = nn.Linear(12, 3), nn.Conv1d(1, 1, 1)
        self.frozen.requires_grad_(False)
        self.unused.requires_grad_(False)
        self.build = build

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.norm(self.first(x[:, None]))).flatten(1)
        return self.head(torch.tanh(self.tied(self.again(self.frozen(x)))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ranks = slice(self.global_rank, None, self._trainer.world_size if self._trainer else 1)
        x, y = batch[0][ranks], batch[1][ranks]  # with several ranks, each has its share of the same batch
        return nn.functional.cross_entropy(self(x).float(), y)

    def configure_optimizers(self) -> Optimizer:
        return self.build(list(self.parameters()))


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


def by_hand(clip: Callable[[Net], Any], accumulate: int = 1) -> Net:
    net = Net()
    optimizer = net.configure_optimizers()
    batches = list(loader())
    for first in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        for batch in batches[first : first + accumulate]:
            (net.training_step(batch, 0) / accumulate).backward()
        clip(net)
        optimizer.step()
    return net


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


def assert_same(one: nn.Module, other: nn.Module, atol: float = 1e-6) -> None:
    for (name, p), q in zip(weights(one).items(), weights(other).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def apart(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


# the maths


@pytest.mark.parametrize("percentile", [0, 10, 37.5, 100])
def test_the_limit_is_numpys_percentile_of_what_is_a_number(percentile: float) -> None:
    norms = np.random.default_rng(0).exponential(size=57).astype("float32")
    padded = torch.cat([torch.full((20,), torch.nan), torch.tensor(norms)])
    assert percentile_limit(padded, percentile).item() == pytest.approx(np.percentile(norms, percentile), rel=1e-6)


def test_there_is_no_limit_before_the_first_norms() -> None:
    history = torch.tensor([torch.nan, 1.0, 2.0])
    assert percentile_limit(history, 50.0, warmup_steps=2) == torch.inf
    assert percentile_limit(history, 50.0, warmup_steps=1) == 1.5
    assert percentile_limit(history * torch.nan, 50.0) == torch.inf


@pytest.mark.parametrize(
    ("norm", "limit", "factor"),
    [(5.0, 1.0, 0.2), (5.0, 5.0, 1.0), (5.0, 9.0, 1.0), (5.0, torch.inf, 1.0), (5.0, torch.nan, 1.0)],
)
def test_gradients_above_the_limit_are_scaled_to_it(norm: float, limit: float, factor: float) -> None:
    gradients = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    clip_norm_(gradients, torch.tensor(norm), torch.tensor(limit))
    assert [g.item() for g in gradients] == pytest.approx([3.0 * factor, 4.0 * factor])


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_zero_and_non_finite_gradients_are_left_as_they_are(value: float) -> None:
    gradients = [torch.tensor([value, 0.0])]
    clip_norm_(gradients, gradients[0].norm(), torch.tensor(0.0))
    torch.testing.assert_close(gradients[0], torch.tensor([value, 0.0]), equal_nan=True)
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([value, 0.0])
    clip_units_([p], 0.01)
    torch.testing.assert_close(p.grad, torch.tensor([value, 0.0]), equal_nan=True)


def test_units_are_rows_filters_and_whole_vectors() -> None:
    for tensor in (torch.randn(5, 3), torch.randn(5, 3, 2), torch.randn(5, 3, 2, 2)):
        assert torch.allclose(unit_norms(tensor).flatten(), torch.stack([row.norm() for row in tensor]))
        assert torch.allclose(unit_norms(tensor, 1).flatten(), torch.stack([t.norm() for t in tensor.unbind(1)]))
    assert torch.allclose(unit_norms(torch.tensor([3.0, 4.0])), torch.tensor([5.0]))
    assert unit_norms(torch.tensor([3.0, 4.0]), 1).tolist() == [5.0]
    assert unit_norms(torch.tensor(-2.0)) == 2.0


def test_each_unit_is_clipped_by_its_own_weights() -> None:
    p = nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [3.0, 4.0]]))
    p.grad = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.01]])
    share = clip_units_([p], ratio=0.1, eps=1e-3)
    assert p.grad[:, 1].tolist() == pytest.approx([0.5, 0.05, 1e-4, 0.01])
    assert share == 0.75
    assert clip_units_([], 0.1) == 0.0


def reference_agc(net: Net, ratio: float) -> None:
    """One unit after the other."""
    for name, p in net.named_parameters():
        if p.grad is None or "head" in name:
            continue
        dim = 1 if name == "up.weight" else 0
        units = [(p, p.grad)] if p.ndim < 2 else list(zip(p.unbind(dim), p.grad.unbind(dim), strict=True))
        for weight, gradient in units:
            limit = ratio * max(weight.detach().norm().item(), 1e-3)
            if gradient.norm() > limit:
                gradient.mul_(limit / gradient.norm())


# hooks, driven by hand


def autoclip(norms: list[float], **options: Any) -> tuple[list[float], AutoClip]:
    """Norms after clipping, one parameter and one step each."""
    p = nn.Parameter(torch.zeros(2))
    optimizer, callback = SGD([p], lr=1.0), AutoClip(**options)
    fake: Any = SimpleNamespace(strategy=None, optimizers=[optimizer], callbacks=[], log_every_n_steps=0, global_step=0)
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    callback.setup(fake, module, "fit")
    callback.on_train_start(fake, module)
    after = []
    for norm in norms:
        p.grad = torch.tensor([0.6 * norm, 0.8 * norm])
        callback.on_before_optimizer_step(fake, module, optimizer)
        after.append(p.grad.norm().item())
    return after, callback


def test_each_step_is_clipped_to_the_percentile_of_the_norms_so_far() -> None:
    norms = np.random.default_rng(1).exponential(size=40)
    after, _ = autoclip(norms.tolist(), percentile=30.0)
    assert after == pytest.approx([min(n, np.percentile(norms[: i + 1], 30)) for i, n in enumerate(norms)], rel=1e-5)


def test_the_history_is_a_window() -> None:
    norms = np.random.default_rng(1).exponential(size=40)
    after, callback = autoclip(norms.tolist(), percentile=30.0, history=5)
    wanted = [min(n, np.percentile(norms[max(0, i - 4) : i + 1], 30)) for i, n in enumerate(norms)]
    assert after == pytest.approx(wanted, rel=1e-5)
    assert callback.norms.shape == (5,)


def test_what_overflows_never_enters_the_history() -> None:
    after, callback = autoclip([4.0, torch.inf, torch.nan, 8.0], percentile=50.0, history=10)
    assert after[0] == pytest.approx(4.0) and after[3] == pytest.approx(6.0)
    assert after[1] == torch.inf or np.isnan(after[1])
    seen = callback.norms[~callback.norms.isnan()]
    assert seen.tolist() == pytest.approx([4.0, 8.0])


def test_the_first_steps_are_only_recorded() -> None:
    after, _ = autoclip([1.0, 10.0, 100.0, 1000.0], percentile=0.0, warmup_steps=2)
    assert after == pytest.approx([1.0, 10.0, 1.0, 1.0])


def test_a_history_of_another_length_is_carried_over() -> None:
    _, callback = autoclip([1.0, 2.0, 3.0, 4.0], history=10)
    shorter = AutoClip(history=2)
    shorter.load_state_dict(callback.state_dict())
    fake: Any = SimpleNamespace(strategy=None, optimizers=[], callbacks=[])
    shorter.on_train_start(fake, SimpleNamespace(device=torch.device("cpu")))  # type: ignore[arg-type]
    assert shorter.norms.tolist() == pytest.approx([3.0, 4.0])


# fits


@pytest.mark.parametrize("accumulate", [1, 3])
def test_autoclip_is_the_loop_by_hand_once_per_step(accumulate: int) -> None:
    seen: list[float] = []

    def clip(net: Net) -> None:
        norm = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
        seen.append(norm.item())
        nn.utils.clip_grad_norm_(net.parameters(), float(np.percentile(seen, 20)))

    wanted = by_hand(clip, accumulate)
    assert_same(fit(AutoClip(20.0), accumulate_grad_batches=accumulate), wanted, 1e-5)
    assert max(seen) > 1.05 * np.percentile(seen, 20)  # there was something to clip


@pytest.mark.parametrize("accumulate", [1, 3])
def test_agc_is_the_loop_by_hand_and_leaves_the_last_linear_layer(accumulate: int) -> None:
    wanted = by_hand(lambda net: reference_agc(net, 0.02), accumulate)
    assert_same(fit(AGC(0.02), accumulate_grad_batches=accumulate), wanted)
    assert_same(fit(AGC(0.02, exclude=["^head"]), accumulate_grad_batches=accumulate), wanted)
    free = by_hand(lambda net: None, accumulate)
    assert apart(free, wanted) > 0.005


def test_the_log_names_what_agc_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "callbacks.clipping"):
        fit(AGC(), limit_train_batches=1)
    assert "AGC does not clip head" in caplog.text


class Push(Callback):
    """A penalty that comes later in the list: its part of the gradient must be clipped, too."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for p in pl_module.parameters():
            if p.grad is not None:
                p.grad += 100.0


class Norm(Callback):
    """What reaches the update."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.norms: list[float] = []
        trainer.optimizers[0].register_step_post_hook(self.look)

    def look(self, optimizer: Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(nn.utils.get_total_norm(gradients).item())


def test_both_act_after_all_others_and_before_lightnings_own_clipping() -> None:
    checkpoint, norm = ModelCheckpoint("here"), Norm()
    auto, agc, push = AutoClip(0.0), AGC(), Push()
    plan = trainer(auto, agc, checkpoint, norm, push, enable_checkpointing=True, gradient_clip_val=0.001)
    plan.fit(Net(), loader())
    assert [c for c in plan.callbacks if c in (auto, agc, push, norm, checkpoint)] == [  # type: ignore[attr-defined]
        norm,
        push,
        auto,
        agc,
        checkpoint,
    ]
    assert auto.norms[~auto.norms.isnan()].min() > 1000  # it has seen the push
    assert norm.norms == pytest.approx([0.001] * 8, rel=1e-3)
    late = fit(Push(), AGC(0.02), limit_train_batches=1)
    assert_same(fit(AGC(0.02), Push(), limit_train_batches=1), late, 0.0)


EVERY = {"autoclip": lambda: AutoClip(10.0), "agc": lambda: AGC(0.02)}
every = pytest.mark.parametrize("name", EVERY)


@every
def test_what_is_frozen_is_not_touched(name: str) -> None:
    net = fit(EVERY[name]())
    before, after = weights(Net()), weights(net)
    assert {key for key in before if torch.equal(before[key], after[key])} == {
        "frozen.weight",
        "frozen.bias",
        "unused.weight",
        "unused.bias",
    }


@every
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_is_near_fp32(name: str, precision: str) -> None:
    other = fit(EVERY[name](), precision=precision)
    assert_same(fit(EVERY[name]()), other.float(), 0.05)


@every
def test_a_scaler_and_a_fused_optimiser_change_nothing(name: str) -> None:
    fused = partial(AdamW, lr=0.01, eps=0.01, weight_decay=0.0, fused=True)  # with such an eps, size counts
    one, other, free = (Net(fused) for _ in range(3))
    fit(EVERY[name](), net=one)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit(EVERY[name](), net=other, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert_same(one, other, 0.01)
    fit(net=free)
    assert apart(free, one) > 0.01


def test_steps_that_a_scaler_skips_leave_no_norm() -> None:
    callback = AutoClip(history=20)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    fit(callback, net=Net(partial(AdamW, lr=0.01, fused=True)), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert callback.norms.isnan().all()


class Save(Callback):
    """Each rank's weights, as they are at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(weights(pl_module), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.slow
@every
def test_two_ranks_are_equal_and_what_one_process_gives(name: str, tmp_path: Path) -> None:
    fit(EVERY[name](), Save(tmp_path), devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
    for key, value in weights(fit(EVERY[name]())).items():
        torch.testing.assert_close(ranks[0][key], value, rtol=0, atol=1e-5)


@every
def test_resumed_is_uninterrupted_bit_for_bit(name: str) -> None:
    build = partial(AdamW, lr=0.01, eps=0.01)
    whole = fit(EVERY[name](), net=Net(build), epochs=2)
    half = trainer(EVERY[name](), epochs=1)
    half.fit(Net(build), loader())
    half.save_checkpoint("half.ckpt")
    resumed = Net(build)
    trainer(EVERY[name](), epochs=2).fit(resumed, loader(), ckpt_path="half.ckpt", weights_only=True)
    assert_same(whole, resumed, 0.0)


@pytest.mark.slow
@every
def test_one_instance_serves_two_fits(name: str) -> None:
    callback = EVERY[name]()
    fit(callback, Push())
    assert_same(fit(callback), fit(EVERY[name]()), 0.0)


def test_log_steps_log_what_was_done_and_no_others() -> None:
    class Watch(Callback):
        seen: list[tuple[int, dict[str, float]]] = []

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            logged = {key: value.item() for key, value in trainer.callback_metrics.items()}
            if logged:
                self.seen.append((trainer.global_step, logged))
                trainer._results.clear()  # type: ignore[union-attr]
                trainer._logger_connector.reset_metrics()

    watch = Watch()
    fit(AutoClip(0.0), AGC(1e-9), watch, log_every_n_steps=3)
    assert [step for step, _ in watch.seen] == [3, 6]
    for _, logged in watch.seen:
        assert logged.keys() == {"autoclip/norm", "autoclip/limit", "agc/clipped"}
        assert 0 < logged["autoclip/limit"] <= logged["autoclip/norm"]
        assert logged["agc/clipped"] > 0.9
    fit(AutoClip(), log_every_n_steps=0)  # never


def test_what_cannot_be_is_refused_before_the_first_step() -> None:
    for name in EVERY:
        with pytest.raises(ValueError, match="L-BFGS builds on differences of gradients, which clipping breaks"):
            fit(EVERY[name](), net=Net(LBFGS))
    with pytest.raises(ValueError, match=r"pattern '\^haed' matches no parameter; did you mean 'head'\?"):
        fit(AGC(exclude=["^haed"]))
    with pytest.raises(ValueError, match="expected ratio and eps above 0, received 0 and 0.001"):
        AGC(0)
    with pytest.raises(ValueError, match="expected a percentile from 0 to 100, received 120; the paper uses 10"):
        AutoClip(120)
    with pytest.raises(ValueError, match="expected 0 <= warmup_steps < history, received 5 and 5"):
        AutoClip(history=5, warmup_steps=5)
    optimizers = [SGD([nn.Parameter(torch.zeros(1))], lr=1.0)] * 2
    with pytest.raises(ValueError, match="AutoClip keeps the history of one optimiser, received 2"):
        AutoClip().on_train_start(SimpleNamespace(strategy=None, optimizers=optimizers), Net())  # type: ignore[arg-type]


def test_sharded_gradients_are_refused() -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    fake: Any = SimpleNamespace(strategy=ModelParallelStrategy(), optimizers=[])
    for name in EVERY:
        with pytest.raises(ValueError, match="adaptive clipping needs whole gradients, received ModelParallelStrategy"):
            EVERY[name]().on_train_start(fake, Net())
