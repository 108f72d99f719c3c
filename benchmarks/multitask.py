"""One net for several tasks against one net for each: what sharing a trunk costs or gives, under each balance of tasks.

    python -m benchmarks.multitask

Rendered shapes, the config multitask/quickstart, three seeds, on one thread. `alone` is four nets, each of the joint
net's size and trained for as many epochs. Every run is the shipped command; one that is finished is not run again, so a
measurement that was killed goes on.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.measure import write_result
from benchmarks.runs import finished

SEEDS = (0, 1, 2)
TASKS = {"shape": "accuracy", "size": "r2", "colours": "f1", "outline": "iou"}
BALANCES = ("fixed", "uncertainty", "gradnorm", "upgrad", "mgda", "dual_proj", "aligned_mtl")
HEADS = {"shape": "{}", "size": "{}", "colours": "{}", "outline": "{hidden: 16}"}


def run(seed: int, *options: str) -> dict[str, Any]:
    arguments = ["recipes.multitask", "fit", "--test", "--config=multitask/quickstart"]
    found = finished([*arguments, f"--seed_everything={seed}", f"--data.seed={seed}", *options])
    keys = {name: f"test/{name}/{metric}" for name, metric in TASKS.items()}
    told = {name: round(found["test"][key], 4) for name, key in keys.items() if key in found["test"]}
    print(*options, f"seed {seed}: {told}, {found['cpu_s']:.0f} s of CPU", flush=True)
    return found


def row(values: list[float]) -> dict[str, float]:
    return {
        "mean": round(statistics.mean(values), 4),
        "lowest": round(min(values), 4),
        "highest": round(max(values), 4),
    }


def main() -> None:
    """All balances and the nets alone; the result is written after each."""
    told: dict[str, Any] = {}
    for balance in BALANCES:
        runs = [run(seed, f"--model.balance={balance}") for seed in SEEDS]
        told[balance] = {
            name: row([found["test"][f"test/{name}/{metric}"] for found in runs]) for name, metric in TASKS.items()
        }
        told[balance]["cpu_s"] = round(statistics.median(found["cpu_s"] for found in runs), 1)
        told[balance]["parameters"] = runs[0]["parameters"]
        write_result("multitask", {"seeds": len(SEEDS), "threads_per_run": 1, "metrics": TASKS, "runs": told})
    alone: dict[str, Any] = {"cpu_s": 0.0, "parameters": 0}
    for name, metric in TASKS.items():
        runs = [run(seed, f"--model.heads={{{name}: {HEADS[name]}}}") for seed in SEEDS]
        alone[name] = row([found["test"][f"test/{name}/{metric}"] for found in runs])
        alone["cpu_s"] = round(alone["cpu_s"] + statistics.median(found["cpu_s"] for found in runs), 1)
        alone["parameters"] += runs[0]["parameters"]
    told["alone"] = alone
    write_result("multitask", {"seeds": len(SEEDS), "threads_per_run": 1, "metrics": TASKS, "runs": told})


if __name__ == "__main__":
    main()
