"""The page of a report, and of several compared: one file, no script, nothing from the network.

`python -m recipes report RUN` writes a run's page again; with several runs, `comparison.html` beside the first
of them. Pictures are SVG by matplotlib, whose ink follows the page's, light or dark; each has its numbers beside it in
words.
"""

from __future__ import annotations

import base64
import difflib
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from .facts import sample_name, shortened
from .outputs import Predictions, load_predictions
from .paired import mcnemar, paired

HUES = ["#3f83c8", "#d9822b", "#3f9b6c", "#c8553d", "#8d6bbd", "#7f8a94", "#b39a2f", "#3aa0a8"]  # on white and on black
INK = "#010203"  # stands for the page's own colour
DEEPEST = 0.5  # opacity of a full cell, on which the page's ink is read by day and by night
FEW = 25  # classes whose names fit beside a matrix
SHOWN = 20  # samples that two runs judge differently


def render(report: Mapping[str, Any]) -> str:
    """The page of one report: the content of `report.json`."""
    return template("page.html").render(  # type: ignore[no-any-return]
        report=report,
        verdict=verdict(report),
        figures=figures([report]),
        matrix=svg(confusion_figure(report)) if report["evaluation"] else None,
        reliability=svg(reliability_figure(report)) if report["evaluation"] else None,
        class_rows=class_rows(report) if report["evaluation"] else [],
        labels=report.get("labels"),
        label_rows=label_rows(report),
        thresholds=svg(threshold_figure(report)) if report.get("labels") else None,
        scores=report.get("scores"),
        scatter=svg(scatter_figure(report)) if report.get("scores") else None,
        residuals=svg(residual_figure(report)) if report.get("scores") else None,
        pairs=pairs(report),
        phases=phases(report),
    )


def template(name: str) -> Any:
    """A template beside this file; whatever is put into it is escaped."""
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": number, "duration": duration}
    return environment.get_template(name)


def number(value: Any) -> str:
    """Three digits after the point for a share, commas in a count."""
    if isinstance(value, int):
        return f"{value:,}"
    if 0 < abs(value) < 0.001:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def duration(seconds: float) -> str:
    """Seconds as one would say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def verdict(report: Mapping[str, Any]) -> str:
    """How good it is, in a sentence or two, and against what."""
    found = report["evaluation"]
    split = {"test": "test", "val": "validation"}[report["split"]]
    if report.get("scores"):
        return verdict_of_scores(report, split)
    if report.get("labels"):
        return verdict_of_labels(report, split)
    if found is None:
        metrics = ", ".join(f"{name.split('/', 1)[-1]} {number(value)}" for name, value in report["metrics"].items())
        return f"{metrics}." if metrics else "Nothing was evaluated."
    low, high = found["accuracy"]["interval"]
    reached = f"{found['accuracy']['value']:.1%} of {found['samples']:,} {split} samples are right"
    most = report["class_names"][found["majority"]["class"]]
    base = found["majority"]["accuracy"]
    text = f"{reached} (95% interval {low:.1%} to {high:.1%}); always saying “{most}” would find {base:.1%}"
    start = report["start"]
    if start:
        text += f", the nearest class centre on the features of before the fit {start['accuracy']:.1%}"
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
    return text + (CHOSE if report["chose"] else "")


CHOSE = " These samples chose the checkpoint, so expect a little less on others."


def verdict_of_scores(report: Mapping[str, Any], split: str) -> str:
    """How far scores are off, against one who always says the mean."""
    found = report["scores"]
    constant, error, rank = found["constant"], found["mae"], found["spearman"]
    whose = "training scores" if constant["of"] == "training" else f"{split} scores themselves"
    text = f"Scores are off by {number(error['value'])} on average{within(error)}, over {found['samples']:,} {split} "
    text += f"samples; always saying {number(constant['value'])}, the mean of the {whose}, would be off by "
    text += f"{number(constant['mae'])}."
    low, high = error["interval"] or (error["value"], error["value"])
    if low > constant["mae"]:
        text += " That is reliably worse than the mean."
    elif high >= constant["mae"]:
        text += " That is not reliably better than the mean."
    if rank is None:
        text += " One of the two, scores or answers, is always the same: there is no correlation."
    else:
        text += f" Spearman's rank correlation is {number(rank['value'])}{within(rank)}; the mean's is 0."
    return text + (CHOSE if report["chose"] else "")


def verdict_of_labels(report: Mapping[str, Any], split: str) -> str:
    """F1 over all labels, against one who always says the same."""
    found = report["labels"]
    f1, whole, constant = found["f1"], found["all_right"], found["constant"]
    names = [report["class_names"][place] for place in constant["labels"]]
    said = f"“{names[0]}”" if len(names) == 1 else f"the {len(names)} most frequent"
    text = f"F1 over all labels is {number(f1['value'])}{within(f1)}, of {found['samples']:,} {split} samples; always "
    text += f"saying {said} would have {number(constant['f1'])}. {whole['value']:.1%} of samples have every label right"
    text += f"{within(whole)}."
    low, high = f1["interval"] or (f1["value"], f1["value"])
    if high < constant["f1"]:
        text += " That is reliably worse than always the same."
    elif low <= constant["f1"]:
        text += " That is not reliably more than always the same: see each label before you trust it."
    return text + (CHOSE if report["chose"] else "")


def within(found: Mapping[str, Any]) -> str:
    """An interval in brackets, where there is one."""
    low, high = found["interval"] or (None, None)
    return "" if low is None else f" (95% interval {number(low)} to {number(high)})"


def label_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each of several labels that is there or was said, the worst F1 first."""
    if not report.get("labels"):
        return []
    columns = report["labels"]["labels"]
    rows = [
        {"label": name, "place": place, **{key: values[place] for key, values in columns.items()}}
        for place, name in enumerate(report["class_names"])
        if columns["support"][place] or columns["said"][place]
    ]
    return sorted(rows, key=lambda row: (row["f1"], row["label"]))


