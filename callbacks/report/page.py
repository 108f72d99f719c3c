"""The page of a report: one file, no script, nothing from the network.

`python -m recipes report RUN` writes a run's page again. Figures are SVG by matplotlib in the page's colours, light or
dark; each has its numbers beside it in words. The page is a function of `report.json`, whose keys are:

    version      1, the version of this layout
    title        what was trained on what
    facts        what the program around the callback adds, plain values by name: model, commands, doctor, ...
    config       the text of config.yaml in the folder, or null
    class_names  in the order of the labels
    split        test or val: whose samples the rest is about
    chose        whether these samples chose the checkpoint
    evaluation   of `evaluation.evaluation`, for classes: accuracy and macro F1 with 95 % intervals, loss, majority
                 class, scores per class, confusion matrix, worst pairs, calibration
    labels       of `label_evaluation`, for several labels: F1 with intervals, scores and curves per label
    scores       of `score_evaluation`, for scores: rank correlation and errors with intervals, points
    start        accuracy of the nearest class centre on the features before the fit, and on how many samples
    tasks        of several tasks each one's class_names, split, chose, evaluation, labels, scores, start, metrics,
                 mistakes, uncertain and furthest, by its name; what is about one task is null above
    metrics      every number that the module logged for that split
    curves       points {step, loss}; validations {step, epoch, metrics}; rates {step, lr per group}; groups
    phases       {step, open: groups that train from there on}
    best         the validation whose predictions are kept: {monitor, mode, score, step, epoch, metrics}
    mistakes     the most confident wrong answers: {name, label, predicted, probability, picture, saliency, pieces}
    uncertain    the least certain correct ones, the same
    furthest     scores with the largest errors: {name, label, predicted}
    data         counts per split, digest of the split, what was skipped or has no finite logits
    cost         seconds of the fit, samples per second while training, peak memory in GB, device, precision
    versions     of Python and the libraries
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from .figures import (
    confusion_figure,
    figures,
    label_rows,
    metric_named,
    number,
    reliability_figure,
    score_figure,
    svg,
    threshold_figure,
    values_of,
)


def render(report: Mapping[str, Any]) -> str:
    """The page of one report: the content of `report.json`."""
    return template("page.html").render(  # type: ignore[no-any-return]
        report=report,
        verdict=verdict(report),
        figures=figures([report]),
        **details(report),
        tasks=[
            {"name": name, "part": part, "verdict": verdict(part), **details(part)}
            for name, part in (report.get("tasks") or {}).items()
        ],
        phases=phases(report),
    )


def details(part: Mapping[str, Any]) -> dict[str, Any]:
    """Figures and tables of a report, or of one of its tasks."""
    classes, labels, scores = part["evaluation"], part.get("labels"), part.get("scores")
    return {
        "matrix": svg(confusion_figure(part)) if classes else None,
        "reliability": svg(reliability_figure(part)) if classes else None,
        "class_rows": class_rows(part) if classes else [],
        "labels": labels,
        "label_rows": label_rows(part),
        "thresholds": svg(threshold_figure(part)) if labels else None,
        "scores": scores,
        "scatter": svg(score_figure(part)) if scores else None,
        "residuals": svg(score_figure(part, errors=True)) if scores else None,
        "pairs": pairs(part),
    }


@functools.cache
def template(name: str, beside: Path = Path(__file__).parent) -> Any:
    """A template of a folder, which may include those of this file's; whatever is put into it is escaped."""
    import jinja2

    folder = jinja2.FileSystemLoader([beside, Path(__file__).parent])
    environment = jinja2.Environment(
        loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": number, "duration": duration}
    return environment.get_template(name)


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def verdict(report: Mapping[str, Any]) -> str:
    """How good it is, in a sentence or two, and against which baseline."""
    found, split = report["evaluation"], {"test": "test", "val": "validation"}[report["split"]]
    chose = " These samples chose the checkpoint, so expect a little less on others." if report["chose"] else ""
    if report.get("scores"):
        return verdict_on_scores(report["scores"], split) + chose
    if report.get("labels"):
        return verdict_on_labels(report["labels"], report["class_names"], split) + chose
    if found is None:
        metrics = ", ".join(f"{name.split('/', 1)[-1]} {number(value)}" for name, value in report["metrics"].items())
        return f"{metrics}." if metrics else "Nothing was evaluated."
    low, high = found["accuracy"]["interval"]
    reached = f"{found['accuracy']['value']:.1%} of {found['samples']:,} {split} samples are classified correctly"
    most = report["class_names"][found["majority"]["class"]]
    base = found["majority"]["accuracy"]
    text = f"{reached} (95% interval {low:.1%} to {high:.1%}); always predicting “{most}” would reach {base:.1%}"
    start = report["start"]
    if start:
        text += f", the nearest class centre on the features before the fit {start['accuracy']:.1%}"
        text += f" (of {start['samples']:,} samples)" if start["samples"] < found["samples"] else ""
    text += "."
    if high < base:
        text += " That is reliably worse than the largest class: see macro F1 and each class for what it does find."
    elif low <= base:
        text += " That is not reliably more than the largest class: see macro F1 and each class before you trust it."
    elif start and high < start["accuracy"]:
        text += " That is reliably worse than the features it started from."
    elif start and low <= start["accuracy"]:
        text += " What the fit adds to its starting point lies within the interval."
    return text + chose


def verdict_on_scores(found: Mapping[str, Any], split: str) -> str:
    """The error of scores, against that of the mean."""
    constant, error, rank = found["constant"], found["mae"], found["spearman"]
    whose = "training scores" if constant["of"] == "training" else f"{split} scores themselves"
    text = f"Scores are off by {number(error['value'])} on average{within(error)}, over {found['samples']:,} {split} "
    text += f"samples; always predicting {number(constant['value'])}, the mean of the {whose}, would be off by "
    text += f"{number(constant['mae'])}."
    low, high = error["interval"] or (error["value"], error["value"])
    if low > constant["mae"]:
        text += " That is reliably worse than the mean."
    elif high >= constant["mae"]:
        text += " That is not reliably better than the mean."
    if rank is None:
        text += " Scores or predictions are all the same: there is no correlation."
    else:
        text += f" Spearman's rank correlation is {number(rank['value'])}{within(rank)}; the mean's is 0."
    return text


def verdict_on_labels(found: Mapping[str, Any], class_names: Sequence[str], split: str) -> str:
    """F1 over all labels, against the same labels for every sample."""
    f1, whole, constant = found["f1"], found["all_right"], found["constant"]
    names = [class_names[place] for place in constant["labels"]]
    same = f"“{names[0]}”" if len(names) == 1 else f"the {len(names)} most frequent"
    text = f"F1 over all labels is {number(f1['value'])}{within(f1)}, of {found['samples']:,} {split} samples; always "
    text += f"predicting {same} would have {number(constant['f1'])}. "
    text += f"{whole['value']:.1%} of samples have every label right{within(whole)}."
    low, high = f1["interval"] or (f1["value"], f1["value"])
    if high < constant["f1"]:
        text += " That is reliably worse than that constant."
    elif low <= constant["f1"]:
        text += " That is not reliably more than that constant: see each label before you trust it."
    return text


def within(found: Mapping[str, Any]) -> str:
    """An interval in brackets, where there is one."""
    low, high = found["interval"] or (None, None)
    return "" if low is None else f" (95% interval {number(low)} to {number(high)})"


def class_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each class that occurs or was predicted, the worst F1 first."""
    scores, names = report["evaluation"]["classes"], report["class_names"]
    columns = zip(*(scores[key] for key in ("precision", "recall", "f1", "support")), strict=True)
    claimed = torch.tensor(report["evaluation"]["confusion"]).sum(0).tolist()
    rows = [
        {"class": name, "precision": f"{p:.3f}", "recall": f"{r:.3f}", "f1": f"{f:.3f}", "samples": n}
        for name, (p, r, f, n), others in zip(names, columns, claimed, strict=True)
        if n or others
    ]
    return sorted(rows, key=lambda row: (row["f1"], row["class"]))


def pairs(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The classes that are most often confused."""
    if not report["evaluation"]:
        return []
    names, support = report["class_names"], report["evaluation"]["classes"]["support"]
    return [
        {"true": names[true], "predicted": names[predicted], "count": count, "of": support[true]}
        for true, predicted, count in report["evaluation"]["worst_pairs"]
    ]


def phases(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From which step on which groups trained, and the best value of the checkpoint's metric until the next."""
    found, best = report["phases"], report["best"] or {}
    name, rises = best.get("monitor"), best.get("mode") == "max"
    if len(found) < 2:
        return []
    if name is None:  # no checkpoint monitors a metric
        accuracy = metric_named(report, "acc")
        name, rises = accuracy or metric_named(report, "loss"), bool(accuracy)
    ends = [*(phase["step"] for phase in found[1:]), float("inf")]
    rows = []
    for phase, end in zip(found, ends, strict=True):
        values = [value for step, value in values_of(report, name) if phase["step"] < step <= end]
        peak = (max if rises else min)(values) if values else None
        opened = ", ".join(phase["open"]) or "nothing"
        rows.append({"step": phase["step"], "open": opened, "metric": peak, "name": name})
    return rows


def write_page(report: Mapping[str, Any], folder: Path) -> None:
    """Write `report.json`, a line for each of its keys, and `report.html` from it."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {key: json.dumps(value, ensure_ascii=False, allow_nan=False) for key, value in report.items()}
    text = "{\n" + ",\n".join(f"{json.dumps(key)}: {value}" for key, value in values.items()) + "\n}\n"
    (folder / "report.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    (folder / "report.html").write_text(f"{render(report)}\n", encoding="utf-8", errors="backslashreplace")


def show_in_tensorboard(trainer: Trainer, report: Mapping[str, Any]) -> None:
    """The confusion matrix and the table of classes, where there is a TensorBoard."""
    for logger in trainer.loggers:
        board: Any = getattr(logger, "experiment", None)
        if report["evaluation"] and hasattr(board, "add_figure"):
            board.add_figure(f"{report['split']}/confusion", confusion_figure(report), trainer.global_step)
            rows = [f"|{'|'.join(map(str, row.values()))}|" for row in class_rows(report)]
            table = "\n".join(["|class|precision|recall|F1|samples|", "|---|---|---|---|---|", *rows])
            board.add_text(f"{report['split']}/classes", table, trainer.global_step)
