"""Groups, rates and decay of every optimiser torch has, on a net with each kind of parameter that goes wrong."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, Adam, AdamW, Muon, Optimizer, RMSprop, Rprop, SparseAdam

from recipes.parts.muon import MuonWithAdamW
from recipes.parts.optim import build_optimizer, reassert, snapshot
from recipes.parts.param_groups import describe, param_groups
from recipes.parts.schedules import Cosine, Linear, OneCycle
from tests.recipes.parts.nets import (
    LAYERS,
    SLOW,
    Net,
    group_of,
    loss_of,
    take_steps,
)

# --- groups ---------------------------------------------------------------------------------------------------


# --- building -------------------------------------------------------------------------------------------------

OPTIMIZERS = [
    cls
    for _, cls in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(cls, Optimizer) and cls is not Optimizer
]
RATES: dict[type, float] = {SGD: 0.05, LBFGS: 0.5, Adafactor: 0.05, torch.optim.Adadelta: 1.0, torch.optim.ASGD: 0.05}
MATRICES = {"one": ["0"], "two": ["2"]}


def sparse_net(sparse: bool = True) -> nn.Module:
    net = nn.Sequential(nn.EmbeddingBag(11, 8, mode="sum", sparse=sparse), nn.Tanh(), nn.Linear(8, 3))
    net[2].requires_grad_(False)
    return net


@pytest.mark.parametrize("cls", [*OPTIMIZERS, MuonWithAdamW], ids=lambda cls: cls.__name__)
def test_every_optimiser_of_torch_lowers_the_loss(cls: type[Optimizer]) -> None:
    if cls is Muon:
        net: nn.Module = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
        layers, options = MATRICES, {"layer_decay": 0.5}
    elif cls is SparseAdam:
        net, layers, options = sparse_net(), MATRICES, {"layer_decay": 0.5}
    else:
        net, layers, options = Net(), LAYERS, {} if cls is LBFGS else SLOW
    lr = RATES.get(cls, 0.01)
    optimizer = build_optimizer(partial(cls, lr=lr), param_groups(net, layers, weight_decay=None, **options))
    before = [group["lr"] for group in optimizer.param_groups]
    assert before == [group["initial_lr"] for group in optimizer.param_groups]
    assert not any({"lr_scale", "kinds"} & set(group) for group in optimizer.param_groups)
    expected = {row.name.split("/")[0]: row.lr / lr for row in describe(optimizer)}
    if layers is LAYERS and cls is not LBFGS:
        assert expected == {"stem": 0.125, "block1": 0.25, "block2": 0.5, "head": 4.0}
    with torch.sparse.check_sparse_tensor_invariants(True):  # torch warns unless told yes or no
        losses = take_steps(net, optimizer)
    assert loss_of(net).item() < losses[0]
    assert [group["lr"] for group in optimizer.param_groups] == before


@pytest.mark.parametrize("cls", [*OPTIMIZERS, MuonWithAdamW], ids=lambda cls: cls.__name__)
def test_named_in_yaml(cls: type[Optimizer]) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=Callable[[Any], Optimizer])
    config = parser.parse_args([f"--optimizer={cls.__module__}.{cls.__name__}", "--optimizer.lr=0.25"])
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    if cls is SparseAdam:
        net = nn.Sequential(nn.Embedding(2, 2, sparse=True), nn.Embedding(2, 2, sparse=True))
    groups = param_groups(net, {"a": ["0"], "b": ["1"]}, weight_decay=None)
    optimizer = build_optimizer(instantiate(config).optimizer, groups)
    assert type(optimizer) is cls and {group["lr"] for group in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [g["initial_lr"] for g in o.param_groups], 6),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: OneCycle(o, 6),
    ],
)
def test_schedules_keep_the_ratios(schedule: Callable[[Optimizer], Any]) -> None:
    net = Net()
    optimizer = build_optimizer(partial(AdamW, lr=0.01), param_groups(net, LAYERS, weight_decay=None, **SLOW))
    scheduler = schedule(optimizer)
    seen = set()
    for _ in range(5):
        rate = {row.name.split("/")[0]: row.lr for row in describe(optimizer)}
        seen.add(rate["head"])
        for name, scale in (("stem", 0.125), ("block1", 0.25), ("block2", 0.5)):
            assert rate[name] / rate["head"] == pytest.approx(scale / 4.0, rel=1e-9)
        optimizer.step()
        scheduler.step()
    assert len(seen) == 5


def test_decay_and_rates_act_on_the_weights_as_written() -> None:
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
    groups = param_groups(net, LAYERS, weight_decay=0.5, **SLOW)
    optimizer = build_optimizer(partial(AdamW, lr=0.01), groups)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    scale = {"conv.weight": 0.125, "blocks.0.attention.in_proj_weight": 0.25, "hidden.weight": 0.5, "head.weight": 4.0}
    for name, factor in scale.items():
        torch.testing.assert_close(
            net.get_parameter(name), torch.full_like(net.get_parameter(name), 1 - 0.01 * 0.5 * factor)
        )
    for name in ("bn.weight", "embed.weight", "token", "blocks.1.pos_bias", "fancy.weight", "head.bias"):
        assert torch.equal(net.get_parameter(name), torch.ones_like(net.get_parameter(name))), name


def test_freezing_flips_requires_grad_and_the_row_says_so() -> None:
    net = Net()
    net.head.requires_grad_(False)
    optimizer = build_optimizer(partial(SGD, lr=0.1), param_groups(net, LAYERS, weight_decay=None))
    head = [row for row in describe(optimizer) if row.name.startswith("head")]
    assert [(row.tensors, row.parameters, row.trainable) for row in head] == [(1, 24, 0), (1, 3, 0)]
    net.head.requires_grad_(True)
    assert sum(row.trainable for row in describe(optimizer)) == sum(p.numel() for p in net.parameters())


def test_lbfgs_has_one_group_and_one_rate() -> None:
    plain = param_groups(Net(), LAYERS, weight_decay=None)
    assert [row.name for row in describe(build_optimizer(LBFGS, plain))] == ["all"]
    with pytest.raises(ValueError, match="L-BFGS has one learning rate for all parameters; set layer_decay to 1"):
        build_optimizer(LBFGS, param_groups(Net(), LAYERS, weight_decay=None, **SLOW))


@pytest.mark.parametrize("cls", [LBFGS, Rprop, SparseAdam])
def test_a_weight_decay_that_would_be_ignored_is_refused(cls: type[Optimizer]) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__} has no weight decay"):
        build_optimizer(cls, param_groups(Net(), LAYERS, weight_decay=0.1))


def test_sparse_adam_needs_sparse_gradients() -> None:
    with pytest.raises(ValueError, match="one/no_decay would have dense ones: set sparse=True"):
        build_optimizer(SparseAdam, param_groups(sparse_net(sparse=False), MATRICES, weight_decay=None))


def test_a_sparse_embedding_is_never_fused() -> None:
    net = sparse_net()
    optimizer = build_optimizer(partial(Adagrad, lr=0.1), param_groups(net, MATRICES, weight_decay=None))
    assert group_of(net, optimizer, "0.weight")["fused"] is None
    assert group_of(net, optimizer, "2.weight")["fused"] is True
    with torch.sparse.check_sparse_tensor_invariants(True):
        take_steps(net, optimizer)


# --- Muon -----------------------------------------------------------------------------------------------------


def test_muon_alone_is_refused_by_the_name_of_what_to_take() -> None:
    with pytest.raises(ValueError, match=r"take recipes\.parts\.muon\.MuonWithAdamW"):
        build_optimizer(Muon, param_groups(Net(), LAYERS, weight_decay=None))
    convolutions = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no hidden matrix"):
        build_optimizer(MuonWithAdamW, param_groups(convolutions, {"a": ["0"], "b": ["1"]}, weight_decay=None))


# --- restoring ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AdamW, partial(SGD, momentum=0.9), MuonWithAdamW, Adagrad, Adafactor])
def test_a_restored_optimiser_goes_on_as_if_it_had_not_stopped(cls: Callable[..., Optimizer], tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = Net()
    build = partial(build_optimizer, partial(cls, lr=0.01))
    straight = copy.deepcopy(net)
    optimizer = build(param_groups(straight, LAYERS, weight_decay=None, **SLOW))
    expected = take_steps(straight, optimizer, 6)

    optimizer = build(param_groups(net, LAYERS, weight_decay=None, **SLOW))
    take_steps(net, optimizer, 3)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    fresh = Net()
    fresh.load_state_dict(saved["net"])
    optimizer = build(param_groups(fresh, LAYERS, weight_decay=None, **SLOW))
    configured = snapshot(optimizer)
    optimizer.load_state_dict(saved["optimizer"])
    assert reassert(optimizer, configured) == []
    assert take_steps(fresh, optimizer, 3) == expected[3:]
    for one, other in zip(fresh.parameters(), straight.parameters(), strict=True):
        assert torch.equal(one, other)


def resume(old: Callable[..., Optimizer], new: Callable[..., Optimizer], **options: Any) -> tuple[Optimizer, Any]:
    """An optimiser configured as `new`, just restored from one that trained as `old`; and its snapshot."""
    net = Net()
    trained = build_optimizer(old, param_groups(net, LAYERS, weight_decay=None, **SLOW))
    take_steps(net, trained, 2)
    optimizer = build_optimizer(new, param_groups(net, LAYERS, weight_decay=None, **(SLOW | options)))
    configured = snapshot(optimizer)
    optimizer.load_state_dict(trained.state_dict())
    return optimizer, configured


def test_what_is_configured_comes_back_with_a_line_for_each_difference() -> None:
    old = partial(AdamW, lr=0.1, weight_decay=0.01, eps=1e-8)
    new = partial(AdamW, lr=0.2, weight_decay=0.05, betas=(0.8, 0.9))
    optimizer, configured = resume(old, new)
    lines = reassert(optimizer, configured)
    assert "weight_decay of block1: 0.01 (checkpoint) -> 0.05 (configured)" in lines
    assert "betas of head/no_decay: (0.9, 0.999) (checkpoint) -> (0.8, 0.9) (configured)" in lines
    assert len(lines) == 4 + 8  # weight decay of four groups, betas of all eight
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    assert {optimizer.param_groups[-1][key] for key in ("lr", "initial_lr")} == {0.4}  # left to the schedule
    lines = reassert(optimizer, configured, scheduled=())
    assert "lr of head: 0.4 (checkpoint) -> 0.8 (configured)" in lines and len(lines) == 8
    assert snapshot(optimizer) == configured


def test_a_schedule_and_reassert_together_leave_nothing_of_the_checkpoints_rates() -> None:
    optimizer, _ = resume(partial(SGD, lr=0.1), partial(SGD, lr=0.1))
    net = Net()
    groups = param_groups(net, LAYERS, weight_decay=None, layer_decay=0.7)
    fresh = build_optimizer(partial(SGD, lr=0.3, momentum=0.5), groups)
    schedule = Linear(fresh, 100)
    configured = snapshot(fresh)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh.load_state_dict(saved)
    schedule.load_state_dict({"last_epoch": 33})
    reassert(fresh, configured, schedule.writes)
    assert [g["lr"] for g in fresh.param_groups] == pytest.approx([g["initial_lr"] * 66 / 99 for g in configured])
    assert {group["momentum"] for group in fresh.param_groups} == {0.5}


def test_a_cycled_momentum_is_left_to_its_schedule() -> None:
    net = Net()
    optimizer = build_optimizer(partial(SGD, lr=0.3, momentum=0.9), param_groups(net, LAYERS, weight_decay=None))
    schedule = OneCycle(optimizer, 100, cycle_momentum=True)
    configured = snapshot(optimizer)
    schedule.load_state_dict({"last_epoch": 29})
    assert reassert(optimizer, configured, schedule.writes) == []
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.85)


def test_state_that_the_checkpoint_lacks_is_missed_at_once() -> None:
    optimizer, configured = resume(Adam, partial(Adam, amsgrad=True))
    with pytest.raises(ValueError, match="amsgrad of stem is True as configured and False in the checkpoint"):
        reassert(optimizer, configured)
    optimizer, configured = resume(RMSprop, partial(RMSprop, momentum=0.9))
    with pytest.raises(ValueError, match=r"momentum of stem is 0\.9 as configured and 0 in the checkpoint"):
        reassert(optimizer, configured)


def test_groups_of_another_network_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    one, other = ({"a": ["0"], name: ["1"]} for name in ("b", "c"))
    trained = build_optimizer(AdamW, param_groups(net, one, weight_decay=None))
    optimizer = build_optimizer(AdamW, param_groups(net, other, weight_decay=None))
    configured = snapshot(optimizer)
    optimizer.load_state_dict(trained.state_dict())
    with pytest.raises(ValueError, match="the checkpoint's group 2 is b where c is configured"):
        reassert(optimizer, configured)


def test_a_changed_multiplier_is_no_other_network() -> None:
    net = Net()
    old, new = ({"lr_multipliers": {"attention": factor}} for factor in (2.0, 3.0))
    trained = build_optimizer(AdamW, param_groups(net, LAYERS, weight_decay=None, **old))
    optimizer = build_optimizer(AdamW, param_groups(net, LAYERS, weight_decay=None, **new))
    configured = snapshot(optimizer)
    optimizer.load_state_dict(trained.state_dict())
    reassert(optimizer, configured, scheduled=())
    assert snapshot(optimizer) == configured


# --- fused kernels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_fused_where_torch_can_unless_told_otherwise(cls: type[Optimizer]) -> None:
    if cls in (Muon, SparseAdam, LBFGS):
        return
    groups = param_groups(Net(), LAYERS, weight_decay=None)
    supported = cls in (Adam, AdamW, Adagrad, SGD)
    assert {g.get("fused") for g in build_optimizer(cls, groups).param_groups} == {True if supported else None}
    off = build_optimizer(cls, groups, fused=False)
    assert not any(g.get("fused") for g in off.param_groups)
    if supported:
        assert {g["fused"] for g in build_optimizer(partial(cls, fused=False), groups).param_groups} == {False}
        assert {g["fused"] for g in build_optimizer(cls, groups, fused=True).param_groups} == {True}
    else:
        with pytest.raises(ValueError, match=f"{cls.__name__} has no fused kernel"):
            build_optimizer(cls, groups, fused=True)


def test_fused_and_not_fused_agree() -> None:  # eps: the gradient of attention's key bias is rounding alone
    nets = [copy.deepcopy(net) for net in [Net()] * 2]
    for fused, net in zip((True, False), nets, strict=True):
        groups = param_groups(net, LAYERS, weight_decay=0.1, **SLOW)
        take_steps(net, build_optimizer(partial(AdamW, lr=0.01, eps=1e-3), groups, fused=fused), 5)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_tensor_that_joins_its_group_late_trains() -> None:
    """torch's fused SGD with momentum raises here, so it is not switched on."""
    net = Net()
    net.blocks[0].norm.requires_grad_(False)
    optimizer = build_optimizer(partial(SGD, lr=0.1, momentum=0.9), param_groups(net, LAYERS, weight_decay=None))
    take_steps(net, optimizer, 2)
    net.blocks[0].norm.requires_grad_(True)
    before = net.blocks[0].norm.weight.clone()
    take_steps(net, optimizer, 2)
    assert not torch.equal(before, net.blocks[0].norm.weight)


