"""Sample order as a pure function of (seed, epoch), so that there is no state to save and a resume is exact.

Usually every generator in every worker would have to be saved and put back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from .draws import Draw
from .seeds import hash_seed


def ranks_of(trainer: Any) -> tuple[int, int]:
    """Number of ranks and number of this one; without a trainer there is one."""
    return (trainer.world_size, trainer.global_rank) if trainer else (1, 0)


class EpochSampler(DistributedSampler[Draw]):
    """Deals out the samples of an epoch to the ranks, in an order that depends on (seed, epoch) only.

    Lightning calls `set_epoch` before each epoch and leaves a `DistributedSampler` as it is. All ranks get the
    same number of samples. While training (`shuffle=True`) the few that are missing are drawn twice, as in
    torch; in evaluation they come marked as padding, so that no metric counts a sample twice.

    Args:
        size: Number of samples in the data set.
        shuffle: Whether to permute, differently in each epoch.
        seed: Seed of the permutation.
        num_replicas: Number of ranks.
        rank: This rank.
        balance: Classes, `(size,)`: an epoch then has as many samples of each class, see `balanced_order`.
    """

    start = 0  # so many of this rank's samples are skipped: they are done already

    def __init__(
        self,
        size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        balance: Tensor | None = None,
    ) -> None:
        super().__init__(range(size), num_replicas, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size, self.balance = size, balance

    def __len__(self) -> int:
        return max(0, self.num_samples - self.start)

    def __iter__(self) -> Iterator[Draw]:
        repeats = [0] * self.size
        if self.shuffle:
            generator = torch.Generator().manual_seed(hash_seed(self.seed, self.epoch))
            if self.balance is None:
                order = torch.randperm(self.size, generator=generator).tolist()
            else:
                order, repeats = (found.tolist() for found in balanced_order(self.balance, generator))
        else:
            order = list(range(self.size))
        for position in range(self.rank, self.total_size, self.num_replicas)[self.start :]:
            is_padding, place = position >= self.size and not self.shuffle, position % self.size
            yield Draw(self.epoch, order[place], is_padding, repeats[place])


def balanced_order(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As many samples as there are labels `(n,)`, in random order, of every class as many, but for one.

    Samples of a rare class come several times, each as often as the others, but for one; of a frequent class only
    some come. A net that is trained so predicts rare classes more often than they occur, and with more confidence
    than it should: its probabilities are those of a world with classes of one size.

    Returns:
        Rows, `(n,)`, and for each how often it came before.
    """
    members = [(labels == label).nonzero().flatten() for label in sorted(set(labels.tolist()))]
    extra = torch.randperm(len(members), generator=generator)[: len(labels) % len(members)].tolist()
    rows, repeats = [], []
    for number, some in enumerate(members):
        places = torch.arange(len(labels) // len(members) + (number in extra))
        rows.append(some[torch.randperm(len(some), generator=generator)][places % len(some)])
        repeats.append(places // len(some))
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat(rows)[order], torch.cat(repeats)[order]


class BlockSampler(DistributedSampler[Draw]):
    """Deals out samples that lie in blocks, such as the row groups of files, so that a block is read once.

    Each rank gets a stretch of blocks, as many samples as any other. While training (`shuffle=True`) the blocks are
    permuted, differently in each epoch, and a rank's stretch is cut into `LANES` lanes; a lane gives whole batches, its
    samples permuted within windows of neighbours. Batch b comes of lane b modulo `LANES`, and a loader has it made by
    worker b modulo their number: with 1, 2, 4 or 8 workers each lane is one worker's own, and the order is the same
    with any number of them. In evaluation samples come in their order; those that fill up the last rank are marked.

    Args:
        blocks: Number of the block that each sample lies in, `(n,)`, ascending.
        batch_size: Samples of a batch.
        window: Samples of a rank among which the order is random, over all lanes.
        shuffle: Whether to train; the others as for `EpochSampler`.
    """

    LANES = 8
    start = 0  # in evaluation, so many of this rank's samples are skipped: they are done already

    def __init__(
        self,
        blocks: npt.ArrayLike,
        *,
        batch_size: int,
        window: int,
        shuffle: bool,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.blocks, self.batch_size = np.asarray(blocks), batch_size
        self.window = max(window // self.LANES, batch_size)
        super().__init__(range(len(self.blocks)), num_replicas, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return max(0, self.num_samples - self.start)

    def __iter__(self) -> Iterator[Draw]:
        size = len(self.blocks)
        places = np.arange(self.rank * self.num_samples, (self.rank + 1) * self.num_samples)
        if not self.shuffle:
            rest: list[int] = places[self.start :].tolist()
            yield from (Draw(self.epoch, min(place, size - 1), place >= size) for place in rest)
            return
        ranking = np.random.default_rng(hash_seed(self.seed, self.epoch)).permutation(self.blocks[-1] + 1)
        mine = np.argsort(ranking[self.blocks], kind="stable")[places % size]
        generator = np.random.default_rng(hash_seed(self.seed, self.epoch, self.rank))
        batches = len(mine) // self.batch_size
        ends = np.cumsum([len(range(lane, batches, self.LANES)) for lane in range(self.LANES)]) * self.batch_size
        *lanes, rest = (self._mixed(lane, generator) for lane in np.split(mine, ends))
        for number in range(batches):
            start = number // self.LANES * self.batch_size
            for row in lanes[number % self.LANES][start : start + self.batch_size]:
                yield Draw(self.epoch, row)
        yield from (Draw(self.epoch, row) for row in rest)

    def _mixed(self, rows: npt.NDArray[Any], generator: np.random.Generator) -> list[int]:
        for start in range(0, len(rows), self.window):
            generator.shuffle(rows[start : start + self.window])
        found: list[int] = rows.tolist()
        return found


class LengthSampler(DistributedSampler[list[Draw]]):
    """Deals out whole batches of samples of like length, so that padding costs next to nothing.

    The samples of an epoch, in an order that depends on (seed, epoch) only, are sorted by their padded length and
    cut into steps: one batch for each rank, of neighbours in length. Every rank gets the same number of steps, and
    each epoch has as many as the others. While training, the steps are shuffled, and where a step lacks samples for
    all ranks, some are drawn twice; in evaluation those come marked as padding, and the longest come first, so that
    memory runs out at once or never.

    Made to be a loader's `sampler` with `batch_size=None`: Lightning leaves a `DistributedSampler` as it is.

    Args:
        lengths: Padded length of each sample, `(n,)`.
        batch_size: Samples of a batch, at most.
        tokens: Of a batch, padding included, at most; a sample longer than that is a batch of its own.
        shuffle: Whether to train: other batches in each epoch; `seed`, `num_replicas`, `rank` as for `EpochSampler`.
        balance: Classes, `(n,)`: while training, an epoch has as many samples of each class, see `balanced_rows`.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        *,
        batch_size: int,
        tokens: int | None = None,
        shuffle: bool,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        balance: npt.ArrayLike | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths)
        super().__init__(range(len(self.lengths)), num_replicas, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.balance = np.asarray(balance) if balance is not None and shuffle else None
        longest = self.lengths if self.balance is None else self.lengths[balanced_rows(self.balance, self.lengths)[0]]
        self.cuts = cuts(np.sort(longest), batch_size, tokens, num_replicas)

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def __iter__(self) -> Iterator[list[Draw]]:
        rows = np.arange(len(self.lengths))
        repeats, order, steps = np.zeros_like(rows), rows.copy(), np.arange(len(self))[::-1]
        if self.shuffle:
            generator = np.random.default_rng(hash_seed(self.seed, self.epoch))
            if self.balance is not None:
                rows, repeats = balanced_rows(self.balance, self.lengths, generator)
            generator.shuffle(order)
            steps = generator.permutation(len(self))
        order = order[np.argsort(self.lengths[rows[order]], kind="stable")]
        for step in steps:
            some = order[self.cuts[step] : self.cuts[step + 1]]
            each = -(-len(some) // self.num_replicas)
            places = range(self.rank, each * self.num_replicas, self.num_replicas)
            yield [
                Draw(self.epoch, int(rows[one]), place >= len(some) and not self.shuffle, int(repeats[one]))
                for place, one in ((place, some[place % len(some)]) for place in places)
            ]


def balanced_rows(
    labels: npt.NDArray[Any], lengths: npt.NDArray[Any], generator: np.random.Generator | None = None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """As many samples as there are, of every class as many, but for one; and of every length about as many each time.

    As `balanced_order`, for batches by length: what is not the whole of a class is drawn one by one from stretches of
    neighbours in length, or without a generator the longest of each stretch are taken. So an epoch's k-th shortest
    sample is never longer than the k-th shortest of those, and all epochs fit into the same steps.

    Returns:
        Rows, `(n,)`, class by class, and for each how often it came before.
    """
    rows, repeats = [], []
    classes = np.unique(labels)
    for number, label in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if generator is not None:
            generator.shuffle(members)
        members = members[np.argsort(lengths[members], kind="stable")]
        share = len(labels) // len(classes) + (number < len(labels) % len(classes))
        whole, rest = divmod(share, len(members))
        ends = np.linspace(0, len(members), rest + 1).astype(np.int64)
        chosen = ends[1:] - 1 if generator is None else generator.integers(ends[:-1], ends[1:])
        rows += [np.tile(members, whole), members[chosen]]
        repeats += [np.repeat(np.arange(whole), len(members)), np.full(rest, whole)]
    return np.concatenate(rows), np.concatenate(repeats)


def cuts(lengths: npt.NDArray[Any], batch_size: int, tokens: int | None, ranks: int) -> npt.NDArray[Any]:
    """Where to cut ascending lengths into steps of one batch for each rank: from 0 to their number.

    Without a limit on tokens the steps are equally large, but for one sample: none is so small that it would count
    for more than the others, or break a BatchNorm.
    """
    size = len(lengths)
    if tokens is None:
        return np.linspace(0, size, -(-size // (batch_size * ranks)) + 1).round().astype(np.int64)
    found = [0]
    while (start := found[-1]) < size:
        ends = range(start + ranks, start + ranks * (batch_size + 1), ranks)
        fitting = bisect_right(ends, tokens, key=lambda end: (end - found[-1]) // ranks * lengths[min(end, size) - 1])
        found.append(min(ends[max(fitting, 1) - 1], size))
    return np.array(found)
