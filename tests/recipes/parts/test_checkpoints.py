"""What lies in a checkpoint is read without running code in it, and a glance reads no tensor twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.parts.checkpoints import data_of, encoder_files, encoder_of, glance, load_checkpoint, run_of_checkpoint


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_what_is_no_checkpoint_of_tensors_is_refused_and_not_run(own_folder: Path) -> None:
    torch.save({"state_dict": Harmful()}, "harmful.ckpt")
    torch.save({"state_dict": {"w": torch.ones(1000)}}, "whole.ckpt")
    Path("half.ckpt").write_bytes(Path("whole.ckpt").read_bytes()[:900])
    for name in ("harmful.ckpt", "half.ckpt"):
        with pytest.raises(ValueError, match=f"checkpoint {name} cannot be read safely"):
            load_checkpoint(name)
    assert not Path("ran").exists()
    with pytest.raises(FileNotFoundError, match="no checkpoint none.ckpt: --ckpt_path must name a .ckpt file"):
        load_checkpoint("none.ckpt")


def test_a_glance_sees_a_file_that_changed(own_folder: Path) -> None:
    torch.save({"epoch": 1, "state_dict": {"w": torch.arange(3)}}, "it.ckpt")
    first = glance("it.ckpt")
    assert glance("it.ckpt") is first and first["state_dict"]["w"].tolist() == [0, 1, 2]
    torch.save({"epoch": 22, "state_dict": {"w": torch.arange(5)}}, "other.ckpt")
    Path("other.ckpt").replace("it.ckpt")
    assert glance("it.ckpt")["epoch"] == 22


def test_data_and_encoder_are_found_whatever_their_names() -> None:
    data = {"class_names": ["a", "b"], "tokenizer_files": {"tokenizer.json": "{}"}}
    checkpoint = {"epoch": 3, "state_dict": {}, "MyData": data, "recipe": {"encoder": {"model_type": "bert"}}}
    assert data_of(checkpoint) == data
    assert data_of({"epoch": 3}) == {}
    assert json.loads(encoder_files(checkpoint)["config.json"]) == {"model_type": "bert"}
    assert encoder_files({"MyData": data}) == {}
    folder = encoder_of(checkpoint)
    assert folder is not None and sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]
    assert encoder_of(checkpoint) == folder
    assert encoder_of({"recipe": checkpoint["recipe"]}) is None, "without a tokenizer it is of no use"


def test_a_run_is_known_by_its_config(own_folder: Path) -> None:
    (own_folder / "run" / "checkpoints").mkdir(parents=True)
    path = "run/checkpoints/best.ckpt"
    assert run_of_checkpoint(path) is None and run_of_checkpoint(None) is None
    (own_folder / "run" / "config.yaml").touch()
    assert run_of_checkpoint(path) == Path("run")
