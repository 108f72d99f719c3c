"""The screen at the end of a run: what was trained on what, how good it is, where it lies, what to type next."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from .doctor import FINDINGS, data_config, sentences
from .runs import glance
from .screen import console, counted

if TYPE_CHECKING:
    from .command import RecipeCLI


NEXT = {"vision": "--data.predict_root path/to/new", "text": "--data.predict_file new.txt"}


def print_summary(cli: RecipeCLI, tested: Mapping[str, float] | None = None) -> None:
    """Print the summary on the first rank.

    Args:
        cli: The finished command line.
        tested: Test metrics of the best checkpoint, where `fit --test` computed them.
    """
    if not cli.trainer.is_global_zero or getattr(cli.trainer, "fast_dev_run", False):
        return
    if cli.quiet:
        print(short(str(cli.folder)))
        return
    print_rows(f"{cli.recipe} {cli.subcommand}", summary_rows(cli, tested))


def print_interruption(cli: RecipeCLI) -> None:
    """Say, on the first rank, what a run that was stopped by hand or by its cluster leaves, and how to go on."""
    if cli.trainer.is_global_zero:
        print_rows(f"{cli.recipe} {cli.subcommand} was interrupted", interruption_rows(cli))


def print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A rule, and below it a name and a text a line."""
    screen = console()
    screen.print(f" {title} ".center(80, "─"), style="green" if screen.is_terminal else "")
    for name, text in rows:
        screen.print(f"[bold]{name:10}[/bold]  ", escape(text), sep="", soft_wrap=True, highlight=False)


def summary_rows(cli: RecipeCLI, tested: Mapping[str, float] | None) -> list[tuple[str, str]]:
    """The rows, as plain text."""
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    trained = cli.report.progress.get("trained") if cli.subcommand == "fit" and hasattr(cli, "report") else None
    rows = [("data", describe_data(data)), ("model", describe_model(model, trained))]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    best = getattr(trainer.checkpoint_callback, "best_model_path", "") if cli.subcommand == "fit" else ""
    if cli.subcommand == "fit":
        rows.append(("best", best_so_far(cli) or nothing_best(cli)))
    figures = tested if tested is not None else metrics if cli.subcommand in ("validate", "test") else {}
    if figures:
        split = next(iter(figures)).split("/")[0]
        there = split != "test" or "test" in getattr(data, "splits", ("test",))
        of = "" if best or cli.subcommand != "fit" else "; of the last weights, for none are best"
        rows.append(
            (split, describe_metrics(figures) + of)
            if there
            else ("val", f"{describe_metrics(figures)}; no test split{of}")
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
        predict = f"python -m recipes.{cli.recipe} predict --ckpt_path {short(best)} {NEXT.get(cli.recipe, '')}"
        rows.append(("next", getattr(cli, "next_command", predict)))
    return rows


def best_so_far(cli: RecipeCLI) -> str:
    """The best value of the monitored metric, and how long it took; nothing before the first validation."""
    trainer: Any = cli.trainer
    score = getattr(trainer.checkpoint_callback, "best_model_score", None)
    if score is None:
        return ""
    monitored = getattr(trainer.checkpoint_callback, "monitor", None) or cli.model.monitor[0]  # type: ignore[index]
    steps = f"{counted(trainer.current_epoch, 'epoch')}, {counted(trainer.global_step, 'optimiser step')}"
    return f"{monitored} {float(score):.4f}, of {steps}"


def nothing_best(cli: RecipeCLI) -> str:
    """Why a finished fit has no best checkpoint."""
    trainer: Any = cli.trainer
    steps = counted(trainer.global_step, "optimiser step")
    if trainer.checkpoint_callback is None:
        return "no checkpoint: trainer.enable_checkpointing is off"
    if cli.model.monitor[0] in trainer.callback_metrics:  # type: ignore[index]
        return "no checkpoint is marked as best"
    last = cli.folder / "checkpoints" / "last.ckpt"
    kept = f"; the last weights are in {short(str(last))}" if last.is_file() else "; nothing was saved"
    return f"none: the fit ended after {steps}, before its first validation{kept}"


def interruption_rows(cli: RecipeCLI) -> list[tuple[str, str]]:
    """Where a run was stopped, what is saved, and the command that goes on."""
    trainer: Any = cli.trainer
    run = f"python -m recipes.{cli.recipe} {cli.subcommand}"
    if cli.subcommand == "predict":
        given = cli.config["predict"].predictions
        again = "the same command goes on where this one stopped" if given else "nothing; give --predictions FILE"
        return [("saved", f"{given}.parts" if given else "nothing"), ("go on", again)]
    if cli.subcommand != "fit":
        return [("saved", "nothing"), ("again", "the same command")]
    of = f" of {trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    rows = [("stopped", f"in epoch {trainer.current_epoch + 1}{of}, after {counted(trainer.global_step, 'step')}")]
    if best := best_so_far(cli):
        rows.append(("best", f"{best}: {short(trainer.checkpoint_callback.best_model_path)}"))
    last = cli.folder / "checkpoints" / "last.ckpt"
    if last.is_file():
        kept = glance(last)
        lost = trainer.global_step - kept["global_step"]
        done = f"{counted(kept['epoch'] + 1, 'epoch')}, {counted(kept['global_step'], 'step')}"
        rows.append(
            ("saved", f"{short(str(last))}: {done}" + (f"; {counted(lost, 'step')} will be done again" if lost else ""))
        )
        rows.append(("go on", f"{run} --ckpt_path {short(str(last))}"))
    else:
        rows.append(("saved", "no weights: the first are written when an epoch is over"))
        if (cli.folder / "config.yaml").is_file():
            rows.append(("again", f"{run} --config {short(str(cli.folder / 'config.yaml'))}"))
    return rows


def report_facts(cli: RecipeCLI) -> dict[str, Any]:
    """What the report says beside what its callback sees: names, commands, the config, the doctor's findings."""
    run, at = f"python -m recipes.{cli.recipe}", short(str(cli.folder))
    commands = {}
    if cli.subcommand == "fit":
        commands["the same run again"] = f"{run} fit --config {at}/config.yaml"
        commands["go on after an interruption"] = f"{run} fit --ckpt_path {at}/checkpoints/last.ckpt"
        commands["predict"] = (
            f"{run} predict --ckpt_path {at}/checkpoints/best.ckpt {NEXT.get(cli.recipe, '')}".rstrip()
        )
        if cli.recipe in ("vision", "text"):
            commands["export"] = f"python -m recipes.export {at}/checkpoints/best.ckpt --format onnx"
    facts: dict[str, Any] = {
        "title": f"{model_name(cli.model)} on {type(cli.datamodule).__name__}",
        "recipe": cli.recipe,
    }
    found = doctors_word(cli)
    return facts | ({"commands": commands} if commands else {}) | ({"doctor": found} if found else {})


def doctors_word(cli: RecipeCLI, file: Path = FINDINGS) -> list[str]:
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
    """Data module, what is learnt, and samples per split."""
    splits = getattr(data, "splits", {})
    counts = ", ".join(f"{len(part.labels)} {name}" for name, part in splits.items() if name != "predict")
    if not counts and "predict" in splits:
        counts = f"{len(splits['predict'].labels)} to predict"
    learnt = {"regression": "a score", "multi_label_classification": counted(data.num_classes, "label")}
    kind = learnt.get(getattr(data, "problem_type", ""), counted(data.num_classes, "class", "classes"))
    text = ", ".join([type(data).__name__, *([kind] if data.num_classes else [])]) + f"; {counts}"
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
