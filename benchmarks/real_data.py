"""The shipped configs on real pictures, from scratch: CIFAR-10 as Parquet, and a folder of ants and bees.

    FINETUNING_DATA=path/to/data python -m benchmarks.real_data

Expects `cifar10/train.parquet` and `test.parquet` with the columns image and label, and `hymenoptera/train` and
`val` with a folder per class (the set of PyTorch's transfer-learning tutorial). No pretrained weights: the figures
say that the path works on real files, not what fine-tuning reaches.
"""

from __future__ import annotations

import csv
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import write_result
from recipes.vision import main

DATA = Path(os.environ["FINETUNING_DATA"]).resolve()
CIFAR10 = [
    *("--config", "vision/huggingface_resnet50", "--data.path=parquet", "--data.test_split=test"),
    "--data.data_files="
    + json.dumps({split: str(DATA / "cifar10" / f"{split}.parquet") for split in ("train", "test")}),
    *("--model.backbone=resnet20", "--model.weights=null", "--model.image_size=32", "--model.head_init=default"),
    *("--model.layer_decay=1", "--model.optimizer.lr=0.004", "--data.batch_size=128", "--trainer.max_epochs=3"),
]
HYMENOPTERA = [
    *("--config", "vision/folder_resnet50", f"--data.root={DATA / 'hymenoptera'}", "--model.backbone=resnet18"),
    *("--model.weights=null", "--model.image_size=96", "--model.small_stem=false", "--data.in_memory=false"),
    *("--model.layer_decay=1", "--data.val_share=0.2", "--trainer.max_epochs=12", "--model.optimizer.lr=0.0005"),
]


def fit(arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """Fit and test; the command line's object and the figures."""
    started = time.time()
    cli = main(["fit", "--test", *arguments, "--trainer.enable_progress_bar=false"])
    metrics = {k: round(float(v), 4) for k, v in cli.trainer.callback_metrics.items() if "accuracy_of" not in k}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return cli, {**metrics, "wall_s": round(time.time() - started), "peak_gb": round(peak, 2)}


if __name__ == "__main__":
    figures = {"cifar10": fit(CIFAR10)[1]}
    cli, figures["hymenoptera"] = fit(HYMENOPTERA)
    best = cli.trainer.checkpoint_callback.best_model_path
    predicted = main(["predict", "--ckpt_path", best, "--trainer.enable_progress_bar=false"])
    with (Path(predicted.trainer.log_dir) / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    figures["hymenoptera"]["predictions"] = len(rows)
    right = sum(row["label"] == Path(row["name"]).parent.name for row in rows)
    figures["hymenoptera"]["accuracy_of_predictions"] = round(right / len(rows), 4)
    write_result("real_data", figures)