def class_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each class that is there or was predicted, the worst F1 first."""
    scores = report["evaluation"]["classes"]
    names, columns = (
        report["class_names"],
        zip(*(scores[key] for key in ("precision", "recall", "f1", "support")), strict=True),
    )
    claimed = torch.tensor(report["evaluation"]["confusion"]).sum(0).tolist()
    rows = [
        {"class": name, "precision": f"{p:.3f}", "recall": f"{r:.3f}", "f1": f"{f:.3f}", "samples": n}
        for name, (p, r, f, n), others in zip(names, columns, claimed, strict=True)
        if n or others
    ]
    return sorted(rows, key=lambda row: (row["f1"], row["class"]))


def pairs(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is most often taken for something else."""
    if not report["evaluation"]:
        return []
    names, support = report["class_names"], report["evaluation"]["classes"]["support"]
    return [
        {"true": names[true], "predicted": names[predicted], "count": count, "of": support[true]}
        for true, predicted, count in report["evaluation"]["worst_pairs"]
    ]


def phases(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From which step on which groups trained, and the best of the checkpoint's metric until the next."""
    found, best = report["phases"], report["best"] or {}
    name, rises = best.get("monitor"), best.get("mode") == "max"
    if len(found) < 2:
        return []
    if name is None:  # no checkpoint goes by a metric
        name = metric_named(report, "acc")
        rises = bool(name)
        name = name or metric_named(report, "loss")
    ends = [*(phase["step"] for phase in found[1:]), float("inf")]
    rows = []
    for phase, end in zip(found, ends, strict=True):
        seen = [v["metrics"].get(name) for v in report["curves"]["validations"] if phase["step"] < v["step"] <= end]
        values = [value for value in seen if value is not None]
        peak = (max if rises else min)(values) if values else None
        rows.append(
            {"step": phase["step"], "open": ", ".join(phase["open"]) or "nothing", "metric": peak, "name": name}
        )
    return rows


# Pictures


def figure(width: float = 4.3, height: float = 2.7) -> tuple[Any, Any]:
    """An empty picture in inches, and its axes, in the page's ink."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes


def svg(made: Any) -> str:
    """A picture as SVG to put into a page, without size and colours that the page should decide on."""
    import matplotlib

    buffer = io.StringIO()
    with inked(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):  # ticks are made here
        made.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"^.*?(?=<svg)", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r'<svg aria-hidden="true" \1', text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r"font: (\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px", text)
    return text.replace(INK, "currentColor").replace("#000000", "currentColor")


def inked() -> Any:
    """Everything that matplotlib would draw in black, in the page's ink."""
    import matplotlib

    inks: Any = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor"), INK
    )
    return matplotlib.rc_context(
        inks
        | {
            "text.parse_math": False,
            "font.size": 9,
            "axes.linewidth": 0.6,
            "lines.linewidth": 1.6,
            "legend.frameon": False,
        }
    )


