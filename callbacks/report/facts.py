"""What can be known of a run from its trainer, module and data module, whatever these are."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
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
def spared(what: str) -> Iterator[None]:
    """A run is not lost because something of its report cannot be made: it is said, and left out."""
    try:
        yield
    except Exception as error:
        log.warning("report: %s is left out: %s: %s", what, type(error).__name__, error, exc_info=log.isEnabledFor(10))


def spread(labels: Tensor, most: int) -> Tensor:
    """Rows of at most so many samples, as equally many of each class as there are; `(n,)`, ascending."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    seen: dict[int, int] = {}
    turn = []
    for label in labels[order].tolist():
        turn.append(seen.get(label, 0))
        seen[label] = turn[-1] + 1
    return order[torch.tensor(turn).argsort(stable=True)[:most]].sort().values


def grouped(groups: Sequence[dict[str, Any]]) -> dict[str, tuple[list[nn.Parameter], dict[str, Any]]]:
    """Parameters and first group of each block; `body/no_decay` belongs to `body`."""
    found: dict[str, tuple[list[nn.Parameter], dict[str, Any]]] = {}
    for number, group in enumerate(groups):
        name = str(group.get("name", f"group {number}")).removesuffix("/no_decay")
        found.setdefault(name, ([], group))[0].extend(group["params"])
    return found


def is_better(score: float | None, best: float | None, mode: str) -> bool:
    """Whether a score replaces the best: the newest does where there is none, and a number that isn't one never."""
    if score is None or best is None:
        return True
    if math.isnan(score) or math.isnan(best):
        return not math.isnan(score)
    return score > best if mode == "max" else score < best


def number_or_none(value: Any) -> float | None:
    """A finite number, or nothing: JSON knows no other."""
    return float(value) if value is not None and math.isfinite(float(value)) else None


def plain(value: Any) -> Any:
    """The same with nothing in it that JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return number_or_none(value) if isinstance(value, float) else value


def names_of_classes(data: Any, found: Predictions | None) -> list[str]:
    """Those of the data module, if there are as many as the net has outputs; else numbers; of scores none."""
    if found is not None and found.kind == "scores":
        return []
    names, wanted = getattr(data, "class_names", None), None if found is None else found.logits.shape[1]
    if isinstance(names, Sequence) and not isinstance(names, str) and wanted in (None, len(names)):
        return [str(name) for name in names]
    return [str(number) for number in range(wanted or 0)]


def shortened(names: Sequence[str]) -> list[str]:
    """Names as they are; whole paths without the folder that all of them lie in."""
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
    """What a sample is called: by the data module, else by its row, else by the order in which samples came."""
    row = int(found.rows[place])
    return found.names[place] if found.names else f"sample {row if row >= 0 else place}"


def training_mean(data: Any) -> float | None:
    """Of the scores that were trained on, where the data module has them at hand."""
    splits = getattr(data, "splits", None)
    labels = getattr(splits.get("train"), "labels", None) if isinstance(splits, Mapping) else None
    if not isinstance(labels, Tensor) or labels.ndim != 1 or not labels.is_floating_point():
        return None
    return number_or_none(labels.nanmean())


def existing(commands: Any) -> Any:
    """Commands without those that start from a checkpoint that was never written."""
    if not isinstance(commands, Mapping):
        return commands
    words = {what: [word for word in str(line).split() if word.endswith(".ckpt")] for what, line in commands.items()}
    return {
        what: line
        for what, line in commands.items()
        if all("://" in word or Path(word).is_file() for word in words[what])
    }


def samples_of(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 0)


def logged(trainer: Trainer) -> dict[str, float]:
    """Every number that the module has logged, without those of single classes."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "accuracy_of/" not in name}


def monitored(trainer: Trainer) -> tuple[str | None, str]:
    """The metric that the first checkpoint callback with one goes by, and whether it is to rise."""
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "monitor", None):
            return callback.monitor, getattr(callback, "mode", "min")  # type: ignore[attr-defined]
    return None, "min"


@contextmanager
def aside(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Evaluate for a moment: random numbers, modes and the trainer's stage are as before afterwards."""
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
    """The most bytes that this process has held in memory; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)


def describe_data(data: Any) -> dict[str, Any]:
    """Counts per split, a digest of which sample is in which, and what was skipped, as far as the data module says."""
    state: Any = {}
    if hasattr(data, "state_dict"):
        with spared("what the data module says of itself"):
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
