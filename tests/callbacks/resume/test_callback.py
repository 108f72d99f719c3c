from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from callbacks.resume.callback import ExactResume
from tests.callbacks.resume.conftest import (
    ROWS,
    SaveEverywhere,
    SaveInOddPlaces,
    SaveOnException,
    Stream,
    Trace,
    X,
    Y,
    by_epoch,
    differences,
    fit,
    resume_everywhere,
    saved,
    shuffled,
    state_of,
)

SETTINGS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (partial(shuffled, noise=0.1), {}),
    "validation twice an epoch": (shuffled, {"val_check_interval": 0.5}),
    "accumulate 3": (partial(shuffled, noise=0.1), {"accumulate_grad_batches": 3, "val_check_interval": 2}),
    "two workers": (partial(shuffled, 2), {"every": 3}),
    "two workers, accumulate 3": (partial(shuffled, 2), {"every": 3, "accumulate_grad_batches": 3}),
    "EpochSampler": (by_epoch, {"accumulate_grad_batches": 3}),
    "EpochSampler, two workers": (partial(by_epoch, 2), {"every": 3, "schedule": "epoch"}),
    "limited": (shuffled, {"limit_train_batches": 5, "schedule": "epoch"}),
    "plateau on training loss": (shuffled, {"schedule": "plateau-step", "val_check_interval": 3}),
    "validation by total batches": (shuffled, {"check_val_every_n_epoch": None, "val_check_interval": 5}),
    "validation every other epoch": (shuffled, {"check_val_every_n_epoch": 2}),
    "loaders made anew": (shuffled, {"reload_dataloaders_every_n_epochs": 1}),
    "stream": (lambda: DataLoader(Stream(), 4), {"accumulate_grad_batches": 3}),
    "stream, two workers": (lambda: DataLoader(Stream(), 5, num_workers=2), {"every": 3, "val_check_interval": 4}),
    "weighted": (partial(shuffled, sampler=WeightedRandomSampler((Y + 1).tolist(), ROWS)), {}),
    "no batches of its own": (lambda: DataLoader(Pairs(), None, shuffle=True), {}),
}


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return ROWS // 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[4 * index : 4 * index + 4], Y[4 * index : 4 * index + 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_anywhere_a_run_ends_as_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    data, options = SETTINGS[name]
    assert resume_everywhere(tmp_path, data, **options) == {}


