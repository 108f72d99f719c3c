"""CIFAR-type loading with standard augmentation: images per CPU second of ours and of torchvision's pipeline.

    python -m benchmarks.loading

Both give float batches of 128 with an own random crop and mirroring for every image, normalised. torchvision's is
the usual one: CIFAR-like PIL images, RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor, Normalize, collated
by a DataLoader, in one process. One thread, so that CPU seconds are work and not waiting.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from benchmarks.measure import interleaved, write_result
from datamodules.images.base import ImageDataModule
from datamodules.images.sources import ImageArray, ImageSource

SIZE, IMAGES, BATCH, ROUNDS = 32, 10_000, 128, 7
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


class Arrays(ImageDataModule):
    """Random pixels in CIFAR-10's shape."""

    @property
    def class_names(self) -> list[str]:
        return [str(label) for label in range(10)]

    def read_splits(self) -> dict[str, ImageSource]:
        pixels = torch.randint(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=torch.uint8)
        return {"train": ImageArray(pixels, torch.arange(IMAGES) % 10, "random")}


class PerSample(torch.utils.data.Dataset[Any]):
    """What torchvision.datasets.CIFAR10 does for each sample."""

    def __init__(self, pixels: np.ndarray[Any, Any]) -> None:
        self.pixels = pixels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(SIZE, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), index % 10


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    data = Arrays(batch_size=BATCH, image_size=SIZE, augment="standard", val_share=0.01)
    data.setup("fit")
    pixels = data.splits["train"].images.pixels.numpy()[: len(data.splits["train"].labels)]  # type: ignore
    usual = torch.utils.data.DataLoader(PerSample(pixels), BATCH, shuffle=True, drop_last=True)
    ours = data.train_dataloader()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def run_ours() -> None:
        for batch in ours:
            (data.on_after_batch_transfer(batch, 0)["image"] - mean) / std

    def run_usual() -> None:
        for _ in usual:
            pass

    found = interleaved({"torchvision": run_usual, "ours": run_ours}, ROUNDS)
    images = len(ours) * BATCH
    per_second = {name: images / seconds["cpu_s"] for name, seconds in found.items()}
    write_result(
        "loading",
        {
            "images_per_cpu_second": {name: round(value) for name, value in per_second.items()},
            "ratio": round(per_second["ours"] / per_second["torchvision"], 2),
            "rounds": ROUNDS,
            "seconds_per_pass": found,
        },
    )


if __name__ == "__main__":
    main()
