"""What each strategy gives and costs, on real data with real pretrained weights: the table to choose by.

    FINETUNING_DATA=... python -m benchmarks.strategies texts path/to/minilm    # all-MiniLM-L6-v2
    FINETUNING_DATA=... python -m benchmarks.strategies images

Each data set, or kind of data set, chooses its learning rates by a search: a factor on the config's for each strategy,
trained on 800 samples of the training set and measured on others of it, never on the test set. Then each strategy
runs with three seeds, on one thread, and the test set is looked at once per run, with the checkpoint that is best on a
tenth of the training set. Every run is the shipped command with a shipped overlay; one that is finished is not run
again, so a measurement that was killed goes on.
"""

from __future__ import annotations

import csv
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import RESULTS, write_result
from benchmarks.runs import DATA, WORK, finished

SEEDS = (0, 1, 2)


class Task(NamedTuple):
    """A data set and how it is trained on."""

    recipe: str
    config: str
    metric: str
    options: Sequence[str]  # of every run
    final: Sequence[str]  # of the runs that count
    search: Sequence[str]  # of those that choose a learning rate
    rates_of: str | None = None  # another task, whose search counts


Ways = dict[str, tuple[Sequence[str], Sequence[float] | str]]
TEXTS: Ways = {  # strategy and options; the factors that are searched
    "full": (("full",), (0.3, 1, 3)),
    "probe": (("probe",), (10, 30, 100, 300, 1000)),
    "BitFit": (("bitfit",), (10, 30, 100)),
    "LoRA, rank 4": (("lora", "--model.peft.rank=4"), (10, 30, 100)),
    "LoRA, rank 16": (("lora", "--model.peft.rank=16"), (10, 30, 100)),
    "DoRA": (("dora",), (10, 30, 100)),
    "IA3": (("ia3",), (10, 30, 100, 300, 1000)),
    "adapter": (("adapter",), (10, 30, 100)),
    "prompt": (("prompt",), (30, 100, 300, 1000)),
    "prefix": (("prefix",), (10, 30, 100, 300, 1000)),
}
IMAGES: Ways = {  # a name instead of factors: what was found for that one counts
    "probe": (("probe",), (1, 3, 10, 30)),
    "full": (("full",), (0.3, 1, 3)),
    "layer decay": (("layer_decay",), (0.3, 1, 3)),
    "gradual": (("gradual",), "full"),
    "two-stage": (("two_stage",), "full"),
    "BitFit": (("bitfit",), (3, 10, 30)),
    "LoRA, rank 4": (("lora", "--model.peft.rank=4"), (1, 3, 10)),
    "adapter": (("adapter",), (1, 3, 10)),
    "L2-SP": (("full", "l2sp"), "full"),
    "EMA": (("full", "ema"), "full"),
    "probe of three blocks": (("probe", "--model.fuse_blocks=[blocks2,blocks4]"), "probe"),
    "full, head on three blocks": (("full", "--model.fuse_blocks=[blocks2,blocks4]"), "full"),
}


def text_tasks(encoder: str) -> dict[str, Task]:
    """2,000 training samples of SST-2, 1,000 of STS-B and SICK, 600 of AG News; of large tests some."""
    shared = [f"--model.encoder={encoder}", "--model.pooling=mean", "--data.max_length=128", "--trainer.max_epochs=3"]
    pair = "--data.text_column=[sentence1,sentence2]"
    score = ["--data.problem_type=regression", "--data.label_column=score"]
    kinds = {
        "sst2": ("val/accuracy", "dev.tsv", ["--data.text_column=sentence"], None, 2000, None),
        "stsb": ("val/spearman", "test.tsv", [pair, *score], None, 1000, None),
        "sick": ("val/accuracy", "test.tsv", [pair], "sst2", 1000, 2000),
        "agnews": ("val/accuracy", "test.csv", [], "sst2", 600, 1000),
    }
    tasks = {}
    for name, (metric, test, options, rates_of, most, most_test) in kinds.items():
        train = DATA / name / f"train{Path(test).suffix}"
        some, others, final = sample(train, (800, 400)) + sample(train, (most,))
        tested = sample(DATA / name / test, (most_test or 10**9,))[0]
        tasks[name] = Task(
            "text",
            "text/csv_minilm",
            metric,
            [*shared, *options],
            [f"--data.train_file={final}", "--data.val_share=0.1", f"--data.test_file={tested}", "--test"],
            [f"--data.train_file={some}", f"--data.val_file={others}"],
            rates_of,
        )
    return tasks


