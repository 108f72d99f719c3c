"""Ways of fine-tuning one small net on few images: which help, and from how many images on?

    FINETUNING_DATA=path/to/data python -m benchmarks.few_images run 10     # images per class: 10, 50, 500
    python -m benchmarks.few_images table

The net is a ResNet-20 trained on CIFAR-10's classes 0 to 4 (`benchmarks.split_cifar`, seed 0); it is fine-tuned on
classes 5 to 9. Every way has the same number of steps. Each chooses its rate out of two, on images of its own and
in a run of its own, by validation accuracy; then five seeds, each with other images, are tested on 4,000 others.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, seed_everything

from benchmarks.cifar import Batches, Classifier, fit, of_classes
from benchmarks.measure import write_result
from benchmarks.split_cifar import RUNS as START
from callbacks import L2SP, Freeze, GradualUnfreezing, LRWarmup

RUNS = Path("runs/few_images")
CLASSES = range(5, 10)
STEPS = {10: 100, 50: 120, 500: 200}  # of 32 images
RATES = (2e-3, 8e-3)
SEEDS = range(1, 6)


class Way(NamedTuple):
    """A way of fine-tuning."""

    callbacks: Callable[[], list[Callback]] = list
    layer_decay: float = 1.0


WAYS = {
    "probe: the head alone": Way(lambda: [Freeze(train_last_blocks=1)]),
    "full": Way(),
    "full, rates falling by 0.6 per block": Way(layer_decay=0.6),
    "gradual unfreezing": Way(lambda: [GradualUnfreezing(over_share=0.5)]),
    "gradual unfreezing, per-block warm-up": Way(lambda: [GradualUnfreezing(over_share=0.5), LRWarmup(share=0.06)]),
    "full, L2-SP of strength 1": Way(lambda: [L2SP(1.0, exclude=["^heads"])]),
}


def tuned(way: Way, images: int, rate: float, seed: int) -> tuple[Classifier, float]:
    """The net fine-tuned on so many images per class, and the CPU seconds it took."""
    seed_everything(seed, verbose=False)
    pictures, labels = of_classes("train", CLASSES, 0, 3000)
    chosen = torch.cat([label * 3000 + torch.randperm(3000)[:images] for label in range(5)])
    model = Classifier(lr=rate, layer_decay=way.layer_decay)
    start = torch.load(START / "a0.pt", weights_only=True)
    model.load_state_dict({k: v for k, v in start.items() if "heads" not in k}, strict=False)
    batches = Batches((pictures[chosen], labels[chosen]), 32, seed, STEPS[images])
    started = time.process_time()
    return fit(model, batches, callbacks=way.callbacks()), time.process_time() - started


def run(images: int) -> None:
    """All ways at one number of images; a line of JSON per finished way."""
    validation = of_classes("train", CLASSES, 3000, 3400)
    test = [
        torch.cat(both) for both in zip(of_classes("train", CLASSES, 3400), of_classes("test", CLASSES), strict=True)
    ]
    RUNS.mkdir(parents=True, exist_ok=True)
    for name, way in WAYS.items():
        tried = {rate: tuned(way, images, rate, 100)[0].accuracy(validation) for rate in RATES}
        rate = max(tried, key=tried.__getitem__)
        accuracies, seconds = [], []
        for seed in SEEDS:
            model, spent = tuned(way, images, rate, seed)
            accuracies.append(model.accuracy((test[0], test[1])))
            seconds.append(spent)
        line = {"images": images, "way": name, "rate": rate, "tried": tried, "test": accuracies, "cpu_s": seconds}
        with (RUNS / f"{images}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(images, name, rate, f"{statistics.mean(accuracies):.3f}", flush=True)


def table() -> None:
    """Mean and range over the seeds, into results/few_images.json."""
    figures: dict[str, Any] = {}
    for path in sorted(RUNS.glob("*.jsonl"), key=lambda p: int(p.stem)):
        for line in map(json.loads, path.read_text().splitlines()):
            test = [round(value, 4) for value in line["test"]]
            figures.setdefault(f"{line['images']} images per class", {})[line["way"]] = {
                "mean": round(statistics.mean(test), 4),
                "lowest": min(test),
                "highest": max(test),
                "rate": line["rate"],
                "cpu_s": round(statistics.mean(line["cpu_s"]), 1),
            }
    write_result("few_images", {"seeds": len(SEEDS), "test_images": 4000, "steps_of_32": STEPS, **figures})


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(int(sys.argv[2])) if sys.argv[1] == "run" else table()
