"""The small ResNets are those of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recipes.parts.backbones import build_backbone
from recipes.parts.backbones.small_resnet import SmallResNet


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_small_resnets_have_the_papers_layers_and_parameters(depth: int, millions: float) -> None:
    net = SmallResNet(depth)
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) + 1 == depth
    classifier = 64 * 10 + 10
    assert round((sum(p.numel() for p in net.parameters()) + classifier) / 1e6, 2) == millions


def test_small_resnets_halve_the_picture_twice() -> None:
    net = SmallResNet(8)
    assert net.layer3(net.layer2(net.layer1(torch.rand(1, 16, 32, 32)))).shape == (1, 64, 8, 8)
    assert net(torch.rand(2, 3, 33, 31)).shape == (2, 64)
    for depth in (2, 7, 18):
        with pytest.raises(ValueError, match=rf"depth must be 6n \+ 2 with n of 1 or more; received {depth}"):
            SmallResNet(depth)


def test_shortcut_takes_every_other_pixel_and_pads_channels_at_the_end() -> None:
    block = build_backbone("resnet8").get_submodule("net.layer2.0").eval()
    nn.init.zeros_(block.bn2.weight)  # type: ignore[arg-type, union-attr]
    images = torch.rand(1, 16, 32, 32)
    output = block(images)
    torch.testing.assert_close(output[:, :16], images[:, :, ::2, ::2])
    assert output[:, 16:].eq(0).all()