def image_tasks() -> dict[str, Task]:
    """Both at 128 px, EfficientNet-Lite0 of timm; hymenoptera's val/ is its test, and its val a tenth of train/."""
    weights = DATA / "weights" / "tf_efficientnet_lite0.safetensors"
    shared = ["--model.backbone=timm/tf_efficientnet_lite0", f"--model.weights={weights}", "--model.image_size=128"]
    return {
        name: Task(
            "vision",
            "vision/folder_resnet50",
            "val/accuracy",
            [*shared, f"--data.root={DATA / name}"],
            [f"--trainer.max_epochs={epochs}", "--test"],
            search,
        )
        for name, epochs, search in (
            ("hymenoptera", 8, ("--trainer.max_epochs=4", "--data.val_share=0.4")),
            ("grocery", 3, ("--trainer.max_epochs=2", "--data.limit_per_class=16")),
        )
    }


def sample(file: Path, counts: Sequence[int]) -> list[Path]:
    """Disjoint random parts of a file with a header, or the file itself where all of it is asked for."""
    lines = file.read_text().splitlines()
    if counts[0] >= len(lines) - 1:
        return [file]
    rows = list(csv.reader(lines)) if file.suffix == ".csv" else [line.split("\t") for line in lines]
    head, body = rows[0], random.Random(0).sample(rows[1:], len(rows) - 1)
    parts, start = [], 0
    for count in counts:
        part = WORK / "data" / f"{file.parent.name}_{file.stem}_{start}_{count}{file.suffix}"
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", newline="") as out:
            delimiter = "," if file.suffix == ".csv" else "\t"
            options: dict[str, Any] = {} if file.suffix == ".csv" else {"quoting": csv.QUOTE_NONE, "quotechar": None}
            csv.writer(out, delimiter=delimiter, lineterminator="\n", **options).writerows(
                [head, *body[start : start + count]]
            )
        parts.append(part)
        start += count
    return parts


def run(task: Task, ways: Ways, way: str, factor: float, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """One command; what it found and used, from the cache where it ran before."""
    overlays, own = [], []
    for word in ways[way][0]:
        own.append(word) if word.startswith("--") else overlays.append(f"--config=strategy/{word}")
    arguments = [
        *(f"recipes.{task.recipe}", "fit", f"--config={task.config}", *overlays, f"--model.lr_factor={factor:g}", *own),
        *(f"--seed_everything={seed}", f"--data.seed={seed}"),
        *task.options,
        *options,
    ]
    found = finished(arguments, more=["--model.lr_limit=null"])
    print(
        f"{way}, x{factor:g}, seed {seed}: val {found['val']:.4f} {found['test']}, {found['fit_s']:.0f} s", flush=True
    )
    return found


def best_factor(task: Task, ways: Ways, way: str) -> float:
    """The factor whose run on a part of the training set is best on another part of it."""
    factors = ways[way][1]
    if isinstance(factors, str):
        return best_factor(task, ways, factors)
    scores = {factor: run(task, ways, way, factor, 0, task.search)["val"] for factor in factors}
    return max(scores, key=lambda factor: scores[factor])


def row(runs: Sequence[dict[str, Any]], metric: str, factor: float) -> dict[str, Any]:
    """Three runs as one line of the table."""
    scores = [found["test"][metric] for found in runs]
    return {
        "test": round(statistics.mean(scores), 4),
        "lowest": round(min(scores), 4),
        "highest": round(max(scores), 4),
        "trained": runs[0]["trained"],
        "trained_share": round(runs[0]["trained"] / runs[0]["parameters"], 5),
        "fit_s": round(statistics.median(found["fit_s"] for found in runs), 1),
        "cpu_s": round(statistics.median(found["cpu_s"] for found in runs), 1),
        "memory_gb": round(max(found["memory_gb"] for found in runs), 2),
        "checkpoint_mb": round(runs[0]["checkpoint_mb"], 2),
        "lr_factor": factor,
    }


def measure(kind: str, tasks: dict[str, Task], ways: Ways) -> None:
    """Every task, strategy and seed; the result is written after each task."""
    file = RESULTS / f"strategies_{kind}.json"
    done = json.loads(file.read_text())["tasks"] if file.is_file() else {}
    for name, task in tasks.items():
        print(f"== {name}", flush=True)
        metric = task.metric.replace("val/", "test/")
        factors = {way: best_factor(tasks[task.rates_of or name], ways, way) for way in ways}
        table = {
            way: row([run(task, ways, way, factor, seed, task.final) for seed in SEEDS], metric, factor)
            for way, factor in factors.items()
        }
        done[name] = {"metric": metric, "strategies": table}
        write_result(f"strategies_{kind}", {"seeds": len(SEEDS), "threads_per_run": 1, "tasks": done})


if __name__ == "__main__":
    chosen, *rest = sys.argv[1:]
    if chosen == "texts":
        measure("texts", text_tasks(str(Path(rest[0]).absolute())), TEXTS)
    else:
        measure("images", image_tasks(), IMAGES)
