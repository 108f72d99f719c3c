"""python -m recipes: quick, complete, and helpful."""

from __future__ import annotations

import subprocess
import sys

import pytest


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
