"""From the feature maps of a net's blocks to a class for each pixel, by as few layers as do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def as_map(output: Tensor) -> Tensor:
    """A block's output as a map `(batch, channels, height, width)`.

    Tokens `(batch, tokens, channels)` become the largest square that they fill; what is left over stands in front, as
    class and register tokens do.

    Raises:
        ValueError: It has no places.
    """
    if output.ndim == 4:
        return output
    if output.ndim != 3:
        raise ValueError(f"a mask needs blocks with places; one gave {tuple(output.shape)}")
    side = isqrt(output.shape[1])
    return output[:, -side * side :].transpose(1, 2).reshape(len(output), -1, side, side)


def blocks_for_masks(shapes: Mapping[str, Sequence[int]], side: int) -> list[str]:
    """The last block of each resolution, finest first; of a net with one resolution four, evenly spaced.

    Maps as fine as the image cost most and say least: they are left out where there are two others.

    Args:
        shapes: Block -> shape of its map, input to output.
        side: Of the image.
    """
    last = {tuple(shape[2:]): name for name, shape in shapes.items() if min(shape[2:]) > 1}
    coarser = [name for size, name in last.items() if max(size) < side]
    if len(last) > 1:
        return coarser if len(coarser) > 1 else list(last.values())
    names = [name for name, shape in shapes.items() if tuple(shape[2:]) in last]
    return [names[round((place + 1) * len(names) / 4) - 1] for place in range(4)] if len(names) > 4 else names


class Decoder(nn.Module):
    """Maps of several resolutions to logits of each pixel: brought to one width, and added from coarse to fine.

    The way down of a feature pyramid, Lin et al. 2017, https://arxiv.org/abs/1612.03144, with one convolution after it.

    Args:
        widths: Channels of each map, finest first.
        classes: Of a pixel.
        width: Channels in between.
        dropout: Probability of dropping a channel before the last layer.
    """

    def __init__(self, widths: Sequence[int], classes: int, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths)
        self.norm = nn.GroupNorm(8, width)
        self.smooth = nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Maps `(batch, channels, height, width)`, finest first, to logits `(batch, classes, *size)`."""
        found: Tensor | None = None
        for lateral, values in zip(reversed(self.lateral), reversed(maps), strict=True):
            values = lateral(values)
            if found is not None:
                values = values + F.interpolate(found, values.shape[2:], mode="bilinear", align_corners=False)
            found = values
        assert found is not None
        found = torch.relu(self.norm(self.smooth(torch.relu(found))))
        return F.interpolate(self.classify(self.drop(found)), size, mode="bilinear", align_corners=False)
