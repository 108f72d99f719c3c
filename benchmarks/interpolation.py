"""A line between two nets, and soups of several: what is kept of the old, what a mean of runs is worth; three seeds.

    FINETUNING_DATA=... python -m benchmarks.interpolation

CIFAR-10: a ResNet-20 learns classes 0 to 4 from scratch, 400 images of each, and goes on from there with 5 to 9.
Grocery: an EfficientNet-Lite0 with ImageNet weights learns the first 40 classes, and goes on with the other 41. Places
are chosen on a fifth of the training images, and the test images are looked at once. The soups are of five runs on all
of grocery from one start, with five seeds and learning rates around the config's, against the best of the five.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from benchmarks.measure import write_result
from benchmarks.runs import DATA, WORK, finished

SEEDS = (0, 1, 2)
LITE0 = [
    *("--model.backbone=timm/tf_efficientnet_lite0", "--model.image_size=128", "--model.head_init=zeros"),
    *("--config=strategy/full", "--trainer.max_epochs=3"),
]
IMAGENET = f"--model.weights={DATA / 'weights' / 'tf_efficientnet_lite0.safetensors'}"
RESNET20 = [
    *("--model.backbone=resnet20", "--model.image_size=32", "--model.head_init=default", "--config=strategy/full"),
    *("--trainer.max_epochs=30", "--model.optimizer.lr=0.01"),
]


def cifar_folder(name: str, classes: Sequence[int], per_class: int = 400) -> Path:
    """A tree of images of some classes of CIFAR-10."""
    import pyarrow.parquet as pq

    root = WORK / "data" / name
    if not root.is_dir():
        part = root.with_name(f".{name}")
        shutil.rmtree(part, ignore_errors=True)
        for split in ("train", "test"):
            table = pq.read_table(DATA / "cifar10" / f"{split}.parquet").to_pylist()
            for label in classes:
                folder = part / split / f"class_{label}"
                folder.mkdir(parents=True)
                rows = [row for row in table if row["label"] == label][:per_class]
                for number, row in enumerate(rows):
                    (folder / f"{number:04}.jpg").write_bytes(io.BytesIO(row["image"]["bytes"]).getvalue())
        part.rename(root)
    return root


def grocery_folder(name: str, classes: slice) -> Path:
    """Links to some classes of grocery; its val, which lacks some, is left out."""
    root = WORK / "data" / name
    for split in ("train", "test"):
        for folder in sorted((DATA / "grocery" / split).iterdir())[classes]:
            link = root / split / folder.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(folder, target_is_directory=True)
    return root


def fit(root: Path, options: Iterable[str], seed: int) -> str:
    """The best checkpoint of a run on a folder of images."""
    arguments = ["recipes.vision", "fit", "--test", "--config=vision/folder_resnet50", *options]
    data = [f"--data.root={root}", "--data.val_share=0.2", f"--data.seed={seed}", f"--seed_everything={seed}"]
    return str(finished([*arguments, *data], keep=True)["checkpoint"])


def mixed(paths: Sequence[str], *options: str) -> dict[str, Any]:
    """The report of `recipes.interpolate`."""
    out = WORK / "mixed" / Path(paths[-1]).parents[5].name
    out = out.with_name(f"{out.name}_{len(paths)}")
    command = [sys.executable, "-m", "recipes.interpolate", *paths, "--test", f"--out={out}", *options]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return dict(json.loads((out / "report.json").read_text()))


def from_old_to_new(old_root: Path, new_root: Path, first: Sequence[str], then: Sequence[str]) -> dict[str, Any]:
    """Three lines, from nets of one set of classes to those that went on with another."""
    lines = []
    for seed in SEEDS:
        old = fit(old_root, first, seed)
        new = fit(new_root, [*then, f"--model.weights={old}"], seed)
        also = WORK / "data" / f"{old_root.name}_{seed}.yaml"
        init = {"root": str(old_root), "val_share": 0.2, "seed": seed, "batch_size": 32}
        also.write_text(yaml.safe_dump({"data": {"class_path": "datamodules.ImageFolder", "init_args": init}}))
        lines.append(mixed([old, new], f"--also={also}"))
        print(lines[-1]["verdict"], flush=True)
    rows = {}
    for place in lines[0]["places"]:
        found = [next(r for r in one["rows"] if r["name"] == f"{place:g}")["figures"] for one in lines]
        sides = [[list(figures.values())[side][0]["other"] for figures in found] for side in (0, 1)]
        rows[f"{place:g}"] = {name: of_seeds(values) for name, values in zip(("new", "old"), sides, strict=True)}
    return {
        "by_a": rows,
        "chosen": [one["at"] for one in lines],
        "above_the_line": [one["facts"]["above the straight line"] for one in lines],
    }


def of_seeds(values: Sequence[float]) -> dict[str, float]:
    """Mean and range."""
    return {"mean": round(mean(values), 4), "lowest": round(min(values), 4), "highest": round(max(values), 4)}


def soups() -> dict[str, Any]:
    """Five runs of one start, three times: their mean, the greedy one, and the best of them, on the test images."""
    rates, found = (0.3, 0.6, 1.0, 1.7, 3.0), []
    for start in SEEDS:
        options = [*LITE0, IMAGENET]
        paths = [
            fit(DATA / "grocery", [*options, f"--model.lr_factor={rate}"], 10 * start + number)
            for number, rate in enumerate(rates)
        ]
        found.append(mixed(paths))
        print(found[-1]["verdict"], flush=True)
    best, gain = [], []
    for one in found:
        compared = one["chosen"]["test"][0]
        best.append(compared["first"])
        gain.append(compared["gain"])
    return {
        "best_alone": of_seeds(best),
        "gain_of_the_soup": of_seeds(gain),
        "members": [one["members"] for one in found],
    }


if __name__ == "__main__":
    old, new = cifar_folder("cifar_a", range(5)), cifar_folder("cifar_b", range(5, 10))
    cifar = from_old_to_new(old, new, [*RESNET20, "--model.weights=null"], RESNET20)
    write_result("interpolation", {"seeds": len(SEEDS), "cifar10": cifar})
    first, second = grocery_folder("grocery_a", slice(40)), grocery_folder("grocery_b", slice(40, None))
    grocery = from_old_to_new(first, second, [*LITE0, IMAGENET], LITE0)
    write_result("interpolation", {"seeds": len(SEEDS), "cifar10": cifar, "grocery": grocery})
    write_result("interpolation", {"seeds": len(SEEDS), "cifar10": cifar, "grocery": grocery, "soups": soups()})
