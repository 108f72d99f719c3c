"""A trained classifier as one plain graph, from images or tokens to logits and probabilities: what an export holds.

Nothing of Lightning and no metric is in it, and what `predict` does around the net is: an image's normalisation, its
mirror image where the recipe asks for one, the probabilities.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..parts.blocks import Fusion
from ..parts.encoders import Pooling, pool

PROBABILITIES: dict[str, Any] = {  # by problem; a score has none
    "single_label_classification": lambda logits: logits.softmax(1),
    "multi_label_classification": torch.sigmoid,
}


class ImageGraph(nn.Module):
    """Images in [0, 1] to logits and probabilities.

    Args:
        backbone: Normalised images `(batch, 3, size, size)` to features `(batch, width)`.
        head: Features to logits `(batch, classes)`.
        mean: To be subtracted from each channel, `(3, 1, 1)`.
        std: To divide by, `(3, 1, 1)`.
        mirror: Whether to give the log of the mean probabilities of an image and its mirror image.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, head: nn.Module, mean: Tensor, std: Tensor, mirror: bool = False) -> None:
        super().__init__()
        self.backbone, self.head, self.mirror = backbone, head, mirror
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images `(batch, 3, size, size)` to logits and probabilities, each `(batch, classes)`."""
        normal = (images - self.mean) / self.std
        logits: Tensor = self.head(self.backbone(normal))
        if self.mirror:
            views = logits, self.head(self.backbone(normal.flip(3)))
            logits = torch.logaddexp(*(view.log_softmax(1) for view in views)) - math.log(2)
        return logits, logits.softmax(1)


class TasksGraph(nn.Module):
    """Images in [0, 1], or tokens, to each task's logits, or its number, in the order of the tasks.

    Args:
        model: Of `recipes.multitask`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.trunk, self.heads, self.maps, self.kinds = model.trunk, model.heads, model.maps, model.kinds
        self.register_buffer("centre", model.centre.clone())
        self.register_buffer("spread", model.spread.clone())

    centre: Tensor
    spread: Tensor

    def forward(self, **batch: Tensor) -> tuple[Tensor, ...]:
        """Named as the batch's: `image`, or `input_ids`, `attention_mask` and perhaps `token_type_ids`."""
        features, maps = self.trunk(batch)
        found = []
        for place, (name, head) in enumerate(self.heads.items()):
            if name in self.maps:
                found.append(head([maps[block] for block in self.maps[name]], batch["image"].shape[2:]))
            elif self.kinds[name] == "regression":
                found.append(head(features) * self.spread[place] + self.centre[place])
            else:
                found.append(head(features))
        return tuple(found)


class ImageTasksGraph(TasksGraph):
    """Of images, whose argument is called as in `ImageGraph`."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Images `(batch, 3, size, size)`."""
        return super().forward(image=images)


class TokenTasksGraph(TasksGraph):
    """Of texts."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Tokens, their mask and types, each `(batch, length)`."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **types)


class TokenGraph(nn.Module):
    """Tokens to logits and, unless a score is predicted, probabilities.

    Args:
        net: An encoder of transformers, or with pooling `model` its classifier.
        head: Features to logits `(batch, classes)`; None with pooling `model`.
        pooling: What the head sees.
        problem_type: Which probabilities there are.
        fusion: Of blocks of the net, if any are joined.
    """

    def __init__(
        self,
        net: nn.Module,
        head: nn.Module | None,
        pooling: Pooling,
        problem_type: str,
        fusion: Fusion | None = None,
    ) -> None:
        super().__init__()
        self.net, self.head, self.pooling, self.fusion = net, head, pooling, fusion
        self.probabilities = PROBABILITIES.get(problem_type)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Tokens, their mask and types, each `(batch, length)`, to logits and probabilities `(batch, classes)`."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        out = self.net(input_ids=input_ids, attention_mask=attention_mask, **types)
        if self.head is None:
            logits = out.logits
        else:
            logits = self.head(pool(out.last_hidden_state, attention_mask, self.pooling, self.fusion))
        return (logits, self.probabilities(logits)) if self.probabilities else (logits,)
