"""Make the encoder that text/quickstart starts from, and write down how well it fills in words.

    python -m benchmarks.quickstart_encoder            # half an hour
    python -m benchmarks.quickstart_encoder path/to/hf # from `recipes.mlm fit --config mlm/quickstart_pretrain`

Writes recipes/weights/docstrings_bert, halved to float16.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from transformers import AutoModelForMaskedLM, AutoTokenizer

from benchmarks.measure import write_result
from recipes.cli.early import WEIGHTS

CONFIG = "mlm/quickstart_pretrain"

if len(sys.argv) > 1:
    made = Path(sys.argv[1])
else:
    from recipes.mlm import main

    made = main(["fit", "--config", CONFIG, "--trainer.accelerator=cpu"]).folder / "hf"
target = WEIGHTS / "docstrings_bert"
encoder = AutoModelForMaskedLM.from_pretrained(made).half()
encoder.save_pretrained(target)
AutoTokenizer.from_pretrained(made).save_pretrained(target)
for file in target.iterdir():
    file.chmod(0o644)
with (made.parent / "metrics.csv").open() as file:
    rows = [row for row in csv.DictReader(file) if row.get("val/loss")]
best = min(rows, key=lambda row: float(row["val/loss"]))
write_result(
    "quickstart_encoder",
    {
        "val_loss": round(float(best["val/loss"]), 4),
        "val_accuracy": round(float(best["val/accuracy"]), 4),
        "optimiser_steps": int(rows[-1]["step"]) + 1,
        "parameters": encoder.num_parameters(),
        "bytes": sum(file.stat().st_size for file in target.iterdir()),
        "config": CONFIG,
    },
)
