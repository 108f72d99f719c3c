"""Fine-tuning MiniLM on SST-2's sentences: texts per CPU second, ours against what else is usual.

    FINETUNING_DATA=... python -m benchmarks.text path/to/encoder

Ways, in turn, each in a process of its own with its own defaults, over the same sentences, batch 32, one thread; what
counts is the second epoch, evaluation not included:

* article: every text padded to 128 tokens, a loop of six lines, fp32
* lightning: a plain LightningModule, each batch padded to its longest, fp32
* trainer: transformers' Trainer as it comes
* trainer_best: the same with batches of like length and bf16
* bare: a bare bf16 loop over the very batches of `ours`, made beforehand: the ceiling of what a recipe can reach
* ours: `python -m recipes.text fit --config text/csv_minilm`
* ours_words_kept: the same with the word embeddings frozen

Then a million short texts: seconds from the file to the first batch, without and with the cache, and the peak memory of
all processes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import report_end, report_start, write_result

TEXTS, BATCH, EPOCHS, ROUNDS = 640, 32, 2, 3
SENTENCES = Path(os.environ.get("FINETUNING_DATA", "")) / "sst2" / "train.tsv"
KEEP_WORDS = ["--trainer.callbacks+=Freeze", '--trainer.callbacks.patterns={word_embeddings: false, ".": true}']


def sentences() -> tuple[list[str], list[int]]:
    """Texts and labels, of both classes alike."""
    rows = [line.rsplit("\t", 1) for line in SENTENCES.read_text().splitlines()[1:]]
    rows = [row for label in "01" for row in [row for row in rows if row[1] == label][: TEXTS // 2]]
    return [text for text, _ in rows], [int(label) for _, label in rows]


def loaded(encoder: str) -> tuple[Any, Any]:
    """Tokenizer and classifier, by plain transformers."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    net = AutoModelForSequenceClassification.from_pretrained(encoder)
    return AutoTokenizer.from_pretrained(encoder), net.train()


def article(encoder: str) -> None:
    """The loop that everybody writes."""
    import torch

    tokenizer, net = loaded(encoder)
    texts, labels = sentences()
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=128, return_tensors="pt")
    data = torch.utils.data.TensorDataset(tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels))
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-5)
    for epoch in range(EPOCHS):
        report_start(epoch)
        for input_ids, attention_mask, label in loader:
            loss = net(input_ids=input_ids, attention_mask=attention_mask, labels=label).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    report_end()


def lightning(encoder: str) -> None:
    """The module that Lightning's own tutorial shows."""
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from transformers import DataCollatorWithPadding

    tokenizer, net = loaded(encoder)
    texts, labels = sentences()
    tokens = tokenizer(texts, truncation=True, max_length=128)
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(tokens["input_ids"], labels, strict=True)]

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.net(**batch).loss
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=5e-5)

        def on_train_epoch_start(self) -> None:
            report_start(self.current_epoch)

    loader = torch.utils.data.DataLoader(rows, BATCH, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        Trainer(max_epochs=EPOCHS, accelerator="cpu", default_root_dir=folder).fit(Module(), loader)
    report_end()


def trainer(encoder: str, **options: Any) -> None:
    """Transformers' own."""
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

    tokenizer, net = loaded(encoder)
    texts, labels = sentences()
    tokens = tokenizer(texts, truncation=True, max_length=128)
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(tokens["input_ids"], labels, strict=True)]

    class Clock(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report_start(round(state.epoch))

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if round(state.epoch) == EPOCHS:
                report_end()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=EPOCHS, use_cpu=True, **options
        )
        collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if options else None)
        Trainer(net, arguments, train_dataset=rows, data_collator=collator, callbacks=[Clock()]).train()  # type: ignore[arg-type]


def data_module(encoder: str, folder: str) -> Any:
    """The sentences as the recipe reads them."""
    from datamodules import TextFiles

    file = Path(folder) / "train.tsv"
    texts, labels = sentences()
    lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in zip(texts, labels, strict=True))]
    file.write_text("\n".join(lines) + "\n")
    data = TextFiles(
        str(file), val_file=str(file), text_column="sentence", tokenizer=encoder, max_length=128, batch_size=BATCH
    )
    data.prepare_data()
    data.setup("fit")
    return data


def bare(encoder: str) -> None:
    """Forward, backward, clip and step over batches that are there."""
    import torch

    _, net = loaded(encoder)
    with tempfile.TemporaryDirectory() as folder:
        batches = list(data_module(encoder, folder).train_dataloader())
        optimizer = torch.optim.AdamW(net.parameters(), lr=5e-5, fused=True)
        for epoch in range(EPOCHS):
            report_start(epoch)
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16):
                    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                    loss = torch.nn.functional.cross_entropy(logits, batch["label"])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        report_end()


