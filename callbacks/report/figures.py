"""The figures of a report, as SVG that follows the page's light or dark mode."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

HUES = ["#3f83c8", "#d9822b", "#3f9b6c", "#c8553d", "#8d6bbd", "#7f8a94", "#b39a2f", "#3aa0a8"]  # on white and on black
INK = "#010203"  # stands for the page's own colour
DEEPEST = 0.5  # opacity of a full cell, on which the page's ink is readable in light and dark mode
FEW = 25  # classes whose names fit beside a matrix


def figure(width: float = 4.3, height: float = 2.7) -> tuple[Any, Any]:
    """An empty figure, its size in inches, and its axes, in the page's ink."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes


def svg(made: Any) -> str:
    """A figure as SVG for a page, without the size and the colours that the page decides on."""
    import matplotlib

    buffer = io.StringIO()
    with inked(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):  # ticks are made here
        made.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r'<svg aria-hidden="true" \1', text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r"font: (\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px", text)
    return text.replace(INK, "currentColor").replace("#000000", "currentColor")


def inked() -> Any:
    """Everything that matplotlib would draw in black, in the page's ink."""
    import matplotlib

    black = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
    look: Any = {"text.parse_math": False, "font.size": 9, "axes.linewidth": 0.6, "lines.linewidth": 1.6}
    return matplotlib.rc_context(look | {"legend.frameon": False} | dict.fromkeys(black, INK))


