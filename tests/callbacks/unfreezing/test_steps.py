"""Optimiser steps of an epoch and of a run, as Lightning counts them in the end."""

from __future__ import annotations

import math
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader, IterableDataset

from callbacks.unfreezing.steps import step_at_epoch, steps_of_run, steps_per_epoch
from tests.nets import Net, data, quiet


class Ask(Callback):
    """The steps that are expected after each batch, and those at which epochs began."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []
        self.begins: list[float] = []
        self.starts: list[int] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.starts.append(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.found.append((steps_per_epoch(trainer), steps_of_run(trainer)))
        self.begins.append(step_at_epoch(trainer, 1))


@pytest.mark.parametrize("accumulate", [1, 3, 4])
@pytest.mark.parametrize("options", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 5}], ids=str)
def test_the_run_ends_at_the_step_that_was_expected_from_every_batch(accumulate: int, options: dict[str, Any]) -> None:
    ask = Ask()
    trainer = quiet(callbacks=[ask], accumulate_grad_batches=accumulate, **options)
    trainer.fit(Net(), data(), data())
    batches = trainer.num_training_batches
    assert set(ask.found) == {(math.ceil(batches / accumulate), trainer.global_step)}
    if len(ask.starts) > 1:
        assert set(ask.begins[:batches]) == {ask.starts[1]}, "the second epoch's first step"


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(data().dataset)  # type: ignore[call-overload]


def test_data_without_a_length_have_no_expected_end_but_max_steps() -> None:
    for options, end in (({"max_epochs": 1}, math.inf), ({"max_steps": 3}, 3)):
        ask = Ask()
        quiet(callbacks=[ask], **options).fit(Net(), DataLoader(Stream(), 8), data())
        assert ask.found[0] == (math.inf, end)


def test_a_fast_dev_run_is_the_beginning_of_a_long_one() -> None:
    ask = Ask()
    quiet(callbacks=[ask], fast_dev_run=True, max_epochs=1).fit(Net(), data(), data())
    assert ask.found[0][1] == 1e6
