"""What an answer hangs on: places of an image, tokens of a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def grad_cam(backbone: nn.Module, head: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Where each image speaks for a class (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391).

    The maps are those of the last convolution. A net with one convolution or none, as transformers have for their
    patches, gets gradient x input instead, summed over patches of a sixteenth of the image.

    Args:
        backbone: Images to features; in evaluation mode.
        head: Features to logits.
        images: As the backbone takes them, `(batch, 3, height, width)`.
        classes: `(batch,)`.

    Returns:
        `(batch, height, width)` in [0, 1], of the size of the maps.
    """
    maps: list[Tensor] = []
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_hook(lambda _, __, output: maps.append(output)) for module in convolutions]
    images = images.detach().requires_grad_()
    try:
        chosen = head(backbone(images)).gather(1, classes[:, None]).sum()
    finally:
        for hook in hooks:
            hook.remove()
    spatial = [found for found in maps if min(found.shape[2:]) > 1]
    if len(maps) > 1 and spatial:
        (slope,) = torch.autograd.grad(chosen, spatial[-1])
        heat = (slope.mean((2, 3), keepdim=True) * spatial[-1]).sum(1).relu()
    else:
        (slope,) = torch.autograd.grad(chosen, images)
        heat = F.adaptive_avg_pool2d((slope * images).sum(1, keepdim=True).abs(), 16)[:, 0]
    return as_shares(heat.detach())


def token_saliency(embeddings: nn.Module, logits: Callable[[], Tensor], mask: Tensor, classes: Tensor) -> Tensor:
    """Which tokens speak for or against a class: gradient x input at the embeddings (Shrikumar et al. 2016,
    https://arxiv.org/abs/1605.01713).

    Args:
        embeddings: The module that turns tokens into vectors.
        logits: Runs the net, which calls `embeddings` once.
        mask: `(batch, length)`, 0 for padding.
        classes: `(batch,)`.

    Returns:
        `(batch, length)` in [0, 1].
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[0]

    hook = embeddings.register_forward_hook(keep)
    try:
        chosen = logits().gather(1, classes[:, None]).sum()
    finally:
        hook.remove()
    (slope,) = torch.autograd.grad(chosen, found[0])
    return as_shares((slope * found[0]).sum(2).abs().detach() * mask)


def as_shares(heat: Tensor) -> Tensor:
    """Each sample's values by its largest; zeros stay zeros."""
    heat = heat.float()
    return heat / heat.flatten(1).amax(1).clamp(min=1e-12).view(-1, *[1] * (heat.ndim - 1))