def figures(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Curves of loss, metric and learning rates over optimiser steps, of one run or of several over each other."""
    return [{"title": title, "svg": svg(made), "words": words} for title, made, words in curves(reports)]


def curves(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any, str]]:
    """Title, figure and caption of each."""
    found = []
    with inked():
        for name, draw in (("loss", draw_loss), ("metric", draw_metric), ("lrs", draw_lrs)):
            if name == "lrs" and len(reports) > 1:
                continue
            made, axes = figure()
            title, words = draw(axes, reports)
            if title:
                for phase in reports[0]["phases"][1:] if len(reports) == 1 else ():
                    axes.axvline(phase["step"], color=INK, linewidth=0.6, alpha=0.5)
                axes.set_xlabel("optimiser step")
                plain_ticks(axes.xaxis)
                axes.xaxis.get_major_locator().set_params(integer=True)
                left, right = axes.get_xlim()
                axes.set_xlim(min(left, right - 1), right if right - left >= 1 else left + 1)
                if name != "lrs":
                    plain_ticks(axes.yaxis)
                axes.set_title(title, loc="left", fontsize=9)
                add_legend(axes)
                found.append((title, made, words))
    return found


def add_legend(axes: Any) -> None:
    """A legend, where anything is labelled."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7.5, loc="best")


def line(axes: Any, steps: Sequence[float], values: Sequence[float], **look: Any) -> None:
    """A curve; a single point is drawn as a dot."""
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
        validated = values_of(report, metric_named(report, "loss"))
        if validated:
            steps, losses = zip(*validated, strict=True)
            other = hue if run else HUES[1]
            axes.plot(steps, losses, "--o", color=other, markersize=3, label=f"{run}validation")
            words.append(f"{run}validation from {number(losses[0])} to {number(losses[-1])}")
    return ("loss" if words else ""), "; ".join(words)


def draw_metric(axes: Any, reports: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The metric that the checkpoint monitors, and its baselines."""
    words, name = [], ""
    for report, hue in zip(reports, HUES * len(reports), strict=False):
        run = f"{report['run']} " if len(reports) > 1 else ""
        name = (report["best"] or {}).get("monitor") or metric_named(report, "acc")
        found = values_of(report, name)
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


def values_of(report: Mapping[str, Any], name: str) -> list[tuple[int, float]]:
    """Steps and values of a validation metric."""
    validations = report["curves"]["validations"]
    return [(v["step"], v["metrics"][name]) for v in validations if v["metrics"].get(name) is not None]


def metric_named(report: Mapping[str, Any], word: str) -> str:
    """The first validation metric whose name has a word in it, such as `val/loss` or `val_loss`."""
    names = [name for v in report["curves"]["validations"] for name in v["metrics"] if "train" not in name]
    return next((name for name in names if word in name.lower()), "")


def draw_lrs(axes: Any, reports: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Each group's learning rate; a thin line while it is frozen."""
    curves = reports[0]["curves"]
    if not curves["rates"]:
        return "", ""
    positive = [lr for point in curves["rates"] for lr in point["lr"].values() if lr]
    steps = [point["step"] for point in curves["rates"]]
    words = []
    for name, hue in zip(curves["groups"], HUES * len(curves["groups"]), strict=False):
        lrs = [point["lr"].get(name) for point in curves["rates"]]
        known = [lr for lr in lrs if lr is not None]
        if not known:
            continue
        hidden = (None, 0) if positive else (None,)  # a logarithm has no 0
        drawn = [float("nan") if lr in hidden else lr for lr in lrs]
        axes.plot(steps, drawn, color=hue, linewidth=0.5, alpha=0.6)
        is_open = (trains(reports[0]["phases"], name, step) for step in steps)
        shown = [lr if yes else float("nan") for lr, yes in zip(drawn, is_open, strict=True)]
        line(axes, steps, shown, color=hue, label=drawable(name) if len(curves["groups"]) <= 8 else None)
        words.append(f"{name} from {known[0]:.2g} to {known[-1]:.2g}, at most {max(known):.2g}")
    if positive:
        spans_little = max(positive) < 30 * min(positive)
        axes.set_yscale("log", subs=[])
        axes.yaxis.get_major_locator().set_params(subs=[1, 2, 5] if spans_little else [1])
        axes.yaxis.set_major_formatter(lambda lr, _: f"{lr:.6g}")  # matplotlib's own writes TeX
        axes.yaxis.set_minor_formatter(lambda *_: "")
    else:
        plain_ticks(axes.yaxis)
    return "learning rate of each group", "; ".join(words)


def trains(found: Sequence[Mapping[str, Any]], name: str, step: int) -> bool:
    """Whether a group trains at a step."""
    current = [phase for phase in found if phase["step"] <= step]
    return bool(current) and name in current[-1]["open"]


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential moving average over a span of 10, with bias correction."""
    keep, total, weight, out = 1 - 2 / 11, 0.0, 0.0, []
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
            short = [drawable(name, 14) for name in names]
            turn = 90 if classes * max(map(len, short)) > 40 else 0
            axes.set_xticks(range(classes), short, rotation=turn, fontsize=9)
            axes.set_yticks(range(classes), short, fontsize=9)
        for row, column in counts.nonzero().tolist() if classes <= 12 else ():
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", fontsize=9)
    return made


def drawable(name: str, most: int = 40) -> str:
    """A name that matplotlib can draw: a file's may be no valid text; a long one's start and end."""
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    start, end = most - most // 2 - 1, most // 2
    return name if len(name) <= most else f"{name[:start]}…{name[-end:]}"


def reliability_figure(report: Mapping[str, Any]) -> Any:
    """Accuracy of the predictions of each confidence; the bars below show how many there are."""
    found = report["evaluation"]["calibration"]
    bins, total = len(found["counts"]), max(1, sum(found["counts"]))
    with inked():
        made, axes = figure(4.3, 3.4)
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.7, linestyle=":")
        middles = [(n + 0.5) / bins for n in range(bins)]
        axes.bar(middles, [count / total for count in found["counts"]], 0.9 / bins, color=HUES[5], alpha=0.45)
        columns = zip(found["confidence"], found["accuracy"], found["counts"], strict=True)
        filled = [(x, y) for x, y, count in columns if count]
        axes.plot([x for x, _ in filled], [y for _, y in filled], "-o", color=HUES[0], markersize=4)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    return made


def score_figure(report: Mapping[str, Any], *, errors: bool = False) -> Any:
    """Predicted scores, or their errors, over the true ones; on the dotted line there is no error."""
    labels, predicted = zip(*report["scores"]["points"], strict=True)
    shown = [score - true for score, true in zip(predicted, labels, strict=True)] if errors else predicted
    with inked():
        made, axes = figure(4.3, 3.4)
        start = 0.0 if errors else labels[0]
        axes.axline((labels[0], start), slope=0 if errors else 1, color=INK, linewidth=0.7, linestyle=":")
        axes.plot(labels, shown, "o", color=HUES[int(errors)], markersize=3, alpha=0.5, markeredgewidth=0)
        axes.set(xlabel="true score", ylabel="error" if errors else "predicted score")
        plain_ticks(axes.xaxis, axes.yaxis)
    return made


def plain_ticks(*axes: Any) -> None:
    """Ticks with full numbers, without a power or an offset at the end of the axis."""
    for axis in axes:
        axis.set_major_formatter(lambda value, _: f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}")
        axis.get_major_locator().set_params(nbins=6)


def threshold_figure(report: Mapping[str, Any]) -> Any:
    """F1 of the worst labels over the threshold of their probability; dots at the chosen thresholds."""
    found = report["labels"]
    with inked():
        made, axes = figure(4.3, 3.4)
        for row, hue in zip(label_rows(report), HUES, strict=False):
            axes.plot(found["thresholds"], found["curves"][row["place"]], color=hue, label=drawable(row["label"], 24))
            axes.plot([row["threshold"]], [row["f1_at_threshold"]], "o", color=hue, markersize=4)
        axes.axvline(0.5, color=INK, linewidth=0.7, linestyle=":")
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="predicted above this probability", ylabel="F1")
        add_legend(axes)
    return made


def as_uri(image: Tensor, weights: Tensor | None = None) -> str:
    """An image `(channels, height, width)` in [0, 1] as a JPEG data URI; with weights, a heat map over its grey."""
    import matplotlib
    import matplotlib.image

    image = image.detach().float().cpu().clamp(0, 1)[:3]  # of more channels the first three
    image = image[:1] if len(image) == 2 else image
    if (scale := 128 / max(image.shape[1:])) < 1:
        image = nn.functional.interpolate(image[None], scale_factor=scale, mode="area")[0]
    pixels = image.expand(3, -1, -1).permute(1, 2, 0)
    if weights is not None:
        heat = nn.functional.interpolate(weights.detach().float().cpu()[None, None], pixels.shape[:2], mode="bilinear")
        colours = torch.from_numpy(matplotlib.colormaps["inferno"](heat[0, 0].numpy()))[..., :3].float()
        pixels = 0.4 * pixels.mean(2, keepdim=True) + 0.6 * colours
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels.clamp(0, 1).numpy(), format="jpeg", pil_kwargs={"quality": 80})
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def number(value: Any) -> str:
    """A count with commas, a share with three decimals."""
    if isinstance(value, int):
        return f"{value:,}"
    if 0 < abs(value) < 0.001:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def label_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each label that occurs or was predicted, the worst F1 first."""
    if not report.get("labels"):
        return []
    columns = report["labels"]["labels"]
    rows = [
        {"label": name, "place": place, **{key: values[place] for key, values in columns.items()}}
        for place, name in enumerate(report["class_names"])
        if columns["support"][place] or columns["said"][place]
    ]
    return sorted(rows, key=lambda row: (row["f1"], row["label"]))
