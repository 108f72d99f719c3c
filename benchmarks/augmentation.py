"""Augmentation presets, mixup and CutMix on few images of CIFAR-10: what helps, and from how many images on?

    FINETUNING_DATA=path/to/data python -m benchmarks.augmentation

A ResNet-20 is trained on classes 0 to 4 and fine-tuned on 10, 50 or 200 images of each of classes 5 to 9, by the
recipe's own model and data module. Every way has the same number of steps; three seeds, each with other images, are
tested on 4,000 others.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import save_file

from benchmarks.cifar import of_classes
from benchmarks.measure import write_result
from callbacks import LRWarmup
from datamodules.images.base import ImageDataModule
from datamodules.images.sources import ImageArray, ImageSource
from recipes.parts.schedules import Cosine
from recipes.vision import VisionClassifier

STEPS = {10: 150, 50: 250, 200: 400}  # of 32 images
SEEDS = (0, 1, 2)
WAYS: dict[str, dict[str, Any]] = {
    "none": {"augment": "none"},
    "light": {"augment": "light"},
    "standard": {"augment": "standard"},
    "strong": {"augment": "strong"},
    "standard, mixup 0.2": {"augment": "standard", "mixup": 0.2},
    "standard, CutMix 1.0": {"augment": "standard", "cutmix": 1.0},
}


class Five(ImageDataModule):
    """Some images of five classes.

    Args:
        classes: Which.
        images: Of each, to train on; all others are left.
        draw: Which of them.
        **kwargs: Those of `ImageDataModule`.
    """

    def __init__(self, classes: range, images: int, draw: int, **kwargs: Any) -> None:
        super().__init__(image_size=32, batch_size=32, eval_batch_size=250, seed=draw, **kwargs)
        self.classes, self.images, self.draw = classes, images, draw

    @property
    def class_names(self) -> list[str]:
        """Numbers of the classes."""
        return [str(label) for label in self.classes]

    def read_splits(self) -> dict[str, ImageSource]:
        """Images to train on from the first 3,000 of each class; to test on, 800 others of each."""
        random = torch.Generator().manual_seed(self.draw)
        pixels, labels = of_classes("train", self.classes, 0, 3000)
        chosen = torch.cat([label * 3000 + torch.randperm(3000, generator=random)[: self.images] for label in range(5)])
        others, truth = of_classes("train", self.classes, 3200, 4000)
        as_rows = partial(torch.permute, dims=(0, 2, 3, 1))
        test = ImageArray(as_rows(others).contiguous(), truth, "test")
        return {
            "train": ImageArray(as_rows(pixels[chosen]).contiguous(), labels[chosen], "train"),
            "val": test,
            "test": test,
        }


def fit(data: ImageDataModule, steps: int, lr: float, weights: str | None) -> tuple[VisionClassifier, float]:
    """Fit, and test the last weights."""
    seed_everything(data.seed, verbose=False)
    optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=0.05)
    model = VisionClassifier(5, "resnet20", weights=weights, image_size=32, optimizer=optimizer, schedule=Cosine)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=[LRWarmup(share=0.05)],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    return model, float(trainer.test(model, datamodule=data, verbose=False)[0]["test/accuracy"])


def main() -> None:
    """Train the start, then every way at every number of images."""
    table: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start.safetensors"
        model, accuracy = fit(Five(range(5), 3000, 0, augment="standard"), 1400, 4e-3, None)
        save_file({k: v.contiguous() for k, v in model.backbone.state_dict().items()}, start)
        print("start", accuracy, flush=True)
        for images, steps in STEPS.items():
            for way, options in WAYS.items():
                found = [fit(Five(range(5, 10), images, seed, **options), steps, 4e-3, str(start))[1] for seed in SEEDS]
                print(images, way, found, flush=True)
                table.setdefault(f"{images} images per class", {})[way] = {
                    "mean": round(statistics.mean(found), 4),
                    "lowest": round(min(found), 4),
                    "highest": round(max(found), 4),
                }
    write_result("augmentation", {"seeds": len(SEEDS), "start": round(accuracy, 4), "steps_of_32": STEPS, **table})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