def give(parameter: nn.Parameter, grad: Tensor) -> float:
    parameter.grad = grad
    return 0.0


@pytest.mark.parametrize("swap", ["gradient", "state"])
@pytest.mark.parametrize("closure", [False, True])  # Lightning computes gradients in one
def test_another_memory_layout_does_not_update_the_wrong_numbers(swap: str, closure: bool) -> None:
    """torch's fused kernels on a CPU walk through memory, whatever the strides say."""
    results = []
    for fused in (True, False):
        net = nn.Conv2d(4, 8, 3, bias=False)
        nn.init.constant_(net.weight, 1.0)
        groups = param_groups(net, {"all": [""]}, weight_decay=None)
        optimizer = build_optimizer(partial(AdamW, lr=0.1), groups, fused=fused)
        for seed in range(3):
            grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
            grad = grad.to(memory_format=torch.channels_last) if swap == "gradient" else grad
            net.weight.grad = None if closure else grad
            optimizer.step(partial(give, net.weight, grad) if closure else None)
            if swap == "state":
                state = optimizer.state[net.weight]
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = state[key].contiguous(memory_format=torch.channels_last)
        results.append(net.weight.detach())
    torch.testing.assert_close(*results)


def test_a_fused_switch_follows_the_configuration_on_resume() -> None:
    optimizer, configured = resume(partial(AdamW, fused=False), AdamW)
    for state in optimizer.state.values():
        state["step"] = state["step"].double()  # a fused kernel needs it in float32, beside the parameter
    assert not any(group["fused"] for group in optimizer.param_groups)
    assert len(reassert(optimizer, configured)) == 8
    assert all(group["fused"] for group in optimizer.param_groups)
    assert all(state["step"].dtype == torch.float32 and state["step"] == 2 for state in optimizer.state.values())


