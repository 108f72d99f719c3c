"""README's commands and code run; its tables and those of benchmarks are what the results give."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.readme import PAGES, PARTS, filled
from recipes import text, vision
from recipes.cli import early as names
from tests.conftest import picture, write_folder
from tests.nets import Net, data
from tests.tiny_encoders import tiny_encoder

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


@pytest.mark.slow
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
    write_folder(own_folder / "path/to/new", (), each=2)
    done = subprocess.run([sys.executable, "-m", *following.split()], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (predictions,) = own_folder.glob("runs/vision/quickstart/*-predict/predictions.csv")
    assert len(predictions.read_text().splitlines()) == 7


@pytest.mark.slow
def test_the_text_quickstart_from_an_empty_folder(own_folder: Path) -> None:
    (first,) = (command for command in COMMANDS if command.endswith("--config text/quickstart"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *shlex.split(first)[1:], "--trainer.max_epochs=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(re.findall(r"test +accuracy (\d\.\d+)", done.stdout)[0]) >= 0.45, "the largest class is 0.17"


QUICK = "--trainer.max_epochs=1 --trainer.limit_train_batches=2 --trainer.enable_progress_bar=false"
TINY = {  # what makes a command of README small, and what needs no network
    "multitask/quickstart": f"{QUICK} --data.images=120",
    "my.yaml": f"{QUICK} --data.num_workers=0 --data.batch_size=4",
    "folder_resnet50": f"{QUICK} --model.weights=null --model.image_size=64 --data.num_workers=0 --data.batch_size=4",
    "csv_minilm": f"{QUICK} --model.encoder=docstrings_bert",
    "csv_bert": f"{QUICK} --model.encoder=docstrings_bert",
}
LEAVES = {  # what a command of README is typed for
    "recipes doctor": "runs/doctor/doctor.json",
    "<later>": "comparison.html",
    "new.csv": "new.csv",
    "new.parquet": "new.parquet",
    "recipes.export": "vision_onnx/README.md",
    "recipes copy": "mine.yaml",
}
ELSEWHERE = ("recipes.serve", "text/quickstart", "--max_drop")  # these have tests of their own


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name: pictures, texts, and a finished run of each recipe."""
    folder = tmp_path_factory.mktemp("reader")
    write_folder(folder / "path/to/images", (), each=8)
    write_folder(folder / "path/to/new", (), each=2)
    rows = "".join(f"word {n} of many,{n % 2}\n" for n in range(40))
    (folder / "my.csv").write_text(f"review,stars\n{rows}")
    (folder / "new.txt").write_text("one text\nanother\n")
    (folder / "my.yaml").write_text(re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[0])
    lines = ["image,breed,weight,outline"]
    for number in range(24):
        picture(number).save(folder / f"{number}.jpg")
        Image.new("L", (48, 40), number % 2).save(folder / f"{number}.png")
        lines.append(f"{number}.jpg,{('pug', 'collie')[number % 2]},{number or ''},{f'{number}.png' if number else ''}")
    (folder / "pets.csv").write_text("\n".join(lines) + "\n")
    root = f"--trainer.default_root_dir={folder}"
    for number in (1, 2):
        run = vision.main(["fit", "--config", "vision/quickstart", *QUICK.split(), root])
        run.folder.rename(folder / f"run{number}")
    csv = [f"--data.train_file={folder / 'my.csv'}", "--data.text_column=review", "--data.label_column=stars"]
    words = text.main(["fit", "--config", "text/csv_minilm", *TINY["csv_minilm"].split(), *csv, root])
    shutil.copy(folder / "run1" / "checkpoints" / "best.ckpt", folder / "vision.ckpt")
    shutil.copy(words.folder / "checkpoints" / "best.ckpt", folder / "text.ckpt")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("python -m recipes") and not any(w in c for w in ELSEWHERE)]
)
def test_every_command_runs(
    command: str, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(prepared)
    made = command.replace("runs/vision/quickstart/<time>", "run1").replace("runs/vision/quickstart/<later>", "run2")
    made = made.replace("best.ckpt", "text.ckpt" if "recipes.text" in made else "vision.ckpt")
    made += "".join(f" {options}" for name, options in TINY.items() if name in made and " fit " in made)
    module, *arguments = shlex.split(made)[2:]
    with contextlib.suppress(SystemExit) if "doctor" in arguments else contextlib.nullcontext():
        importlib.import_module("recipes.__main__" if module == "recipes" else module).main(arguments)
    assert capsys.readouterr().out.strip(), "it says what it did"
    for word, file in LEAVES.items():
        assert word not in command or (prepared / file).is_file(), file


ROWS = {  # of README's tables of what to add: what I want, for which recipe, and the options
    recipe: re.findall(r"^\| (?!I want to)(.+?) \| `(--.+?)`", README.split(title)[1].split("\n## ")[0], re.MULTILINE)
    for recipe, title in (("vision", "## Your own images"), ("text", "## Your own texts"))
}
TRIED = {  # configs, and what makes their runs small
    "vision/quickstart": "",
    "vision/folder_resnet50": "--data.root=path/to/images --model.weights=null --model.image_size=64",
    "vision/folder_mobilenet_v3": "--data.root=path/to/images --model.weights=null --model.image_size=64",
    "vision/folder_inception_v3": "--data.root=path/to/images --model.weights=null",
    "text/quickstart": "",
    "text/csv_minilm": "--data.train_file=rated.csv --model.encoder=docstrings_bert",
    "text/csv_distilbert": "--data.train_file=rated.csv --model.encoder=distilbert --data.max_length=32",
}
FITTED = ("vision/quickstart", "vision/folder_mobilenet_v3", "text/csv_minilm")  # the others would take minutes
PLANNED = set(TRIED) - {"vision/folder_mobilenet_v3", "text/csv_minilm"}  # a fit builds what is planned ...
CASES = [
    (config, options if not what.startswith("...") else f"{ROWS[recipe][row - 1][1]} {options}")
    for config in TRIED
    for recipe in [config.split("/")[0]]
    for row, (what, options) in enumerate(ROWS[recipe])
    if not (config == "text/quickstart" and re.search("text_column|problem_type|head mlp", options))  # Docstrings, mean
    and not ("fuse_blocks" in options and re.search("mobilenet|inception", config))  # which call their blocks otherwise
]


def options_for(config: str, options: str) -> list[str]:
    """A row of README's as the end of a command line."""
    few = "--trainer.accelerator=cpu --trainer.enable_progress_bar=false --data.batch_size=4 --data.val_share=0.2"
    return shlex.split(f"{TRIED[config]} {few} {options}")


@pytest.fixture(scope="module")
def at_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, a table of texts, a tiny encoder."""
    folder = tmp_path_factory.mktemp("rows")
    write_folder(folder / "path/to/images", (), each=20)
    rows = "".join(f"question {n},answer {n},text {n} of many,{n % 2}\n" for n in range(80))
    (folder / "rated.csv").write_text(f"question,answer,text,label\n{rows}")
    tiny_encoder(folder / "distilbert", "distilbert")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("config", "options"), CASES)
def test_every_row_fits_every_config_it_stands_beside(
    config: str, options: str, at_hand: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(at_hand)
    if any(word in options for word in ("WandbLogger", "nyu-mll")):
        pytest.skip("needs an extra, or the network")
    fitted = config in FITTED and not re.search("ddp|teacher", options)  # a plan asks no teacher
    if config in PLANNED or not fitted:  # ... and the same rows on the same data are planned with another net
        importlib.import_module("recipes.__main__").main(["plan", config, *options_for(config, options)])
        assert "optimiser steps per epoch" in capsys.readouterr().out
    if fitted:
        steps = 12 if "Unfreezing" in options or "accumulate" in options else 2  # all phases must open
        once = [f"--trainer.limit_train_batches={steps}", "--trainer.limit_val_batches=2", "--trainer.max_epochs=1"]
        recipe = importlib.import_module(f"recipes.{config.split('/')[0]}")
        cli = recipe.main(["fit", "--config", config, *options_for(config, options), *once])
        assert cli.trainer.global_step >= (2 if "tokens_per_batch" not in options else 1)  # all fit into a batch


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
