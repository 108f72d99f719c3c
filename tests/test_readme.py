"""README's commands and code run; its tables and those of benchmarks are what the results give."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from benchmarks.readme import PAGES, PARTS, filled
from recipes import names
from tests.nets import Net, data

README = (Path(__file__).parents[1] / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def test_the_tables_are_those_of_the_results() -> None:
    for page in PAGES:
        assert filled(page.read_text()) == page.read_text(), "python -m benchmarks.readme"
    there = [name for page in PAGES for name in re.findall(r"<!-- (\w+) -->", page.read_text()) if name != "end"]
    assert sorted(there) == sorted(PARTS), "each table once"


@pytest.fixture
def your_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project of the reader, whose module and data the examples use."""
    project = types.ModuleType("your_project")
    vars(project).update(Net=Net, train_loader=data(), val_loader=data(8, seed=1))
    monkeypatch.setitem(sys.modules, "your_project", project)


@pytest.mark.filterwarnings("ignore")  # a reader's Trainer has a bar, a logger and few workers
@pytest.mark.parametrize("number", range(len(CODE)))
def test_the_code_runs(number: int, capsys: pytest.CaptureFixture[str], your_project: None) -> None:
    assert len([line for line in CODE[number].splitlines() if line]) <= 12
    exec(compile(CODE[number], f"README block {number}", "exec"), {"__name__": "readme"})
    assert "Traceback" not in capsys.readouterr().err


def test_the_first_command_from_an_empty_folder(own_folder: Path) -> None:
    first = COMMANDS[0].split("&&")[-1].strip()
    assert first.startswith(".venv/bin/python -m recipes.vision")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *shlex.split(first)[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    accuracy = float(re.findall(r"test +accuracy (\d\.\d+)", done.stdout)[0])
    assert accuracy >= 0.97
    following = re.findall(r"next +python -m (.+)", done.stdout)[0]
    done = subprocess.run([sys.executable, "-m", *following.split()], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (predictions,) = own_folder.glob("runs/vision/quickstart/*-predict/predictions.csv")
    assert len(predictions.read_text().splitlines()) == 180


def test_the_text_quickstart_from_an_empty_folder(own_folder: Path) -> None:
    (first,) = (command for command in COMMANDS if command.endswith("--config text/quickstart"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *shlex.split(first)[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(re.findall(r"test +accuracy (\d\.\d+)", done.stdout)[0]) >= 0.57, "more than a count of words finds"


def test_every_config_and_key_that_is_named_exists() -> None:
    for name in re.findall(r"(?:vision|text|mlm)/[a-z0-9_]+", README):
        assert (names.CONFIGS / f"{name}.yaml").is_file(), name
    ci = (Path(__file__).parents[1] / ".ci" / "run").read_text()
    test_command = next(command for command in COMMANDS if "pytest" in command)
    assert test_command.removeprefix(".venv/bin/python -m ") in ci, "CI runs README's test command"


def test_every_test_that_is_named_exists() -> None:
    home = Path(__file__).parent
    named = re.findall(r"`([a-z_/]+\.py)::(test_\w+)`", (home / "README.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (home / file).read_text(), f"{file}::{test}"
