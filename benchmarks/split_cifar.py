"""Learn five classes of CIFAR-10, then the other five: how much of the first is kept, and at what price?

    FINETUNING_DATA=path/to/data python -m benchmarks.split_cifar 0     # one seed; 1 and 2 likewise
    python -m benchmarks.split_cifar table                              # all seeds: the table and the picture

Task A is classes 0 to 4, learnt from scratch in 8 epochs; task B classes 5 to 9, 2,000 images of each, 2 epochs
(joint training: 1 of both). Each task has a head of its own, and while B is learnt BatchNorm keeps A's statistics in
every way of learning, so that only weights can forget. The Fisher is exact, of 1,000 images of A. B is learnt with
SGD: a step of Adam does not shrink with its gradient, so that strengths of 1e2 to 1e6 hold too little against it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor
from torch.optim import SGD

from benchmarks.cifar import Batches, Classifier, fit, of_classes
from benchmarks.measure import RESULTS, write_result

RUNS = Path("runs/split_cifar")
A, B = range(5), range(5, 10)
STRENGTHS = {"proximal": (1e2, 1e3, 1e4, 1e5, 1e6), "gradient": (1e2, 1e4, 1e6)}


class Both:
    """Batches of two tasks in turn, each with its task's number."""

    def __init__(self, *tasks: Batches) -> None:
        self.tasks = tasks

    def __len__(self) -> int:
        return sum(map(len, self.tasks))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        for batches in zip(*self.tasks, strict=True):
            yield from ((*batch, task) for task, batch in enumerate(batches))


def learn_a(seed: int) -> Classifier:
    """The net after task A; made once per seed."""
    path = RUNS / f"a{seed}.pt"
    seed_everything(seed, verbose=False)
    model = Classifier(tasks=2, lr=4e-3, weight_decay=0.05)
    if not path.is_file():
        fit(model, Batches(of_classes("train", A), 64, seed), epochs=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def take_fisher(model: Classifier, path: Path) -> None:
    """What EWC needs to know of task A."""
    from callbacks.ewc.fisher import fisher_diagonal
    from callbacks.ewc.memory import Memory, save_memory

    images, labels = of_classes("train", A, 0, 200)
    held = {name: p for name, p in model.named_parameters() if "heads" not in name}
    fisher, samples = fisher_diagonal(lambda batch: model(batch[0]), Batches((images, labels), 100), held, module=model)
    anchor = {name: p.detach().clone() for name, p in held.items()}
    facts = {"name": "A", "samples": samples, "estimator": "exact", "draws": 1, "normalised": False, "mean": 0.0}
    save_memory(path, Memory(fisher, anchor, [facts]))


def ways(fisher: Path) -> dict[str, list[Callback]]:
    """Ways of learning B, each with what it takes; the rate is 0.05 where the name says no other."""
    from callbacks import EWC, L2SP

    found: dict[str, list[Callback]] = {"fine-tuning": []}
    found["L2-SP 1"] = [L2SP(1.0, exclude=["^heads"])]
    for mode, strengths in STRENGTHS.items():
        for strength in strengths:
            callback = EWC(strength, mode=mode, load=fisher, exclude=["^heads"], consolidate=False)  # type: ignore[arg-type]
            found[f"EWC {mode} {strength:.0e}"] = [callback]
    found["joint training"] = []
    for strength in (1e3, 1e4):
        callback = EWC(strength, load=fisher, exclude=["^heads"], consolidate=False)
        found[f"EWC proximal {strength:.0e}, rate 0.1"] = [callback]
    return found


def run(seed: int) -> None:
    """All ways for one seed; a line of JSON each."""
    tests = [of_classes("test", classes) for classes in (A, B)]
    data = [of_classes("train", classes, 0, 2000) for classes in (A, B)]
    start = learn_a(seed)
    fisher = RUNS / f"fisher{seed}.safetensors"
    if not fisher.is_file():
        take_fisher(start, fisher)
    before = start.accuracy(tests[0], 0)
    path = RUNS / f"{seed}.jsonl"
    done = {json.loads(line)["way"] for line in path.read_text().splitlines()} if path.is_file() else set()
    for name, callbacks in ways(fisher).items():
        if name in done:
            continue
        rate = 0.1 if name.endswith("rate 0.1") else 0.05
        seed_everything(seed, verbose=False)
        model = Classifier(
            tasks=2, lr=rate, weight_decay=5e-4, frozen_statistics=True, optimizer=partial(SGD, momentum=0.9)
        )
        model.load_state_dict(start.state_dict())
        model.task = 1
        batches: Any = Batches(data[1], 64, seed)
        if name == "joint training":
            batches = Both(Batches(data[0], 64, seed), batches)
        started = time.process_time()
        fit(model, batches, epochs=1 if name == "joint training" else 2, callbacks=callbacks, clip=1.0)
        spent = time.process_time() - started
        a, b = (model.accuracy(test, task) for task, test in enumerate(tests))
        line = {"seed": seed, "way": name, "a_before": before, "a": a, "b": b, "cpu_s": spent}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(seed, name, f"A {a:.3f} B {b:.3f} average {(a + b) / 2:.3f}", flush=True)


def table() -> None:
    """Mean and range over the seeds, into results/split_cifar.json, and the picture beside it."""
    lines = [json.loads(line) for path in sorted(RUNS.glob("?.jsonl")) for line in path.read_text().splitlines()]
    figures: dict[str, Any] = {}
    for name in dict.fromkeys(line["way"] for line in lines):
        mine = [line for line in lines if line["way"] == name]
        columns = {
            "a": [line["a"] for line in mine],
            "b": [line["b"] for line in mine],
            "average": [(line["a"] + line["b"]) / 2 for line in mine],
            "forgetting": [line["a_before"] - line["a"] for line in mine],
        }
        figures[name] = {
            key: {"mean": round(statistics.mean(v), 4), "lowest": round(min(v), 4), "highest": round(max(v), 4)}
            for key, v in columns.items()
        } | {"cpu_s": round(statistics.mean(line["cpu_s"] for line in mine), 1)}
    before = statistics.mean(line["a_before"] for line in lines)
    seeds = len({line["seed"] for line in lines})
    write_result("split_cifar", {"seeds": seeds, "a_before": round(before, 4), **figures})
    draw(figures, before)


def draw(figures: dict[str, Any], before: float) -> None:
    """The trade-off: accuracy on B against accuracy on A, a line per mode through its strengths."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "split_cifar", "font.size": 10}
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for label in ("EWC proximal", "EWC gradient", "L2-SP"):
        chosen = {name: row for name, row in figures.items() if name.startswith(label) and "rate" not in name}
        points = [(row["a"]["mean"], row["b"]["mean"]) for row in chosen.values()]
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
        for name, point in zip(chosen, points, strict=True):
            axes.annotate(
                name.split()[-1].replace("e+0", "e"), point, textcoords="offset points", xytext=(4, 5), fontsize=7
            )
    for name, marker in (("fine-tuning", "s"), ("joint training", "*")):
        axes.plot(figures[name]["a"]["mean"], figures[name]["b"]["mean"], marker, markersize=10, label=name)
    axes.axvline(before, color="grey", linestyle=":", label="A before B")
    axes.set(xlabel="test accuracy on A, after learning B", ylabel="test accuracy on B")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "split_cifar.svg", metadata={"Date": None})


if __name__ == "__main__":
    torch.set_num_threads(1)
    table() if sys.argv[1] == "table" else run(int(sys.argv[1]))
