"""Progress in checkpoints, and settings that differ from them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.resume.progress import during_step, settle
from tests.callbacks.resume.conftest import Net, fit, saved, shuffled


def test_learning_rates_that_the_checkpoint_overrides_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.warns(UserWarning) as caught:
        trainer, _ = fit(shuffled, ckpt_path=path, make=partial(Net, lr=0.001, steps=60))
    words = str(caught[-1].message)
    assert "base_lrs of CosineAnnealingLR stays at the checkpoint's [0.05], not the configured [0.001]" in words
    assert "T_max of CosineAnnealingLR stays at the checkpoint's 30, not the configured 60" in words
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.05

    path = saved(tmp_path, schedule="none")
    with pytest.warns(UserWarning, match=r"lr of group 0 stays at the checkpoint's 0.05, not the configured 0.001"):
        fit(shuffled, ckpt_path=path, make=partial(Net, "none", lr=0.001))


def test_another_length_of_the_run_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.warns(UserWarning, match=r"max_epochs is 3 \(checkpoint: 2\); the number of optimiser steps is 21"):
        fit(shuffled, ckpt_path=path, max_epochs=3)
    with pytest.warns(UserWarning, match=r"accumulate_grad_batches is 2 \(checkpoint: 1\)"):
        fit(shuffled, ckpt_path=path, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match=r"the number of batches per epoch is 6 \(checkpoint: 7\)"):
        fit(shuffled, ckpt_path=path, limit_train_batches=6)


def test_schedulers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.warns(UserWarning, match=r"0 schedulers are configured \(checkpoint: 1\)"):
        fit(shuffled, ckpt_path=path, schedule="none")
    checkpoint = torch.load(path)
    checkpoint["lr_schedulers"][0]["last_epoch"] = 2
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="CosineAnnealingLR is at step 2, the run at 4"):
        fit(shuffled, ckpt_path=path)


def loops(ready: int, started: int, processed: int, completed: int, *, last: bool = False) -> dict[str, Any]:
    """A fit loop's counters within its first epoch."""

    def progress(*counts: int) -> dict[str, Any]:
        names = ("ready", "started", "processed", "completed")
        return {kind: dict(zip(names, counts, strict=True)) for kind in ("total", "current")}

    return {
        "epoch_progress": progress(1, 1, 0, 0),
        "epoch_loop.batch_progress": progress(ready, started, processed, completed) | {"is_last_batch": last},
        "epoch_loop.val_loop.batch_progress": progress(5, 5, 5, 5),
    }


@pytest.mark.parametrize(
    ("counts", "validation", "pending"),
    [
        ((3, 3, 3, 3), "", (3, "")),
        ((4, 4, 3, 3), "", (3, "")),
        ((4, 4, 3, 3), "over", (3, "")),
        ((4, 4, 4, 3), "", (4, "validation")),
        ((4, 4, 4, 4), "begun", (4, "validation")),
        ((4, 4, 4, 4), "over", (4, "after validation")),
    ],
)
def test_counters_are_set_to_what_was_finished(counts: Any, validation: str, pending: tuple[int, str]) -> None:
    saved_loops = loops(*counts)
    assert settle(saved_loops, validation) == pending
    assert set(saved_loops["epoch_loop.batch_progress"]["current"].values()) == {pending[0]}


def test_after_an_epochs_last_batch_a_plateau_step_is_pending_until_the_epoch_is_completed() -> None:
    for completed, pending in ((0, "plateau"), (1, "")):
        saved_loops = loops(7, 7, 7, 7, last=True)
        for counters in saved_loops["epoch_progress"].values():
            counters |= {"processed": 1, "completed": completed}
        assert settle(saved_loops, "") == (0, pending)
        assert saved_loops["epoch_progress"]["current"]["completed"] == 1


def test_a_step_is_under_way_from_its_start_to_its_end() -> None:
    assert during_step({"started": 4, "processed": 3}) and not during_step({"started": 4, "processed": 4})
