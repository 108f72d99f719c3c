"""Runs of a few steps, to be exported."""

from __future__ import annotations

from pathlib import Path

import torch

from recipes.deploy.restored import restore
from recipes.deploy.samples import random_images
from recipes.parts.checkpoints import load_checkpoint
from recipes.text import main as text
from recipes.vision import main as vision
from tests.conftest import write_folder
from tests.tiny_encoders import tiny_encoder, write_csv

QUIET = [
    *("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"),
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.precision=32-true"),
]


NEW = [
    *("fit", "--config=vision/quickstart", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
    "--trainer.max_epochs=4",
]


def fit_digits(*command: str) -> Path:
    """The folder of a run on digits that `command` begins."""
    return Path(vision(list(command)).folder)


def fit_pictures(folder: Path, *options: str) -> Path:
    """A checkpoint of a net that has seen two batches."""
    root = folder / "pictures"
    if not root.exists():
        write_folder(root, ("train", "val", "test"))
    where = [f"--data.root={root}", "--data.batch_size=8", "--data.num_workers=0"]
    cli = vision(["fit", "--data=ImageFolder", *where, *options, *QUIET])
    return awake(Path(cli.folder) / "checkpoints" / "last.ckpt")


@torch.no_grad()
def awake(checkpoint: Path) -> Path:
    """After two steps BatchNorm's statistics are far off, and all logits alike: a wrong graph would go unseen."""
    model = restore(checkpoint).model.train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    for _ in range(3):
        model(random_images(32, model.backbone.input_size))
    list(model.head.parameters())[-2].mul_(10)  # the last layer's weights
    content = load_checkpoint(checkpoint)
    torch.save({**content, "state_dict": model.state_dict()}, checkpoint)
    return checkpoint


def fit_texts(folder: Path, *options: str, kind: str = "bert", file: Path | None = None) -> Path:
    encoder = folder / kind
    if not encoder.exists():
        tiny_encoder(encoder, kind)
    file = file or write_csv(folder / "train.csv", 60)
    data = ["--data=TextFiles", f"--data.train_file={file}", "--data.val_share=0.3", "--data.max_length=32"]
    cli = text(["fit", *data, f"--model.encoder={encoder}", "--data.batch_size=8", *options, *QUIET])
    return Path(cli.folder) / "checkpoints" / "last.ckpt"


NETS = {
    "resnet18": ["--model.backbone=resnet18", "--model.image_size=32", "--model.small_stem=true"],
    "mobilenet": ["--model.backbone=mobilenet_v3_small", "--model.image_size=32", "--model.head_dropout=0.2"],
    "vit": ["--model.backbone=timm/test_vit", "--model.image_size=32"],
    "resnet8": ["--model.backbone=resnet8", "--model.image_size=32", "--model.head=mlp", "--model.head_hidden=8"],
}