@pytest.mark.slow
def test_without_the_callback_it_does_not(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ended before the epoch ended"):
        found = resume_everywhere(tmp_path, shuffled, exact=False)
    assert len(found) >= 17, "these tests would see a difference"


@pytest.mark.slow
@pytest.mark.parametrize("data", [shuffled, lambda: DataLoader(Stream(), 4)], ids=["sized", "stream"])
@pytest.mark.parametrize("options", [{"val_check_interval": 3}, {"accumulate_grad_batches": 3}], ids=str)
def test_checkpoints_written_in_odd_places_resume_exactly(data: Any, options: dict[str, Any], tmp_path: Path) -> None:
    assert resume_everywhere(tmp_path, data, SaveInOddPlaces, **options) == {}


@pytest.mark.slow
def test_a_run_limited_by_steps_resumes_exactly(tmp_path: Path) -> None:
    found = resume_everywhere(tmp_path, max_steps=11, max_epochs=-1)
    over = "batch end 1.3"  # where the last step has been made Lightning does not even start
    assert found.keys() == {over} and not [line for line in found[over] if line.startswith((".net", ".opt", ".sch"))]


@pytest.mark.slow
def test_no_step_of_reduce_lr_on_plateau_is_lost(tmp_path: Path) -> None:
    found = resume_everywhere(tmp_path, schedule="plateau", val_check_interval=3, max_epochs=3)
    assert found.keys() == {"epoch end 2.6"}, "at most that of a run that is over"
    assert not [line for line in found["epoch end 2.6"] if line.startswith((".net", ".optimizer.state", "trace"))]


class Terminate(Callback):
    """As a cluster's scheduler does, in a given hook."""

    def __init__(self, hook: str, batch: int) -> None:
        self.batch = batch
        setattr(self, hook, self.send)

    def send(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            trainer._signal_connector.received_sigterm = True


@pytest.mark.parametrize(
    ("hook", "batch"), [("on_train_batch_end", 1), ("on_train_batch_end", 2), ("on_validation_end", 5)]
)
def test_a_run_that_was_told_to_terminate_resumes_exactly(hook: str, batch: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"val_check_interval": 3, "schedule": "plateau-step", "accumulate_grad_batches": 2}
    trace, first, again = Trace(), Trace(), Trace()
    whole = state_of(*fit(shuffled, trace, **options))
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(SIGTERMException):
        fit(shuffled, first, Terminate(hook, batch), SaveOnException(path), **options)
    resumed = state_of(*fit(shuffled, again, ckpt_path=path, **options))
    if first.events[-1][0] == "validation":
        first.events.pop()  # it was cut off, and is repeated
    assert first.events + again.events == trace.events
    assert differences(whole, resumed) == []


def test_a_checkpoint_from_within_a_step_is_repeated_with_a_warning(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 6:  # the epoch's last, at which Lightning would end it early
                raise RuntimeError("out of memory")

    save = SaveOnException(tmp_path / "failed.ckpt")
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(shuffled, Fails(), save)
    trace = Trace()
    with pytest.warns(UserWarning, match="saved during a training step, which is repeated: gradients accumulated"):
        fit(shuffled, trace, ckpt_path=tmp_path / "failed.ckpt")
    assert trace.events[0][:4] == ("batch", 0, 6, 6) and len(trace.events) == 2 + 3 + 1 + 14 + 3


def on_two_ranks(folder: Path, name: str, *callbacks: Callback, **options: Any) -> list[dict[str, Any]]:
    """Each rank's state after a fit, and what it drew."""

    class Keep(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            drawn = [event[-3] for event in trace.events if event[0] == "batch"]
            torch.save(state_of(trainer, pl_module) | {"drawn": drawn}, folder / f"{name}.{trainer.global_rank}.pt")

    trace = Trace()
    fit(partial(shuffled, batch_size=5), trace, *callbacks, Keep(), devices=2, strategy="ddp_fork", **options)
    return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_resume_exactly_and_draw_different_numbers(tmp_path: Path) -> None:
    whole = on_two_ranks(tmp_path, "whole", SaveEverywhere(tmp_path))
    assert not set(whole[0]["drawn"]) & set(whole[1]["drawn"])
    for number in (1, 2, 3, 4, 5):  # within an epoch, at its last batch, after its validation, at its end, in the next
        again = on_two_ranks(tmp_path, "again", ckpt_path=tmp_path / f"{number}.ckpt")
        for one, other in zip(whole, again, strict=True):
            assert other["drawn"] == one["drawn"][-len(other["drawn"]) :]
            lines = differences(one | {"drawn": []}, other | {"drawn": []})
            assert [line for line in lines if "running_" not in line] == [], "each rank's own statistics apart"


def test_gradients_during_an_accumulation_over_ranks_are_right_to_rounding(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "schedule": "none", "limit_val_batches": 0}
    whole = on_two_ranks(tmp_path, "whole", SaveEverywhere(tmp_path), **options)[0]
    again = on_two_ranks(tmp_path, "again", ckpt_path=tmp_path / "1.ckpt", **options)[0]
    apart = {key: (again["net"][key] - weight).abs().max().item() for key, weight in whole["net"].items()}
    apart.pop("net.0.bias")  # before BatchNorm its gradient is nothing but rounding, and AdamW normalises it
    assert max(apart.values()) < 1e-4
    gradients = torch.load(tmp_path / "1.ckpt")["callbacks"]["ExactResume"]["gradients"]
    assert gradients.keys() == {f"net.{n}.{kind}" for n in (0, 1, 4) for kind in ("weight", "bias")}


# What is said


def test_no_warning_where_nothing_has_changed(tmp_path: Path) -> None:
    trainer, _ = fit(shuffled, ckpt_path=saved(tmp_path))  # a warning would be an error
    assert trainer.global_step == fit(shuffled)[0].global_step


def test_a_checkpoint_of_a_run_without_the_callback_is_resumed_with_a_warning(tmp_path: Path) -> None:
    path = saved(tmp_path, 8, exact=False, schedule="plateau")
    lost = "saved without ExactResume; a step of ReduceLROnPlateau is lost: the checkpoint lacks val/loss"
    with pytest.warns(UserWarning, match=lost):
        fit(shuffled, ckpt_path=path, schedule="plateau")


# The seed


def test_a_resumed_run_takes_its_own_seed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(seed: int | None, *callbacks: Callback, **options: Any) -> dict[str, Any]:
        return state_of(*fit(shuffled, Trace(), *callbacks, ExactResume(seed), exact=False, **options))

    save = SaveEverywhere(tmp_path)
    whole = run(None, save)
    assert differences(whole, run(None, ckpt_path=save.saved[3][2])) == []
    assert differences(whole, run(None)) != [], "a random one"
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    assert differences(run(None), run(11)) == [], "that of seed_everything"
    with pytest.warns(UserWarning, match=r"the seed is 5 \(checkpoint: \d+\)"):
        run(5, ckpt_path=save.saved[3][2])


def test_one_instance_serves_two_fits_and_leaves_nothing_behind(tmp_path: Path) -> None:
    callback = ExactResume(7)
    trainer, net = fit(shuffled, callback, exact=False)
    assert "dataloader" not in vars(trainer.fit_loop._data_source)
    assert "on_run_start" not in vars(trainer.fit_loop.epoch_loop)
    again, other = fit(shuffled, callback, exact=False)
    assert differences(state_of(trainer, net), state_of(again, other)) == []
    pickle.dumps(ExactResume(3))