def figures(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Curves of loss, metric and rates over optimiser steps, of one run or of several over each other."""
    return [{"title": title, "svg": svg(made), "words": words} for title, made, words in curves(reports)]


def curves(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any, str]]:
    """Title, picture and words of each."""
    found = []
    with inked():
        for name, draw in (("loss", draw_loss), ("metric", draw_metric), ("rates", draw_rates)):
            if name == "rates" and len(reports) > 1:
                continue
            made, axes = figure()
            title, words = draw(axes, reports)
            if title:
                mark_phases(axes, reports)
                axes.set_xlabel("optimiser step")
                written_out(axes.xaxis)
                axes.xaxis.get_major_locator().set_params(integer=True)
                left, right = axes.get_xlim()
                axes.set_xlim(min(left, right - 1), right if right - left >= 1 else left + 1)
                if name != "rates":
                    written_out(axes.yaxis)
                axes.set_title(title, loc="left", fontsize=9)
                if axes.get_legend_handles_labels()[0]:
                    axes.legend(fontsize=7.5, loc="best")
                found.append((title, made, words))
    return found


def line(axes: Any, steps: Sequence[float], values: Sequence[float], **look: Any) -> None:
    """A curve; what is a single point is drawn as one."""
    finite = sum(value == value for value in values)
    axes.plot(steps, values, **({"marker": "o", "markersize": 3} if finite == 1 else {}) | look)


def draw_loss(axes: Any, reports: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Training loss, smoothed, and validation loss."""
    words = []
    for report, hue in zip(reports, HUES * len(reports), strict=False):
        run = f"{report['run']} " if len(reports) > 1 else ""
        points = [(p["step"], p["loss"]) for p in report["curves"]["points"] if p["loss"] is not None]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, color=hue, alpha=0.25, linewidth=0.8)
            line(axes, steps, smoothed(losses), color=hue, label=f"{run}training")
            words.append(f"{run}training from {number(losses[0])} to {number(losses[-1])}")
        validated = valued(report, metric_named(report, "loss"))
        if validated:
            steps, losses = zip(*validated, strict=True)
            other = hue if run else HUES[1]
            axes.plot(steps, losses, "--o", color=other, markersize=3, label=f"{run}validation")
            words.append(f"{run}validation from {number(losses[0])} to {number(losses[-1])}")
    return ("loss" if words else ""), "; ".join(words)


