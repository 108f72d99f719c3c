"""Fill the tables of README.md and benchmarks/README.md from benchmarks/results and the configs' headers.

    python -m benchmarks.readme

Replaces what stands between `<!-- name -->` and `<!-- end -->`; a test sees that nothing else is there.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS
from recipes.cli.early import config_names, find_config, header, strategy_names
from tests.adapted_nets import table as adapters

HOME = Path(__file__).parents[1]
PAGES = [HOME / "README.md", HOME / "benchmarks" / "README.md", HOME / "docs" / "adapters.md"]


def result(name: str) -> dict[str, Any]:
    """A results file's content."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def configs() -> str:
    """A row per config: name, what, measured."""
    rows = []
    for name in config_names():
        text = " ".join(header(find_config(name)))
        what = text.split(" python -m")[0].strip().rstrip(".")
        measured = text.split("Measured: ")[1].split(" Source:")[0].rstrip(".")
        rows.append(f"| `{name}` | {what} | {measured} |")
    return "\n".join(["| config | what | measured |", "|---|---|---|", *rows])


def strategies() -> str:
    """A row per strategy: name and what it does."""
    rows = []
    for name in strategy_names():
        what = header(find_config(name))[0].rstrip(".")
        rows.append(f"| `{name.removeprefix('strategy/')}` | {what} |")
    return "\n".join(["| strategy | what |", "|---|---|", *rows])


def quickstart() -> str:
    """The screen that the quickstart ends with."""
    return "```\n" + "\n".join(result("quickstart")["screen"]) + "\n```"


def speed() -> str:
    """What was measured, with the hardware."""
    training, loading = result("training"), result("loading")
    overhead, features, real, opened = (result(name) for name in ("overhead", "features", "real_data", "predict"))
    again = features["recomputed_cpu_s"] / features["stored_again_cpu_s"]
    cifar, ants = real["cifar10"], real["hymenoptera"]
    rows = [
        ("ResNet-18, 64 px, batch 32, loading included, against a bare loop, fp32, CPU time",
         f"{training['fp32_ratio_cpu_s']:.2f}", "training"),
        ("the same with the defaults that ship", f"{training['shipped_ratio_cpu_s']:.2f}", "training"),
        ("a step beyond the net: logging, metrics, bar, callbacks; fp32 and bf16, each against its own bare loop",
         f"{overhead['fp32']['overhead_ms_per_step']:.1f} and {overhead['bf16']['overhead_ms_per_step']:.1f} ms of CPU",
         "overhead"),
        (f"from the command to a prediction, by a ResNet-50 in a checkpoint of {opened['checkpoint_mb']} MB",
         f"{opened['seconds']:.1f} s, of which {opened['opening_s']:.2f} s open the checkpoint", "predict"),
        ("images per CPU second with standard augmentation, against torchvision's per-sample pipeline",
         f"{loading['ratio']:.1f} times", "loading"),
        ("ten epochs of a linear probe with `--feature_views 1`, against computing features again",
         f"{features['ratio']:.1f} times faster; {again:.0f} times when they are there", "features"),
        ("40,000 CIFAR-10 images as Parquet, ResNet-20 from scratch, 3 epochs: test accuracy",
         f"{cifar['test/accuracy']:.3f} in {cifar['wall_s']} s", "real_data"),
        ("396 photographs of ants and bees, ResNet-18 from scratch: test accuracy",
         f"{ants['test/accuracy']:.3f} in {ants['wall_s']} s", "real_data"),
    ]  # fmt: skip
    lines = ["| what | measured | file in benchmarks/results |", "|---|---|---|"]
    lines += [f"| {what} | {value} | {name}.json |" for what, value, name in rows]
    return f"On {training['hardware']['processor']}, without a GPU and without bf16 in hardware:\n\n" + "\n".join(lines)


