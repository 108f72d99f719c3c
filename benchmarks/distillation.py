"""A student of at most a quarter of its teacher's size, with its teacher and alone: three seeds, real data.

    FINETUNING_DATA=... python -m benchmarks.distillation path/to/minilm

CIFAR-10, 400 images a class: an EfficientNet-Lite0 with ImageNet weights, fine-tuned at 96 px, teaches a ResNet-14
from scratch at 32 px. AG News, 12,000 texts: a MiniLM, fine-tuned on 2,000 of them, teaches a net of two layers of
width 128 from scratch. With the teacher and alone a student sees the same samples for the same number of epochs; its
learning rate is the better of two for the student alone.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import write_result
from benchmarks.runs import DATA, finished
from benchmarks.strategies import sample

SEEDS = (0, 1, 2)
FILES = json.dumps({split: str(DATA / "cifar10" / f"{split}.parquet") for split in ("train", "test")})
IMAGES = [
    *("recipes.vision", "fit", "--test", "--config=vision/huggingface_resnet50", "--config=strategy/full"),
    *("--data.path=parquet", "--data.test_split=test", f"--data.data_files={FILES}", "--data.limit_per_class=400"),
    "--model.label_smoothing=0",
]
LITE0 = [
    *("--model.backbone=timm/tf_efficientnet_lite0", "--model.image_size=96", "--trainer.max_epochs=4"),
    f"--model.weights={DATA / 'weights' / 'tf_efficientnet_lite0.safetensors'}",
]
RESNET14 = [
    *("--model.backbone=resnet14", "--model.weights=null", "--model.image_size=32", "--model.head_init=default"),
    "--trainer.max_epochs=30",
]
TEXTS = ["recipes.text", "fit", "--test", "--config=text/csv_minilm", "--data.max_length=128", "--model.pooling=mean"]


def measure(
    name: str, teacher: Sequence[str], student: Sequence[str], rates: Sequence[float], taught: Sequence[str]
) -> Any:
    """The teacher once, its students at each seed."""
    told = finished(teacher, keep=True)
    print(name, "teacher", told["test"], flush=True)
    rate = max(rates, key=lambda lr: finished([*student, f"--model.optimizer.lr={lr}"])["val"])
    rows: dict[str, Any] = {"teacher": {"test": told["test"]["test/accuracy"], "parameters": told["parameters"]}}
    ways = {"alone": [], "taught": [f"--model.teacher={told['checkpoint']}", *taught]}
    for way, options in ways.items():
        runs = []
        for seed in SEEDS:
            runs.append(finished([*student, f"--model.optimizer.lr={rate}", *options, f"--seed_everything={seed}"]))
            print(name, way, seed, runs[-1]["test"], flush=True)
        scores = [run["test"]["test/accuracy"] for run in runs]
        rows[way] = {
            "test": round(statistics.mean(scores), 4),
            "lowest": round(min(scores), 4),
            "highest": round(max(scores), 4),
            "parameters": runs[0]["parameters"],
            "fit_s": round(statistics.median(run["fit_s"] for run in runs), 1),
        }
    return {**rows, "lr": rate, "options": list(taught)}


if __name__ == "__main__":
    encoder = f"--model.encoder={Path(sys.argv[1]).absolute()}"
    few, test = sample(DATA / "agnews" / "train.csv", (2000,))[0], sample(DATA / "agnews" / "test.csv", (2000,))[0]
    tested = [f"--data.test_file={test}", encoder]
    every = f"--data.train_file={DATA / 'agnews' / 'train.csv'}"
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = f"--model.architecture={json.dumps(sizes)}"
    student = [*TEXTS, *tested, every, "--model.pretrained=false", small, "--config=strategy/full"]
    write_result(
        "distillation",
        {
            "seeds": len(SEEDS),
            "cifar10": measure(
                "cifar10",
                [*IMAGES, *LITE0],
                [*IMAGES, *RESNET14],
                (0.003, 0.01),
                ["--model.teacher_weight=0.9", "--model.temperature=4"],
            ),
            "agnews": measure(
                "agnews",
                [*TEXTS, *tested, f"--data.train_file={few}", "--trainer.max_epochs=3"],
                [*student, "--trainer.max_epochs=6"],
                (0.0005, 0.001),
                ["--model.teacher_weight=0.9", "--model.temperature=2"],
            ),
        },
    )
