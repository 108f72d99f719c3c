"""A checkpoint is enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.export import export
from tests.recipes.deploy.exports import fit_texts


@pytest.mark.slow
def test_a_checkpoint_alone_is_enough(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = fit_texts(own_folder)
    moved = Path(checkpoint.rename(own_folder / "model.ckpt"))
    for name in ("bert", "runs"):
        (own_folder / name).rename(own_folder / f"no more {name}")
    folder = export(moved, "onnx")
    assert folder == own_folder / "model_onnx"
    assert "made up at random, for the validation samples are not at hand (the checkpoint" in capsys.readouterr().out
    assert "made up at random" in (folder / "README.md").read_text()
