"""Which samples the Fisher information is taken of, and their logits and labels."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.utils.data import Dataset

FISHER_BATCH = 16  # samples at a time at most; the result does not depend on it


def choose_samples(labels: Sequence[int] | Tensor | None, size: int, samples: int | None, seed: int) -> list[int]:
    """Some of `size` samples, or all at None, in ascending order; each class keeps its share where labels are known."""
    if samples is None or samples >= size:
        return list(range(size))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    if labels is not None:
        _, classes, counts = torch.unique(torch.as_tensor(labels)[order], return_inverse=True, return_counts=True)
        within = torch.cat([torch.arange(count) for count in counts])
        place = torch.empty(size)  # of a sample within its class, from 0 to 1
        place[classes.argsort(stable=True)] = (within + 0.5) / counts.repeat_interleave(counts)
        order = order[place.argsort(stable=True)]
    return sorted(order[:samples].tolist())


def dataset_labels(dataset: Any) -> Tensor | None:
    """Class of each sample, `(samples,)`, where a data set or what it is a subset of has `targets` or `labels`."""
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        inner = dataset_labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    for name in ("targets", "labels"):
        with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
            found = torch.as_tensor(getattr(dataset, name))
            if found.shape == (len(dataset),):
                return found
    return None


class ChosenSamples(Dataset[Any]):
    """Some of a data set's samples; what its transforms draw depends on the sample and the seed alone."""

    def __init__(self, dataset: Any, items: Sequence[Any], positions: Sequence[int], seed: int) -> None:
        self.dataset, self.items, self.positions, self.seed = dataset, items, positions, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self._reseed(index)
        return self.dataset[self.items[index]]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """A batch: sample by sample, unless the data set knows no single ones."""
        if type(self.dataset).__getitem__ is not Dataset.__getitem__:
            return [self[index] for index in indices]
        self._reseed(indices[0])
        return self.dataset.__getitems__([self.items[index] for index in indices])

    def _reseed(self, index: int) -> None:
        word = random.Random(f"{self.seed} {self.positions[index]}").getrandbits(63)
        torch.random.default_generator.manual_seed(word)
        random.seed(word)


def logits_of(pl_module: nn.Module, batch: Any) -> Tensor:
    """Logits `(batch, classes)` of any classifier, from the usual kinds of batches; a TypeError tells what is missing.

    `pl_module.logits(batch)` where there is such a method. Else the module is called: with the tensors of a
    dictionary that has `input_ids`, but for labels and what `forward` does not take; with `image` of a dictionary;
    with the first of a tuple or list; with a tensor. What it returns is a tensor or has `logits`.
    """
    if callable(own := getattr(pl_module, "logits", None)) and not isinstance(own, nn.Module):
        return cast(Tensor, own(batch))
    name, ask = type(pl_module).__name__, "a method logits(batch) that returns them, (batch, classes)"
    if isinstance(batch, Mapping) and "input_ids" in batch:
        takes = inspect.signature(pl_module.forward).parameters  # type: ignore[arg-type]
        anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        names = [key for key in batch if (anything or key in takes) and key not in ("label", "labels")]
        out = pl_module(**{key: batch[key] for key in names})
    elif isinstance(batch, Mapping) and "image" in batch:
        out = pl_module(batch["image"])
    elif isinstance(batch, (tuple, list)) and batch:
        out = pl_module(batch[0])
    elif isinstance(batch, Tensor):
        out = pl_module(batch)
    else:
        keys = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        kind = type(batch).__name__ + keys
        raise TypeError(f"EWC does not know how {name} makes logits of a {kind}; give the module {ask}")
    found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if found is None:
        raise TypeError(f"{name} returned a {type(out).__name__} without logits; give it {ask}")
    return cast(Tensor, found)


def labels_of(batch: Any) -> Tensor | None:
    """True labels `(batch,)`: `label` or `labels` of a dictionary, the second of a tuple or list."""
    found = None
    if isinstance(batch, Mapping):
        found = batch.get("label", batch.get("labels"))
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    whole = isinstance(found, Tensor) and found.dim() == 1 and not found.is_floating_point()
    return found if whole else None


@contextlib.contextmanager
def preserve_state(trainer: Trainer, device: torch.device) -> Iterator[None]:
    """Leaves torch's and Python's random numbers as they were; transfer hooks see a validation, not a training."""
    stage, state = trainer.state.stage, random.getstate()
    trainer.state.stage = RunningStage.VALIDATING
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        trainer.state.stage = stage
        random.setstate(state)
