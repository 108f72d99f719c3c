"""The features of a frozen backbone, computed once and trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device

from ..parts.features import extract, fingerprint

Batch = dict[str, Any]


def precompute(model: Any, data: Any, views: int, folder: Path) -> None:
    """Let a data module serve the backbone's features in place of its images.

    Args:
        model: Its whole backbone is frozen.
        data: An image data module; `data.features` is filled for each of its splits.
        views: Augmented views of each training image; one, without augmentation, says all.
        folder: Where the features lie, each split's in a file named by a hash of all that it depends on.

    Raises:
        ValueError: The backbone trains, or images are mixed: features would be wrong after a step.
    """
    if any(parameter.requires_grad for parameter in model.backbone.parameters()):
        raise ValueError("feature_views needs a frozen backbone: add the callback Freeze with train_last_blocks=1")
    if data.mixup or data.cutmix:
        raise ValueError("feature_views can't mix images: set data.mixup and data.cutmix to 0")
    data.prepare_data()
    data.setup("fit")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    for split in ("train", "val", "test"):
        if split not in data.splits:
            continue
        augmented = split == "train" and data.augment != "none"
        chosen: list[int | None] = list(range(views)) if augmented else [None]
        kind = type(data.view_dataloader(split, None).dataset).__name__  # decodes what is to lie in memory
        facts = (data.augment if augmented else "none", chosen, data.seed, data.image_size, kind, data.flip)
        data.features[split] = extract(
            lambda batch: model.backbone(model.normalise(batch["image"])),
            [batches_of(data, split, view, device) for view in chosen],
            len(data.splits[split].labels),
            folder / f"{fingerprint(model.backbone, *facts, data.fingerprint(split))}.f32",
        )
    model.train()


def batches_of(data: Any, split: str, view: int | None, device: torch.device) -> Iterator[Batch]:
    """Every image of a split once, as in evaluation or as augmented in epoch `view`, on a device."""
    for batch in data.view_dataloader(split, view):
        yield data.on_after_batch_transfer(move_data_to_device(batch, device), 0)