def draw_metric(axes: Any, reports: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The metric that the checkpoint goes by, and what the result is held against."""
    words, name = [], ""
    for report, hue in zip(reports, HUES * len(reports), strict=False):
        run = f"{report['run']} " if len(reports) > 1 else ""
        name = (report["best"] or {}).get("monitor") or metric_named(report, "acc")
        found = valued(report, name)
        if not found:
            continue
        steps, values = zip(*found, strict=True)
        axes.plot(steps, values, "-o", color=hue, markersize=3, label=f"{run}{name}")
        ends = f"from {number(values[0])} to {number(values[-1])}"
        words.append(f"{run}{name} {ends}, between {number(min(values))} and {number(max(values))}")
        if not run and "accuracy" in name and report["evaluation"]:
            majority = report["evaluation"]["majority"]["accuracy"]
            axes.axhline(majority, color=INK, linewidth=0.8, linestyle=":", label="largest class")
            if report["start"]:
                axes.axhline(report["start"]["accuracy"], color=HUES[2], linestyle=":", label="before the fit")
    return name if words else "", "; ".join(words)


def valued(report: Mapping[str, Any], name: str) -> list[tuple[int, float]]:
    """Step and value of a validation metric."""
    validations = report["curves"]["validations"]
    return [(v["step"], v["metrics"][name]) for v in validations if v["metrics"].get(name) is not None]


def metric_named(report: Mapping[str, Any], word: str) -> str:
    """The first validation metric whose name has a word in it, such as `val/loss` or `val_loss`."""
    names = [name for v in report["curves"]["validations"] for name in v["metrics"] if "train" not in name]
    return next((name for name in names if word in name.lower()), "")


def draw_rates(axes: Any, reports: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Each group's learning rate; while it is frozen, thin."""
    curves = reports[0]["curves"]
    if not curves["rates"]:
        return "", ""
    seen = [rate for point in curves["rates"] for rate in point["lr"].values() if rate]
    steps = [point["step"] for point in curves["rates"]]
    words = []
    for name, hue in zip(curves["groups"], HUES * len(curves["groups"]), strict=False):
        rates = [point["lr"].get(name) for point in curves["rates"]]
        known = [rate for rate in rates if rate is not None]
        if not known:
            continue
        is_open = [opened(reports[0]["phases"], name, step) for step in steps]
        unseen = (None, 0) if seen else (None,)  # a logarithm has no 0
        drawn = [float("nan") if rate in unseen else rate for rate in rates]
        axes.plot(steps, drawn, color=hue, linewidth=0.5, alpha=0.6)
        shown = [rate if there else float("nan") for rate, there in zip(drawn, is_open, strict=True)]
        line(axes, steps, shown, color=hue, label=written(name) if len(curves["groups"]) <= 8 else None)
        words.append(f"{name} from {known[0]:.2g} to {known[-1]:.2g}, at most {max(known):.2g}")
    if seen:
        spans_little = max(seen) < 30 * min(seen)
        axes.set_yscale("log", subs=[])
        axes.yaxis.get_major_locator().set_params(subs=[1, 2, 5] if spans_little else [1])
        axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.6g}")  # matplotlib's own writes TeX
        axes.yaxis.set_minor_formatter(lambda *_: "")
    else:
        written_out(axes.yaxis)
    return "learning rate of each group", "; ".join(words)


def opened(found: Sequence[Mapping[str, Any]], name: str, step: int) -> bool:
    """Whether a group trains at a step."""
    current = [phase for phase in found if phase["step"] <= step]
    return bool(current) and name in current[-1]["open"]


def mark_phases(axes: Any, reports: Sequence[Mapping[str, Any]]) -> None:
    """A line where blocks opened."""
    if len(reports) == 1:
        for phase in reports[0]["phases"][1:]:
            axes.axvline(phase["step"], color=INK, linewidth=0.6, alpha=0.5)


def smoothed(values: Sequence[float], span: int = 10) -> list[float]:
    """An average that forgets, started without a bias towards zero."""
    keep, total, weight, out = 1 - 2 / (span + 1), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


def confusion_figure(report: Mapping[str, Any]) -> Any:
    """The confusion matrix, each row as shares of its class; with names and counts where they fit."""
    counts = torch.tensor(report["evaluation"]["confusion"])
    names, classes = report["class_names"], len(counts)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    with inked():
        side = 4.3 if classes <= FEW else 5.2
        made, axes = figure(side, side)
        right = torch.eye(classes, dtype=torch.bool)[..., None]
        hue = torch.where(right, torch.tensor([0.25, 0.51, 0.78]), torch.tensor([0.82, 0.36, 0.20]))
        axes.imshow(torch.cat([hue, DEEPEST * share.sqrt()[..., None]], 2).numpy(), interpolation="nearest")
        axes.spines[["top", "right"]].set_visible(True)
        axes.set(xlabel="predicted", ylabel="true")
        if classes <= FEW:
            short = [written(name, 14) for name in names]
            axes.set_xticks(
                range(classes), short, rotation=90 if classes * max(map(len, short)) > 40 else 0, fontsize=9
            )
            axes.set_yticks(range(classes), short, fontsize=9)
        for row, column in counts.nonzero().tolist() if classes <= 12 else ():
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", fontsize=9)
    return made


