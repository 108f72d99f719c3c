"""What every callback of this collection promises, whichever it is: a new one is tested without anyone asking.

`CASES` says how each is built; a callback that is missing there fails. All run on a net with BatchNorm, LayerNorm,
dropout and a tied weight, with shuffled data.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

import callbacks as package
from callbacks import EWC, ExactResume
from tests.nets import Net, data, fit, quiet

CASES: dict[str, dict[str, Any]] = {
    "AGC": {"ratio": 0.001},
    "AutoClip": {"percentile": 5.0},
    "Constrain": {"pattern": "weight", "maximum": 0.1},
    "EMA": {"decay": 0.9},
    "EWC": {"strength": 1e3, "load": "fisher.safetensors"},
    "ExactResume": {"seed": 5},
    "Freeze": {"train_last_blocks": 2},
    "GradualUnfreezing": {"over_share": 0.4},
    "Interpolation": {"share": 0.5},
    "L1": {"strength": 0.1},
    "L2": {"strength": 0.1},
    "L2SP": {"strength": 10.0, "exclude": ["^head"]},
    "LRWarmup": {"steps": 3},
    "PhaseAwareEarlyStopping": {"monitor": "val/loss", "patience": 50},
    "PredictionWriter": {},
    "Prune": {"sparsity": 0.7, "end": 0.6, "every_n_steps": 1},
    "RateBounds": {"maximum": 1e-4},
    "Report": {"folder": "page"},
    "StopOnNonFinite": {},
}
WATCH = {
    "ExactResume",
    "PhaseAwareEarlyStopping",
    "PredictionWriter",
    "Report",
    "StopOnNonFinite",
}  # these leave weights alone
FOUND: dict[str, type[Callback]] = {
    kind.__name__: kind
    for info in pkgutil.walk_packages(package.__path__, "callbacks.")
    for kind in vars(importlib.import_module(info.name)).values()
    if inspect.isclass(kind) and issubclass(kind, Callback) and kind.__module__ == info.name
    if not kind.__name__.startswith("_")
}
NAMES = sorted(FOUND)

PRECISIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "fp32": dict,
    "bf16": lambda: {"precision": "bf16-mixed"},
    "fp16": lambda: {"plugins": [MixedPrecision("16-mixed", "cpu")]},
}

SGD = partial(torch.optim.SGD, momentum=0.9)
LBFGS = partial(torch.optim.LBFGS, lr=0.1, max_iter=2)


def make(name: str) -> Callback:
    return FOUND[name](**CASES[name])


def shuffled() -> DataLoader[Any]:
    return DataLoader(data(24).dataset, batch_size=4, shuffle=True)


@pytest.fixture(autouse=True, scope="module")
def fisher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What EWC starts from: the Fisher information of a short fit."""
    path = tmp_path_factory.mktemp("fisher") / "fisher.safetensors"
    fit([EWC(save=path)], max_epochs=1)
    return path


@pytest.fixture(autouse=True)
def with_fisher(fisher: Path, own_folder: Path) -> None:
    (own_folder / "fisher.safetensors").write_bytes(fisher.read_bytes())


def run(callbacks: list[Any], net: Net | None = None, **options: Any) -> Net:
    """A short fit with shuffling and dropout, all of it decided by the seed."""
    if not any(isinstance(callback, ExactResume) for callback in callbacks):
        callbacks = [ExactResume(seed=1), *callbacks]
    return fit(callbacks, net, train=shuffled(), **{"max_epochs": 2, **options})


