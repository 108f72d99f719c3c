"""Which samples are for training and which are held out: stratified, seeded, the same on every machine.

Every split function returns the indices kept and the indices held out, each in ascending order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from .seeds import hash_seed


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out a share, in (0, 1), of every class of labels `(n,)`.

    A class of two or more samples gives at least one and keeps one; a ValueError where no class has two.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to hold out must lie between 0 and 1, not {share}")
    generator = torch.Generator().manual_seed(hash_seed(seed, len(labels)))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for members in by_class(labels):
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    check_some(held_out, labels)
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def hold_out(labels: Tensor, share: float, fold: tuple[int, int] | None, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out a share of every class; or of so many folds, (number, folds), that of the number, from 0.

    Together the folds hold every sample once; another seed gives other folds.

    Raises:
        ValueError: No such fold, or an empty one; a share out of (0, 1), or no class of two samples.
    """
    if fold is None:
        return stratified_split(labels, share, seed)
    number, folds = fold
    if not 0 <= number < folds or folds < 2:
        raise ValueError(f"data.fold takes a number from 0 and how many there are, such as [0, 5]; not {list(fold)}")
    generator = torch.Generator().manual_seed(hash_seed(seed, len(labels), folds))
    of = torch.empty(len(labels), dtype=torch.long)
    start = 0
    for members in by_class(labels):  # each class goes on where the last ended, so that folds are of like size
        order = members[torch.randperm(len(members), generator=generator)]
        of[order] = torch.arange(start, start + len(members)) % folds
        start += len(members)
    check_some(of == number, labels)
    return (of != number).nonzero().flatten(), (of == number).nonzero().flatten()


def check_some(held_out: Tensor, labels: Tensor) -> None:
    """Refuse a split of nothing with a ValueError: a run would choose no checkpoint, or have nothing to report."""
    if not held_out.any() or held_out.all():
        raise ValueError(
            f"too few samples: of {len(labels)} in {len(labels.unique())} classes none can be held out for validation "  # type: ignore[no-untyped-call]
            "or test, as each class keeps one to train on. Give each class three or more, or a split of their own"
        )


def grouped_split(labels: Tensor, groups: Sequence[str], share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out whole groups, about a share of every class: what belongs together is never on both sides.

    All samples of a group are of one class. A class never gives more than the share; and none
    if its every group is larger.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to hold out must lie between 0 and 1, not {share}")
    sizes, classes = Counter(groups), dict(zip(groups, labels.tolist(), strict=True))
    room = {label: share * count for label, count in Counter(labels.tolist()).items()}
    held_out = set()
    for group in sorted(sizes, key=lambda group: (hash_seed(seed, crc32(group.encode())), group)):
        if sizes[group] <= room[classes[group]]:
            room[classes[group]] -= sizes[group]
            held_out.add(group)
    chosen = torch.tensor([group in held_out for group in groups])
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def limit_per_class(labels: Tensor, limit: int, seed: int) -> Tensor:
    """Indices of at most `limit` random samples of each class, in ascending order.

    A smaller limit takes a subset of what a larger one takes, so that learning curves compare like with like.
    """
    generator = torch.Generator().manual_seed(hash_seed(seed, len(labels), 1))
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[members[:limit]] for members in by_class(labels[order])]).sort().values


def by_class(labels: Tensor) -> tuple[Tensor, ...]:
    """Indices of each class that occurs, ascending; one sort for all, of a thousand classes and a million samples."""
    counts = labels.unique(return_counts=True)[1]  # type: ignore[no-untyped-call]
    return labels.argsort(stable=True).split(counts.tolist())  # type: ignore[no-untyped-call, no-any-return]


def split_train(splits: dict[str, Any], classes: Tensor, part: Callable[[Any, Tensor], Any], data: Any) -> None:
    """Hold training samples out for validation where none are given, and limit the rest.

    Args:
        splits: By name; changed in place.
        classes: Of the training samples, `(n,)`.
        part: Makes of a split and rows a split of these rows.
        data: The data module: its `val_share`, `fold`, `limit_per_class` and `seed` decide.
    """
    train = splits["train"]
    if "val" not in splits:
        kept, held_out = hold_out(classes, data.val_share, data.fold, data.seed)
        splits["val"], splits["train"] = part(train, held_out), part(train, kept)
    elif data.fold is not None:
        raise ValueError("data.fold: this data set has a validation split of its own")
    if data.limit_per_class is not None:
        train = splits["train"]
        splits["train"] = part(train, limit_per_class(train.labels, data.limit_per_class, data.seed))


def split_state(data: Any) -> dict[str, Any]:
    """What a checkpoint keeps of a data module's classes and splits."""
    return {
        "class_names": data.class_names,
        "seed": data.seed,
        "counts": {name: len(part.labels) for name, part in data.splits.items()},
        "split_rows": {name: torch.tensor(rows, dtype=torch.int32) for name, rows in data.cut_rows.items()},
    }


def check_state(state: Mapping[str, Any], data: Any) -> None:
    """Refuse, with a ValueError, a checkpoint of other classes, and to go on training with another split than its."""
    if list(state["class_names"]) != list(data.class_names):
        raise ValueError(
            f"the checkpoint's classes are {', '.join(state['class_names'])}; the data's are "
            f"{', '.join(data.class_names)}: labels would be read as other classes"
        )
    if data.trainer is not None and data.trainer.state.fn != "fit":
        return
    for name, rows in data.cut_rows.items():
        saved = state["split_rows"].get(name)
        if saved is None or saved.tolist() != list(rows):
            raise ValueError(
                f"the {name} split is not the checkpoint's ({state['counts'].get(name)} samples then, {len(rows)} "
                "now): same data, data.seed, data.val_share, data.fold and data.limit_per_class are needed to resume"
            )
