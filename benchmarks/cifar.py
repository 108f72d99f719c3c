"""What the experiments on CIFAR-10 share: pictures in memory, a ResNet-20 with a head per task, and one fit.

Expects `cifar10/train.parquet` and `test.parquet`, columns image and label, in the folder named by FINETUNING_DATA.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn

from datamodules.images.augment import shift_and_mirror, to_float
from recipes.parts.backbones.build import build_backbone
from recipes.parts.optim import build_optimizer
from recipes.parts.param_groups import param_groups
from recipes.parts.schedules import Cosine


@functools.cache
def pictures(split: str) -> tuple[Tensor, Tensor]:
    """All of a split: `(samples, 3, 32, 32)` uint8 and labels `(samples,)`."""
    import datasets

    path = Path(os.environ["FINETUNING_DATA"]) / "cifar10" / f"{split}.parquet"
    rows = datasets.Dataset.from_parquet(str(path)).cast_column("image", datasets.Image(decode=False))
    decoded = [np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in rows["image"]]
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous(), torch.tensor(rows["label"])


def of_classes(split: str, classes: Sequence[int], first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor]:
    """Pictures `first` to `last` of each class, with labels counted from 0."""
    images, labels = pictures(split)
    chosen = torch.cat([torch.nonzero(labels == label).flatten()[first:last] for label in classes])
    return images[chosen], torch.tensor([list(classes).index(label) for label in labels[chosen].tolist()])


class Batches:
    """Batches of `(images, labels)`: shuffled, shifted and mirrored anew in each epoch, or in order and as they are.

    Args:
        data: Images `(samples, 3, 32, 32)` uint8 and labels.
        batch_size: Pictures per batch.
        seed: Of order and augmentation; None for neither.
        batches: Per epoch; as many as the data fills if not given.
    """

    def __init__(
        self, data: tuple[Tensor, Tensor], batch_size: int = 32, seed: int | None = None, batches: int | None = None
    ) -> None:
        self.images, self.labels = data
        self.batch_size = batch_size
        self.random = None if seed is None else torch.Generator().manual_seed(seed)
        self.batches = batches or max(len(self.labels) // batch_size, 1)

    def __len__(self) -> int:
        return self.batches if self.random else -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.labels))
        if self.random:
            rounds = -(-self.batches * self.batch_size // len(order))
            order = torch.cat([torch.randperm(len(order), generator=self.random) for _ in range(rounds)])
        for batch in order.split(self.batch_size)[: len(self)]:
            images = to_float(self.images[batch])
            if self.random:
                dy, dx, side = torch.rand(3, len(batch), generator=self.random)
                images = shift_and_mirror(images, dy, dx, side < 0.5, reach=4)
            yield (images - 0.47) / 0.25, self.labels[batch]


class Classifier(LightningModule):
    """A ResNet-20 with a head of five classes for each task; `task`, or the batch, says which one is learnt.

    Args:
        tasks: Number of heads.
        lr: Rate of the head; the blocks' is that times `layer_decay` to the power of their distance.
        layer_decay: 1.0 for one rate.
        weight_decay: Of weights; norms and biases have none.
        frozen_statistics: Keep BatchNorm in evaluation mode.
        optimizer: Called with the parameter groups and `lr`.
    """

    def __init__(
        self,
        tasks: int = 1,
        lr: float = 1e-3,
        layer_decay: float = 1.0,
        weight_decay: float = 0.01,
        frozen_statistics: bool = False,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone("resnet20")
        self.heads = nn.ModuleList(nn.Linear(64, 5) for _ in range(tasks))
        self.lr, self.layer_decay, self.weight_decay = lr, layer_decay, weight_decay
        self.frozen_statistics, self.optimizer, self.task = frozen_statistics, optimizer, 0
        self.to(memory_format=torch.channels_last)

    def layer_groups(self) -> dict[str, list[str]]:
        """Blocks of the backbone, then the heads."""
        blocks = self.backbone.blocks.items()
        return {name: [f"backbone.{path}" for path in paths] for name, paths in blocks} | {"head": ["heads"]}

    def forward(self, images: Tensor) -> Tensor:
        return self.heads[self.task](self.backbone(images.contiguous(memory_format=torch.channels_last)))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch) == 3:
            self.task = batch[2]
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for module in self.modules() if self.frozen_statistics else ():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def configure_optimizers(self) -> Any:
        groups = param_groups(self, self.layer_groups(), weight_decay=self.weight_decay, layer_decay=self.layer_decay)
        optimizer = build_optimizer(partial(self.optimizer, lr=self.lr), groups)
        schedule = Cosine(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def accuracy(self, data: tuple[Tensor, Tensor], task: int = 0) -> float:
        """Share of right answers of a task's head."""
        self.eval()
        before, self.task = self.task, task
        right = sum(int((self(x).argmax(1) == y).sum()) for x, y in Batches(data, 250))
        self.task = before
        self.train()
        return right / len(data[1])


def fit(
    model: Classifier, batches: Any, epochs: int = 1, callbacks: Sequence[Any] = (), clip: float | None = None
) -> Classifier:
    """Fit in place, on this processor, with gradients clipped to norm `clip`."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        gradient_clip_val=clip,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches)
    return model
