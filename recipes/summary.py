"""The screen at the end of a run: what was trained on what, how good it is, where it lies, what to type next."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from .doctor import data_config, sentences

if TYPE_CHECKING:
    from .cli import RecipeCLI


def print_summary(cli: RecipeCLI, tested: Mapping[str, float] | None = None) -> None:
    """Print the summary on the first rank.

    Args:
        cli: The finished command line.
        tested: Test metrics of the best checkpoint, where `fit --test` computed them.
    """
    if not cli.trainer.is_global_zero or getattr(cli.trainer, "fast_dev_run", False):
        return
    console = Console()
    console.rule(f"{cli.recipe} {cli.subcommand}")
    for name, text in summary_rows(cli, tested):
        console.print(f"[bold]{name:10}[/bold]  ", escape(text), sep="", soft_wrap=True, highlight=False)


def summary_rows(cli: RecipeCLI, tested: Mapping[str, float] | None) -> list[tuple[str, str]]:
    """The rows, as plain text."""
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    rows = [("data", describe_data(data)), ("model", describe_model(model, cli.trainer.callbacks))]  # type: ignore[attr-defined]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    best = getattr(trainer.checkpoint_callback, "best_model_path", "") if cli.subcommand == "fit" else ""
    if cli.subcommand == "fit":
        score = getattr(trainer.checkpoint_callback, "best_model_score", None)
        if score is not None:
            steps = f"{trainer.current_epoch} epochs, {trainer.global_step} optimiser steps"
            rows.append(("best", f"{model.monitor[0]} {float(score):.4f}, of {steps}"))
    figures = tested if tested is not None else metrics if cli.subcommand in ("validate", "test") else {}
    if figures:
        split = next(iter(figures)).split("/")[0]
        there = split != "test" or "test" in getattr(data, "splits", ("test",))
        rows.append(
            (split, describe_metrics(figures)) if there else ("val", f"{describe_metrics(figures)}; no test split")
        )
        worst = sorted((v, k.split("/")[-1]) for k, v in figures.items() if "accuracy_of/" in k)[:3]
        if worst:
            rows.append(("hardest", ", ".join(f"{name} {value:.3f}" for value, name in worst)))
    rows.append(("time", f"{time.time() - cli.started:.0f} s, precision {trainer.precision}"))
    rows.append(("folder", short(str(cli.folder))))
    if (cli.folder / "report.html").is_file():
        rows.append(("report", short(str(cli.folder / "report.html"))))
    if cli.subcommand == "predict":
        rows += [("written", callback.written()) for callback in trainer.callbacks if hasattr(callback, "written")]  # type: ignore[attr-defined]
    if best:
        rows.append(("checkpoint", short(best)))
        rows.append(
            ("next", getattr(cli, "next_command", f"python -m recipes.{cli.recipe} predict --ckpt_path {short(best)}"))
        )
    return rows


def report_facts(cli: RecipeCLI) -> dict[str, Any]:
    """What the report says beside what its callback sees: names, commands, the config, the doctor's findings."""
    run, at = f"python -m recipes.{cli.recipe}", short(str(cli.folder))
    commands = {}
    if cli.subcommand == "fit":
        commands["the same run again"] = f"{run} fit --config {at}/config.yaml"
        commands["go on after an interruption"] = f"{run} fit --ckpt_path {at}/checkpoints/last.ckpt"
        commands["predict"] = f"{run} predict --ckpt_path {at}/checkpoints/best.ckpt"
        if cli.recipe in ("vision", "text"):
            commands["export"] = f"python -m recipes.export {at}/checkpoints/best.ckpt --format onnx"
    facts: dict[str, Any] = {
        "title": f"{model_name(cli.model)} on {type(cli.datamodule).__name__}",
        "recipe": cli.recipe,
    }
    found = doctors_word(cli)
    return facts | ({"commands": commands} if commands else {}) | ({"doctor": found} if found else {})


def doctors_word(cli: RecipeCLI, file: Path = Path("doctor.json")) -> list[str]:
    """What `recipes doctor` said of the same data, where its file lies here."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return sentences(found) if found.get("data") == data_config(cli) else []


def short(path: str) -> str:
    """A path as one would type it here."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def describe_data(data: Any) -> str:
    """Data module, classes and samples per split."""
    splits = getattr(data, "splits", {})
    counts = ", ".join(f"{len(part.labels)} {name}" for name, part in splits.items() if name != "predict")
    if not counts and "predict" in splits:
        counts = f"{len(splits['predict'].labels)} to predict"
    text = f"{type(data).__name__}, {data.num_classes} classes; {counts}"
    parts = {id(part): part for part in splits.values()}.values()
    skipped = len(getattr(data, "skipped", ())) + sum(getattr(part, "skipped", 0) for part in parts)
    return f"{text}; {skipped} skipped that cannot be read" if skipped else text


def describe_model(model: Any, callbacks: Sequence[Any] = ()) -> str:
    """Backbone and the share of its parameters that trained; callbacks that freeze say how many they did."""
    total = sum(p.numel() for p in model.parameters())
    frozen = sum(getattr(callback, "frozen_parameters", 0) for callback in callbacks)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - frozen
    return f"{model_name(model)}, {total / 1e6:.2f} M parameters, {trained / total:.1%} of them trained"


def model_name(model: Any) -> str:
    """Of its backbone or encoder; of a folder the last part."""
    name = model.hparams.get("backbone") or model.hparams.get("encoder") or type(model).__name__
    return Path(str(name)).name if Path(str(name)).is_absolute() else str(name)


def describe_metrics(figures: Mapping[str, float]) -> str:
    """Metrics without those of single classes."""
    chosen = {k.split("/", 1)[1]: v for k, v in figures.items() if "/" in k and "accuracy_of/" not in k}
    return ", ".join(f"{name} {value:.4f}" for name, value in sorted(chosen.items()))
