"""What needs no heavy import is said before there is one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from recipes.__main__ import main as command
from recipes.cli import early as names


@pytest.mark.parametrize("args", [["--help"], ["fitt"], ["fit", "--config", "vision/quickstar"]])
def test_help_and_slips_in_a_name_come_before_the_heavy_imports(args: list[str]) -> None:
    run = "sys.argv[0] = 'recipes.vision'; runpy.run_module('recipes.vision', run_name='__main__')"
    probe = f"import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); {run}"
    done = subprocess.run([sys.executable, "-c", probe, *args], capture_output=True, text=True)
    assert done.stdout.strip().endswith("False")
    assert done.returncode == (0 if args == ["--help"] else 2)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_folder_that_hides_ours_is_told(own_folder: Path) -> None:
    (own_folder / "callbacks").mkdir()
    (own_folder / "callbacks" / "__init__.py").touch()
    command = [sys.executable, "-m", "recipes.vision", "fit", "--config", "vision/quickstart"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "hides this collection's own 'callbacks' package" in done.stderr and "python -P -m" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
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
