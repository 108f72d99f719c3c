"""Runs compared on one page."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .facts import sample_name, shortened
from .figures import figures
from .outputs import Predictions, load_predictions
from .page import template, write_page
from .paired import mcnemar, paired

SHOWN = 20  # samples that one run gets right and the other wrong


def main(runs: Sequence[Path], target: Path | None = None) -> Path:
    """Write the page of one run again, or compare several; returns the page's path.

    Args:
        runs: Folders of finished runs.
        target: The comparison's page; `comparison.html` beside the first run if not given.

    Raises:
        FileNotFoundError: A folder without a report.
        ValueError: Runs that were evaluated on other samples.
    """
    reports = [read(run) for run in runs]
    if len(runs) == 1:
        write_page(reports[0], runs[0])
        return runs[0] / "report.html"
    target = target or runs[0].resolve().parent / "comparison.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(compare(runs, reports) + "\n", encoding="utf-8", errors="backslashreplace")
    return target


def read(run: Path) -> dict[str, Any]:
    """A run's `report.json`."""
    path = run / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the folder of a finished run, runs/<recipe>/<config>/<time>")
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def compare(runs: Sequence[Path], reports: Sequence[dict[str, Any]]) -> str:
    """The page that holds runs, called A, B and so on, against the first of them, on the same samples."""
    made = [predictions_of(run, report) for run, report in zip(runs, reports, strict=True)]
    first = made[0]
    for run, report, other in zip(runs, reports, made, strict=True):
        if apart := difference(reports[0], first, report, other):
            raise ValueError(
                f"{run} and {runs[0]} were evaluated on other samples ({len(other.labels)} and {len(first.labels)}), "
                f"or their labels differ: {apart}; compare runs with the same data, seed and split"
            )
    rows = []
    for place, (run, report) in enumerate(zip(runs, reports, strict=True)):
        report["run"] = chr(ord("A") + place)
        figured = paired(first, made[place])
        row = {
            "name": report["run"],
            "title": report["title"],
            "folder": str(run),
            "figures": figured,
            "seconds": report["cost"]["seconds"],
            "changes": changed(reports[0]["config"], report["config"]),
        }
        if first.kind == "classes":
            correct, base = (found.logits.argmax(1) == found.labels for found in (made[place], first))
            figured[0]["p"] = mcnemar(base, correct)
            row |= {"p": figured[0]["p"], "ece": report["evaluation"]["calibration"]["error"]}
            row["only_first"] = differing(first, made[place], base & ~correct, report["class_names"])
            row["only_this"] = differing(first, made[place], correct & ~base, report["class_names"])
        row["words"] = [gain_in_words(report["run"], figure) for figure in figured] if place else []
        rows.append(row)
    page = template("comparison.html")
    return str(page.render(rows=rows, figures=figures(reports), split=reports[0]["split"], samples=len(first.labels)))


def difference(one: Mapping[str, Any], first: Predictions, report: Mapping[str, Any], other: Predictions) -> str | None:
    """Why two runs cannot be compared; None where they can."""
    if one["split"] != report["split"]:
        return f"one was evaluated on {report['split']}, the other on {one['split']}"
    if first.kind != other.kind or first.logits.shape[1:] != other.logits.shape[1:]:
        return f"one predicts {other.kind} ({other.logits.shape[1]}), the other {first.kind} ({first.logits.shape[1]})"
    if first.kind != "scores" and one["class_names"] != report["class_names"]:
        return "their classes have other names or another order"
    if len(first.labels) != len(other.labels):
        return "one has more samples"
    if first.names != other.names:
        return "samples have other names"
    if not torch.equal(first.labels, other.labels):
        count = int((first.labels != other.labels).reshape(len(first.labels), -1).any(1).sum())
        return f"{count} of the labels are not the same"
    digests = one["data"]["digest"], report["data"]["digest"]
    if not first.names and (None in digests or digests[0] != digests[1]):
        return "samples have no names to tell them by"
    return None


def gain_in_words(name: str, figure: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a run is better than the first by a figure: words, and the numbers behind them."""
    (low, high), share = figure["interval"], figure["name"] in ("accuracy", "every label right")
    better, worse = (low > 0, high < 0) if figure["rises"] else (high < 0, low > 0)
    if "p" in figure:  # an exact test knows more than an interval
        better, worse = (figure["p"] < 0.05 and sign * figure["gain"] > 0 for sign in (1, -1))
    words = "is better than" if better else "is worse than" if worse else "cannot be told apart from"
    scale, unit = (100, " points of") if share else (1, " of")
    digits = "+.1f" if share else "+.3f"
    numbers = [f"{scale * value:{digits}}" for value in (figure["gain"], low, high)]
    by = f"{numbers[0]}{unit} {figure['name']} (95% interval {numbers[1]} to {numbers[2]}, paired bootstrap)"
    return {"run": name, "words": words, "by": by}


def predictions_of(run: Path, report: Mapping[str, Any]) -> Predictions:
    """A run's predictions with finite logits."""
    path = run / "predictions" / f"{report['split']}.safetensors"
    evaluated = any(report.get(kind) for kind in ("evaluation", "labels", "scores"))
    if not evaluated or not path.is_file():
        raise FileNotFoundError(f"no {path}: only runs with their predictions beside the report can be compared")
    found = load_predictions(path)
    assert found is not None
    return found.part(found.logits.isfinite().all(1))  # a fit's are saved as they were


def changed(first: str | None, other: str | None) -> str:
    """The lines of two configs that differ."""
    lines = difflib.ndiff((first or "").splitlines(), (other or "").splitlines())
    return "\n".join(line.rstrip() for line in lines if line[:1] in "+-")


def differing(
    first: Predictions, other: Predictions, chosen: torch.Tensor, class_names: Sequence[str]
) -> dict[str, Any]:
    """Samples that one run gets right and the other wrong: how many, and the first of them."""
    places, named = chosen.nonzero().flatten().tolist(), first._replace(names=shortened(first.names))
    answers = {"label": first.labels, "first": first.logits.argmax(1), "other": other.logits.argmax(1)}
    return {
        "count": len(places),
        "samples": [
            {"name": sample_name(named, place)} | {key: class_names[int(of[place])] for key, of in answers.items()}
            for place in places[:SHOWN]
        ],
    }
