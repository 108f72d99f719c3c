"""A run's folder, and what is known of a run in the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.__main__ import main as command
from recipes.cli.runs import check_writable
from recipes.vision import main
from tests.recipes.cli.quick import QUICK


@pytest.mark.slow
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
