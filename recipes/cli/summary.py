"""The screen at the end of a run: what was trained on what, how good it is, where it lies, what to type next."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from ..parts.checkpoints import glance
from .doctor import FINDINGS, data_config, sentences
from .runs import FinishedRun
from .screen import console, counted

NEXT = {"vision": "--data.predict_root path/to/new", "text": "--data.predict_file new.txt"}


def print_summary(run: FinishedRun, tested: Mapping[str, float] | None = None) -> None:
    """Print the summary on the first rank.

    Args:
        run: That is over.
        tested: Test metrics of the best checkpoint, where `fit --test` computed them.
    """
    if not run.trainer.is_global_zero or getattr(run.trainer, "fast_dev_run", False):
        return
    if run.config.quiet:
        print(short(str(run.folder)))
        return
    print_rows(f"{run.recipe} {run.subcommand}", summary_rows(run, tested))


def print_interruption(run: FinishedRun) -> None:
    """Say, on the first rank, what a run that was stopped by hand or by its cluster leaves, and how to go on."""
    if run.trainer.is_global_zero:
        print_rows(f"{run.recipe} {run.subcommand} was interrupted", interruption_rows(run))


def print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A rule, and below it a name and a text a line."""
    screen = console()
    screen.print(f" {title} ".center(80, "─"), style="green" if screen.is_terminal else "")
    for name, text in rows:
        screen.print(f"[bold]{name:10}[/bold]  ", escape(text), sep="", soft_wrap=True, highlight=False)


def summary_rows(run: FinishedRun, tested: Mapping[str, float] | None) -> list[tuple[str, str]]:
    """The rows, as plain text."""
    trainer, model, data = run.trainer, run.model, run.data
    trained = run.report.progress.get("trained") if run.subcommand == "fit" and run.report is not None else None
    rows = [("data", describe_data(data, list(getattr(model, "kinds", ())))), ("model", describe_model(model, trained))]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if run.subcommand == "fit":
        rows.append(("best", best_so_far(run) or nothing_best(run)))
    figures = tested if tested is not None else metrics if run.subcommand in ("validate", "test") else {}
    if figures:
        split = next(iter(figures)).split("/")[0]
        there = split != "test" or "test" in getattr(data, "splits", ("test",))
        of = "" if run.best or run.subcommand != "fit" else "; of the last weights, for none are best"
        rows.append(
            (split, describe_metrics(figures) + of)
            if there
            else ("val", f"{describe_metrics(figures)}; no test split{of}")
        )
        worst = sorted((v, k.split("/")[-1]) for k, v in figures.items() if "accuracy_of/" in k)[:3]
        if worst:
            rows.append(("hardest", ", ".join(f"{name} {value:.3f}" for value, name in worst)))
    rows.append(("time", f"{time.time() - run.started:.0f} s, precision {trainer.precision}"))
    rows.append(("folder", short(str(run.folder))))
    if (run.folder / "report.html").is_file():
        rows.append(("report", short(str(run.folder / "report.html"))))
    if run.subcommand == "predict":
        rows += [("written", callback.written()) for callback in trainer.callbacks if hasattr(callback, "written")]  # type: ignore[attr-defined]
    if run.best:
        rows.append(("checkpoint", short(run.best)))
        predict = f"python -m recipes.{run.recipe} predict --ckpt_path {short(run.best)} {NEXT.get(run.recipe, '')}"
        rows.append(("next", run.next_command or predict))
    return rows


def best_so_far(run: FinishedRun) -> str:
    """The best value of the monitored metric, and how long it took; nothing before the first validation."""
    trainer: Any = run.trainer
    score = getattr(run.checkpoint, "best_model_score", None)
    if score is None:
        return ""
    steps = f"{counted(trainer.current_epoch, 'epoch')}, {counted(trainer.global_step, 'optimiser step')}"
    return f"{run.checkpoint.monitor} {float(score):.4f}, of {steps}"


def nothing_best(run: FinishedRun) -> str:
    """Why a finished fit has no best checkpoint."""
    trainer: Any = run.trainer
    steps = counted(trainer.global_step, "optimiser step")
    if trainer.checkpoint_callback is None:
        return "no checkpoint: trainer.enable_checkpointing is off"
    if run.model.monitor[0] in trainer.callback_metrics:
        return "no checkpoint is marked as best"
    last = run.folder / "checkpoints" / "last.ckpt"
    kept = f"; the last weights are in {short(str(last))}" if last.is_file() else "; nothing was saved"
    return f"none: the fit ended after {steps}, before its first validation{kept}"


