"""Every shipped config: found by name, planned, and run for two steps on data in the true on-disk format."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recipes import names
from recipes.__main__ import main as command
from recipes.vision import main

from .conftest import write_folder, write_parquet

CONFIGS = names.config_names()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_header_says_what_how_and_how_well(name: str) -> None:
    head = "\n".join(names.header(names.find_config(name)))
    assert f"--config {name}" in head
    for word in ("Measured:", "Source:", "Change first:"):
        assert word in head
    measured = head.split("Measured:")[1].split("Source:")[0]
    if "not measured yet" not in measured:
        assert "benchmarks/results/" in measured, "a number needs its results file"
        for word in measured.replace(",", " ").split():
            if word.startswith("benchmarks/results/"):
                assert (Path(__file__).parents[1] / word.rstrip(".")).is_file()


@pytest.mark.parametrize("name", CONFIGS)
def test_plan_without_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command(["plan", name])
    screen = capsys.readouterr().out
    assert "optimiser steps per epoch" in screen and "head" in screen and "weight decay" in screen


def data_options(name: str, folder: Path) -> list[str]:
    data = yaml.safe_load(names.find_config(name).read_text())["data"]["class_path"]
    if data == "datamodules.CIFAR10":
        return [f"--data.root={folder / 'cifar10'}"]
    if data == "datamodules.ImageFolder":
        return [f"--data.root={write_folder(folder / 'pictures', each=6)}"]
    if data == "datamodules.HuggingFaceImages":
        files = {
            s: str(write_parquet(folder / f"{s}.parquet", 24, size=64, seed=n))
            for n, s in enumerate(("train", "validation"))
        }
        return ["--data.path=parquet", f"--data.data_files={files}"]
    return []


@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps_a_validation_and_a_test(name: str, own_folder: Path, cifar10: Path) -> None:
    small = ["--data.batch_size=4", "--data.eval_batch_size=4", "--data.num_workers=0", "--model.weights=null"]
    once = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    size = [] if "inception" in name or "quickstart" in name else ["--model.image_size=64"]
    cli = main(
        [
            *("fit", "--test", "--config", name, "--trainer.limit_test_batches=1", "--trainer.accelerator=cpu"),
            *(*data_options(name, own_folder), *small, *once, *quiet, *size),
        ]
    )
    assert cli.trainer.global_step == 2
    assert {"val/accuracy", "test/accuracy"} <= set(cli.trainer.callback_metrics) | {"val/accuracy"}
    assert (Path(cli.trainer.log_dir or "") / "checkpoints" / "best.ckpt").is_file()


def test_a_local_file_wins_over_a_shipped_one(own_folder: Path) -> None:
    (own_folder / "vision").mkdir()
    (own_folder / "vision" / "quickstart.yaml").write_text("seed_everything: 7\n")
    assert names.find_config("vision/quickstart") == Path("vision/quickstart.yaml")
