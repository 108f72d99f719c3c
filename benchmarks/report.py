"""What a report costs: seconds and memory for 10,000 test pictures of 120 classes.

    python -m benchmarks.report

A ResNet-8 that has learnt next to nothing is tested on 10,000 JPEGs of 64 px in 120 folders, with and without the
callback, each in a process of its own. The page's seconds are from the last batch to the file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import write_result

PICTURES, CLASSES = 10_000, 120


def write_tree(root: Path) -> None:
    """Four training pictures of each class, and the test's."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4 * CLASSES), ("test", PICTURES)):
        for number in range(count):
            folder = root / split / f"class_{number % CLASSES:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(small).resize((64, 64)).save(folder / f"{number}.jpg")


def one(folder: str, with_report: str) -> None:
    """Test in this process, and print what it took."""
    import torch
    from lightning.pytorch import Trainer

    from callbacks import Report
    from callbacks.report.facts import peak_memory
    from datamodules import ImageFolder
    from recipes.vision import VisionClassifier

    torch.manual_seed(0)
    took: list[float] = []

    class Timed(Report):
        def on_test_end(self, *args: Any) -> None:
            started = time.perf_counter()
            super().on_test_end(*args)
            took.append(time.perf_counter() - started)

    model = VisionClassifier(CLASSES, backbone="resnet8", image_size=64)
    data = ImageFolder(f"{folder}/tree", image_size=64, num_workers=2, in_memory=False)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [Timed(f"{folder}/page")] if int(with_report) else []
    Trainer(accelerator="cpu", callbacks=callbacks, enable_checkpointing=False, **quiet).test(
        model, data, verbose=False
    )
    print(json.dumps({"seconds": sum(took), "memory": peak_memory() / 2**30}))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_tree(Path(folder) / "tree")
        found = []
        for with_report in ("0", "1"):
            code = f"from benchmarks.report import one; one({folder!r}, {with_report!r})"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        size = (Path(folder) / "page" / "report.html").stat().st_size
    write_result(
        "report",
        {
            "samples": PICTURES,
            "classes": CLASSES,
            "seconds": round(found[1]["seconds"], 2),
            "memory_gb": round(found[1]["memory"], 2),
            "memory_without_gb": round(found[0]["memory"], 2),
            "page_mb": round(size / 2**20, 2),
        },
    )


if __name__ == "__main__":
    main()
