"""The command line from beginning to end, interrupted or not."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.cli.screen import counted
from recipes.vision import main
from tests.recipes.cli.quick import QUICK, SPY


@pytest.fixture
def signals() -> Iterator[None]:
    """Lightning leaves Ctrl-C ignored."""
    kept = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    yield
    for one, handler in kept.items():
        signal.signal(one, handler)


@pytest.mark.slow
def test_quiet_prints_the_folder_alone(capfd: pytest.CaptureFixture[str]) -> None:
    cli = main([*QUICK, "--quiet"])
    said = capfd.readouterr()
    assert said.out.strip() == f"runs/vision/quickstart/{cli.folder.name}"
    assert [line for line in said.err.splitlines() if "Seed set" not in line] == []
    assert "quiet: false" in (cli.folder / "config.yaml").read_text(), "whoever runs it again may want to see it"


@pytest.mark.slow
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


@pytest.mark.slow
def test_who_stops_a_fit_in_its_first_epoch_has_saved_nothing(
    signals: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*QUICK, *SPY, "--trainer.callbacks.step=3"])
    screen = capsys.readouterr().out
    assert "no weights: the first are written when an epoch is over" in screen
    assert re.search(r"again +python -m recipes.vision fit --config runs/.*/config.yaml", screen)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "opens", [[], ["--trainer.callbacks+=GradualUnfreezing", "--trainer.callbacks.every_epochs=1"]]
)
def test_a_trial_of_one_step_is_the_beginning_of_a_run(opens: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli = main([*QUICK, "--trainer.fast_dev_run=true", *opens])
    assert cli.trainer.global_step == 1 and not Path("runs").exists()
