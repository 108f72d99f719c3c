"""Facts about a run from its trainer, module and data module, whatever these are."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn

from .outputs import Predictions

log = logging.getLogger(__name__)


@contextmanager
def warn_on_error(what: str) -> Iterator[None]:
    """An error in a part of the report costs that part, with a warning, not the run."""
    try:
        yield
    except Exception as error:
        log.warning("report: %s is omitted: %s: %s", what, type(error).__name__, error, exc_info=log.isEnabledFor(10))


def balanced_subset(labels: Tensor, most: int) -> Tensor:
    """Rows of at most `most` samples, equally many of each class as far as there are; `(n,)`, ascending."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    seen: Counter[int] = Counter()
    turn = []  # which of its class a sample is
    for label in labels[order].tolist():
        turn.append(seen[label])
        seen[label] += 1
    return order[torch.tensor(turn).argsort(stable=True)[:most]].sort().values


def groups_by_block(groups: Sequence[dict[str, Any]]) -> dict[str, tuple[list[nn.Parameter], dict[str, Any]]]:
    """Parameters and first group of each block; `body/no_decay` belongs to `body`."""
    found: dict[str, tuple[list[nn.Parameter], dict[str, Any]]] = {}
    for number, group in enumerate(groups):
        name = str(group.get("name", f"group {number}")).removesuffix("/no_decay")
        found.setdefault(name, ([], group))[0].extend(group["params"])
    return found


def is_better(score: float | None, best: float | None, mode: str) -> bool:
    """Whether a score replaces the best one: always where there is no metric, never if it is NaN."""
    if score is None or best is None:
        return True
    if math.isnan(score) or math.isnan(best):
        return not math.isnan(score)
    return score > best if mode == "max" else score < best


def number_or_none(value: Any) -> float | None:
    """A finite number, or None: JSON has no others."""
    return float(value) if value is not None and math.isfinite(float(value)) else None


def as_json(value: Any) -> Any:
    """The same as plain values that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): as_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(one) for one in value]
    return number_or_none(value) if isinstance(value, float) else value


def names_of_classes(data: Any, found: Predictions | None, task: str = "") -> list[str]:
    """The data module's, if there are as many as the net has outputs; else numbers; for scores none.

    Args:
        data: The data module.
        found: What was predicted.
        task: Of several, whose names `data.tasks[task].class_names` are.
    """
    if found is not None and found.kind == "scores":
        return []
    source = getattr(data, "tasks", {}).get(task) if task else data
    names, wanted = getattr(source, "class_names", None), None if found is None else found.logits.shape[1]
    if isinstance(names, Sequence) and not isinstance(names, str) and wanted in (None, len(names)):
        return [str(name) for name in names]
    return [str(number) for number in range(wanted or 0)]


def shortened(names: Sequence[str]) -> list[str]:
    """Names; absolute paths without the folder that they share."""
    if not names or not all(map(os.path.isabs, names)):
        return list(names)
    if len(set(names)) == 1:
        return [Path(name).name for name in names]
    try:
        shared = os.path.commonpath((min(names), max(names)))
    except ValueError:  # on several drives
        return list(names)
    return [os.path.relpath(name, shared) for name in names] if len(shared) > 1 else list(names)


def sample_name(found: Predictions, place: int) -> str:
    """A sample's name by the data module, else its row, else its position."""
    row = int(found.rows[place])
    return found.names[place] if found.names else f"sample {row if row >= 0 else place}"


def training_mean(data: Any, task: str = "") -> float | None:
    """Mean of the training scores, of several tasks of the one that is named, where the data module has it at hand."""
    if task:
        return number_or_none(getattr(data, "label_facts", {}).get(task, {}).get("mean"))
    splits = getattr(data, "splits", None)
    labels = getattr(splits.get("train"), "labels", None) if isinstance(splits, Mapping) else None
    if not isinstance(labels, Tensor) or labels.ndim != 1 or not labels.is_floating_point():
        return None
    return number_or_none(labels.nanmean())


def runnable_commands(commands: Any) -> Any:
    """Commands without those that name a checkpoint that does not exist."""
    if not isinstance(commands, Mapping):
        return commands

    def is_runnable(command: str) -> bool:
        paths = [word for word in command.split() if word.endswith(".ckpt") and "://" not in word]
        return all(Path(path).is_file() for path in paths)

    return {name: command for name, command in commands.items() if is_runnable(str(command))}


def batch_size(batch: Any) -> int:
    """Length of a batch's first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 0)


def logged_metrics(trainer: Trainer) -> dict[str, float]:
    """Every metric that the module has logged, without those of single classes."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "accuracy_of/" not in name}


def monitored_metric(trainer: Trainer) -> tuple[str | None, str]:
    """Metric and mode (`min` or `max`) of the first checkpoint callback that monitors one."""
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "monitor", None):
            return callback.monitor, getattr(callback, "mode", "min")  # type: ignore[attr-defined]
    return None, "min"


@contextmanager
def preserve_state(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Evaluation mode; random state, modes and the trainer's stage are restored afterwards."""
    modes = {module: module.training for module in pl_module.modules()}
    stage, device = trainer.state.stage, pl_module.device
    trainer.state.stage = RunningStage.VALIDATING
    pl_module.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        trainer.state.stage = stage
        for module, mode in modes.items():
            module.training = mode


def peak_memory() -> int:
    """Peak memory of this process in bytes; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)


def describe_data(data: Any) -> dict[str, Any]:
    """Counts and digest of the splits, and skipped samples, as far as the data module says."""
    state: Any = {}
    if hasattr(data, "state_dict"):
        with warn_on_error("the data module's state"):
            state = data.state_dict()
    state = state if isinstance(state, Mapping) else {}
    counts = {name: int(count) for name, count in dict(state.get("counts") or {}).items() if name != "predict"}
    rows = {name: torch.as_tensor(some).tolist() for name, some in sorted(dict(state.get("split_rows") or {}).items())}
    digest = hashlib.sha256(json.dumps([counts, rows, state.get("class_names")], default=str).encode()).hexdigest()
    splits = getattr(data, "splits", None)
    parts = {id(part): part for part in splits.values()}.values() if isinstance(splits, Mapping) else ()
    return {
        "counts": counts,
        "digest": digest[:12] if counts else None,
        "seed": state.get("seed"),
        "skipped": sorted(map(str, getattr(data, "skipped", None) or ())),
        "skipped_rows": sum(int(getattr(part, "skipped", 0)) for part in parts),
        "without_numbers": 0,
    }
