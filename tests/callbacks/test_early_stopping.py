"""Early stopping that waits for the last phase."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.early_stopping import PhaseAwareEarlyStopping, Phased
from tests.callbacks.test_nonfinite import Net, fit, loader, trainer


class Phases(Callback):
    """Opens its last phase at a step."""

    def __init__(self, step: int = 0) -> None:
        self.step, self.all_open = step, True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.all_open = False

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.all_open = trainer.global_step >= self.step


def drive(stop: PhaseAwareEarlyStopping, phases: Any, scores: list[float], waits: list[bool]) -> Iterator[bool]:
    """One check per score, by hand; yields whether it stops."""
    plan: Any = SimpleNamespace(
        callbacks=[phases, stop],
        callback_metrics={},
        fast_dev_run=False,
        sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
        should_stop=False,
        current_epoch=0,
        val_check_interval=1.0,
        check_val_every_n_epoch=1,
    )
    net: Any = None
    stop.setup(plan, net, "fit")
    stop.on_train_start(plan, net)
    for score, wait in zip(scores, waits, strict=True):
        phases.all_open = not wait
        stop.on_train_batch_start(plan, net, None, 0)
        plan.callback_metrics["loss"] = torch.tensor(score)
        stop.on_train_epoch_end(plan, net)
        yield plan.should_stop


def test_nothing_stops_it_before_the_last_phase_and_patience_begins_there() -> None:
    stop = PhaseAwareEarlyStopping("loss", patience=2)
    scores, waits = [1.0, 2.0, math.nan, 0.5, 2.0, 2.0, 0.7, 0.7], [True] * 6 + [False] * 2
    assert list(drive(stop, Phases(), scores, waits)) == [False] * 7 + [True]
    assert stop.best_score == 0.5  # kept from before
    assert stop.stopping_reason.name == "PATIENCE_EXHAUSTED"


@pytest.mark.parametrize("options", [{"stopping_threshold": 10.0}, {"divergence_threshold": 0.1}, {"patience": 1}])
def test_no_other_criterion_stops_it_either(options: dict[str, Any]) -> None:
    scores = [1.0, 1.0, 1.0, 1.0]
    stop = PhaseAwareEarlyStopping("loss", **options)
    assert list(drive(stop, Phases(), scores, [True] * 3 + [False])) == [False] * 3 + [True]
    assert list(drive(stop, Phases(), scores, [True] * 4)) == [False] * 4
    assert stop.stopping_reason.name == "NOT_STOPPED"


def test_a_phase_that_opens_on_this_very_check_starts_with_all_its_patience() -> None:
    class Opens(Phases):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.all_open = self.all_open or trainer.current_epoch == 2

        def on_train_batch_start(self, *_: Any) -> None:
            pass

    class Flat(Net):
        def on_train_epoch_end(self) -> None:
            self.log("flat", 1.0)

    plan = trainer(Opens(), PhaseAwareEarlyStopping("flat", patience=2), epochs=20)
    plan.fit(Flat(), loader())
    assert plan.current_epoch == 5  # epochs 3 and 4 use up the patience of 2


def test_without_phases_it_is_its_parent() -> None:
    class Other(Callback):
        pass

    stop = PhaseAwareEarlyStopping("loss", patience=2)
    other: Any = Other()
    assert list(drive(stop, other, [1.0, 1.0, 1.0], [False] * 3)) == [False, False, True]
    assert isinstance(Phases(), Phased) and PhaseAwareEarlyStopping.waits_for_phases


class Watched(Net):
    def on_train_epoch_end(self) -> None:
        self.log("flat", 1.0, sync_dist=True)


@pytest.mark.slow
def test_a_resumed_run_stops_where_the_uninterrupted_one_does() -> None:
    whole = trainer(Phases(20), PhaseAwareEarlyStopping("flat", patience=4), epochs=20)
    whole.fit(Watched(), loader())
    assert whole.current_epoch == 6  # all is open at the end of epoch 2, and epochs 2 to 5 bring nothing new
    for epochs in (1, 2, 3, 5):
        first = trainer(Phases(20), PhaseAwareEarlyStopping("flat", patience=4), epochs=epochs)
        first.fit(Watched(), loader())
        first.save_checkpoint("half.ckpt")
        resumed = trainer(Phases(20), PhaseAwareEarlyStopping("flat", patience=4), epochs=20)
        resumed.fit(Watched(), loader(), ckpt_path="half.ckpt", weights_only=True)
        assert resumed.current_epoch == whole.current_epoch


def test_early_stopping_serves_two_fits() -> None:
    stop = PhaseAwareEarlyStopping("flat", patience=2)
    for _ in range(2):
        plan = trainer(stop, epochs=9)
        plan.fit(Watched(), loader())
        assert plan.current_epoch == 3 and stop.wait_count == stop.stopped_epoch == 2
    assert stop._check_on_train_epoch_end
    every_other = trainer(stop, epochs=1, check_val_every_n_epoch=2)
    every_other.fit(Watched(), loader())
    assert not stop._check_on_train_epoch_end  # found anew
    assert stop.stopped_epoch == stop.wait_count == 0 and stop.stopping_reason.name == "NOT_STOPPED"


@pytest.mark.slow
def test_two_ranks_stop_together(tmp_path: Path) -> None:
    class Note(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            (tmp_path / f"{trainer.global_rank}.txt").write_text(str(trainer.current_epoch))

    stop = PhaseAwareEarlyStopping("flat", patience=2)
    fit(
        stop,
        Phases(20),
        Note(),
        net=Watched(),
        epochs=20,
        devices=2,
        strategy="ddp_fork",
        use_distributed_sampler=False,
    )
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["4", "4"]
