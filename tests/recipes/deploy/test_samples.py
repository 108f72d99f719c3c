"""Samples to compare on are what can be read of the run's own data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.export import export
from tests.conftest import picture
from tests.recipes.deploy.exports import fit_texts
from tests.tiny_encoders import write_csv


@pytest.mark.slow
def test_samples_are_what_can_be_read(checkpoint: Path, own_folder: Path) -> None:
    given = own_folder / "given" / "deeper"
    given.mkdir(parents=True)
    picture(0).save(given / "a.jfif", "JPEG")
    Image.fromarray(np.full((40, 40), 30_000, np.uint16)).save(given / "b.png")
    for name in ("._b.png", "notes.txt", "broken.png"):
        (given / name).write_bytes(b"Mac OS X")
    folder = export(checkpoint, "safetensors", given=own_folder / "given")
    assert json.loads((folder / "facts.json").read_text())["check"]["samples"] == 2
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere: expected one of images"):
        export(checkpoint, "safetensors", Path("made"), given=own_folder / "nowhere")


@pytest.mark.slow
def test_other_data_under_the_same_path_is_not_taken_for_the_runs(own_folder: Path) -> None:
    checkpoint = fit_texts(own_folder)
    write_csv(own_folder / "train.csv", 80)
    where = json.loads((export(checkpoint, "safetensors") / "facts.json").read_text())["check"]["where"]
    assert "made up at random" in where and "same data" in where
