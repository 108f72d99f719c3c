from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from callbacks.penalties import L1, L2, L2SP, add_l1_, add_l2_, half_squares, pull_, shrink_

SAMPLES = 32
Build = Callable[[Any], Optimizer]
PLAIN = partial(SGD, lr=0.1)
SEARCH = partial(LBFGS, line_search_fn="strong_wolfe")


class Net(LightningModule):
    """Norms, a tied weight, a frozen layer in the middle, a layer that is never used, groups of two learning rates."""

    def __init__(self, optimizer: Build = PLAIN) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.frozen, self.again, self.tied = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.again.weight
        self.head, self.unused = nn.Linear(8, 3), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.build = optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tied(self.again(self.frozen(self.norm(self.first(x)))))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ranks = slice(self.global_rank, None, self._trainer.world_size if self._trainer else 1)
        x, y = batch[0][ranks], batch[1][ranks]  # with several ranks, each has its share of the same batch
        return nn.functional.cross_entropy(self(x).float(), y)

    def configure_optimizers(self) -> Optimizer:
        head = list(self.head.parameters())
        body = [p for p in self.parameters() if all(p is not other for other in head)]
        if self.build in (LBFGS, SEARCH):
            return self.build(list(self.parameters()))
        lr = self.build.keywords["lr"]  # type: ignore[attr-defined]
        return self.build([{"params": body}, {"params": head, "lr": 3 * lr}])