def cost() -> str:
    """What callbacks add to a step, and what they save."""
    steps, ewc = result("callbacks"), result("ewc")
    resnet, bert = ewc["step_resnet18_32px"], ewc["step_bert_6_layers"]
    rows = [
        ("GradualUnfreezing, LRWarmup and StopOnNonFinite together, ResNet-18, 64 px: time of a step",
         f"{steps['all three']['cpu']:.2f} times that without", "callbacks"),
        *[(f"{name} of ResNet-18 trained: time of a step, and its share of the work",
           f"{steps[name]['cpu']:.2f} of full training, {steps[name]['work']:.2f}", "callbacks")
          for name in steps if name.startswith("last")],
        ("EWC's penalty: time of a step of ResNet-18, 32 px, batch 32; of a BERT of 6 layers",
         f"{resnet['proximal_ratio_cpu']:.2f} and {bert['proximal_ratio_cpu']:.2f} times that without", "ewc"),
        ("... as a sum in the loss, as everybody writes it",
         f"{resnet['autograd_ratio_cpu']:.2f} and {bert['autograd_ratio_cpu']:.2f} times", "ewc"),
        *[(f"Fisher information of {net}, {estimator}, 1,000 samples: CPU seconds, against a loop over samples",
           f"{figures['ours_cpu_s_per_1000']} s, {figures['times_faster_than_loop_cpu']:.1f} times faster", "ewc")
          for key, net in (("resnet18_32px", "ResNet-18, 32 px, 10 classes"), ("bert_6_layers", "the BERT, 2 classes"))
          for kind, estimator in (("exact", "exact"), ("one_draw", "one draw"))
          for figures in (ewc[f"fisher_{kind}_{key}"],)],
    ]  # fmt: skip
    lines = ["| what | measured, CPU time | file in benchmarks/results |", "|---|---|---|"]
    lines += [f"| {what} | {value} | {name}.json |" for what, value, name in rows]
    return f"On one thread of {ewc['hardware']['processor']}:\n\n" + "\n".join(lines)


def with_range(row: dict[str, float]) -> str:
    """A mean and its range over the seeds."""
    return f"{row['mean']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})"


def forgetting() -> str:
    """Two tasks one after the other: what is kept of the first, by the way of learning the second."""
    figures = result("split_cifar")
    rows = [(name, row) for name, row in figures.items() if isinstance(row, dict) and "average" in row]
    lines = ["| way of learning B | accuracy on A | on B | average |", "|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(with_range(row[key]) for key in ('a', 'b', 'average'))} |" for name, row in rows]
    return f"A before B: {figures['a_before']:.3f}; {figures['seeds']} seeds; split_cifar.json.\n\n" + "\n".join(lines)


def by_images(name: str, with_seconds: bool) -> str:
    """Ways by number of images."""
    figures = result(name)
    columns = {column: row for column, row in figures.items() if column.endswith("per class")}
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for way in next(iter(columns.values())):
        rows = [column[way] for column in columns.values()]
        cells = [with_range(row) + (f", {row['cpu_s']:.0f} s" if with_seconds else "") for row in rows]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    note = ", CPU seconds of one fit" if with_seconds else ""
    return f"Test accuracy, {figures['seeds']} seeds{note}; {name}.json.\n\n" + "\n".join(lines)


def text_quickstart() -> str:
    """The screen that the text quickstart ends with, and what else finds on the same texts."""
    figures = result("text_quickstart")
    found = figures["test_accuracy"]
    return (
        "```\n" + "\n".join(figures["screen"]) + "\n```\n\n"
        f"Over {len(found)} seeds it finds {figures['mean']:.3f} of the test's docstrings ({min(found):.3f} to "
        f"{max(found):.3f}); logistic regression on TF-IDF finds {figures['tfidf']:.3f}, the largest class is "
        f"{figures['majority_class']:.3f} of them (text_quickstart.json)."
    )


