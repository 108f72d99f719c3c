"""The small ResNets of He et al. for 32 px images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SmallResNet(nn.Module):
    """ResNet for 32 px images, without classifier: He et al. 2015, section 4.2.

    https://arxiv.org/abs/1512.03385: a 3x3 convolution, three stages of 16, 32 and 64 channels with
    `(depth - 2) / 6` blocks each, global average pooling. Where a stage halves the image, the shortcut takes
    every other pixel and pads the new channels with zeros: the paper's option A, free of parameters.

    Args:
        depth: Number of weighted layers, classifier included: 6n + 2.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 2, 6)
        if blocks < 1 or remainder:
            raise ValueError(f"depth must be 6n + 2 with n of 1 or more; received {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks)
        self.layer2 = self._stage(16, 32, blocks)
        self.layer3 = self._stage(32, 64, blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(channels: int, out_channels: int, blocks: int) -> nn.Sequential:
        first = _SmallBlock(channels, out_channels)
        return nn.Sequential(first, *(_SmallBlock(out_channels, out_channels) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Images `(batch, 3, height, width)` to features `(batch, 64)`."""
        x = F.relu(self.bn1(self.conv1(images)))  # (batch, 16, height, width)
        x = self.layer3(self.layer2(self.layer1(x)))  # (batch, 64, height / 4, width / 4)
        return torch.mean(x, (2, 3))


class _SmallBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; halves the image where the number of channels grows."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride = 1 if channels == out_channels else 2
        self.new_channels = out_channels - channels
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(x + y)
