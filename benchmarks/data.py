"""Loading of JPEGs as Stanford Dogs has them, start on a million files, and the doctor's pace.

    python -m benchmarks.data

* 600 JPEGs of 300 to 500 px, written to a temporary folder, to augmented batches of 224 px: `ImageFolder` of this
  package, against torchvision's with the transforms of its references, both with two workers, two epochs; and the
  decoding alone, the ceiling of both. Images per second of the wall and of the CPU, in turn.
* A tree of 1,000,000 empty files in 1,000 folders: the first and the second start, against a walk that notes paths.
* The doctor on 20,000 pictures of 32 px; and where FINETUNING_DATA names the folder of `cifar10/*.parquet`, what it
  finds in them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from benchmarks.measure import used, write_result
from datamodules import HuggingFaceImages, ImageFolder
from datamodules.files.index import list_files
from datamodules.images.decoding import readable_endings
from datamodules.images.inspection import inspect_images
from datamodules.images.sources import ImageFiles

PICTURES, EPOCHS, ROUNDS = 600, 2, 3


def write_pictures(root: Path, count: int, low: int, high: int) -> None:
    """JPEGs with coarse shapes and fine grain, so that they are as large as photographs."""
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / f"class_{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        width, height = rng.integers(low, high + 1, 2).tolist()
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))
        grain = rng.normal(0, 12, (height, width, 1))
        pixels = (np.asarray(coarse, np.float32) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)


def usual(root: Path) -> Any:
    """As in torchvision's references."""
    crop = v2.Compose(
        [
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    pictures = datasets.ImageFolder(str(root), crop)
    return torch.utils.data.DataLoader(pictures, 32, shuffle=True, num_workers=2, persistent_workers=True)


def ours(root: Path) -> Any:
    """The data module's training batches."""
    data = ImageFolder(root, image_size=224, batch_size=32, num_workers=2, val_share=0.01, test_share=0.01)
    data.setup("fit")
    return data.train_dataloader()


class Decoded(torch.utils.data.Dataset[Any]):
    """Decoding and nothing else."""

    def __init__(self, root: Path) -> None:
        self.paths = [str(path) for path in sorted(root.glob("*/*.jpg"))]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> int:
        return int(np.asarray(Image.open(self.paths[index]))[0, 0, 0])


def ceiling(root: Path) -> Any:
    """Two workers that only decode."""
    return torch.utils.data.DataLoader(Decoded(root), 32, num_workers=2, persistent_workers=True)


def pace(make: Callable[[Path], Any], root: Path) -> tuple[float, float]:
    """Pictures per second of the wall and of the CPU, after an epoch that starts the workers."""
    loader, seen = make(root), 0
    for _ in loader:
        pass
    started, cpu = time.perf_counter(), used()
    for _ in range(EPOCHS):
        for batch in loader:
            seen += len(batch[0] if isinstance(batch, list) else batch["image"] if isinstance(batch, dict) else batch)
    return seen / (time.perf_counter() - started), seen / (used() - cpu)


def million(root: Path) -> dict[str, float]:
    """Seconds of a walk, of a first and of a second listing."""
    for folder in range(1000):
        (root / f"n{folder:08d}").mkdir(parents=True)
        for number in range(1000):
            os.close(os.open(root / f"n{folder:08d}" / f"n{folder:08d}_{number}.JPEG", os.O_CREAT))

    def seconds(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def walk() -> list[str]:
        return [os.path.join(base, name) for base, _, names in os.walk(root) for name in names]  # noqa: PTH118

    def setup() -> None:
        data = ImageFolder(root, image_size=224)
        data.setup("fit")

    seconds(walk)  # the system's own cache
    walked = seconds(walk)
    return {
        "walk_s": round(walked, 2),
        "first_s": round(seconds(lambda: list_files(root, readable_endings())), 2),
        "second_s": round(seconds(lambda: list_files(root, readable_endings())), 2),
        "second_setup_s": round(seconds(setup), 2),
    }


def cifar10(folder: Path) -> dict[str, Any]:
    """Copies that the doctor finds in CIFAR-10."""
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "test")}
    data = HuggingFaceImages("parquet", data_files=files, val_split=None, test_split="test", image_size=32)
    data.setup("fit")
    found = data.inspect()
    counts = {key: len(found[key]) for key in ("unreadable", "misnamed", "exact", "rescaled")}
    return {"pictures": sum(part["samples"] for part in found["splits"].values()), **counts, "leaks": found["leaks"]}


def main() -> None:
    """Measure and write."""
    ways = {"usual": usual, "ours": ours, "decoding": ceiling}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    figures: dict[str, Any] = {"pictures": PICTURES}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCH_HOME"] = f"{folder}/torch"
        write_pictures(Path(folder) / "large", PICTURES, 300, 500)
        for _ in range(ROUNDS):
            for way, make in ways.items():
                found[way].append(pace(make, Path(folder) / "large"))
                print(way, found[way][-1], flush=True)
        for way, runs in found.items():
            wall, cpu = (statistics.median(run[kind] for run in runs) for kind in (0, 1))
            figures[way] = {"per_wall_s": round(wall, 1), "per_cpu_s": round(cpu, 1)}
        write_pictures(Path(folder) / "small", 20_000, 32, 32)
        paths = list_files(Path(folder) / "small", readable_endings())
        pictures = ImageFiles(paths, torch.zeros(len(paths)), f"{folder}/small")
        started = time.perf_counter()
        inspect_images({"train": pictures}, ["all"], workers=2)
        figures["doctor_per_s"] = round(len(paths) / (time.perf_counter() - started))
        figures["million"] = million(Path(folder) / "million")
    if "FINETUNING_DATA" in os.environ:
        figures["cifar10"] = cifar10(Path(os.environ["FINETUNING_DATA"]) / "cifar10")
    write_result("data", figures)


if __name__ == "__main__":
    main()
