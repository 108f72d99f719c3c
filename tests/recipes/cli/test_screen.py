"""What a run prints: on a terminal, into a file, quietly; at its end, and when it is stopped."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer

from recipes.cli.mistakes import unwrapped
from recipes.cli.screen import Bar, EpochLines, console, progress
from recipes.vision import main
from tests.recipes.cli.quick import QUICK


@pytest.mark.slow
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


def test_a_missing_extra_is_named() -> None:
    words = unwrapped(
        "Does not validate\nErrors:\n  - Problem with given class_path 'loggers.WandbLogger':\n"
        "      Requirement 'wandb>=0.12.10' not met. HINT: Try running `pip install -U 'wandb>=0.12.10'`\n"
        "  - Expected a <class 'bool'>\n"
    )
    assert words.startswith("Problem with given class_path 'loggers.WandbLogger': Requirement 'wandb>=0.12.10' not met")
    assert "Expected" not in words
