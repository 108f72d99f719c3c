"""Augmentation of whole batches of small images, with a random decision of its own for every image.

torchvision's transforms, given a batch, decide once for all of it; given samples, they cost a Python loop.
Here a batch `(batch, channels, height, width)` stays one tensor on its device, and each image's decisions come
from uniform numbers in [0, 1), `(batch,)` for each decision, that the caller passes in: the functions are pure.
Colours and mixing take floats in [0, 1].
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DRAWS = 12  # uniform numbers that `augment` may use for one image


def augment(images: Tensor, uniform: Tensor, strength: str, *, flip: bool = True) -> Tensor:
    """Augment a batch by a named strength.

    | strength | what is done |
    |---|---|
    | none | nothing |
    | light | mirrored with probability 1/2 |
    | standard | mirrored, and shifted by up to an eighth of the size with reflected borders |
    | strong | standard; brightness, contrast and saturation by up to 0.4; a rectangle erased in half of them |

    Args:
        images: uint8 or float in [0, 1], `(batch, channels, height, width)`, any memory format.
        uniform: Numbers in [0, 1), `(batch, DRAWS)`.
        strength: One of none, light, standard, strong.
        flip: Whether mirrored images keep their meaning (letters and digits do not).

    Returns:
        float in [0, 1], same shape, channels-last.
    """
    return recolour(move(images, uniform, strength, flip=flip), uniform, strength)


def move(images: Tensor, uniform: Tensor, strength: str, *, flip: bool = True) -> Tensor:
    """What `augment` does with places; any type and number of channels, masks among them."""
    u = uniform.unbind(1)
    mirrored = (u[0] < 0.5) & flip
    if strength in ("standard", "strong"):
        return shift_and_mirror(images, u[1], u[2], mirrored, reach=max(1, images.shape[-1] // 8))
    if strength == "light":
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images


def recolour(images: Tensor, uniform: Tensor, strength: str) -> Tensor:
    """What `augment` does with colours, to floats."""
    images = to_float(images)
    if strength == "strong":
        u = uniform.unbind(1)
        images = jitter_colours(images, u[3], u[4], u[5], amount=0.4)
        images = erase_rectangle(images, u[6:12])
    return images


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float in [0, 1]; what is float already stays."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def shift_and_mirror(images: Tensor, dy: Tensor, dx: Tensor, mirrored: Tensor, *, reach: int) -> Tensor:
    """Random crop of the image padded by `reach` reflected pixels, and mirroring, in one gather.

    Args:
        images: Any type, which stays; returned channels-last.
        dy: Vertical place of the crop.
        dx: Horizontal place of the crop.
        mirrored: bool, `(batch,)`.
        reach: Largest shift in pixels; below the image's size.
    """
    batch, channels, height, width = images.shape
    device = images.device
    top = (dy * (2 * reach + 1)).long() - reach
    left = (dx * (2 * reach + 1)).long() - reach
    rows = _reflect(torch.arange(height, device=device) + top[:, None], height)  # (batch, height)
    columns = torch.arange(width, device=device).expand(batch, width)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    columns = _reflect(columns + left[:, None], width)  # (batch, width)
    # Whole rows are moved first, then bytes within them: faster than one gather of pixels.
    lines = images.permute(0, 2, 3, 1).reshape(batch * height, width * channels)  # a view where channels are last
    rows = rows + torch.arange(batch, device=device)[:, None] * height
    lines = lines.index_select(0, rows.flatten()).view(batch, height, width * channels)
    columns = (columns[:, :, None] * channels + torch.arange(channels, device=device)).view(batch, 1, -1)
    moved = lines.gather(2, columns.expand(batch, height, width * channels))
    return moved.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _reflect(position: Tensor, size: int) -> Tensor:
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)


def jitter_colours(
    images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, *, amount: float
) -> Tensor:
    """Scale brightness, contrast about the image's mean, and saturation about each pixel's mean over the channels, each
    by a factor in [1 - amount, 1 + amount].
    """
    b, c, s = ((1 + amount * (2 * u - 1))[:, None, None, None] for u in (brightness, contrast, saturation))
    images = images * b
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, c)
    images = torch.lerp(images.mean(1, keepdim=True), images, s)
    return images.clamp_(0, 1)


def erase_rectangle(images: Tensor, uniform: tuple[Tensor, ...]) -> Tensor:
    """Fill a rectangle of half of the images with the mean colour (random erasing, Zhong et al. 2020).

    The rectangle takes 2 to 33 % of the area with an aspect ratio between 0.3 and 3.3, as in the paper.

    Args:
        images: float.
        uniform: Five or more tensors `(batch,)`: whether, area, aspect ratio, top, left.
    """
    whether, area, ratio, top, left = uniform[:5]
    height, width = images.shape[-2:]
    side = (0.02 + 0.31 * area).sqrt()
    aspect = torch.exp(np.log(0.3) + ratio * (np.log(3.3) - np.log(0.3))).sqrt()
    tall, wide = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)

    def inside(size: int, start: Tensor, extent: Tensor) -> Tensor:
        place = (torch.arange(size, device=images.device) + 0.5) / size
        start = start * (1 - extent)
        return (place >= start[:, None]) & (place < (start + extent)[:, None])

    mask = inside(height, top, tall)[:, :, None] & inside(width, left, wide)[:, None, :]
    mask &= (whether < 0.5)[:, None, None]
    return torch.where(mask[:, None], images.mean((2, 3), keepdim=True), images)


def mix(images: Tensor, target: Tensor, *, mixup: float, cutmix: float, seed: int) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of each image with another of the batch.

    Where both are on, a coin decides for the whole batch. The share of each image is its own.

    Args:
        images: float.
        target: Class probabilities, `(batch, classes)`, which are mixed alike.
        mixup: Beta distribution's parameter, 0 for off.
        cutmix: Beta distribution's parameter, 0 for off.
        seed: Decides everything that is random here.
    """
    rng = np.random.default_rng(seed)
    alpha, cut = (cutmix, True) if mixup == 0 or (cutmix > 0 and rng.random() < 0.5) else (mixup, False)
    batch, _, height, width = images.shape
    partner = torch.from_numpy(rng.permutation(batch)).to(images.device)
    share = torch.from_numpy(rng.beta(alpha, alpha, batch).astype(np.float32)).to(images.device)
    if not cut:
        mixed = torch.lerp(images[partner], images, share[:, None, None, None])
    else:
        centre = torch.from_numpy(rng.random((2, batch), dtype=np.float32)).to(images.device)
        half = (1 - share).sqrt() / 2
        rows = (torch.arange(height, device=images.device) + 0.5) / height
        columns = (torch.arange(width, device=images.device) + 0.5) / width
        pasted = ((rows - centre[0][:, None]).abs() < half[:, None])[:, :, None]
        pasted = pasted & ((columns - centre[1][:, None]).abs() < half[:, None])[:, None, :]
        mixed = torch.where(pasted[:, None], images[partner], images)
        share = 1 - pasted.float().mean((1, 2))  # what was really kept: the border clips rectangles
    return mixed, torch.lerp(target[partner], target, share[:, None])


def soft_targets(labels: Tensor, classes: int) -> Tensor:
    """Labels `(batch,)` as probabilities `(batch, classes)`."""
    return F.one_hot(labels, classes).float()
