"""Every shipped config: found by name, planned, and run for two steps on data in the true on-disk format."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml

from recipes.__main__ import main as command
from recipes.cli import early as names

from .conftest import write_folder, write_parquet
from .official_archives import write_flowers102, write_oxford_pets, write_stanford_dogs
from .tiny_encoders import tiny_encoder, write_csv, write_text_parquet

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


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_plan_without_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = (
        ["--data.texts.packages=[]"] if name == "mlm/quickstart_pretrain" else []
    )  # else it reads all that is installed
    command(["plan", name, *few])
    screen = capsys.readouterr().out
    assert "optimiser steps per epoch" in screen and "head" in screen and "weight decay" in screen


OFFICIAL = {
    "datamodules.StanfordDogs": write_stanford_dogs,
    "datamodules.Flowers102": write_flowers102,
    "datamodules.OxfordPets": write_oxford_pets,
}


def data_options(name: str, folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    config = yaml.safe_load(names.find_config(name).read_text())
    data = config["data"]["class_path"]
    if data == "datamodules.CIFAR10":
        return [f"--data.root={folder / 'cifar10'}"]
    if data in OFFICIAL:
        OFFICIAL[data](folder / "official", patch)
        return [f"--data.root={folder / 'official'}"]
    if data == "datamodules.ImageFolder":
        return [f"--data.root={write_folder(folder / 'pictures', each=6)}"]
    if data == "datamodules.HuggingFaceImages":
        files = {
            s: str(write_parquet(folder / f"{s}.parquet", 24, size=64, seed=n))
            for n, s in enumerate(("train", "validation"))
        }
        return ["--data.path=parquet", f"--data.data_files={files}"]
    if data == "datamodules.ParquetImages":
        for number in range(2):
            write_parquet(folder / f"train-{number}.parquet", 18, size=64, seed=number, group=6)
        return [f"--data.train_files={folder / 'train-*.parquet'}"]
    if data == "datamodules.TextFiles":
        return [f"--data.train_file={write_csv(folder / 'texts.csv', 40)}"]
    if data == "datamodules.HuggingFaceTexts":
        given = config["data"]["init_args"]
        splits = ["train", *(given[key] for key in ("val_split", "test_split") if key in given)]
        column = given.get("text_column", "text")
        files = {split: str(write_text_parquet(folder / f"{split}.parquet", 30, column)) for split in splits}
        return ["--data.path=parquet", "--data.name=null", f"--data.data_files={files}"]
    if data == "datamodules.MaskedTexts":
        texts = config["data"]["init_args"]["texts"]["class_path"]
        return {
            "datamodules.TextFiles": [f"--data.texts.train_file={write_csv(folder / 'texts.csv', 40)}"],
            "datamodules.PackageDocstrings": ["--data.texts.packages=[]"],
        }.get(texts, [])
    return []


def model_options(name: str, folder: Path) -> list[str]:
    """Small pictures and no weights; of an encoder on the hub a tiny one of the same architecture."""
    recipe = names.find_config(name).parent.name
    model = yaml.safe_load(names.find_config(name).read_text())["model"]
    if recipe == "multitask":
        return ["--data.num_workers=0", "--model.weights=null", "--model.image_size=64"]
    if recipe == "vision":
        size = [] if "inception" in name or "quickstart" in name else ["--model.image_size=64"]
        return ["--data.num_workers=0", "--model.weights=null", *size]
    if "encoder" not in model or "/" not in model["encoder"]:
        return []
    kind = next(
        kind for kind in ("distilbert", "albert", "roberta", "bert") if kind in model["encoder"].lower() + "bert"
    )
    return [f"--model.encoder={tiny_encoder(folder / kind, kind)}", "--data.max_length=32"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps_a_validation_and_a_test(
    name: str, own_folder: Path, cifar10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--data.batch_size=4", "--data.eval_batch_size=4", *model_options(name, own_folder)]
    once = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    recipe = importlib.import_module(f"recipes.{names.find_config(name).parent.name}")
    if "teacher:" in names.find_config(name).read_text():  # the newest run is to teach
        recipe.main(["fit", "--config", name.replace("distill_", ""), *small, *once, *quiet])
    test = [] if name.startswith("mlm/") else ["--test", "--trainer.limit_test_batches=1"]
    cli = recipe.main(
        [
            *("fit", *test, "--config", name, "--trainer.accelerator=cpu"),
            *(*data_options(name, own_folder, monkeypatch), *small, *once, *quiet),
        ]
    )
    assert cli.trainer.global_step == 2
    best = cli.model.monitor[0]
    assert (best.replace("val/", "test/") if test else best) in cli.trainer.callback_metrics
    assert (Path(cli.trainer.log_dir or "") / "checkpoints" / "best.ckpt").is_file()


def test_a_local_file_wins_over_a_shipped_one(own_folder: Path) -> None:
    (own_folder / "vision").mkdir()
    (own_folder / "vision" / "quickstart.yaml").write_text("seed_everything: 7\n")
    assert names.find_config("vision/quickstart") == Path("vision/quickstart.yaml")