def sst2() -> str:
    """Ways to fine-tune MiniLM on SST-2."""
    figures = result("sst2")
    lines = ["| way | accuracy |", "|---|---|"]
    lines += [f"| {way} | {with_range(row)} |" for way, row in figures["accuracy"].items()]
    seeds, sentences = figures["seeds"], figures["sentences"]
    return f"{sentences:,} training sentences but for the last row, {seeds} seeds; sst2.json.\n\n" + "\n".join(lines)


def more_speed() -> str:
    """Texts and files: measured on another machine than the images."""
    texts, data, parquet = result("text"), result("data"), result("parquet")
    per, ours = texts["texts_per_cpu_s"], texts["texts_per_cpu_s"]["ours"]
    first, second = texts["million"]["first"], texts["million"]["second"]
    usual, mine, decoding = (data[way]["per_cpu_s"] for way in ("usual", "ours", "decoding"))
    tree = data["million"]
    others = {
        "article": "a loop that pads all to 128 tokens, fp32",
        "lightning": "a plain LightningModule, padding per batch, fp32",
        "trainer": "transformers' Trainer as it comes",
        "trainer_best": "the same with batches of like length and bf16",
        "bare": "a bare bf16 loop over batches made beforehand",
    }
    rows = [
        ("MiniLM, sentences of SST-2, batch 32: texts per CPU second", f"{ours:.0f}", "text"),
        *[(f"... {name}", f"{per[way]:.0f}; ours is {ours / per[way]:.2f} times as fast", "text")
          for way, name in others.items()],
        ("1,000,000 short texts in a CSV to the first batch: first start, second start, most memory",
         f"{first['wall_s']:.0f} s, {second['wall_s']:.1f} s, {first['peak_gb']:.1f} GB", "text"),
        ("JPEGs of 300 to 500 px to augmented batches of 224 px, images per CPU second",
         f"{mine:.0f}: {mine / usual:.2f} times torchvision's, {mine / decoding:.2f} of decoding alone", "data"),
        ("1,000,000 files in 1,000 folders: listed, listed again; a walk that notes paths",
         f"{tree['first_s']:.1f} s, {tree['second_s']:.2f} s; {tree['walk_s']:.1f} s", "data"),
        (f"{parquet['rows']:,} rows in {parquet['files']} Parquet files: to the first batch's order, most memory",
         f"{parquet['start_s'] + parquet['order_s']:.1f} s, {parquet['memory_gb']:.1f} GB", "parquet"),
        ("JPEGs in Parquet files to augmented batches, against single files: images per CPU second",
         f"{parquet['parquet_per_cpu_s'] / parquet['files_per_cpu_s']:.2f} times", "parquet"),
        ("`recipes doctor`, images of 32 px", f"{data['doctor_per_s']:,} a second", "data"),
        (f"... pairs of copies in {data['cifar10']['pictures']:,} images of CIFAR-10; of these in training and test",
         f"{data['cifar10']['rescaled']}; {data['cifar10']['leaks']['train, test']}", "data"),
    ]  # fmt: skip
    lines = ["| what | measured | file in benchmarks/results |", "|---|---|---|"]
    lines += [f"| {what} | {value} | {name}.json |" for what, value, name in rows]
    return f"On {texts['hardware']['processor']}, without a GPU:\n\n" + "\n".join(lines)


def filled(text: str) -> str:
    """A page with its generated parts made anew."""

    def made(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{PARTS[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?\n?<!-- end -->", made, text, flags=re.DOTALL)


PARTS = {
    "quickstart": quickstart,
    "configs": configs,
    "strategies": strategies,
    "adapters": adapters,
    "forgetting": forgetting,
    "few": partial(by_images, "few_images", with_seconds=True),
    "cost": cost,
    "speed": speed,
    "more": more_speed,
    "augmentation": partial(by_images, "augmentation", with_seconds=False),
    "text": text_quickstart,
    "sst2": sst2,
}

if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
