"""python -m recipes: quick, complete, and helpful."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from recipes.__main__ import main
from recipes.cli import early as names


def output(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main(args)
    return capsys.readouterr().out


def test_ls_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    from recipes.parts.backbones.families import FAMILIES

    screen = output(capsys, "ls")
    for word in ("vision", "Digits", "ImageFolder", "PredictionWriter", *names.config_names()):
        assert word in screen
    for family in FAMILIES:
        for name in family.names:
            assert f" {name} " in screen.replace("\n", " "), name


def test_ls_filters(capsys: pytest.CaptureFixture[str]) -> None:
    assert "resnet50" not in output(capsys, "ls", "configs", "cifar10_v")
    screen = output(capsys, "ls", "convnext")
    assert "convnext_tiny" in screen and "Digits" not in screen


@pytest.mark.parametrize("args", [["ls"], ["--help"], ["show", "vision/quickstart"], ["show", "ImageFolder"]])
def test_light_commands_import_nothing_heavy(args: list[str]) -> None:
    code = f"""
import sys
from recipes.__main__ import main
try:
    main({args!r})
except SystemExit:
    pass
heavy = {{"torch", "lightning", "numpy", "jsonargparse", "rich"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("args", [["--help"], ["fitt"], ["fit", "--config", "vision/quickstar"]])
def test_help_and_slips_in_a_name_come_before_the_heavy_imports(args: list[str]) -> None:
    run = "sys.argv[0] = 'recipes.vision'; runpy.run_module('recipes.vision', run_name='__main__')"
    probe = f"import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); {run}"
    done = subprocess.run([sys.executable, "-c", probe, *args], capture_output=True, text=True)
    assert done.stdout.strip().endswith("False")
    assert done.returncode == (0 if args == ["--help"] else 2)
    assert "Traceback" not in done.stderr


def test_a_folder_that_hides_ours_is_told(own_folder: Path) -> None:
    (own_folder / "callbacks").mkdir()
    (own_folder / "callbacks" / "__init__.py").touch()
    command = [sys.executable, "-m", "recipes.vision", "fit", "--config", "vision/quickstart"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "hides this collection's own 'callbacks' package" in done.stderr and "python -P -m" in done.stderr
    assert "Traceback" not in done.stderr


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "show", "vision/quickstart") == names.find_config("vision/quickstart").read_text()
    assert "root/train/ants/a.jpg" in output(capsys, "show", "ImageFolder")
    assert "Fine-tune an image classifier" in output(capsys, "show", "vision")
    assert "299" in output(capsys, "show", "inception_v3")
    with pytest.raises(SystemExit):
        main(["show", "ImageFoldr"])
    assert "did you mean 'ImageFolder'?" in capsys.readouterr().err


def test_copy(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    assert "fit --config mine.yaml" in output(capsys, "copy", "vision/quickstart", "mine.yaml")
    assert (own_folder / "mine.yaml").read_text() == names.find_config("vision/quickstart").read_text()
    with pytest.raises(SystemExit):
        main(["copy", "vision/quickstart", "mine.yaml"])
    assert "exists already" in capsys.readouterr().err


def test_plan_shows_groups_rates_and_steps(capsys: pytest.CaptureFixture[str]) -> None:
    screen = output(capsys, "plan", "vision/quickstart")
    assert "573 training samples (counted)" in screen and "17 optimiser steps per epoch, 204 in all" in screen
    rows = {line.split()[0]: line.split() for line in screen.splitlines() if line.split()}
    assert rows["head"][-2] == "0.00976", "the head's rate at the end of the warm-up, when the cosine has begun to fall"
    assert float(rows["layer3"][-2]) == pytest.approx(0.00976 * 0.7, rel=1e-3)
    assert float(rows["stem"][-2]) == pytest.approx(0.00976 * 0.7**4, rel=1e-2)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--data.batch_size=1000", "don't fill one batch"),
        ("--model.schedule.warmup=1.5", "a share of the run below 1"),
        ("--model.schedule.warmup=0.1", "LRWarmup and the warm-up of"),
        ("--model.lr_multipliers={heed: 2}", "heed"),
        ("--model.backbone=resnet5", "did you mean 'resnet50'?"),
    ],
)
def test_plan_refuses_what_cannot_work(option: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "vision/quickstart", option])
    assert words in capsys.readouterr().err
