"""Data loaders whose order and randomness are a function of seed and progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from .seeds import BATCH, ITERATOR, counter_seed, reseed


class Replay:
    """The training loaders, iterated from the run's progress; a base class before CombinedLoader.

    Lightning makes an iterator too early, before it knows the epoch. Closed, this one starts no worker and gives no
    batch; open, it gives an epoch's batches from a given one on, each under its own seed.
    """

    _flattened: list[Any]

    def __init__(self, loaders: CombinedLoader) -> None:
        super().__init__(loaders.iterables, loaders._mode)  # type: ignore[call-arg]
        self.close()

    def close(self) -> None:
        self.is_open = self.stateful = False

    def open(self, seed: int, epoch: int, rank: int, skip: int, stateful: bool) -> None:
        self.seed, self.epoch, self.rank, self.skip, self.stateful = seed, epoch, rank, skip, stateful
        self.is_open = True

    def reseed(self, loader: int) -> None:
        reseed(counter_seed(self.seed, BATCH, self.epoch, self.batch, self.rank, loader))

    def __iter__(self) -> Replay:
        plain = self._flattened
        self._flattened = [_Batches(loader, number, self) for number, loader in enumerate(plain)]
        try:
            super().__iter__()  # type: ignore[misc]
        finally:
            self._flattened = plain
        self.batch, self.skipping = 0, False
        return self

    def __next__(self) -> Any:
        if not self.is_open:
            raise StopIteration
        while self.batch < self.skip:
            self.skipping = True
            try:
                super().__next__()  # type: ignore[misc]
            except StopIteration:
                raise RuntimeError(
                    f"the checkpoint was saved after batch {self.skip} of an epoch, which has only {self.batch} now; "
                    "resume with the same data and batch size"
                ) from None
            self.batch += 1
        self.skipping = False
        item = super().__next__()  # type: ignore[misc]
        self.batch += 1
        return item


class _Batches:
    """One of the loaders; iterated again where it is shorter than another and cycled."""

    def __init__(self, loader: Any, number: int, replay: Replay) -> None:
        self.loader, self.number, self.replay = loader, number, replay
        self.round = 0
        self.by_index = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        self.by_itself = replay.stateful and hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.round += 1
        skip = 0
        if self.by_index or self.by_itself:
            length = sized_len(self.loader)
            while self.replay.skipping:
                if skip == length:
                    return
                skip += 1
                yield None
        for count, batch in enumerate(self._start(skip), skip):
            if count == 0:
                self.replay.reseed(self.number)  # the first one is loaded under the iterator's seed
            yield batch
            self.replay.reseed(self.number)

    def _start(self, skip: int) -> Iterable[Any]:
        """The loader's iterator without its first `skip` batches, made under a seed of its own."""
        loader, replay, again = self.loader, self.replay, partial(self.replay.reseed, self.number)
        seed = counter_seed(replay.seed, ITERATOR, replay.epoch, self.number, self.round)
        reseed(seed)
        batch_sampler = getattr(loader, "batch_sampler", None)
        for owner in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                generator.manual_seed(seed)
        if getattr(loader, "_iterator", None) is not None:  # persistent workers: no base seed is drawn for them
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        if skip == 0 or self.by_itself:
            iterator: Iterator[Any] = iter(loader)
            if skip:
                again()
            return iterator
        name = "sampler" if batch_sampler is None else "batch_sampler"
        rest = _Rest(getattr(loader, name), skip, again)
        vars(loader)[name] = rest  # only while the iterator is made, which keeps it
        try:
            iterator = iter(loader)
            first = list(islice(iterator, 1))
        finally:
            vars(loader)[name] = rest.whole
        if not rest.skip:
            return chain(first, iterator)
        for _ in islice(iterator, skip - 1):  # it reads its indices elsewhere: batches are loaded to skip them
            pass
        again()
        return iterator


class _Rest:
    """A sampler without its first indices; whole when it is iterated again."""

    def __init__(self, whole: Iterable[Any], skip: int, then: Callable[[], None]) -> None:
        self.whole, self.skip, self.then = whole, skip, then

    def __len__(self) -> int:
        return len(self.whole)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def __iter__(self) -> Iterator[Any]:
        indices = iter(self.whole)
        skip, self.skip = self.skip, 0
        if skip:
            for _ in islice(indices, skip):
                pass
            self.then()
        yield from indices
