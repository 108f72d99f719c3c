"""Checkpoints of only what trains: resumed, predicted with, exported; and refused beside other weights."""

from __future__ import annotations

import csv
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks import GradualUnfreezing
from recipes.deploy.restored import restore
from recipes.export import export
from recipes.mlm import main as mlm
from recipes.parts.checkpoints import load_checkpoint
from recipes.parts.encoders import build_encoder
from recipes.parts.peft import Peft, adapters
from recipes.text import main as text
from recipes.vision import VisionClassifier
from recipes.vision import main as vision
from tests.nets import quiet, same
from tests.recipes.deploy.exports import QUIET, fit_texts
from tests.tiny_encoders import tiny_encoder, write_csv

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The dirpath has changed")]
LORA = ["--config=strategy/lora", "--model.peft.rank=2"]
DIGITS = ["fit", "--config=vision/quickstart", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
KEEP = [
    *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"),
    *("--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.dirpath=steps"),
    "--trainer.callbacks.filename={step}",
]


def texts(folder: Path) -> list[str]:
    tiny_encoder(folder / "bert")
    file = write_csv(folder / "train.csv", 60)
    data = ["--data=TextFiles", f"--data.train_file={file}", "--data.val_share=0.3", "--data.max_length=32"]
    quiet = [word for word in QUIET if "limit" not in word and "max_epochs" not in word]
    return ["fit", *LORA, *data, f"--model.encoder={folder / 'bert'}", "--data.batch_size=8", *quiet]


def test_lora_with_gradual_unfreezing_is_resumed_bit_for_bit(own_folder: Path) -> None:
    """With dropout, from the middle of a phase, from its last step and in the last."""
    options = [*texts(own_folder), "--config=strategy/gradual", "--trainer.max_epochs=4", "--model.peft.dropout=0.1"]
    whole = text([*options, *KEEP])
    opened = next(c for c in whole.trainer.callbacks if type(c).__name__ == "GradualUnfreezing").opening_steps  # type: ignore[attr-defined]
    assert len(opened) == 4 and whole.trainer.global_step == 24
    for step in (2, opened[2], 20):
        resumed = text([*options, f"--ckpt_path=steps/step={step}.ckpt"])
        assert same(whole.model, resumed.model), step


class Shares(torch.utils.data.IterableDataset[Any]):
    """32 images, each rank every second of them."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ranks else (0, 1)
        for index in range(rank, 32, world):
            image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(index))
            yield {"image": image, "label": torch.tensor(index % 3), "index": torch.tensor(index)}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_adapters_of_two_ranks_are_those_of_one() -> None:
    """Blocks open while both run; every sample is seen once in a step."""
    states = []
    for devices in (1, 2):
        torch.manual_seed(0)
        options: dict[str, Any] = {"backbone": "resnet8", "image_size": 8, "weights": "digits_0_4_resnet8"}
        optimizer = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        model = VisionClassifier(3, peft=Peft("lora", rank=2), optimizer=optimizer, **options)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = quiet(
            callbacks=[GradualUnfreezing(every_steps=2)],
            max_epochs=4,
            max_steps=16,
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
        )
        trainer.fit(model, torch.utils.data.DataLoader(Shares(), batch_size=8 // devices))
        states.append(model.state_dict())
    one, two = states
    moved = [name for name, value in one.items() if name in start and not torch.equal(value, start[name])]
    assert {name.split(".")[2] for name in moved if "lora_B" in name} == {"layer1", "layer2", "layer3"}
    assert not [name for name in moved if "lora_" not in name and not name.startswith("head")]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_of_adapters_is_small_and_does_all_that_others_do(own_folder: Path) -> None:
    tiny_encoder(own_folder / "bert", vocab_size=120)
    checkpoint = fit_texts(own_folder, *LORA, "--model.peft.start=pissa")
    state = load_checkpoint(checkpoint)["state_dict"]
    assert not [name for name in state if "base_layer" in name or "embeddings" in name]
    assert (checkpoint.parents[1] / "hf" / "adapter_config.json").is_file()

    restored = restore(checkpoint)
    samples = ["a fine and warm film", "a dull story"]
    logits = restored.logits(samples)
    restored.merge()
    assert not adapters(restored.net)
    torch.testing.assert_close(restored.logits(samples), logits, atol=1e-5, rtol=0)

    moved = own_folder / "elsewhere"
    shutil.move(own_folder / "bert", moved)
    with pytest.raises(
        FileNotFoundError, match="holds only what was trained beside the weights .*bert; say with --base"
    ):
        restore(checkpoint)
    torch.testing.assert_close(restore(checkpoint, str(moved)).logits(samples), logits, atol=0, rtol=0)
    for form, merged in (("hf", False), ("hf", True), ("safetensors", False), ("onnx", False)):
        export(checkpoint, form, own_folder / f"{form}{merged}", count=4, base=str(moved), merged=merged)
    assert (own_folder / "hfFalse" / "adapter_model.safetensors").is_file()
    assert (own_folder / "hfTrue" / "model.safetensors").is_file()

    (own_folder / "new.txt").write_text("a fine film\na dull film\n")
    new = [f"--data.predict_file={own_folder / 'new.txt'}", "--predictions=new.csv", f"--model.encoder={moved}"]
    text(["predict", f"--ckpt_path={checkpoint}", *new])
    with (own_folder / "new.csv").open() as file:
        probabilities = [float(row["probability"]) for row in csv.DictReader(file)]
    expected = restore(checkpoint, str(moved)).logits(["a fine film", "a dull film"]).softmax(1).amax(1)
    assert probabilities == pytest.approx(expected.tolist(), abs=1e-4)

    torch.manual_seed(5)
    other = build_encoder(str(moved), num_classes=2, pretrained=False)
    other.save_pretrained(own_folder / "other")
    shutil.copy(moved / "tokenizer.json", own_folder / "other")
    with pytest.raises(ValueError, match="beside the weights .*bert, and these are others, of .*other"):
        restore(checkpoint, str(own_folder / "other"))


def test_bottlenecks_are_exported_as_they_are(own_folder: Path) -> None:
    checkpoint = fit_texts(own_folder, "--config=strategy/adapter", "--model.peft.rank=2")
    export(checkpoint, "onnx", own_folder / "onnx", count=4)
    for form, merged in (("safetensors", False), ("hf", True)):
        with pytest.raises(ValueError, match="no plain weights can hold what adapter learnt; take torch or onnx"):
            export(checkpoint, form, own_folder / form, count=4, merged=merged)
    with pytest.raises(ValueError, match="the library peft has no adapter for encoders"):
        export(checkpoint, "hf", own_folder / "hf", count=4)
    assert not (own_folder / "hf").exists() and not (checkpoint.parents[1] / "hf").exists()


@pytest.mark.parametrize("save_base", [None, True])
def test_images_with_trained_norms_keep_their_statistics(save_base: bool | None, own_folder: Path) -> None:
    """Which the library's own file forgets; with the frozen weights in it, a checkpoint is enough."""
    options = [*LORA, "--model.peft.train=[bn]", f"--model.save_base={save_base or 'null'}", "--trainer.max_epochs=2"]
    cli = vision([*DIGITS, *options, "--config=strategy/ema", "--trainer.callbacks.decay=0.5"])
    checkpoint = load_checkpoint(cli.folder / "checkpoints" / "last.ckpt")
    state = checkpoint["state_dict"]
    assert ("backbone.net.conv1.weight" in state) == bool(save_base)
    norm = "backbone.net.layer1.0.bn1"
    assert torch.equal(state[f"{norm}.running_mean"], cli.model.backbone.net.layer1[0].bn1.running_mean)
    images = torch.rand(4, 3, 8, 8)
    restored = restore(cli.folder / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(restored.logits(images), cli.model.eval().cpu()(images).detach(), atol=1e-6, rtol=0)


def test_frozen_norms_stand_still(own_folder: Path) -> None:
    cli = vision([*DIGITS, *LORA, "--trainer.max_epochs=1"])
    after = dict(cli.model.backbone.net.named_buffers())
    fresh: Any = type(cli.model)(5, backbone="resnet8", weights="digits_0_4_resnet8", image_size=8).backbone.net
    for name, value in fresh.named_buffers():
        assert torch.equal(after[name], value), name


def test_a_probe_can_leave_out_what_it_does_not_train(own_folder: Path) -> None:
    cli = vision([*DIGITS, "--config=strategy/probe", "--model.save_base=false", "--trainer.max_epochs=1", "--test"])
    state = load_checkpoint(cli.folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert {name for name in state if name.startswith(("backbone", "head"))} == {"head.weight", "head.bias"}
    images = torch.rand(4, 3, 8, 8)
    found = restore(cli.folder / "checkpoints" / "last.ckpt").logits(images)
    torch.testing.assert_close(found, cli.model.eval()(images).detach())


def test_without_weights_to_load_again_a_checkpoint_is_whole(
    own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = vision([*DIGITS, *LORA, "--model.weights=null", "--trainer.max_epochs=1"])
    assert "backbone.net.conv1.weight" in load_checkpoint(cli.folder / "checkpoints" / "last.ckpt")["state_dict"]
    restore(cli.folder / "checkpoints" / "last.ckpt")
    with pytest.raises(SystemExit):
        vision([*DIGITS, *LORA, "--model.weights=null", "--model.save_base=false"])
    assert "model.save_base false needs pretrained weights" in capsys.readouterr().err


def test_an_encoder_that_read_on_with_lora_is_plain_again(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_encoder(own_folder / "bert")
    file = write_csv(own_folder / "train.csv", 60)
    options = ["fit", "--data=MaskedTexts", "--data.texts=TextFiles", f"--data.texts.train_file={file}"]
    options += [f"--model.encoder={own_folder / 'bert'}", "--data.batch_size=8", "--data.max_length=32", *QUIET]
    cli = mlm([*options, "--model.peft.method=lora", "--model.optimizer=AdamW", "--model.optimizer.lr=0.1"])
    net = build_encoder(str(cli.folder / "hf"))
    before = build_encoder(str(own_folder / "bert"))
    changed = [n for n, p in net.named_parameters() if not torch.allclose(p, before.get_parameter(n), atol=1e-6)]
    assert changed and all(name.startswith("encoder.layer") and name.endswith("weight") for name in changed)
    with pytest.raises(SystemExit):
        mlm([*options, "--model.peft.method=adapter"])
    assert "peft.method must be lora, dora or ia3" in capsys.readouterr().err
