"""What tests of several commands start from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from recipes.deploy import formats
from tests.recipes.deploy.exports import NETS, NEW, fit_digits, fit_pictures


@pytest.fixture(autouse=True)
def _undrawn(undrawn: None) -> None:
    """No test of a command looks at a report's figures."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a small net that has seen two batches."""
    folder, home = tmp_path_factory.mktemp("trained"), Path.cwd()
    os.chdir(folder)
    fit_pictures(folder, *NETS["resnet8"])
    os.chdir(home)
    return folder


@pytest.fixture
def checkpoint(trained: Path, own_folder: Path) -> Path:
    """Its last checkpoint, in a copy of the run."""
    shutil.copytree(trained / "runs", own_folder / "runs")
    (found,) = own_folder.glob("runs/*/*/*/checkpoints/last.ckpt")
    return found


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a net of the digits 0 to 4, and one that went on from it to 5 to 9."""
    folder, home = tmp_path_factory.mktemp("digits"), Path.cwd()
    os.chdir(folder)
    old = fit_digits("fit", "--config=vision/quickstart_pretrain", *NEW[2:-1], "--trainer.max_epochs=8")
    fit_digits(*NEW, f"--model.weights={old / 'checkpoints' / 'best.ckpt'}")
    os.chdir(home)
    return folder


@pytest.fixture
def old_and_new(digits: Path, own_folder: Path) -> tuple[str, str]:
    """Folders of the two runs, copies."""
    shutil.copytree(digits / "runs", own_folder / "runs")
    old, new = (next(Path("runs/vision", name).iterdir()) for name in ("quickstart_pretrain", "quickstart"))
    return str(old), str(new)


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forms of one checkpoint are written from one program, which takes seconds to trace."""
    trace, made = formats.program_of, []

    def program_of(*args: Any) -> Any:
        made.extend([] if made else [trace(*args)])
        return made[0]

    monkeypatch.setattr(formats, "program_of", program_of)