def weights(net: LightningModule) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def equal(one: Any, other: Any) -> bool:
    """Bitwise, through dictionaries and lists."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def test_every_callback_is_exported_and_has_a_case() -> None:
    assert set(NAMES) == set(CASES)
    assert set(NAMES) <= set(package.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_does(name: str) -> None:
    text = inspect.getdoc(FOUND[name]) or ""
    assert "Runs on:" in text
    assert "Touches:" in text
    assert "Example:" in text
    own = inspect.signature(FOUND[name]).parameters if "__init__" in vars(FOUND[name]) else ()
    assert all(f"{argument}:" in text for argument in own)


@pytest.mark.parametrize("name", NAMES)
def test_it_pickles(name: str) -> None:
    assert type(pickle.loads(pickle.dumps(make(name)))) is FOUND[name]


@pytest.mark.parametrize("name", NAMES)
def test_it_round_trips_through_yaml(name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    config = parser.parse_object({"callback": {"class_path": f"callbacks.{name}", "init_args": CASES[name]}})
    again = parser.parse_string(parser.dump(config))
    assert type(parser.instantiate_classes(again).callback) is FOUND[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_instance_serves_two_fits(name: str) -> None:
    callback = make(name)
    assert equal(weights(run([callback])), weights(run([callback])))


@pytest.mark.parametrize("name", sorted(set(NAMES) - WATCH))
def test_it_acts(name: str) -> None:
    assert not equal(weights(run([make(name)])), weights(run([])))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WATCH - {"ExactResume"}))
def test_it_leaves_weights_alone(name: str) -> None:
    assert equal(weights(run([make(name)])), weights(run([])))


# Precision x accumulation x clipping x optimiser, in one process


EVERY_WAY = [
    (precision, clip, accumulate, optimizer)
    for precision, clip, accumulate, optimizer in product(PRECISIONS, [None, 0.5], [1, 3], ["AdamW", "SGD", "LBFGS"])
    if optimizer != "LBFGS" or (accumulate == 1 and precision != "fp16")  # Lightning's closure doesn't go with L-BFGS
]
# Those that have no part in how a step is made: the report reads logits and counts steps.
FEW_WAYS: dict[str, list[tuple[str, float | None, int, str]]] = {
    "ExactResume": [("fp32", None, 1, "AdamW")],  # it is in the runs of all others, too
    "PredictionWriter": [("fp32", None, 1, "AdamW")],  # has hooks of `predict` alone
    "PhaseAwareEarlyStopping": [("fp32", None, accumulate, "AdamW") for accumulate in (1, 3)],  # counts steps
    "Report": [(precision, None, accumulate, "AdamW") for precision in PRECISIONS for accumulate in (1, 3)],
}
WAYS = [
    pytest.param(name, *way, marks=[] if way == ("fp32", None, 1, "AdamW") else pytest.mark.slow)
    for name in NAMES
    for way in FEW_WAYS.get(name, EVERY_WAY)
]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # a scaler may skip the first step
@pytest.mark.parametrize(("name", "precision", "clip", "accumulate", "optimizer"), WAYS)
@pytest.mark.usefixtures("undrawn")
def test_it_works_however_the_step_is_made(
    name: str, precision: str, clip: float | None, accumulate: int, optimizer: str
) -> None:
    """Finite and repeatable, or refused in a sentence."""
    makers: dict[str, Any] = {
        "AdamW": partial(torch.optim.AdamW, fused=precision == "fp16" and not clip),  # Lightning can't clip for that
        "SGD": SGD,
        "LBFGS": LBFGS,
    }

    def once() -> Net:
        options = {**PRECISIONS[precision](), "accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
        by_block = optimizer != "LBFGS"
        scheduler = partial(schedulers.CosineAnnealingLR, T_max=12)
        return run([make(name)], Net(makers[optimizer], scheduler, by_block=by_block), **options)

    try:
        first = once()
    except ValueError as error:
        assert optimizer == "LBFGS", error
        assert "L-BFGS" in str(error)
        return
    assert all(tensor.isfinite().all() for tensor in first.state_dict().values())
    assert equal(weights(first), weights(once()))


# Two ranks


class Weights(Callback):
    """Each rank writes its weights."""

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        torch.save(weights(pl_module), f"rank{trainer.global_rank}.pt")


OVER_RANKS = [
    (name, precision, accumulate)
    for name in NAMES
    for precision, accumulate in dict.fromkeys((way[0], way[2]) for way in FEW_WAYS.get(name, EVERY_WAY))
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(("name", "precision", "accumulate"), OVER_RANKS)
@pytest.mark.usefixtures("undrawn")
def test_two_ranks_stay_equal(name: str, precision: str, accumulate: int) -> None:
    options = {**PRECISIONS[precision](), "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    options |= {"devices": 2, "strategy": "ddp_fork", "max_epochs": 4}
    run([make(name), Weights()], Net(batch_norm=False), **options)
    assert equal(torch.load("rank0.pt"), torch.load("rank1.pt"))


# Resuming


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("undrawn")
def test_a_resumed_run_is_the_uninterrupted_one(name: str, accumulate: int) -> None:
    """Bitwise, with shuffling and dropout, from every step: before, at and after each change, amid an epoch."""

    def net() -> Net:
        return Net(SGD, partial(schedulers.OneCycleLR, max_lr=1e-2, total_steps=12 * 3 // accumulate))

    options: dict[str, Any] = {"max_epochs": 6, "gradient_clip_val": 1.0, "accumulate_grad_batches": accumulate}
    keep = ModelCheckpoint(dirpath="all", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole = run([make(name), keep], net(), enable_checkpointing=True, **options)
    files = sorted(Path("all").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert len(files) == 36 // accumulate
    end = weights(whole), whole.trainer.optimizers[0].state_dict(), whole.lr_schedulers().state_dict()  # type: ignore[union-attr]
    for path in files[: 14 : 1 if accumulate > 1 else 2]:
        saved = torch.load(path, weights_only=True)  # tensors and plain types
        assert saved["global_step"] == int(path.stem.split("=")[1])
        resumed = run([make(name)], net(), ckpt_path=path, **options)
        scheduler = resumed.lr_schedulers().state_dict()  # type: ignore[union-attr]
        found = weights(resumed), resumed.trainer.optimizers[0].state_dict(), scheduler
        assert equal(found, end), path


# However a run is cut short or repeated


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fit_validate_and_fit_again_go_on_with_one_instance(name: str) -> None:
    """In one process, with one Trainer: nothing of the first fit is in the way of the validation or the second fit."""
    callback, net = make(name), Net()
    trainer = quiet(callbacks=[callback], max_epochs=1)
    trainer.fit(net, shuffled(), data(8, seed=1))
    before = weights(net)
    trainer.validate(net, data(8, seed=1), verbose=False)
    assert equal(before, weights(net)) and all(p.requires_grad for p in net.parameters())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, shuffled(), data(8, seed=1))
    assert trainer.global_step == 12
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())


class TwoOptimizers(Net):
    """Steps as it likes."""

    automatic_optimization = False  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        body, head = self.optimizers()  # type: ignore[attr-defined]
        body.zero_grad()
        head.zero_grad()
        self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
        body.step()
        head.step()

    def configure_optimizers(self) -> Any:
        head = list(self.head["out"].parameters())
        body = [p for p in self.parameters() if p not in set(head)]
        return [torch.optim.SGD(body, lr=1e-2, momentum=0.9), torch.optim.Adam(head, lr=1e-2)]


REFUSED = {
    "AutoClip": "one optimiser",
    "LRWarmup": "one optimiser",
    "GradualUnfreezing": "several optimisers",
    "StopOnNonFinite": "manual",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_optimizers_by_hand(name: str) -> None:
    """Each works, or says that it can't."""
    net = TwoOptimizers()
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            fit([make(name)], net, max_epochs=1)
    else:
        fit([make(name)], net, max_epochs=1)
        assert all(tensor.isfinite().all() for tensor in net.state_dict().values())


CUT = [{"overfit_batches": 2}, {"limit_train_batches": 0.5}, {"fast_dev_run": 8}, {"fast_dev_run": True}]


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUT, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_short_runs(name: str, cut: dict[str, Any]) -> None:
    net = fit([make(name)], train=shuffled(), **cut)
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
