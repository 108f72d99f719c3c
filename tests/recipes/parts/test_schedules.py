"""Each schedule against its formula written anew, against torch's where the two coincide, and over a resume."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jsonargparse
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from recipes.parts import schedules
from recipes.parts.schedules import (
    Constant,
    Cosine,
    Decay,
    Linear,
    OneCycle,
    Piecewise,
    Plateau,
    Polynomial,
    Schedule,
    Step,
    WarmupStableDecay,
)

T, W = 60, 7  # optimiser steps of a run, and of its warm-up where it has one
TRUNK, HEAD = 0.02, 0.5
ALL = [
    cls
    for _, cls in inspect.getmembers(schedules, inspect.isclass)
    if issubclass(cls, Schedule) and cls not in (Schedule, Decay)
]
NEEDS: dict[type, dict[str, Any]] = {Piecewise: {"pieces": [(0.5, 0.3)]}}  # arguments without a default


def make_optimizer(trunk: float = TRUNK, head: float = HEAD) -> SGD:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in (trunk, head)]
    return SGD(groups, lr=1.0, momentum=0.9)


def rates(optimizer: Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def run(optimizer: Optimizer, scheduler: LRScheduler, steps: int) -> list[list[float]]:
    """Rates of the two groups in each of the following optimiser steps."""
    seen = []
    for _ in range(steps):
        seen.append(rates(optimizer))
        optimizer.step()
        scheduler.step()
    return seen


def warm(t: int) -> float:
    return (t + 1) / (W + 1) if t < W else 1.0


def half_cosine(p: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * p)


def cycle_by_hand(t: int) -> float:  # rises over steps 0 to 17, falls over 17 to 59
    low, lowest = 1 / 25, 1 / 25e4
    if t <= 17:
        return 1 + (low - 1) * half_cosine(t / 17)
    return lowest + (1 - lowest) * half_cosine((t - 17) / 42)


FORMULAS: list[tuple[Callable[..., Schedule], Callable[[int], float]]] = [
    (Constant, lambda t: 1.0),
    (partial(Constant, warmup=W), warm),
    (partial(Constant, warmup=0.1), lambda t: min(1.0, (t + 1) / 7)),
    (Cosine, lambda t: half_cosine(t / 59)),
    (
        partial(Cosine, end_factor=0.1, warmup=W),
        lambda t: warm(t) * (0.1 + 0.9 * half_cosine(max(0, t - W) / (59 - W))),
    ),
    (partial(Linear, end_factor=0.05), lambda t: 1 - 0.95 * t / 59),
    (partial(Linear, warmup=W), lambda t: warm(t) if t < W else (59 - t) / (59 - W)),
    (partial(Polynomial, power=3.0, end_factor=0.2), lambda t: 0.2 + 0.8 * (1 - t / 59) ** 3),
    (
        partial(WarmupStableDecay, decay_share=0.25, warmup=W, end_factor=0.1),
        lambda t: warm(t) if t < 45 else 1 - 0.9 * math.sqrt((t - 45) / 14),
    ),
    (
        partial(WarmupStableDecay, decay_share=0.25, decay="linear"),
        lambda t: 1.0 if t < 45 else (59 - t) / 14,
    ),
    (
        partial(WarmupStableDecay, decay_share=0.5, decay="cosine"),
        lambda t: 1.0 if t < 30 else half_cosine((t - 30) / 29),
    ),
    (Step, lambda t: 0.1 ** (t // 20)),
    (partial(Step, every=7, drop=0.5, warmup=W), lambda t: warm(t) * 0.5 ** (t // 7)),
    (partial(Step, milestones=[40, 0.25]), lambda t: 1.0 if t < 15 else 0.1 if t < 40 else 0.01),
    (
        partial(Piecewise, pieces=[(0.1, 0.5), (0.5, 2.0), (50, 0.0)]),
        lambda t: 1.0 if t < 6 else 0.5 if t < 30 else 2.0 if t < 50 else 0.0,
    ),
    (OneCycle, cycle_by_hand),
    (partial(Plateau, warmup=W), warm),
]


def name_of(value: object) -> str:
    if isinstance(value, partial):
        return f"{value.func.__name__}({', '.join(f'{k}={v}' for k, v in value.keywords.items())})"  # type: ignore[attr-defined]
    return getattr(value, "__name__", str(value)).replace("<lambda>", "")


def test_every_schedule_has_a_formula() -> None:
    assert {getattr(build, "func", build) for build, _ in FORMULAS} == set(ALL)


@pytest.mark.parametrize(("build", "formula"), FORMULAS, ids=name_of)
def test_rates_follow_the_formula_and_keep_their_ratio(
    build: Callable[..., Schedule], formula: Callable[[int], float]
) -> None:
    optimizer = make_optimizer()
    scheduler = build(optimizer, T)
    for step, (trunk, head) in enumerate(run(optimizer, scheduler, T)):
        assert trunk == pytest.approx(TRUNK * formula(step), abs=1e-15), step
        assert head == pytest.approx(HEAD * formula(step), abs=1e-15), step
    last = [base * scheduler.factor(T - 1) for base in (TRUNK, HEAD)]
    assert run(optimizer, scheduler, 3) == [last] * 3  # steps beyond the run stay at its last rate


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_the_first_step_learns_even_in_the_shortest_run(cls: type[Schedule], steps: int, share: float) -> None:
    if cls is WarmupStableDecay and share > 0.8:
        share = 0.8  # the rest is the decay's
    optimizer = make_optimizer()
    scheduler = cls(optimizer, steps, warmup=share, **NEEDS.get(cls, {}))
    seen = run(optimizer, scheduler, steps)
    assert 0.0 < seen[0][0] <= TRUNK
    assert all(0.0 <= trunk <= TRUNK for trunk, _ in seen)


@pytest.mark.parametrize("build", [Cosine, Linear, Polynomial, WarmupStableDecay])
@pytest.mark.parametrize("end", [0.0, 0.1, 0.3])
def test_the_last_step_is_at_the_end_factor_exactly(build: type[Schedule], end: float) -> None:
    scheduler = build(make_optimizer(), T, end_factor=end, warmup=W)  # type: ignore[call-arg]
    assert scheduler.factor(W) == 1.0
    assert scheduler.factor(T - 1) == end < scheduler.factor(T - 2)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Cosine, lambda o: lr_scheduler.CosineAnnealingLR(o, T - 1)),  # over T steps it never gets to its minimum
        (partial(Linear, end_factor=0.2), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, T - 1)),
        (partial(Polynomial, power=1.5), lambda o: lr_scheduler.PolynomialLR(o, T - 1, 1.5)),
        (partial(Step, every=20, drop=0.3), lambda o: lr_scheduler.StepLR(o, 20, 0.3)),
        (partial(Step, milestones=[10, 0.75]), lambda o: lr_scheduler.MultiStepLR(o, [10, 45])),
        (OneCycle, lambda o: lr_scheduler.OneCycleLR(o, [TRUNK, HEAD], T, cycle_momentum=False)),
    ],
    ids=name_of,
)
def test_same_rates_as_torch(ours: Callable[..., Schedule], theirs: Callable[[Optimizer], LRScheduler]) -> None:
    mine, its = make_optimizer(), make_optimizer()
    for got, expected in zip(run(mine, ours(mine, T), T), run(its, theirs(its), T), strict=True):
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("steps", [2, 3, 5, 7, 11, 40])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_one_cycle_is_torchs_with_momentum_too(steps: int, kind: Callable[..., Optimizer]) -> None:
    mine, its = (kind([nn.Parameter(torch.ones(2))], lr=0.3) for _ in range(2))
    ours = OneCycle(mine, steps, cycle_momentum=True)
    theirs = lr_scheduler.OneCycleLR(its, 0.3, steps)
    for _ in range(steps):
        for key in {"lr", "momentum", "betas"} & set(mine.param_groups[0]):
            assert mine.param_groups[0][key] == pytest.approx(its.param_groups[0][key], rel=1e-12), key
        run(mine, ours, 1), run(its, theirs, 1)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [0, 2])
def test_plateau_drops_when_torchs_does(mode: Any, patience: int) -> None:
    mine, its = make_optimizer(), make_optimizer()
    ours = Plateau(mine, T, mode=mode, drop=0.5, patience=patience, threshold=0.05, min_factor=0.1)
    theirs = lr_scheduler.ReduceLROnPlateau(
        its, mode, 0.5, patience, threshold=0.05, min_lr=[0.1 * TRUNK, 0.1 * HEAD], eps=0.0
    )
    values = [*(1 + torch.rand(40, generator=torch.Generator().manual_seed(1))).tolist(), float("nan"), 1.0]
    drops = 0
    for value in values:
        before = rates(mine)
        assert ours.observe(torch.tensor(value)) == (rates(mine) != before)
        drops += rates(mine) != before
        theirs.step(value)
        run(mine, ours, 2)
        assert rates(mine) == pytest.approx(rates(its), rel=1e-12)
    assert drops == 4 and rates(mine) == pytest.approx([0.1 * TRUNK, 0.1 * HEAD])


def test_plateau_warms_up_by_optimiser_step_and_drops_by_validation() -> None:
    optimizer = make_optimizer()
    scheduler = Plateau(optimizer, T, patience=0, drop=0.5, warmup=3)
    assert not scheduler.observe(1.0)
    assert scheduler.observe(2.0)
    assert [head / HEAD for _, head in run(optimizer, scheduler, 5)] == [0.125, 0.25, 0.375, 0.5, 0.5]
    assert scheduler.monitor == "val/loss"


SETTINGS: list[Callable[..., Schedule]] = [
    *(partial(cls, warmup=W, **NEEDS.get(cls, {})) for cls in ALL),
    partial(OneCycle, cycle_momentum=True),
]


def play(optimizer: Optimizer, scheduler: Schedule, first: int, last: int) -> list[Any]:
    """Rates and momenta of steps `first` to `last`; a Plateau sees a bad validation every third step."""
    seen = []
    for step in range(first, last):
        seen.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
        if isinstance(scheduler, Plateau) and step % 3 == 0:
            scheduler.observe(float(step))
    return seen


@pytest.mark.parametrize("build", SETTINGS, ids=name_of)
@pytest.mark.parametrize("cut", [0, 1, W - 1, W, 31, T - 1, T])
def test_resumed_anywhere_the_rates_are_those_of_one_run(build: Callable[..., Schedule], cut: int) -> None:
    if build.func is Plateau:  # type: ignore[attr-defined]
        build = partial(build, patience=2)
    straight = make_optimizer()
    expected = play(straight, build(straight, T), 0, T + 2)

    optimizer = make_optimizer()
    scheduler = build(optimizer, T)
    play(optimizer, scheduler, 0, cut)
    saved = optimizer.state_dict(), json.loads(json.dumps(scheduler.state_dict()))  # plain types only

    optimizer = make_optimizer()
    scheduler = build(optimizer, T)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert scheduler.get_last_lr() == rates(optimizer)
    assert play(optimizer, scheduler, cut, T + 2) == expected[cut:]


@pytest.mark.parametrize("cls", ALL)
def test_what_is_configured_on_resume_beats_the_checkpoint(cls: type[Schedule]) -> None:
    optimizer = make_optimizer()
    scheduler = cls(optimizer, T, warmup=W, **NEEDS.get(cls, {}))
    play(optimizer, scheduler, 0, 20)
    saved = optimizer.state_dict(), scheduler.state_dict()

    optimizer = make_optimizer(trunk=0.001, head=0.003)
    scheduler = cls(optimizer, 2 * T, warmup=30, **NEEDS.get(cls, {}))
    fresh = [scheduler.factor(step) for step in range(2 * T)]
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.001, 0.003]
    if cls is Plateau:
        fresh = [0.1**scheduler.drops * factor for factor in fresh]  # type: ignore[attr-defined]
    for step, got in enumerate(run(optimizer, scheduler, 2 * T - 20), 20):
        assert got == pytest.approx([0.001 * fresh[step], 0.003 * fresh[step]], rel=1e-12)


def test_another_kind_of_schedule_takes_over_at_the_same_step() -> None:
    optimizer = make_optimizer()
    theirs = lr_scheduler.CosineAnnealingLR(optimizer, T)
    run(optimizer, theirs, 11)
    scheduler = Plateau(make_optimizer(0.001, 0.003), T, warmup=20)
    scheduler.load_state_dict(theirs.state_dict())  # has base rates, too, which are not taken over
    assert scheduler.state_dict() == {"last_epoch": 11, "drops": 0, "best": None, "bad_validations": 0}
    assert scheduler.get_last_lr() == pytest.approx([0.001 * 12 / 21, 0.003 * 12 / 21])
    assert Cosine(make_optimizer(), T).state_dict() == {"last_epoch": 0}


def test_a_tensor_rate_is_written_in_place() -> None:
    rate = torch.tensor(0.5)
    optimizer = AdamW([nn.Parameter(torch.ones(2))], lr=rate, capturable=False, foreach=False)
    scheduler = Linear(optimizer, 5)
    run(optimizer, scheduler, 2)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.25)
    scheduler.load_state_dict({"last_epoch": 3})
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.125)


@pytest.mark.parametrize("given_warmup", ["warmup", "warmup_share"])
@pytest.mark.parametrize("cls", ALL)
def test_named_in_yaml(cls: type[Schedule], given_warmup: str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=Callable[[Optimizer, int], LRScheduler])
    given = {"class_path": f"recipes.parts.schedules.{cls.__name__}", "init_args": {given_warmup: 0.1}}
    given["init_args"] |= {"pieces": [[0, 1], [30, 0.1]]} if cls is Piecewise else {}  # type: ignore[operator]
    given["init_args"] |= {"monitor": "val/accuracy", "mode": "max"} if cls is Plateau else {}  # type: ignore[operator]
    config = parser.parse_args([f"--schedule={json.dumps(given)}"])
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    scheduler = instantiate(config).schedule(make_optimizer(), T)
    assert type(scheduler) is cls and scheduler.warmup_steps == 6
    assert getattr(scheduler, "monitor", "val/accuracy") == "val/accuracy"


def test_turning_points() -> None:
    assert Constant(make_optimizer(), T).turning_points() == {}
    assert Cosine(make_optimizer(), T, warmup=W).turning_points() == {
        "warm-up ends": W,
        "decay begins": W,
        "decay ends": 59,
    }
    assert WarmupStableDecay(make_optimizer(), T).turning_points() == {"decay begins": 48, "decay ends": 59}
    assert Step(make_optimizer(), T).turning_points() == {"drop 1": 20, "drop 2": 40}
    pieces = Piecewise(make_optimizer(), T, [(0, 0.5), (0.5, 0.1)])
    assert pieces.turning_points() == {"piece 1 at 0.5": 0, "piece 2 at 0.1": 30}
    assert OneCycle(make_optimizer(), T).turning_points() == {"peak": 17}
    assert Plateau(make_optimizer(), T, warmup=0.5).turning_points() == {"warm-up ends": 30}


@pytest.mark.parametrize("cls", [Cosine, Linear, Polynomial, WarmupStableDecay, OneCycle, Step, Piecewise])
def test_the_rate_changes_where_the_turning_points_say(cls: type[Schedule]) -> None:
    scheduler = cls(make_optimizer(), T, **NEEDS.get(cls, {}))
    factors = [scheduler.factor(step) for step in range(T)]
    slopes = [after - before for before, after in itertools.pairwise(factors)]
    for name, step in scheduler.turning_points().items():
        if name.startswith(("drop", "piece")):
            assert slopes[step - 1] != 0 == slopes[step]
        elif name == "decay begins":
            assert factors[step] == 1.0 > factors[step + 1] and not any(slopes[:step])
        else:
            assert factors[step] == {"peak": max, "decay ends": min}[name](factors)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (partial(Cosine, total_steps=100, warmup=500), "warm-up of 500 steps does not fit in a run of 100"),
        (partial(Cosine, total_steps=100, warmup=100), "shorten it, give a share below 1 instead"),
        (partial(Cosine, total_steps=9, warmup_steps=2, warmup_share=0.1), "give warmup alone"),
        (partial(Cosine, total_steps=9, warmup=1.5), "warmup must be a share of the run below 1, or a whole"),
        (partial(Cosine, total_steps=9, warmup=-1), "warmup must be 0 or more.*received -1"),
        (partial(Constant, total_steps=math.inf), "total_steps must be a whole number.*received inf; set max_epochs"),
        (partial(Constant, total_steps=0), "received 0"),
        (partial(Linear, total_steps=9, end_factor=1.5), "end_factor must be between 0 and 1; received 1.5"),
        (partial(Polynomial, total_steps=9, power=0.0), "power must be above 0"),
        (partial(WarmupStableDecay, total_steps=9, decay="sqrt"), "linear, cosine or 1-sqrt; received 'sqrt'"),
        (
            partial(WarmupStableDecay, total_steps=100, warmup=60, decay_share=0.5),
            "a warm-up of 60 steps and a decay over 0.5 of the run do not both fit in a run of 100 steps",
        ),
        (partial(Step, total_steps=9, every=3, milestones=[4]), "give one of the two"),
        (partial(Step, total_steps=100, milestones=[30, 500]), "one of its 100 steps, received 500"),
        (partial(Step, total_steps=100, every=0.0), "every must be above 0"),
        (partial(Step, total_steps=9, drop=2.0), "drop must be above 0 and at most 1"),
        (partial(Piecewise, total_steps=9, pieces=[]), "one or more"),
        (partial(Piecewise, total_steps=9, pieces=[(5, 1.0), (2, 0.5)]), "in order of their starts"),
        (partial(Piecewise, total_steps=9, pieces=[(0, 0.0), (2, 0.5)]), "above 0 at the first step"),
        (partial(OneCycle, total_steps=9, up_share=1.0), "up_share must be above 0 and below 1"),
        (partial(Plateau, total_steps=9, mode="less"), "mode must be min or max; received 'less'"),
        (partial(Plateau, total_steps=9, drop=1.0), "drop must be above 0 and below 1"),
    ],
    ids=name_of,
)
def test_errors_say_what_was_expected_and_received(build: Callable[..., Schedule], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(make_optimizer())


def test_momentum_is_cycled_only_where_there_is_some() -> None:
    optimizer = torch.optim.Adagrad([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="momentum or betas; received Adagrad; set cycle_momentum to false"):
        OneCycle(optimizer, T, cycle_momentum=True)
    assert OneCycle(make_optimizer(), T, cycle_momentum=True).writes == ("lr", "momentum", "betas")
