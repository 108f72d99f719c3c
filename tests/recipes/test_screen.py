"""What a run prints: on a terminal, into a file, quietly; at its end, and when it is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from recipes.__main__ import main as command
from recipes.cli import early as names
from recipes.cli.mistakes import unwrapped
from recipes.cli.plan import Phases
from recipes.cli.runs import check_writable
from recipes.cli.screen import Bar, EpochLines, console, counted, progress
from recipes.cli.summary import describe_data, describe_model, model_name
from recipes.parts.checkpoints import glance, load_checkpoint
from recipes.vision import main

QUICK = ["fit", "--config", "vision/quickstart", "--trainer.accelerator=cpu", "--trainer.max_epochs=3"]
SPY = ["--trainer.callbacks+=tests.spies.Interrupt", "--trainer.callbacks.step=40"]


@pytest.fixture
def signals() -> Iterator[None]:
    """Lightning leaves Ctrl-C ignored."""
    kept = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    yield
    for one, handler in kept.items():
        signal.signal(one, handler)


def test_in_a_file_there_is_a_line_an_epoch_and_nothing_wraps(capfd: pytest.CaptureFixture[str]) -> None:
    main([*QUICK, "--trainer.log_every_n_steps=1"])
    said = capfd.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("epoch ")]
    assert [line.split(",")[:2] for line in lines] == [[f"epoch {n} of 3", f" step {17 * n}"] for n in (1, 2, 3)]
    for line in lines:
        assert re.search(r"train/accuracy 0\.\d{4}, train/loss_epoch .*val/accuracy 0\.\d{4}, .*val/loss .* s$", line)
        assert "lr-" not in line and "train/loss " not in line
    assert "\r" not in said.err + said.out and "\x1b" not in said.err + said.out
    assert any(
        len(line) > 80 and "predict --ckpt_path" in line and "predict_root" in line for line in said.out.splitlines()
    )
    assert "best        val/accuracy" in said.out and "of 3 epochs, 51 optimiser steps" in said.out


def test_quiet_prints_the_folder_alone(capfd: pytest.CaptureFixture[str]) -> None:
    cli = main([*QUICK, "--quiet"])
    said = capfd.readouterr()
    assert said.out.strip() == f"runs/vision/quickstart/{cli.folder.name}"
    assert [line for line in said.err.splitlines() if "Seed set" not in line] == []
    assert "quiet: false" in (cli.folder / "config.yaml").read_text(), "whoever runs it again may want to see it"


@pytest.mark.parametrize("way", ["ctrl-c", "sigterm"])
def test_who_stops_a_fit_is_told_what_is_saved_and_how_to_go_on(
    way: str, signals: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*QUICK, *SPY, f"--trainer.callbacks.terminate={way == 'sigterm'}"])
    assert stop.value.code == {"ctrl-c": 130, "sigterm": 143}[way]
    screen = capsys.readouterr().out
    steps = 40 if way == "ctrl-c" else 41  # a terminated run ends its step
    assert f"in epoch 3 of 3, after {steps} steps" in screen and "was interrupted" in screen
    assert re.search(r"best +val/accuracy 0\.\d{4}, of 2 epochs, .*checkpoints/best.ckpt", screen)
    lost = f"{counted(steps - 34, 'step')} will be done again"
    assert re.search(rf"saved +runs/.*/checkpoints/last.ckpt: 2 epochs, 34 steps; {lost}", screen)
    command = re.search(r"go on +python -m recipes.vision (.*)", screen)
    assert command, screen
    cli = main([*shlex.split(command[1]), "--trainer.callbacks.step=-1"])
    assert cli.trainer.global_step == 51


def test_who_stops_a_fit_in_its_first_epoch_has_saved_nothing(
    signals: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*QUICK, *SPY, "--trainer.callbacks.step=3"])
    screen = capsys.readouterr().out
    assert "no weights: the first are written when an epoch is over" in screen
    assert re.search(r"again +python -m recipes.vision fit --config runs/.*/config.yaml", screen)


def test_ctrl_c_before_the_fit_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("datamodules.Digits.class_names", property(pressed))
    with pytest.raises(SystemExit) as stop:
        main(QUICK)
    assert stop.value.code == 130 and "nothing was written" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_fit_that_ends_before_a_validation_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    cli = main([*QUICK, "--trainer.max_steps=2", "--test", *stop])
    screen = capsys.readouterr().out
    assert "none: the fit ended after 2 optimiser steps, before its first validation" in screen
    assert f"the last weights are in runs/vision/quickstart/{cli.folder.name}/checkpoints/last.ckpt" in screen
    assert "of the last weights, for none are best" in screen
    assert load_checkpoint(cli.folder / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_a_finished_run_is_not_gone_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    folder = main([*QUICK, "--trainer.max_epochs=1"]).folder

    def record() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = record()
    for more, words in (
        ([], "finished, after 1 epoch and 17 steps; to go on, set --trainer.max_epochs above 1"),
        (["--trainer.max_epochs=9", "--trainer.max_steps=17"], "to go on, set --trainer.max_steps above 17"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["fit", f"--ckpt_path={folder}/checkpoints/last.ckpt", *more])
        assert stop.value.code == 0 and words in capsys.readouterr().out
        assert record() == before
    with pytest.warns(UserWarning, match="resumed, but not as if never stopped"):
        cli = main(["fit", f"--ckpt_path={folder}/checkpoints/last.ckpt", "--trainer.max_epochs=2"])
    assert cli.trainer.global_step == 34 and cli.folder == folder


def test_where_a_run_cannot_be_written_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs").touch()
    with pytest.raises(SystemExit):
        main(QUICK)
    assert "runs is a file, and the run's folder goes below it" in capsys.readouterr().err
    command(["plan", "vision/quickstart"])
    assert "optimiser steps per epoch" in capsys.readouterr().out, "a plan writes nothing"
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(SystemExit):
        check_writable(Path.cwd() / "elsewhere" / "run")
    assert "no permission to write in" in capsys.readouterr().err


def test_something_is_said_before_anything_heavy_is_imported(capsys: pytest.CaptureFixture[str]) -> None:
    names.start("vision", ["fit", "--config", "vision/quickstart"])
    assert capsys.readouterr().err == "vision fit: starting\n"
    names.start("vision", ["fit", "--config", "vision/quickstart", "--quiet"])
    assert capsys.readouterr().err == ""
    command(["plan", "vision/quickstart"])
    assert capsys.readouterr().err.startswith("plan: starting\n")


def test_a_hub_that_cannot_be_found_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def nobody(*_: Any) -> Any:
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", nobody)
    assert not names.hub_can_be_found()
    names.start("text", ["fit", "--config", "text/quickstart"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert names.hub_can_be_found(), "whoever set that has decided"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [1])
    assert names.hub_can_be_found()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: time.sleep(5))
    assert not names.hub_can_be_found(seconds=0.1)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert names.hub_can_be_found(), "the proxy looks it up"


def test_a_terminal_has_a_bar_and_colours_unless_there_should_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(progress(), EpochLines) and console().width == 200
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(progress(), Bar) and not console().no_color
    monkeypatch.setenv("NO_COLOR", "1")
    assert console().no_color


def test_the_bar_counts_epochs_from_one_and_has_no_version() -> None:
    bar = Bar()
    bar._trainer = Trainer(max_epochs=15, logger=False, enable_checkpointing=False)
    assert [bar._get_train_description(epoch).strip() for epoch in (0, 14)] == ["Epoch 1/15", "Epoch 15/15"]
    speed = next(column for column in bar.configure_columns(bar._trainer) if type(column).__name__ == "Speed")
    assert str(speed.render(SimpleNamespace(speed=None))) == ""
    assert str(speed.render(SimpleNamespace(speed=12.34))) == "12.3 batches/s"


def data(kind: str, count: int) -> Any:
    """A data module as the summary sees it."""
    return SimpleNamespace(problem_type=kind, num_classes=count, splits={"train": SimpleNamespace(labels=[0] * 7)})


def test_words_agree_with_their_numbers() -> None:
    assert describe_data(data("regression", 1)) == "SimpleNamespace, a score; 7 train"
    assert describe_data(data("single_label_classification", 0)) == "SimpleNamespace; 7 train"
    assert describe_data(data("single_label_classification", 3)) == "SimpleNamespace, 3 classes; 7 train"
    assert describe_data(data("multi_label_classification", 1)) == "SimpleNamespace, 1 label; 7 train"
    assert [counted(n, "row") for n in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]
    assert Phases(opens={"layer4, stem": 5, "layer3": 3}).turning_points() == {
        "layer4, stem open": 5,
        "layer3 opens": 3,
    }


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


def test_what_trained_is_counted_once_where_features_were_computed_before(capsys: pytest.CaptureFixture[str]) -> None:
    probe = ["--trainer.callbacks+=Freeze", "--trainer.callbacks.train_last_blocks=1"]
    main([*QUICK, *probe, "--feature_views=1", "--data.augment=none", "--trainer.max_epochs=1"])
    share = 100 * 325 / 74_965
    said = capsys.readouterr()
    assert f"{share:.1f}% of them trained" in said.out
    assert said.err.count("325 parameters train") == 1


def test_a_missing_extra_is_named() -> None:
    words = unwrapped(
        "Does not validate\nErrors:\n  - Problem with given class_path 'loggers.WandbLogger':\n"
        "      Requirement 'wandb>=0.12.10' not met. HINT: Try running `pip install -U 'wandb>=0.12.10'`\n"
        "  - Expected a <class 'bool'>\n"
    )
    assert words.startswith("Problem with given class_path 'loggers.WandbLogger': Requirement 'wandb>=0.12.10' not met")
    assert "Expected" not in words


def test_a_checkpoint_is_opened_once_and_not_read_whole_to_ask_its_name(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"recipe": {"name": "vision"}, "state_dict": {"w": torch.arange(5)}}
    torch.save(content, "new.ckpt")
    torch.save(content, "old.ckpt", _use_new_zipfile_serialization=False)
    asked: list[bool] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (asked.append(k["mmap"]), load(*a, **k))[1])
    for name in ("new.ckpt", "new.ckpt", "old.ckpt"):
        assert glance(name)["state_dict"]["w"].tolist() == list(range(5))
    assert asked == [True, False]
    assert load_checkpoint("new.ckpt")["state_dict"]["w"].tolist() == list(range(5)) and asked[-1] is False
    torch.save({**content, "recipe": {"name": "text"}}, "new.ckpt")
    assert glance("new.ckpt")["recipe"]["name"] == "text", "another file of that name"


@pytest.mark.parametrize(
    "opens", [[], ["--trainer.callbacks+=GradualUnfreezing", "--trainer.callbacks.every_epochs=1"]]
)
def test_a_trial_of_one_step_is_the_beginning_of_a_run(opens: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli = main([*QUICK, "--trainer.fast_dev_run=true", *opens])
    assert cli.trainer.global_step == 1 and not Path("runs").exists()


def test_the_report_knows_what_doctor_said_of_the_same_data() -> None:
    with contextlib.suppress(SystemExit):
        command(["doctor", "vision/quickstart"])
    for seed, knows in ((0, True), (1, False)):
        cli = main([*QUICK, "--trainer.max_epochs=1", f"--data.seed={seed}"])
        facts = json.loads((cli.folder / "report.json").read_text())["facts"]
        assert bool(facts.get("doctor")) == knows, "of other data it said nothing"
