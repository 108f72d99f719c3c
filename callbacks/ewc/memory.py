"""What is kept of a task: its weights and their Fisher information, as a safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .penalty import Tensors

FORMAT = "ewc-fisher 1"


@dataclass
class Memory:
    """Fisher and anchor of all tasks so far, as one quadratic; `constant` is what it lacks to their sum."""

    fisher: dict[str, Tensor]
    anchor: dict[str, Tensor]
    tasks: list[dict[str, Any]]  # name, samples, estimator, draws, normalised, mean
    constant: float = 0.0


def save_memory(path: Path, memory: Memory) -> None:
    """Writes a `fisher.safetensors`, whole or not at all."""
    tensors = {
        f"{kind}/{name}": t.detach().cpu().contiguous()
        for kind, table in (("fisher", memory.fisher), ("anchor", memory.anchor))
        for name, t in table.items()
    }
    metadata = {"format": FORMAT, "tasks": json.dumps(memory.tasks), "constant": repr(memory.constant)}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    save_file(tensors, beside, metadata)
    beside.replace(path)


def load_memory(path: Path) -> Memory:
    """Reads a `fisher.safetensors`; refuses other files and a useless Fisher."""
    if not path.is_file():
        raise FileNotFoundError(f"no Fisher at {path}; a fit with EWC(save=...) writes one at its end")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no Fisher of this kind; expected {FORMAT!r}, as EWC(save=...) writes")
    tables: dict[str, dict[str, Tensor]] = {"fisher": {}, "anchor": {}}
    for key, t in tensors.items():
        kind, name = key.split("/", 1)
        tables[kind][name] = t
    check_fisher(tables["fisher"], str(path))
    return Memory(**tables, tasks=json.loads(metadata["tasks"]), constant=float(metadata["constant"]))


def check_fisher(fisher: Tensors, source: str) -> None:
    """Raises a ValueError for a Fisher that is zero everywhere, negative or not finite."""
    for name, t in fisher.items():
        if not bool(torch.isfinite(t).all()) or bool((t < 0).any()):
            raise ValueError(f"{source}: the Fisher of {name} has negative or non-finite values; take it again")
    if not any(bool(t.any()) for t in fisher.values()):
        raise ValueError(
            f"{source}: the Fisher is zero everywhere, so the penalty would hold nothing; the logits do not depend "
            "on the trained parameters, or the model is so sure of its labels that float32 has no gradient left"
        )
