"""What an answer hangs on: known where the net is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recipes.parts.backbones import build_backbone
from recipes.parts.saliency import as_shares, grad_cam, token_saliency


class Halves(nn.Module):
    """Features: the brightness of the left half and of the right."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 1, 1, bias=False), nn.Conv2d(1, 2, 1, bias=False)
        nn.init.ones_(self.first.weight)
        nn.init.ones_(self.second.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.second(self.first(images))
        return torch.stack([maps[:, 0, :, :4].mean((1, 2)), maps[:, 1, :, 4:].mean((1, 2))], 1)


def test_the_map_is_bright_where_the_class_is_seen() -> None:
    images = torch.zeros(2, 3, 8, 8)
    images[:, :, 2:4, 1:3] = 1
    heat = grad_cam(Halves(), nn.Identity(), images, torch.tensor([0, 0]))
    assert heat.shape == (2, 8, 8)
    assert torch.equal(heat[0] > 0, images[0, 0] > 0) and heat.max() == 1


def test_the_map_is_of_the_class_that_is_asked_for() -> None:
    colours = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False))
    for module in colours:
        with torch.no_grad():
            module.weight.copy_(torch.eye(3)[..., None, None])
    backbone = nn.Sequential(colours, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.zeros(1, 3, 8, 8)
    images[0, 0, :, 1], images[0, 2, :, 6] = 1, 1  # red on the left, blue on the right
    for label, columns in ((0, [1]), (2, [6])):
        heat = grad_cam(backbone, nn.Identity(), images, torch.tensor([label]))
        assert heat[0].amax(0).nonzero().flatten().tolist() == columns


def test_one_convolution_is_patches_and_gives_gradient_times_input() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.Flatten(), nn.Linear(64, 5))
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, :8, :8] = 1
    heat = grad_cam(net, nn.Identity(), images, torch.tensor([1]))
    assert heat.shape == (1, 16, 16) and torch.equal(heat[0] > 0, images[0, 0, ::2, ::2] > 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v3_small", "vit_b_16", "swin_t", "convnext_tiny"])
def test_every_family_of_backbones_gives_a_map(name: str) -> None:
    backbone = build_backbone(name).eval().requires_grad_(False)
    head = nn.Linear(backbone.width, 3)
    size = 224 if name == "vit_b_16" else 64
    heat = grad_cam(backbone, head, torch.rand(1, 3, size, size), torch.tensor([2]))
    assert heat.ndim == 3 and min(heat.shape[1:]) > 1 and heat.min() >= 0 and heat.max() <= 1
    assert not any(module._forward_hooks for module in backbone.modules())


def test_tokens_are_weighed_by_what_they_add() -> None:
    embeddings = nn.Embedding(4, 3)
    weight = torch.tensor([[1.0, 0, 0], [0, 2.0, 0]])
    ids, mask = torch.tensor([[0, 1, 2], [3, 1, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    heat = token_saliency(embeddings, lambda: embeddings(ids).sum(1) @ weight.T, mask, torch.tensor([0, 1]))
    by_hand = torch.stack([embeddings(ids[0])[:, 0].abs(), 2 * embeddings(ids[1])[:, 1].abs() * mask[1]]).detach()
    assert torch.allclose(heat, as_shares(by_hand)) and heat[1, 2] == 0
    assert not embeddings._forward_hooks


def test_nothing_is_no_share() -> None:
    assert not as_shares(torch.zeros(2, 3, 3)).any()
