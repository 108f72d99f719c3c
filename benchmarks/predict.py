"""From the command to the first prediction of a large checkpoint, and what of it goes into opening the checkpoint.

    python -m benchmarks.predict

A ResNet-50 of random weights on one picture, each time in a process of its own; `opened` counts how often the file is
opened before the model is loaded from it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import write_result

ROUNDS = 3


def child(checkpoint: str, folder: str) -> None:
    """Predict, and print what was spent on opening the checkpoint."""
    import torch

    load, spent = torch.load, [0.0]
    opened = 0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal opened
        started = time.perf_counter()
        try:
            return load(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - started
            opened += 1

    torch.load = timed
    from recipes.vision import main

    out = f"{folder}/{time.time_ns()}.csv"
    main(["predict", "--ckpt_path", checkpoint, "--data.predict_root", folder, "--predictions", out, "--quiet"])
    print(json.dumps({"opened": opened, "opening_s": spent[0]}))


def run() -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "new"
        pictures.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / "a.jpg")
        checkpoint = made(Path(folder))
        rounds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            command = [sys.executable, "-m", "benchmarks.predict", str(checkpoint), str(pictures)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rounds.append({"seconds": time.perf_counter() - started, **json.loads(done.stdout.splitlines()[-1])})
        write_result(
            "predict",
            {
                "checkpoint_mb": round(checkpoint.stat().st_size / 1e6),
                "seconds": round(statistics.median(one["seconds"] for one in rounds), 1),
                "opening_s": round(statistics.median(one["opening_s"] for one in rounds), 2),
                "opened": rounds[0]["opened"],
            },
        )


def made(folder: Path) -> Path:
    """A checkpoint of two steps of a ResNet-50 with AdamW's state."""
    from recipes.vision import main

    for label in ("x", "y"):
        for number in range(8):
            path = folder / "train" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((64, 64, 3), 20 * number, np.uint8)).save(path)
    small = "--data.batch_size=2 --data.num_workers=0 --data.val_share=0.2 --model.weights=null --model.image_size=64"
    short = "--trainer.max_steps=2 --trainer.callbacks=null --trainer.accelerator=cpu --quiet"
    root = [f"--data.root={folder / 'train'}", f"--trainer.default_root_dir={folder}"]
    cli = main(["fit", "--config", "vision/folder_resnet50", *root, *small.split(), *short.split()])
    moved = folder / "moved.ckpt"
    (cli.folder / "checkpoints" / "last.ckpt").rename(moved)
    return moved


if __name__ == "__main__":
    child(*sys.argv[1:]) if len(sys.argv) > 2 else run()