def ours(encoder: str, *options: str) -> None:
    """The recipe, through its command line, with all that it does beside."""
    with tempfile.TemporaryDirectory() as folder:
        data_module(encoder, folder)
        arguments = [
            *("fit", "--config", "text/csv_minilm", f"--model.encoder={encoder}", "--data.text_column=sentence"),
            *(f"--data.train_file={folder}/train.tsv", f"--data.val_file={folder}/train.tsv"),
            *(f"--trainer.max_epochs={EPOCHS}", f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu"),
            *("--trainer.limit_val_batches=1", *options),
        ]
        from recipes.cli.early import start

        start("text", arguments)
        from lightning.pytorch import Callback

        import recipes.cli.defaults
        from recipes.text import main

        class Clock(Callback):
            def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
                report_start(trainer.current_epoch)

            def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
                if trainer.current_epoch == EPOCHS - 1 and not trainer.sanity_checking:
                    report_end()

        defaults = recipes.cli.defaults.default_callbacks
        recipes.cli.defaults.default_callbacks = lambda *a, **k: [Clock(), *defaults(*a, **k)]  # type: ignore
        main(arguments)


WAYS = {
    "article": article,
    "lightning": lightning,
    "trainer": trainer,
    "trainer_best": functools.partial(trainer, bf16=True, train_sampling_strategy="group_by_length"),
    "bare": bare,
    "ours": ours,
    "ours_words_kept": lambda encoder: ours(encoder, *KEEP_WORDS),
}


def million(folder: str) -> None:
    """From the file to the first batch, without the imports of libraries."""
    import datasets  # noqa: F401
    import transformers  # noqa: F401

    from datamodules import TextFiles

    started = time.perf_counter()
    encoder = os.environ["ENCODER"]
    data = TextFiles(f"{folder}/texts.csv", tokenizer=encoder, max_length=64, val_share=0.01)
    data.prepare_data()
    data.setup("fit")
    next(iter(data.train_dataloader()))
    print("SECONDS", json.dumps({"wall_s": time.perf_counter() - started}), flush=True)


def run(*arguments: str, **environment: str) -> dict[str, float]:
    """One way in a process of its own; its seconds and the peak memory of it and its children."""
    command = [sys.executable, "-m", "benchmarks.text", *arguments]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        peak: list[float] = [0.0]
        watch = threading.Thread(target=watch_memory, args=(process.pid, peak))
        watch.start()
        process.wait()
        watch.join()
        out.seek(0)
        text = out.read()
    if process.returncode or "SECONDS" not in text:
        raise RuntimeError(f"{arguments}: {text[-3000:]}")
    return {**json.loads(text.split("SECONDS")[1].splitlines()[0]), "peak_gb": peak[0]}


def watch_memory(pid: int, peak: list[float]) -> None:
    """Highest sum of the memory that belongs to a process and its children alone."""
    process = psutil.Process(pid)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        total = 0
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += each.memory_full_info().uss
        peak[0] = max(peak[0], round(total / 2**30, 2))
        time.sleep(0.1)


def write_million(folder: str) -> None:
    """A million texts of 5 to 14 words, in two classes."""
    import random

    words = " ".join(sentences()[0]).replace('"', "").split()
    draw = random.Random(0)
    with Path(folder, "texts.csv").open("w") as file:
        file.write("text,label\n")
        for number in range(1_000_000):
            file.write(f'"{" ".join(draw.choices(words, k=draw.randint(5, 14)))}",{number % 2}\n')


def measure(encoder: str) -> None:
    """Run the ways in turn and write the ratios."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way in WAYS:
            found[way].append(run(way, encoder, OMP_NUM_THREADS="1"))
            print(way, found[way][-1], flush=True)
    per_second = {way: round(TEXTS / statistics.median(r["cpu_s"] for r in runs), 1) for way, runs in found.items()}
    figures: dict[str, Any] = {"texts": TEXTS, "rounds": ROUNDS, "texts_per_cpu_s": per_second}
    for key in ("wall_s", "cpu_s"):
        figures[key] = {way: [round(run[key], 2) for run in runs] for way, runs in found.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_million(folder)
        options = {"ENCODER": encoder, "HF_DATASETS_CACHE": f"{folder}/cache"}
        figures["million"] = {start: run("million", folder, **options) for start in ("first", "second")}
    write_result("text", figures)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        {**WAYS, "million": million}[sys.argv[1]](sys.argv[2])
    else:
        measure(sys.argv[1])