def written(name: str, most: int = 40) -> str:
    """A name as matplotlib can write it: names of files may be no text; of a long one the start and the end."""
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    start, end = most - most // 2 - 1, most // 2
    return name if len(name) <= most else f"{name[:start]}…{name[-end:]}"


def reliability_figure(report: Mapping[str, Any]) -> Any:
    """How often answers of each confidence are right; the bars below say how many there are."""
    found = report["evaluation"]["calibration"]
    bins, total = len(found["counts"]), max(1, sum(found["counts"]))
    with inked():
        made, axes = figure(4.3, 3.4)
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.7, linestyle=":")
        axes.bar(
            [(n + 0.5) / bins for n in range(bins)],
            [c / total for c in found["counts"]],
            0.9 / bins,
            color=HUES[5],
            alpha=0.45,
        )
        filled = [
            (x, y, n) for x, y, n in zip(found["confidence"], found["accuracy"], found["counts"], strict=True) if n
        ]
        axes.plot([x for x, *_ in filled], [y for _, y, _ in filled], "-o", color=HUES[0], markersize=4)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="probability of the answer", ylabel="share that is right")
    return made


def scatter_figure(report: Mapping[str, Any]) -> Any:
    """Predicted scores against true ones; on the dotted line the two are the same."""
    labels, predicted = zip(*report["scores"]["points"], strict=True)
    with inked():
        made, axes = figure(4.3, 3.4)
        axes.axline((labels[0], labels[0]), slope=1, color=INK, linewidth=0.7, linestyle=":")
        axes.plot(labels, predicted, "o", color=HUES[0], markersize=3, alpha=0.5, markeredgewidth=0)
        axes.set(xlabel="true score", ylabel="predicted score")
        written_out(axes.xaxis, axes.yaxis)
    return made


def residual_figure(report: Mapping[str, Any]) -> Any:
    """How far predicted scores are off, over the true ones."""
    labels, predicted = zip(*report["scores"]["points"], strict=True)
    with inked():
        made, axes = figure(4.3, 3.4)
        axes.axhline(0, color=INK, linewidth=0.7, linestyle=":")
        off = [said - true for said, true in zip(predicted, labels, strict=True)]
        axes.plot(labels, off, "o", color=HUES[1], markersize=3, alpha=0.5, markeredgewidth=0)
        axes.set(xlabel="true score", ylabel="how far off")
        written_out(axes.xaxis, axes.yaxis)
    return made


def written_out(*axes: Any) -> None:
    """Ticks that say what they stand for, without a power or an offset at the end of the axis."""
    for axis in axes:
        axis.set_major_formatter(lambda value, _: f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}")
        axis.get_major_locator().set_params(nbins=6)


def threshold_figure(report: Mapping[str, Any]) -> Any:
    """F1 of the worst labels over the probability above which they are said; points at the thresholds found."""
    found = report["labels"]
    with inked():
        made, axes = figure(4.3, 3.4)
        for row, hue in zip(label_rows(report), HUES, strict=False):
            axes.plot(found["thresholds"], found["curves"][row["place"]], color=hue, label=written(row["label"], 24))
            axes.plot([row["threshold"]], [row["f1_at_threshold"]], "o", color=hue, markersize=4)
        axes.axvline(0.5, color=INK, linewidth=0.7, linestyle=":")
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="said above this probability", ylabel="F1")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7.5, loc="best")
    return made