def interruption_rows(run: FinishedRun) -> list[tuple[str, str]]:
    """Where a run was stopped, what is saved, and the command that goes on."""
    trainer: Any = run.trainer
    command = f"python -m recipes.{run.recipe} {run.subcommand}"
    if run.subcommand == "predict":
        given = run.config.predictions
        again = "the same command goes on where this one stopped" if given else "nothing; give --predictions FILE"
        return [("saved", f"{given}.parts" if given else "nothing"), ("go on", again)]
    if run.subcommand != "fit":
        return [("saved", "nothing"), ("again", "the same command")]
    of = f" of {trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    rows = [("stopped", f"in epoch {trainer.current_epoch + 1}{of}, after {counted(trainer.global_step, 'step')}")]
    if best := best_so_far(run):
        rows.append(("best", f"{best}: {short(run.best)}"))
    last = run.folder / "checkpoints" / "last.ckpt"
    if last.is_file():
        kept = glance(last)
        lost = trainer.global_step - kept["global_step"]
        done = f"{counted(kept['epoch'] + 1, 'epoch')}, {counted(kept['global_step'], 'step')}"
        rows.append(
            ("saved", f"{short(str(last))}: {done}" + (f"; {counted(lost, 'step')} will be done again" if lost else ""))
        )
        rows.append(("go on", f"{command} --ckpt_path {short(str(last))}"))
    else:
        rows.append(("saved", "no weights: the first are written when an epoch is over"))
        if (run.folder / "config.yaml").is_file():
            rows.append(("again", f"{command} --config {short(str(run.folder / 'config.yaml'))}"))
    return rows


def report_facts(run: FinishedRun) -> dict[str, Any]:
    """What the report says beside what its callback sees: names, commands, the config, the doctor's findings."""
    command, at = f"python -m recipes.{run.recipe}", short(str(run.folder))
    commands = {}
    if run.subcommand == "fit":
        commands["the same run again"] = f"{command} fit --config {at}/config.yaml"
        commands["go on after an interruption"] = f"{command} fit --ckpt_path {at}/checkpoints/last.ckpt"
        commands["predict"] = (
            f"{command} predict --ckpt_path {at}/checkpoints/best.ckpt {NEXT.get(run.recipe, '')}".rstrip()
        )
        if run.recipe in ("vision", "text"):
            commands["export"] = f"python -m recipes.export {at}/checkpoints/best.ckpt --format onnx"
    facts: dict[str, Any] = {
        "title": f"{model_name(run.model)} on {type(run.data).__name__}",
        "recipe": run.recipe,
    }
    found = load_doctor_findings(run)
    return facts | ({"commands": commands} if commands else {}) | ({"doctor": found} if found else {})


def load_doctor_findings(run: FinishedRun, file: Path = FINDINGS) -> list[str]:
    """What `recipes doctor` said of the same data, where its file lies here."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return sentences(found) if found.get("data") == data_config(run.config) else []


def short(path: str) -> str:
    """A path as one would type it here."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def describe_data(data: Any, tasks: Sequence[str] = ()) -> str:
    """Data module, what is learnt, and samples per split; `tasks` are the names of several."""
    splits = getattr(data, "splits", {})
    counts = ", ".join(f"{len(part.labels)} {name}" for name, part in splits.items() if name != "predict")
    if not counts and "predict" in splits:
        counts = f"{len(splits['predict'].labels)} to predict"
    classes = 0 if tasks else data.num_classes
    learnt = {"regression": "a score", "multi_label_classification": counted(classes, "label")}
    kind = learnt.get(getattr(data, "problem_type", ""), counted(classes, "class", "classes"))
    if tasks:
        kind = f"{counted(len(tasks), 'task')} ({', '.join(tasks)})"
    text = ", ".join([type(data).__name__, *([kind] if classes or tasks else [])]) + f"; {counts}"
    parts = {id(part): part for part in splits.values()}.values()
    skipped = len(getattr(data, "skipped", ())) + sum(getattr(part, "skipped", 0) for part in parts)
    return f"{text}; {skipped} skipped that cannot be read" if skipped else text


def describe_model(model: Any, trained: int | None = None) -> str:
    """Backbone, and the share of its parameters that trained: so many, or those that do now."""
    total = sum(p.numel() for p in model.parameters())
    if trained is None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{model_name(model)}, {total / 1e6:.2f} M parameters, {trained / total:.1%} of them trained"


def model_name(model: Any) -> str:
    """Of its backbone or encoder; of a folder the last two parts, since many are called `hf` or `model`."""
    made = dict(model.hparams.get("architecture") or {}).get("model_type")  # from scratch
    name = str(model.hparams.get("backbone") or model.hparams.get("encoder") or made or type(model).__name__)
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() or Path(name).is_dir() else name


def describe_metrics(figures: Mapping[str, float]) -> str:
    """Metrics without those of single classes."""
    chosen = {k.split("/", 1)[1]: v for k, v in figures.items() if "/" in k and "accuracy_of/" not in k}
    return ", ".join(f"{name} {value:.4f}" for name, value in sorted(chosen.items()))
