"""Which samples are for training and which are held out: stratified, seeded, the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from .sampling import hash_seed


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out a share of every class.

    Args:
        labels: Classes, `(n,)`.
        share: Part to hold out, in (0, 1). A class of two or more samples gives at least one and keeps one.
        seed: Decides which.

    Returns:
        Indices kept and indices held out, each in ascending order.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to hold out must lie between 0 and 1, not {share}")
    generator = torch.Generator().manual_seed(hash_seed(seed, len(labels)))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def limit_per_class(labels: Tensor, limit: int, seed: int) -> Tensor:
    """Indices of at most `limit` random samples of each class, in ascending order.

    A smaller limit takes a subset of what a larger one takes, so that learning curves compare like with like.
    """
    generator = torch.Generator().manual_seed(hash_seed(seed, len(labels), 1))
    order = torch.randperm(len(labels), generator=generator)
    chosen = [order[labels[order] == label][:limit] for label in sorted(set(labels.tolist()))]
    return torch.cat(chosen).sort().values
