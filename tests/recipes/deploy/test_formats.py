"""Encoders of every kind in ONNX."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.export import export
from tests.recipes.deploy.exports import fit_texts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deberta-v2", "distilbert", "modernbert"])
def test_every_encoder_in_onnx(own_folder: Path, kind: str) -> None:
    checkpoint = fit_texts(own_folder, kind=kind)
    folder = export(checkpoint, "onnx", out=own_folder / "made")
    checked = json.loads((folder / "facts.json").read_text())["check"]
    assert checked["samples"] == 18 and checked["where"] == "of the run's validation split"
