"""What a run has where its config says nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.vision import main
from tests.conftest import write_folder
from tests.recipes.cli.test_mistakes import QUICK


@pytest.mark.slow
def test_a_learning_rate_finder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*QUICK, "--trainer.callbacks+=LearningRateFinder"])
    assert "gives every parameter group the same learning rate" in capsys.readouterr().err


@pytest.mark.slow
def test_what_the_command_line_adds_takes_the_place_of_the_configs(own_folder: Path) -> None:
    """README's rows, on a config that unfreezes already."""
    root = write_folder(own_folder / "pictures", (), each=8)
    small = ["--model.weights=null", "--model.backbone=resnet18", "--model.image_size=64", "--data.batch_size=4"]
    common = ["fit", "--config", "vision/folder_resnet50", f"--data.root={root}", "--data.num_workers=0", *small]
    common += ["--trainer.max_epochs=6", "--trainer.limit_train_batches=1", "--trainer.enable_progress_bar=false"]
    added = ["--trainer.callbacks+=GradualUnfreezing", "--trainer.callbacks.every_epochs=1"]
    kinds = [type(callback).__name__ for callback in main([*common, *added]).trainer.callbacks]
    assert kinds.count("GradualUnfreezing") == 1
    added = ["--trainer.callbacks+=Freeze", "--trainer.callbacks.train_last_blocks=1"]
    kinds = [type(callback).__name__ for callback in main([*common, *added]).trainer.callbacks]
    assert "Freeze" in kinds and "GradualUnfreezing" not in kinds