@pytest.mark.parametrize("cls", [AdamW, SGD, MuonWithAdamW, partial(AdamW, fused=True)])
def test_gradients_are_unscaled_before_the_step_so_that_hooks_and_clipping_may_read_them(
    cls: Callable[..., Optimizer],
) -> None:
    net, twin = [copy.deepcopy(net) for net in [Net()] * 2]
    scaled, plain = (
        build_optimizer(partial(cls, lr=0.01), param_groups(n, LAYERS, weight_decay=None)) for n in (net, twin)
    )
    assert not getattr(scaled, "_step_supports_amp_scaling", False)  # what Lightning and GradScaler ask
    seen = []
    scaled.register_step_pre_hook(lambda *_: seen.append(net.head.weight.grad.clone()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(net)).backward()
    scaler.step(scaled)
    scaler.update()
    loss_of(twin).backward()
    plain.step()
    torch.testing.assert_close(seen[0], twin.head.weight.grad)
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_example_of_the_module_works_with_a_schedule() -> None:
    net = Net()
    groups = param_groups(net, LAYERS, weight_decay=0.05, layer_decay=0.8, lr_multipliers={"^head": 10})
    optimizer = build_optimizer(partial(AdamW, lr=1e-3), groups)
    schedule = Cosine(optimizer, 10, warmup=0.2)
    losses = []
    for _ in range(10):
        losses += take_steps(net, optimizer, 1)
        schedule.step()
    assert losses[-1] < losses[0]
    assert describe(optimizer)[-1].lr == 0.0


# --- the callbacks' copy of the rule -------------------------------------------------------------------------------
