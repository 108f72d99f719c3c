"""Which samples the Fisher information is taken of, and their logits and labels."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .per_sample import wide_dtype

FISHER_BATCH = 16  # samples at a time at most; the result does not depend on it


def choose_samples(labels: Sequence[int] | Tensor | None, size: int, samples: int | None, seed: int) -> list[int]:
    """Indices of some of `size` samples, all at None, ascending; each class keeps its share where labels are known."""
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


def fisher_batches(
    trainer: Trainer, pl_module: LightningModule, samples: int | None, seed: int
) -> tuple[Iterator[Any], Sequence[int]]:
    """This rank's batches on its device, after all transfer hooks, and the positions of their samples."""
    data: Any = getattr(trainer, "datamodule", None)
    own = hasattr(data, "fisher_dataloader")
    loader = data.fisher_dataloader() if own else trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            "EWC takes the Fisher of samples of one DataLoader over a data set with a length, received "
            f"{type(loader).__name__}; give the data module a method fisher_dataloader() that returns such a one"
        )
    dataset: Any = loader.dataset
    items = list(loader.sampler) if own else list(range(len(dataset)))
    if not items:
        raise ValueError("EWC: there are no samples to take a Fisher of; the training data are empty")
    labels = dataset_labels(dataset)
    if labels is not None and isinstance(items[0], int):
        labels = labels[torch.tensor(items)]
    fit = labels is not None and len(labels) == len(items)
    chosen = choose_samples(labels if fit else None, len(items), samples, seed)
    positions = range(len(chosen))[trainer.global_rank :: trainer.world_size]
    taken = [chosen[position] for position in positions]
    workers = loader.num_workers if len(taken) > FISHER_BATCH else 0
    batches: DataLoader[Any] = DataLoader(
        ChosenSamples(dataset, [items[index] for index in taken], taken, seed),
        batch_size=min(loader.batch_size or FISHER_BATCH, FISHER_BATCH),
        collate_fn=loader.collate_fn,
        num_workers=workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
    )
    wide = wide_dtype(next(pl_module.parameters()).dtype)

    def moved(batch: Any) -> Any:
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        return apply_to_collection(batch, Tensor, lambda t: t.to(wide) if t.is_floating_point() else t)

    return map(moved, batches), positions


class ChosenSamples(Dataset[Any]):
    """Some of a data set's samples, whose random transforms depend on the sample and the seed alone."""

    def __init__(self, dataset: Any, items: Sequence[Any], positions: Sequence[int], seed: int) -> None:
        self.dataset, self.items, self.positions, self.seed = dataset, items, positions, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self._reseed(index)
        return self.dataset[self.items[index]]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """A batch: sample by sample, unless the data set gives whole batches only."""
        if type(self.dataset).__getitem__ is not Dataset.__getitem__:
            return [self[index] for index in indices]
        self._reseed(indices[0])
        return self.dataset.__getitems__([self.items[index] for index in indices])

    def _reseed(self, index: int) -> None:
        word = random.Random(f"{self.seed} {self.positions[index]}").getrandbits(63)
        torch.random.default_generator.manual_seed(word)
        random.seed(word)


def logits_of(pl_module: nn.Module, batch: Any) -> Tensor:
    """Logits `(batch, classes)` of any classifier, from the usual kinds of batches; a TypeError says what is missing.

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
        raise TypeError(f"EWC does not know how {name} computes logits of a {kind}; give the module {ask}")
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
    """Restores torch's and Python's random states; transfer hooks see validation, not training, during it."""
    stage, state = trainer.state.stage, random.getstate()
    trainer.state.stage = RunningStage.VALIDATING
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        trainer.state.stage = stage
        random.setstate(state)
