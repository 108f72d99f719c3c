"""Configs are found by name, and what a config can name is known."""

from __future__ import annotations

from pathlib import Path

import pytest

import callbacks
import datamodules
from recipes.cli.parser import RecipeParser, nameable
from recipes.parts.muon import MuonWithAdamW
from recipes.parts.schedules import Cosine, Decay, Schedule
from recipes.vision import main


def test_all_that_a_config_can_name_is_offered_and_no_base_is() -> None:
    found = nameable()
    classes = [getattr(callbacks, name) for name in callbacks.__all__ if isinstance(getattr(callbacks, name), type)]
    assert set(found) >= {
        *classes,
        *(getattr(datamodules, name) for name in datamodules.__all__),
        MuonWithAdamW,
        Cosine,
    }
    assert not {Schedule, Decay} & set(found)


def test_a_file_of_ones_own_wins_over_a_shipped_config(own_folder: Path) -> None:
    (own_folder / "vision").mkdir()
    (own_folder / "vision" / "quickstart.yaml").write_text("model: {backbone: resnet14}\ndata: {class_path: Digits}\n")
    cli = main(["fit", "--config", "vision/quickstart"], plan=True)
    assert cli.model.hparams["backbone"] == "resnet14"


def test_configs_merge_from_left_to_right(own_folder: Path) -> None:
    Path("mine.yaml").write_text("trainer: {max_epochs: 2}\nmodel: {layer_decay: 0.5}\n")
    options = ["--config", "vision/quickstart", "--config", "mine.yaml", "--model.layer_decay=0.7"]
    cli = main(["fit", *options], plan=True)
    assert cli.trainer.max_epochs == 2 and cli.model.layer_decay == 0.7
    assert cli.model.hparams["backbone"] == "resnet8", "what the second does not say, the first does"


def test_an_abbreviated_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "vision/quickstart", "--trainer.max_epoch=3"])
    assert "key --trainer.max_epoch is not known; did you mean '--trainer.max_epochs'?" in capsys.readouterr().err
    assert RecipeParser.recipe == "vision"
