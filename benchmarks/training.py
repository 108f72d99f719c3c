"""Whole training of a ResNet-18 at 64 px, batch 32, loading and augmentation included: ours and a bare loop.

    python -m benchmarks.training

Three ways over the same pictures (random JPEGs in class folders, written to a temporary folder), one epoch each,
in turn, each in a process of its own, so that its defaults are really its own:

* bare: torchvision's ImageFolder with random resized crops and mirroring, a DataLoader with two workers, AdamW,
  a loop of six lines, fp32, torch's defaults
* fp32: VisionClassifier and ImageFolder through the recipe's command line, precision 32-true, pictures decoded by
  the same transforms in two workers
* shipped: the same with every default that ships: pictures of 64 px lie decoded in memory, and are augmented as
  batches

Seconds are those of the second epoch: start-up is not counted in any of them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import report_end, report_start, write_result

IMAGES, CLASSES, ROUNDS = 1600, 10, 2


def write_pictures(root: Path) -> None:
    """JPEGs of 80 x 80 px, smooth as photographs are."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        folder = root / f"class_{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (10, 10, 3), dtype=np.uint8))
        small.resize((80, 80), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


def bare(root: str) -> None:
    """The loop that everybody writes."""
    import torch
    from torchvision import datasets, models
    from torchvision.transforms import v2

    crop = v2.Compose(
        [
            v2.RandomResizedCrop(64, scale=(0.35, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    pictures = torch.utils.data.Subset(datasets.ImageFolder(root, crop), range(IMAGES - 2 * CLASSES * 3))
    loader = torch.utils.data.DataLoader(
        pictures, 32, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    net = models.resnet18(num_classes=CLASSES)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for epoch in range(2):
        report_start(epoch)
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    report_end()


def ours(root: str, *options: str) -> None:
    """The recipe, through its command line."""
    from recipes.cli.early import start

    arguments = [
        *("fit", "--config", "vision/folder_resnet50", "--model.backbone", "resnet18", "--model.weights=null"),
        *("--model.image_size=64", "--model.layer_decay=1", f"--data.root={root}", "--data.val_share=0.02"),
        *("--data.test_share=0.02", "--trainer.max_epochs=2", "--trainer.gradient_clip_val=null"),
        *(f"--trainer.default_root_dir={root}-runs", "--trainer.accelerator=cpu", "--data.augment=standard", *options),
    ]
    start("vision", arguments)
    from lightning.pytorch import Callback

    import recipes.cli.defaults
    from recipes.vision import main

    class Clock(Callback):
        def on_train_epoch_start(self, trainer: object, pl_module: object) -> None:
            report_start(trainer.current_epoch)  # type: ignore[attr-defined]

        def on_train_epoch_end(self, trainer: object, pl_module: object) -> None:
            if trainer.current_epoch == 1:  # type: ignore[attr-defined]
                report_end()

    defaults = recipes.cli.defaults.default_callbacks
    recipes.cli.defaults.default_callbacks = lambda *a, **k: [*defaults(*a, **k), Clock()]  # type: ignore
    main(arguments)


WAYS = {
    "bare": bare,
    "fp32": lambda root: ours(root, "--trainer.precision=32-true", "--data.in_memory=false", "--data.num_workers=2"),
    "shipped": ours,
}


def measure() -> None:
    """Run the ways in turn and write the ratios."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "pictures"
        write_pictures(root)
        for _ in range(ROUNDS):
            for way in WAYS:
                command = [sys.executable, "-m", "benchmarks.training", way, str(root)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                line = next(line for line in done.stdout.splitlines() if "SECONDS" in line)
                found[way].append(json.loads(line.split("SECONDS")[1]))
                print(way, found[way][-1], flush=True)
    figures: dict[str, object] = {"pictures": IMAGES, "rounds": ROUNDS}
    for key in ("wall_s", "cpu_s"):
        for way, runs in found.items():
            figures[f"{way}_{key}"] = [round(run[key], 2) for run in runs]
        base = statistics.median(run[key] for run in found["bare"])
        for way in ("fp32", "shipped"):
            figures[f"{way}_ratio_{key}"] = round(statistics.median(run[key] for run in found[way]) / base, 3)
    write_result("training", figures)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        WAYS[sys.argv[1]](sys.argv[2])
    else:
        measure()
