"""What there is can be listed, shown and copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.__main__ import main
from recipes.cli import early as names
from recipes.cli.catalogue import recipe_of


def test_ls_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    from recipes.parts.backbones.families import FAMILIES

    screen = output(capsys, "ls")
    for word in ("vision", "Digits", "ImageFolder", "PredictionWriter", *names.config_names()):
        assert word in screen
    for family in FAMILIES:
        for name in family.names:
            assert f" {name} " in screen.replace("\n", " "), name


def test_ls_filters(capsys: pytest.CaptureFixture[str]) -> None:
    assert "resnet50" not in output(capsys, "ls", "configs", "cifar10_v")
    screen = output(capsys, "ls", "convnext")
    assert "convnext_tiny" in screen and "Digits" not in screen


@pytest.mark.slow
def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "show", "vision/quickstart") == names.find_config("vision/quickstart").read_text()
    assert "root/train/ants/a.jpg" in output(capsys, "show", "ImageFolder")
    assert "Fine-tune an image classifier" in output(capsys, "show", "vision")
    assert "299" in output(capsys, "show", "inception_v3")
    with pytest.raises(SystemExit):
        main(["show", "ImageFoldr"])
    assert "did you mean 'ImageFolder'?" in capsys.readouterr().err


def test_copy(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    assert "fit --config mine.yaml" in output(capsys, "copy", "vision/quickstart", "mine.yaml")
    assert (own_folder / "mine.yaml").read_text() == names.find_config("vision/quickstart").read_text()
    with pytest.raises(SystemExit):
        main(["copy", "vision/quickstart", "mine.yaml"])
    assert "exists already" in capsys.readouterr().err


def output(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main(args)
    return capsys.readouterr().out


def test_a_folder_called_export_is_no_recipe(own_folder: Path) -> None:
    (own_folder / "export").mkdir()
    (own_folder / "export" / "mine.yaml").touch()
    assert recipe_of("export/mine.yaml") == "vision"
    assert recipe_of("text/quickstart") == "text"
