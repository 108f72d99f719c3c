"""The screen at the end of a run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from recipes.__main__ import main as command
from recipes.cli.plan import Phases
from recipes.cli.screen import counted
from recipes.cli.summary import describe_data, describe_model, model_name
from recipes.parts.checkpoints import load_checkpoint
from recipes.vision import main
from tests.recipes.cli.quick import QUICK


@pytest.mark.slow
def test_a_fit_that_ends_before_a_validation_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    cli = main([*QUICK, "--trainer.max_steps=2", "--test", *stop])
    screen = capsys.readouterr().out
    assert "none: the fit ended after 2 optimiser steps, before its first validation" in screen
    assert f"the last weights are in runs/vision/quickstart/{cli.folder.name}/checkpoints/last.ckpt" in screen
    assert "of the last weights, for none are best" in screen
    assert load_checkpoint(cli.folder / "checkpoints" / "last.ckpt")["global_step"] == 2


def data(kind: str, count: int) -> Any:
    """A data module as the summary sees it."""
    return SimpleNamespace(problem_type=kind, num_classes=count, splits={"train": SimpleNamespace(labels=[0] * 7)})


def test_a_models_name_says_more_than_model(own_folder: Path) -> None:
    def net(**facts: Any) -> Any:
        module: Any = nn.Linear(3, 2)
        module.hparams = facts
        return module

    (own_folder / "mine" / "model").mkdir(parents=True)
    assert model_name(net(encoder="mine/model")) == "mine/model"
    assert model_name(net(encoder=str(own_folder / "mine" / "model"))) == "mine/model"
    assert model_name(net(encoder="google-bert/bert-base-uncased")) == "google-bert/bert-base-uncased"
    assert model_name(net(encoder=None, architecture={"model_type": "bert"})) == "bert"
    assert describe_model(net(backbone="small"), trained=2).endswith("25.0% of them trained")


@pytest.mark.slow
def test_what_trained_is_counted_once_where_features_were_computed_before(capsys: pytest.CaptureFixture[str]) -> None:
    probe = ["--trainer.callbacks+=Freeze", "--trainer.callbacks.train_last_blocks=1"]
    main([*QUICK, *probe, "--feature_views=1", "--data.augment=none", "--trainer.max_epochs=1"])
    share = 100 * 325 / 74_965
    said = capsys.readouterr()
    assert f"{share:.1f}% of them trained" in said.out
    assert said.err.count("325 parameters train") == 1


@pytest.mark.slow
def test_the_report_knows_what_doctor_said_of_the_same_data() -> None:
    with contextlib.suppress(SystemExit):
        command(["doctor", "vision/quickstart"])
    for seed, knows in ((0, True), (1, False)):
        cli = main([*QUICK, "--trainer.max_epochs=1", f"--data.seed={seed}"])
        facts = json.loads((cli.folder / "report.json").read_text())["facts"]
        assert bool(facts.get("doctor")) == knows, "of other data it said nothing"


def test_words_agree_with_their_numbers() -> None:
    assert describe_data(data("regression", 1)) == "SimpleNamespace, a score; 7 train"
    assert describe_data(data("single_label_classification", 0)) == "SimpleNamespace; 7 train"
    assert describe_data(data("single_label_classification", 3)) == "SimpleNamespace, 3 classes; 7 train"
    assert describe_data(data("regression", 1), ["a", "b"]) == "SimpleNamespace, 2 tasks (a, b); 7 train"
    assert describe_data(data("multi_label_classification", 1)) == "SimpleNamespace, 1 label; 7 train"
    assert [counted(n, "row") for n in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]
    assert Phases(opens={"layer4, stem": 5, "layer3": 3}).turning_points() == {
        "layer4, stem open": 5,
        "layer3 opens": 3,
    }


def test_a_checkpoint_of_every_tenth_step_is_not_taken_for_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning's `trainer.checkpoint_callback` is the first of them, and the config's come first."""
    periodic = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=10"]
    cli = main([*QUICK, "--trainer.max_epochs=1", "--test", *periodic])
    assert Path(cli.finished.best).name == "best.ckpt"
    said = capsys.readouterr().out
    assert "best        val/accuracy" in said and "checkpoints/best.ckpt" in said
