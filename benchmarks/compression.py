"""What a net loses by zeros, by channels cut out and in 8 bits: ResNet-20, EfficientNet-Lite0 and MiniLM.

    FINETUNING_DATA=... python -m benchmarks.compression path/to/minilm

CIFAR-10, 40,000 images, ResNet-20 from scratch; grocery at 128 px, EfficientNet-Lite0 with ImageNet weights; SST-2,
2,000 sentences, all-MiniLM-L6-v2. Each is fine-tuned by a shipped config, and `recipes.compress` does the rest; the
test set is looked at once, for the variant to ship.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import write_result
from benchmarks.runs import DATA, WORK, finished
from benchmarks.strategies import sample

FILES = json.dumps({split: str(DATA / "cifar10" / f"{split}.parquet") for split in ("train", "test")})


def nets(encoder: str) -> dict[str, tuple[list[str], list[str]]]:
    """What is trained, and how it is compressed."""
    train = sample(DATA / "sst2" / "train.tsv", (2000,))[0]
    return {
        "cifar10, ResNet-20": (
            [
                *("recipes.vision", "fit", "--test", "--config=vision/huggingface_resnet50", "--config=strategy/full"),
                *("--data.path=parquet", f"--data.data_files={FILES}", "--data.test_split=test"),
                *("--model.backbone=resnet20", "--model.weights=null", "--model.image_size=32"),
                *("--model.head_init=default", "--model.optimizer.lr=0.01", "--trainer.max_epochs=15"),
            ],
            ["--epochs=6", "--cut=0.53"],
        ),
        "grocery, EfficientNet-Lite0": (
            [
                *("recipes.vision", "fit", "--test", "--config=vision/folder_resnet50", "--config=strategy/full"),
                *("--model.backbone=timm/tf_efficientnet_lite0", "--model.image_size=128"),
                f"--model.weights={DATA / 'weights' / 'tf_efficientnet_lite0.safetensors'}",
                *(f"--data.root={DATA / 'grocery'}", "--trainer.max_epochs=4"),
            ],
            ["--epochs=4", "--cut=0.5"],
        ),
        "sst2, MiniLM": (
            [
                *("recipes.text", "fit", "--test", "--config=text/csv_minilm", f"--model.encoder={encoder}"),
                *("--model.pooling=mean", "--data.max_length=128", "--data.text_column=sentence"),
                *(f"--data.train_file={train}", f"--data.test_file={DATA / 'sst2' / 'dev.tsv'}"),
            ],
            ["--epochs=3", "--cut=0.4"],
        ),
    }


def compressed(checkpoint: str, options: Sequence[str], name: str) -> dict[str, Any]:
    """The report of `recipes.compress`."""
    out = WORK / "compressed" / name.split(",")[0]
    command = [sys.executable, "-m", "recipes.compress", checkpoint, "--test", f"--out={out}", *options]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return dict(json.loads((out / "report.json").read_text()))


if __name__ == "__main__":
    results: dict[str, Any] = {}
    for name, (arguments, options) in nets(str(Path(sys.argv[1]).absolute())).items():
        trained = finished(arguments, keep=True)
        report = compressed(trained["checkpoint"], options, name)
        print(name, report["verdict"], flush=True)
        kept = ("name", "bytes", "weight_bytes", "parameters", "zeros", "macs", "times", "gain", "agreement")
        results[name] = {
            "test": trained["test"],
            "shipped": report["chosen"],
            "on_the_test_split": report["facts"]["on the test split"],
            "variants": [{key: row[key] for key in kept} for row in report["rows"]],
        }
        write_result("compression", {"threads": 1, "nets": results})
