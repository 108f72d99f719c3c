"""Accuracy of ways to fine-tune MiniLM on SST-2, on its development set, three seeds.

    FINETUNING_DATA=... python -m benchmarks.sst2 path/to/encoder

Each seed draws 2,000 training sentences, the same for all ways; batch 32. The development set chooses nothing: what
counts is the last epoch. The Trainer and `full` do the same work: two epochs at 5e-5 falling to zero.
"""

from __future__ import annotations

import csv
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import write_result
from benchmarks.text import KEEP_WORDS

SEEDS, TEXTS = (0, 1, 2), 2000
ROOT = Path(os.environ.get("FINETUNING_DATA", "")) / "sst2"
PLAIN = [
    *("--trainer.max_epochs=2", "--model.optimizer.lr=5e-5", "--model.optimizer.weight_decay=0"),
    *("--model.layer_decay=1", "--model.lr_multipliers=null", "--trainer.callbacks=null"),
]
UNFREEZING = ["--trainer.callbacks+=GradualUnfreezing", "--trainer.callbacks.over_share=0.4"]
WAYS: dict[str, list[str]] = {
    "full": PLAIN,
    "gradual unfreezing": [*PLAIN, *UNFREEZING],
    "layer decay 0.8": [*PLAIN, "--model.layer_decay=0.8"],
    "text/csv_minilm, 2 epochs": ["--trainer.max_epochs=2"],
    "text/csv_minilm": [],
    "text/csv_minilm, word embeddings frozen": KEEP_WORDS,
    "text/csv_minilm, gradual unfreezing": UNFREEZING,
    "text/csv_minilm, all 6,920 sentences": [],
}


def draw(seed: int, file: Path, texts: int) -> None:
    """Some of the training sentences."""
    head, *rows = (ROOT / "train.tsv").read_text().splitlines()
    file.write_text("\n".join([head, *random.Random(seed).sample(rows, min(texts, len(rows)))]) + "\n")


def ours(encoder: str, seed: int, train: Path, options: list[str]) -> float:
    """The recipe; accuracy after the last epoch."""
    command = [
        *(sys.executable, "-m", "recipes.text", "fit", "--config", "text/csv_minilm", f"--seed_everything={seed}"),
        *(f"--model.encoder={encoder}", f"--data.train_file={train}", f"--data.val_file={ROOT / 'dev.tsv'}"),
        *("--data.text_column=sentence", f"--data.seed={seed}", "--trainer.accelerator=cpu"),
        *(f"--trainer.default_root_dir={train.parent / 'runs'}", *options),
    ]
    subprocess.run(command, check=True, capture_output=True)
    newest = max(train.parent.glob("runs/**/metrics.csv"), key=lambda file: file.stat().st_mtime)
    with newest.open() as file:
        found = [row["val/accuracy"] for row in csv.DictReader(file) if row.get("val/accuracy")]
    return float(found[-1])


def trainer(encoder: str, seed: int, train: Path) -> float:
    """Transformers' Trainer with its best flags."""
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder)

    def rows(file: Path) -> list[dict[str, Any]]:
        pairs = [line.rsplit("\t", 1) for line in file.read_text().splitlines()[1:]]
        tokens = tokenizer([text for text, _ in pairs], truncation=True, max_length=128)["input_ids"]
        return [{"input_ids": ids, "labels": int(label)} for ids, (_, label) in zip(tokens, pairs, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=32,
            num_train_epochs=2,
            learning_rate=5e-5,
            bf16=True,
            train_sampling_strategy="group_by_length",
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
        )
        net = AutoModelForSequenceClassification.from_pretrained(encoder)
        collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
        fit = Trainer(net, arguments, train_dataset=rows(train), data_collator=collator)  # type: ignore[arg-type]
        fit.train()
        found = fit.predict(rows(ROOT / "dev.tsv"))  # type: ignore[arg-type]
    return float((torch.tensor(found.predictions).argmax(1) == torch.tensor(found.label_ids)).float().mean())


def measure(encoder: str) -> None:
    """Every way at every seed, and the table."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            some, everything = Path(folder) / f"{seed}.tsv", Path(folder) / "all.tsv"
            draw(seed, some, TEXTS)
            draw(0, everything, 10**9)
            for way in ("Trainer, best flags", *WAYS):
                train = everything if "6,920" in way else some
                accuracy = ours(encoder, seed, train, WAYS[way]) if way in WAYS else trainer(encoder, seed, train)
                found.setdefault(way, []).append(accuracy)
                print(way, seed, accuracy, flush=True)
    table = {
        way: {
            "mean": round(statistics.mean(runs), 4),
            "lowest": round(min(runs), 4),
            "highest": round(max(runs), 4),
        }
        for way, runs in found.items()
    }
    write_result("sst2", {"seeds": len(SEEDS), "sentences": TEXTS, "accuracy": table})


if __name__ == "__main__":
    measure(sys.argv[1])
