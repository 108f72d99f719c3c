"""What several heads share: an image backbone or an encoder of texts, from a batch to features.

trunk = ImageTrunk("resnet18", image_size=64)
features, maps = trunk({"image": images})        # (batch, 512), and maps of the blocks that are watched
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .backbones import build_backbone, load_weights
from .blocks import Watch, run_once
from .decoder import as_map
from .encoders import Pooling, build_encoder, encoder_blocks, pool

log = logging.getLogger(__name__)
INPUTS = ("input_ids", "attention_mask", "token_type_ids")

Batch = Mapping[str, Any]
Seen = tuple[Tensor, dict[str, Tensor]]  # features `(batch, width)`; maps `(batch, channels, height, width)` by block


class ImageTrunk(nn.Module):
    """A backbone that normalises the images it is given.

    Args:
        name: Of the backbone.
        weights: Where its weights come from: a name of torchvision's, a file, or nothing.
        image_size: Side in pixels of the images; the backbone's own if not given.
        small_stem: For ResNets on images of 64 px and less.
    """

    mean: Tensor
    std: Tensor
    reads = "vision"

    def __init__(
        self, name: str, weights: str | None = None, image_size: int | None = None, small_stem: bool = False
    ) -> None:
        super().__init__()
        self.net = build_backbone(name, image_size=image_size, small_stem=small_stem)
        self.source, self.new = weights, list[str]()  # names of parameters that nothing was loaded for
        if weights is not None:
            log.info("%s", report := load_weights(self.net, weights))
            self.new = [f"net.{missing}" for missing in report.missing]
        self.width = self.net.width
        self.register_buffer("mean", torch.tensor(self.net.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.net.std).view(3, 1, 1), persistent=False)
        self.watched: Watch | None = None

    @property
    def blocks(self) -> dict[str, list[str]]:
        """Ordered, input to output: name -> paths inside `net`."""
        return self.net.blocks

    def run(self) -> Any:
        """One image through the net."""
        side = self.net.input_size
        return self.net(torch.zeros(1, 3, side, side, device=self.mean.device))

    @cached_property
    def map_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the map that each block gives; of those that have places."""
        modules = dict(self.net.named_modules())
        watch = Watch(self.net, self.blocks, [name for name, paths in self.blocks.items() if paths[-1] in modules], "")
        run_once(self.net, self.run)
        return {name: tuple(as_map(out).shape) for name, out in watch.end().items() if out.ndim > 2}

    def watch(self, blocks: Sequence[str]) -> None:
        """Give the maps of these blocks, too."""
        self.watched = Watch(self.net, self.blocks, blocks, "blocks") if blocks else None

    def forward(self, batch: Batch) -> Seen:
        """A batch with images in [0, 1], `(batch, 3, height, width)`, to what heads see."""
        images = (batch["image"].to(self.mean.dtype) - self.mean) / self.std
        features = self.net(images.contiguous(memory_format=torch.channels_last))
        if self.watched is None:
            return features, {}
        maps = {name: as_map(out) for name, out in self.watched.outputs.items()}
        self.watched.outputs.clear()
        return features, maps

    def facts(self) -> dict[str, Any]:
        """Mean and standard deviation that images are normalised with."""
        return {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}

    def take_facts(self, facts: Mapping[str, Any]) -> None:
        """Normalise as in training, whatever the backbone's table says by now."""
        for name in {"mean", "std"} & facts.keys():
            getattr(self, name).copy_(torch.tensor(facts[name]).view(3, 1, 1))


class TextTrunk(nn.Module):
    """An encoder whose tokens are pooled.

    Args:
        name: On the hub, a folder, or an encoder that ships with this package.
        pretrained: Whether to load its weights.
        pooling: `cls` or `mean`.
        dropout: Of its layers and attention; its own if not given.

    Raises:
        ValueError: Pooling `model`, which is one head's.
    """

    map_shapes: Mapping[str, tuple[int, ...]] = {}  # a text has no places
    reads = "text"

    def __init__(
        self, name: str, pretrained: bool = True, pooling: Pooling = "mean", dropout: float | None = None
    ) -> None:
        super().__init__()
        if pooling == "model":
            raise ValueError("model.pooling must be cls or mean: transformers' own head has room for one task")
        self.net, self.pooling = build_encoder(name, pretrained=pretrained, dropout=dropout), pooling
        self.source, self.new = name if pretrained else None, self.net.new_weights
        self.width: int = self.net.config.hidden_size

    @property
    def blocks(self) -> dict[str, list[str]]:
        """Ordered, input to output: name -> paths inside `net`."""
        return encoder_blocks(self.net)

    def run(self) -> Any:
        """Two tokens through the net."""
        return self.net(**{name: torch.ones(1, 2, dtype=torch.long, device=self.net.device) for name in INPUTS[:2]})

    def forward(self, batch: Batch) -> Seen:
        """A batch of tokens, their mask and perhaps types, each `(batch, length)`, to what heads see."""
        out = self.net(**{name: batch[name] for name in INPUTS if name in batch})
        return pool(out.last_hidden_state, batch["attention_mask"], self.pooling), {}

    def facts(self) -> dict[str, Any]:
        """The encoder's configuration."""
        return {"encoder": self.net.config.to_dict()}

    def take_facts(self, facts: Mapping[str, Any]) -> None:
        """There is nothing that could differ."""