def as_uri(image: Tensor, weights: Tensor | None = None, side: int = 128) -> str:
    """A picture `(3, height, width)` in [0, 1] as a JPEG in a data address; with weights, heat over its grey."""
    import matplotlib
    import matplotlib.image

    image = image.detach().float().cpu().clamp(0, 1)[:3]  # of more channels the first three
    image = image[:1] if len(image) == 2 else image
    if max(image.shape[1:]) > side:
        scale = side / max(image.shape[1:])
        image = nn.functional.interpolate(image[None], scale_factor=scale, mode="area")[0]
    pixels = image.expand(3, -1, -1).permute(1, 2, 0)
    if weights is not None:
        heat = nn.functional.interpolate(weights.detach().float().cpu()[None, None], pixels.shape[:2], mode="bilinear")
        colours = torch.from_numpy(matplotlib.colormaps["inferno"](heat[0, 0].numpy()))[..., :3].float()
        pixels = 0.4 * pixels.mean(2, keepdim=True) + 0.6 * colours
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels.clamp(0, 1).numpy(), format="jpeg", pil_kwargs={"quality": 80})
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_page(report: Mapping[str, Any], folder: Path) -> None:
    """Write `report.json`, a line for each of its keys, and `report.html` from it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}" for key, value in report.items()
    ]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
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


# A run's page again, and several runs against each other


def main(runs: Sequence[Path], target: Path | None = None) -> Path:
    """Write the page of one run again, or compare several; returns the page's path.

    Args:
        runs: Folders of finished runs.
        target: The comparison's page; `comparison.html` beside the first run if not given.

    Raises:
        FileNotFoundError: A folder without a report.
        ValueError: Runs that judged other samples.
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
    made = [judged(run, report) for run, report in zip(runs, reports, strict=True)]
    first = made[0]
    for run, report, other in zip(runs, reports, made, strict=True):
        apart = difference(reports[0], first, report, other)
        if apart:
            raise ValueError(
                f"{run} and {runs[0]} judged other samples ({len(other.labels)} and {len(first.labels)}), or their "
                f"labels differ: {apart}; compare runs with the same data, seed and split"
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
            right, base = (found.logits.argmax(1) == found.labels for found in (made[place], first))
            p = mcnemar(base, right)
            figured[0]["p"] = p
            row |= {"p": p, "ece": report["evaluation"]["calibration"]["error"]}
            row["only_first"] = differing(first, made[place], base & ~right, report["class_names"])
            row["only_this"] = differing(first, made[place], right & ~base, report["class_names"])
        row["words"] = [gain_in_words(report["run"], figure) for figure in figured] if place else []
        rows.append(row)
    page = template("comparison.html")
    return str(page.render(rows=rows, figures=figures(reports), split=reports[0]["split"], samples=len(first.labels)))


def difference(one: Mapping[str, Any], first: Predictions, report: Mapping[str, Any], other: Predictions) -> str | None:
    """In what two runs did not judge the same; nothing where they did."""
    if one["split"] != report["split"]:
        return f"one judged {report['split']}, the other {one['split']}"
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
    """Whether a run is better than the first by a figure: a word, and the numbers behind it."""
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


def judged(run: Path, report: Mapping[str, Any]) -> Predictions:
    """What a run said of each sample."""
    path = run / "predictions" / f"{report['split']}.safetensors"
    evaluated = any(report.get(kind) for kind in ("evaluation", "labels", "scores"))
    if not evaluated or not path.is_file():
        raise FileNotFoundError(f"no {path}: only runs with their predictions beside the report can be compared")
    found = load_predictions(path)
    assert found is not None
    finite = found.logits.isfinite().all(1)  # a fit's are kept as they were
    return found.part(finite)


def changed(first: str | None, other: str | None) -> str:
    """The lines of two configs that differ."""
    lines = difflib.ndiff((first or "").splitlines(), (other or "").splitlines())
    return "\n".join(line.rstrip() for line in lines if line[:1] in "+-")


def differing(
    first: Predictions, other: Predictions, chosen: torch.Tensor, class_names: Sequence[str]
) -> dict[str, Any]:
    """Samples that one run gets right and the other wrong: how many, and the first of them."""
    places, named = chosen.nonzero().flatten().tolist(), first._replace(names=shortened(first.names))
    return {
        "count": len(places),
        "samples": [
            {
                "name": sample_name(named, place),
                "label": class_names[int(first.labels[place])],
                "first": class_names[int(first.logits[place].argmax())],
                "other": class_names[int(other.logits[place].argmax())],
            }
            for place in places[:SHOWN]
        ],
    }