def loader(batch: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(SAMPLES, 6, generator=generator), torch.randint(0, 3, (SAMPLES,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def trainer(*callbacks: Callback, epochs: int = 1, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return Trainer(**{"accelerator": "cpu", "max_epochs": epochs, "callbacks": list(callbacks), **quiet, **options})


def fit(*callbacks: Callback, net: Net | None = None, batch: int = 4, **options: Any) -> Net:
    net = net or Net()
    trainer(*callbacks, **options).fit(net, loader(batch))
    return net


def by_hand(
    penalty: Callable[[Net, dict[str, Tensor]], Tensor] | None = None,
    after: Callable[[Net, dict[str, Tensor]], None] | None = None,
    accumulate: int = 1,
    build: Build = PLAIN,
) -> Net:
    """The loop that anybody would write, with autograd for the penalty: once per step, at its full strength."""
    net = Net(build)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = net.configure_optimizers()
    batches = list(loader())
    for first in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        for number, batch in enumerate(batches[first : first + accumulate]):
            loss = net.training_step(batch, number) / accumulate
            if penalty is not None and number == 0:
                loss = loss + penalty(net, start)
            loss.backward()
        optimizer.step()
        if after is not None:
            with torch.no_grad():
                after(net, start)
    return net


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


def assert_same(one: nn.Module, other: nn.Module, atol: float = 1e-6) -> None:
    for (name, p), q in zip(weights(one).items(), weights(other).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def used(net: Net, dimensions: int = 0) -> list[tuple[str, Tensor]]:
    named = net.named_parameters()
    return [(n, p) for n, p in named if p.requires_grad and "unused" not in n and p.ndim >= dimensions]


# the maths


def test_gradients_are_those_of_autograd() -> None:
    anchors = [torch.randn(3, 4), torch.randn(5)]
    for add, value in (
        (lambda ps: add_l2_(ps, 0.3), lambda ps: 0.15 * sum((p**2).sum() for p in ps)),
        (lambda ps: add_l2_(ps, 0.3, anchors), lambda ps: 0.3 * half(ps, anchors)),
        (lambda ps: add_l1_(ps, 0.3), lambda ps: 0.3 * sum(p.abs().sum() for p in ps)),
    ):
        parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
        wanted = torch.autograd.grad(value(parameters), parameters)
        for p in parameters:
            p.grad = torch.ones_like(p)
        add(parameters)
        for p, gradient in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(p.grad, 1 + gradient)
    torch.testing.assert_close(half_squares(parameters, anchors), half(parameters, anchors).detach())
    assert half_squares([]) == 0.0


def half(parameters: list[Any], anchors: list[Tensor]) -> Any:
    return sum(((p - a) ** 2).sum() for p, a in zip(parameters, anchors, strict=True)) / 2


def test_shrinking_takes_the_threshold_off_each_size_and_stops_at_zero() -> None:
    theta = torch.tensor([-2.0, -0.5, -0.1, 0.0, 0.1, 0.25, 3.0])
    shrink_([theta], 0.25)
    assert theta.tolist() == [-1.75, -0.25, 0.0, 0.0, 0.0, 0.0, 2.75]


def test_a_pull_minimises_the_penalty_and_the_distance_moved_and_never_overshoots() -> None:
    theta, anchor = torch.tensor([4.0]), torch.tensor([1.0])
    pull_([theta], 2.0, [anchor])
    assert theta.item() == pytest.approx((4.0 + 2.0 * 1.0) / 3.0)
    pull_([theta], 1e12, [anchor])
    assert theta.item() == pytest.approx(1.0)
    pull_([theta], 3.0)
    assert theta.item() == pytest.approx(0.25)


def test_at_its_anchor_a_weight_is_not_moved_by_a_bit() -> None:
    theta = torch.randn(1000)
    anchor = theta.clone()
    pull_([theta], 0.37, [anchor])
    assert torch.equal(theta, anchor)


# hooks, driven by hand


def test_the_rate_of_the_update_counts_not_the_one_put_back_after_it() -> None:
    net = Net()
    optimizer = net.configure_optimizers()
    lrs = [group["lr"] for group in optimizer.param_groups]

    def set_rates(optimizer: Optimizer, factor: float) -> None:
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr * factor

    optimizer.register_step_pre_hook(lambda optimizer, *_: set_rates(optimizer, 0.1))
    optimizer.register_step_post_hook(lambda optimizer, *_: set_rates(optimizer, 1.0))
    before = weights(Net())
    callback = L1(0.5, norms_and_biases=True)
    callback.on_train_start(SimpleNamespace(strategy=None, optimizers=[optimizer]), net)  # type: ignore[arg-type]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)  # what is frozen may have one left over
    optimizer.step()
    for name, p in net.named_parameters():
        lr = 0.0 if "frozen" in name else 0.03 if "head" in name else 0.01
        torch.testing.assert_close(p.detach(), nn.functional.softshrink(before[name], lr * 0.5), rtol=0, atol=1e-8)


# fits


@pytest.mark.parametrize("accumulate", [1, 3])  # 8 batches: with 3, the last step has two
def test_l2_is_what_autograd_would_add_once_per_step(accumulate: int) -> None:
    wanted = by_hand(lambda net, _: 0.05 * sum((p**2).sum() for _, p in used(net, 2)), accumulate=accumulate)
    assert_same(fit(L2(0.1), accumulate_grad_batches=accumulate), wanted)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_of_l2sp_is_autograds_and_the_head_has_its_own(accumulate: int) -> None:
    def penalty(net: Net, start: dict[str, Tensor]) -> Tensor:
        body = sum(((p - start[n]) ** 2).sum() for n, p in used(net) if "head" not in n)
        return 0.25 * body + 0.05 * sum((p**2).sum() for p in net.head.parameters())  # type: ignore[return-value]

    net = fit(L2SP(0.5, ["^head"], 0.1, mode="gradient"), accumulate_grad_batches=accumulate)
    assert_same(net, by_hand(penalty, accumulate=accumulate))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_pull_of_l2sp_follows_each_update_at_the_groups_own_learning_rate(accumulate: int) -> None:
    def after(net: Net, start: dict[str, Tensor]) -> None:
        for name, p in used(net):
            head = "head" in name
            c = 0.3 * 0.1 if head else 0.1 * 0.5
            p.copy_((p + (0.0 if head else c * start[name])) / (1 + c))

    wanted = by_hand(after=after, accumulate=accumulate)
    assert_same(fit(L2SP(0.5, ["^head"], 0.1), accumulate_grad_batches=accumulate), wanted)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_l1_in_both_modes(accumulate: int) -> None:
    def after(net: Net, _: dict[str, Tensor]) -> None:
        for name, p in used(net, 2):
            p.copy_(nn.functional.softshrink(p, (0.3 if "head" in name else 0.1) * 0.02))

    wanted = by_hand(after=after, accumulate=accumulate)
    assert_same(fit(L1(0.02), accumulate_grad_batches=accumulate), wanted)
    wanted = by_hand(lambda net, _: 0.02 * sum(p.abs().sum() for _, p in used(net, 2)), accumulate=accumulate)
    assert_same(fit(L1(0.02, "gradient"), accumulate_grad_batches=accumulate), wanted)


def test_proximal_l1_gives_true_zeros_and_the_sub_gradient_does_not() -> None:
    def zeros(net: Net) -> int:
        return int(sum((p == 0).sum() for _, p in used(net, 2)))

    net = Net(partial(AdamW, lr=0.01))
    plan = trainer(L1(0.5), epochs=3, log_every_n_steps=1)
    plan.fit(net, loader())
    assert zeros(net) > 50
    share = zeros(net) / sum(p.numel() for _, p in used(net, 2))
    assert 0 < plan.callback_metrics["l1/zeros"] <= share  # counted before the last step
    assert zeros(fit(L1(0.5, "gradient"), net=Net(partial(AdamW, lr=0.01)), epochs=3)) == 0


EVERY = {
    "l2": lambda: L2(0.5, norms_and_biases=True),
    "l1": lambda: L1(0.2, norms_and_biases=True),
    "l1 gradient": lambda: L1(0.2, "gradient", norms_and_biases=True),
    "l2sp": lambda: L2SP(0.5, ["^head"], 0.5),
    "l2sp gradient": lambda: L2SP(0.5, ["^head"], 0.5, "gradient"),
}
every = pytest.mark.parametrize("name", EVERY)


@every
def test_what_is_frozen_or_unused_is_not_touched(name: str) -> None:
    net, before = Net(), weights(Net())
    frozen = [key for key in before if key.startswith(("frozen", "unused"))]
    fit(EVERY[name](), net=net)
    after = weights(net)
    assert all(torch.equal(after[key], before[key]) for key in frozen)
    assert not any(torch.equal(after[key], before[key]) for key in before if key not in frozen and "bias" not in key)
    assert all(p.grad is None for p in [*net.frozen.parameters(), *net.unused.parameters()])


class OpenAt(Callback):
    """Opens the frozen layer at a step, as gradual unfreezing does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            pl_module.frozen.requires_grad_(True)


@every
def test_what_opens_in_mid_run_is_penalised_from_then_on(name: str) -> None:
    weak = fit(OpenAt(4))
    strong = fit(OpenAt(4), EVERY[name]())
    assert not torch.equal(weights(strong)["frozen.weight"], weights(Net())["frozen.weight"])
    assert not torch.allclose(weights(weak)["frozen.weight"], weights(strong)["frozen.weight"], atol=1e-4)


@every
def test_bf16_mixed_is_near_fp32_and_weights_stay_fp32(name: str) -> None:
    one, other = fit(EVERY[name]()), fit(EVERY[name](), precision="bf16-mixed")
    assert all(p.dtype == torch.float32 for p in other.parameters())
    assert_same(one, other, 0.02)


def float16(scale: float = 1024.0) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@every
def test_a_scaler_and_a_fused_optimiser_change_nothing(name: str) -> None:
    fused = partial(AdamW, lr=0.01, weight_decay=0.0, fused=True)
    plain, one, other = (Net(fused) for _ in range(3))
    fit(net=plain)
    fit(EVERY[name](), net=one)
    fit(EVERY[name](), net=other, plugins=[float16()])
    assert_same(one, other, 0.01)
    apart = max((p - q).abs().max() for p, q in zip(weights(plain).values(), weights(one).values(), strict=True))
    assert apart > 0.02  # a penalty that is lost in scaled gradients is seen


@every
def test_a_step_that_the_scaler_skips_moves_nothing(name: str) -> None:
    net = Net(partial(AdamW, lr=0.01, fused=True))
    fit(EVERY[name](), net=net, plugins=[float16(2.0**60)], limit_train_batches=2)
    assert_same(net, Net(), 0.0)


class Save(Callback):
    """Each rank's weights, as they are at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(weights(pl_module), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.slow
@every
def test_two_ranks_are_equal_and_what_one_process_gives(name: str, tmp_path: Path) -> None:
    net = Net()
    net.unused.requires_grad_(False)  # DDP wants a gradient for all that asks for one
    fit(EVERY[name](), Save(tmp_path), net=net, devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
    alone = Net()
    alone.unused.requires_grad_(False)
    fit(EVERY[name](), net=alone)
    for key, value in weights(alone).items():
        torch.testing.assert_close(ranks[0][key], value, rtol=0, atol=1e-5)


@every
def test_resumed_is_uninterrupted_bit_for_bit(name: str) -> None:
    build = partial(AdamW, lr=0.01)
    whole = fit(EVERY[name](), net=Net(build), epochs=2)
    half = trainer(EVERY[name](), epochs=1)
    half.fit(Net(build), loader())
    half.save_checkpoint("half.ckpt")
    resumed = Net(build)
    trainer(EVERY[name](), epochs=2).fit(resumed, loader(), ckpt_path="half.ckpt", weights_only=True)
    assert_same(whole, resumed, 0.0)


def test_a_resumed_l2sp_is_anchored_to_the_first_start(caplog: pytest.LogCaptureFixture) -> None:
    first = trainer(L2SP(0.5), epochs=1)
    with caplog.at_level("INFO", "callbacks.penalties"):
        first.fit(Net(), loader())
    assert "L2SP starts from step 0: 13 tensors, 323 parameters" in caplog.text
    first.save_checkpoint("first.ckpt")
    callback, net = L2SP(0.5), Net()
    trainer(callback, epochs=2).fit(net, loader(), ckpt_path="first.ckpt", weights_only=True)
    original = weights(Net())
    assert callback.start.keys() == original.keys()
    assert all(torch.equal(callback.start[key], value) for key, value in original.items())
    with pytest.raises(ValueError, match=r"no start.*first\.bias; resume with the same network and the same `exclude`"):
        misfit = torch.load("first.ckpt", weights_only=True)
        del misfit["callbacks"]["L2SP"]["start"]["first.bias"]
        torch.save(misfit, "misfit.ckpt")
        trainer(L2SP(0.5), epochs=2).fit(Net(), loader(), ckpt_path="misfit.ckpt", weights_only=True)


@pytest.mark.slow
@every
def test_one_instance_serves_two_fits(name: str) -> None:
    callback = EVERY[name]()
    fit(callback, net=Net(partial(SGD, lr=0.05)))
    second = Net()
    with torch.no_grad():
        second.first.weight.mul_(1.5)
    again = Net()
    again.load_state_dict(second.state_dict())
    assert_same(fit(callback, net=second), fit(EVERY[name](), net=again), 0.0)


@every
def test_an_interrupted_fit_leaves_no_hooks(name: str) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ZeroDivisionError

    plan, net = trainer(EVERY[name](), Stop()), Net()
    with pytest.raises(ZeroDivisionError):
        plan.fit(net, loader())
    optimizer = plan.optimizers[0]
    before = weights(net)["first.weight"].clone()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(weights(net)["first.weight"], before)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_log_steps_log_the_penalty_and_its_ratio_to_the_loss(accumulate: int) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, float, float]] = []

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, _: int) -> None:
            self.loss = pl_module.training_step(batch, 0).item()
            self.value = 0.05 * sum(p.detach().square().sum().item() for _, p in used(pl_module, 2))  # type: ignore[arg-type]

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            logged = trainer.callback_metrics
            if "l2/penalty" in logged:
                assert logged["l2/penalty"].item() == pytest.approx(self.value, rel=1e-4)
                assert logged["l2/ratio"].item() == pytest.approx(self.value / self.loss, rel=1e-4)
                self.seen.append((trainer.global_step, self.value, self.loss))
                trainer.callback_metrics.clear()
                trainer._logger_connector.reset_metrics()
                trainer._results.clear()  # type: ignore[union-attr]

    watch = Watch()
    fit(L2(0.1), watch, log_every_n_steps=2, accumulate_grad_batches=accumulate)
    assert [step for step, _, _ in watch.seen] == list(range(2, 8 // accumulate + 1, 2))
    fit(L2(0.1), log_every_n_steps=0)  # never


def test_lbfgs_without_a_line_search_takes_gradients_and_all_else_is_refused() -> None:
    net = fit(L2(1e3), net=Net(LBFGS), limit_train_batches=1)
    assert all(p.detach().norm() < 0.5 * weights(Net())[name].norm() for name, p in used(net, 2))
    for callback, build in ((L1(0.1), LBFGS), (L2SP(0.1), LBFGS), (L2(0.1), SEARCH), (L1(0.1, "gradient"), SEARCH)):
        with pytest.raises(ValueError, match="L-BFGS has no learning rate per step .* or another optimiser"):
            fit(callback, net=Net(build))


def test_what_cannot_be_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match=r"pattern '\^haed' matches no parameter; did you mean 'head'\?"):
        fit(L2(0.1, ["^haed"]))
    with pytest.raises(ValueError, match="pattern 'zzz' matches no parameter; it is searched for in dotted names"):
        fit(L2SP(0.1, ["zzz"]))
    with pytest.raises(ValueError, match="leave no parameter but norms and biases; set norms_and_biases=True"):
        fit(L1(0.1, patterns=["norm"]))
    with pytest.raises(ValueError, match="leave no parameter; exclude less"):
        fit(L1(0.1, exclude=["."]))
    with pytest.raises(ValueError, match="expected strength of 0 or more, received -1; 0.0 is no penalty"):
        L2(-1)
    with pytest.raises(ValueError, match="expected head_strength of 0 or more, received nan"):
        L2SP(0.1, ["head"], float("nan"))
    with pytest.raises(ValueError, match="expected mode 'proximal' or 'gradient', received 'implicit'"):
        L1(0.1, "implicit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"head_strength=0.1 acts on what is excluded, which is nothing; name the new"):
        L2SP(0.1, head_strength=0.1)


def test_patterns_choose_and_exclude() -> None:
    plain, some = fit(), fit(L2(1.0, ["first", "again"], exclude=["again"]), limit_train_batches=1)
    plain = fit(limit_train_batches=1)
    changed = [
        n for (n, p), q in zip(some.named_parameters(), plain.parameters(), strict=True) if not torch.equal(p, q)
    ]
    assert changed == ["first.weight"]


def test_sharded_parameters_are_refused() -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    fake = SimpleNamespace(strategy=ModelParallelStrategy(), optimizers=[])
    with pytest.raises(ValueError, match="penalties need whole parameters, received ModelParallelStrategy"):
        L2(0.1).on_train_start(fake, Net())  # type: ignore[arg-type]


class Adapted(Net):
    """With matrices of LoRA beside a frozen layer, of which the module says that it never trains."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
        self.first.requires_grad_(False)
        self.untuned = {*self.first.parameters()}


def test_adapters_are_pulled_to_zero_and_what_never_trains_is_not_kept() -> None:
    net, callback = Adapted(), L2SP(0.5, exclude=["head"])
    wrapped = nn.ModuleDict({"inner": net})  # names of adapters lie inside a net
    wrapped.untuned = net.untuned
    callback.choose(SimpleNamespace(is_global_zero=False, global_step=0), wrapped)  # type: ignore[arg-type]
    zero = {name for name, start in callback.start.items() if not start.any() and "norm" not in name}
    assert zero == {"inner.lora_A.default.weight", "inner.lora_B.default.weight"}
    assert not any(name.startswith("inner.first") for name in callback.start)
    assert "inner.frozen.weight" in callback.start, "may open later"
    matrix = net.lora_A["default"].weight  # type: ignore[union-attr]
    before = matrix.detach().clone()
    matrix.grad = torch.zeros_like(matrix)
    callback.proximal_step({"params": [matrix]}, lr=2.0)
    torch.testing.assert_close(matrix.detach(), before / (1 + 2.0 * 0.5))
