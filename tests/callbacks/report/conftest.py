"""Reports of random predictions, and what is read of a page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from callbacks.report.evaluation import label_evaluation, score_evaluation
from callbacks.report.outputs import Predictions, load_predictions


def run(steps: int, lrs: Any, validations: int = 1, **changes: Any) -> dict[str, Any]:
    """A report of a fit of so many steps; `lrs` gives those of both groups at a step."""
    every = max(1, steps // 100)
    found = some(changes.pop("classes", 3), **changes)
    marks = range(0, steps, every)
    found["curves"] = {
        "points": [{"step": step, "loss": 1 / (1 + step)} for step in marks],
        "rates": [{"step": step, "lr": dict(zip(("$body$", "head_1"), lrs(step), strict=True))} for step in marks],
        "groups": ["$body$", "head_1"],
        "validations": [
            {"step": steps * (n + 1) // validations, "epoch": n, "metrics": {"val/loss": 0.5, "val/accuracy": 0.99994}}
            for n in range(validations)
        ],
    }
    last = found["curves"]["validations"][-1]
    found["best"] = {"monitor": "val/accuracy", "mode": "max", "score": 0.5, **last}
    found["phases"] = [{"step": 0, "open": ["head_1"]}, {"step": steps // 2, "open": ["$body$", "head_1"]}]
    return found


def with_scores(report: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
    labels = torch.randn(200, generator=torch.Generator().manual_seed(0))
    found = score_evaluation(scale * labels + 0.1, labels, mean=0.5)
    furthest = [{"name": "a < b", "label": 1.0, "predicted": -3.0}]
    return report | {"evaluation": None, "scores": found, "class_names": [], "furthest": furthest}


def with_labels(report: dict[str, Any], names: list[str]) -> dict[str, Any]:
    labels = (torch.rand(200, len(names), generator=torch.Generator().manual_seed(0)) < 0.3).float()
    noise = torch.randn(200, len(names), generator=torch.Generator().manual_seed(1))
    return report | {
        "evaluation": None, "labels": label_evaluation(2 * labels - 1 + noise, labels), "class_names": names
    }  # fmt: skip


QUICK = ["fit", "--config", "vision/quickstart", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


class Page(HTMLParser):
    """Counts what a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def loaded(path: Path) -> Predictions:
    found = load_predictions(path)
    assert found is not None
    return found


def check_page(folder: Path) -> str:
    """One file, without scripts and without anything from elsewhere; every drawing has words beside it."""
    content = (folder / "report.html").read_text()
    page = Page(content)
    assert "script" not in page.tags and "link" not in page.tags
    assert all(link.startswith(("#", "data:image/")) for link in page.links), page.links
    assert "url(http" not in content and "@import" not in content
    assert page.tags.count("figcaption") == page.tags.count("figure") >= 1
    assert page.tags.count("svg") <= page.tags.count("figure")
    assert len(content) < 2 * 2**20
    return content


def some(classes: int, samples: int = 300, **changes: Any) -> dict[str, Any]:
    """A report of random answers."""
    from callbacks.report.evaluation import evaluation

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator)
    curves: dict[str, Any] = {"points": [], "validations": [], "rates": [], "groups": []}
    cost = {"seconds": 0, "samples_per_second": None, "memory_gb": 1, "device": "x", "devices": 1, "precision": "32"}
    report = {
        "version": 1, "title": "net on data", "facts": {}, "config": None, "split": "test", "start": None,
        "chose": False,
        "class_names": [f"class {n}" for n in range(classes)], "evaluation": evaluation(logits, labels), "metrics": {},
        "curves": curves, "phases": [], "best": None, "mistakes": [], "uncertain": [],
        "data": {"counts": {}, "digest": None, "seed": None, "skipped": [], "skipped_rows": 0, "without_numbers": 0},
        "cost": cost | {"parameters": 5, "trained": 4}, "versions": {},
    }  # fmt: skip
    return report | changes
