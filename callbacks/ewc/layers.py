"""Squares of per-sample gradients of one layer's parameters, from its input and the gradient of its output."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

SQUARES = 1 << 18  # numbers of per-sample gradients at a time on a CPU, for its cache
LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)  # features in the last dimension; in the second of the others
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, nn.Embedding, *NORMS, *CONVOLUTIONS)

Use: TypeAlias = tuple[nn.Module | None, str, Tensor, Tensor]  # the first arguments of `_gradients`


def add_squares(uses: Sequence[Use], total: Tensor) -> None:
    """Adds the squared per-sample gradients of one parameter, from all its uses, to `total`."""
    layer, key, x, g = uses[0]
    convolution = key == "weight" and isinstance(layer, CONVOLUTIONS)
    # Tap by tap pays off where maps are small; elsewhere on a CPU one gradient at a time stays in its cache.
    small = convolution and (g.device.type != "cpu" or g[0, :, 0].numel() <= x.shape[2])
    if len(uses) > 1 or (convolution and not (small and isinstance(layer, nn.Conv2d) and layer.groups == 1)):
        for row in range(len(g)):  # what is used more than once is summed before it is squared
            parts = [_gradients(layer, key, x[row, None], g[row, None], total.shape) for layer, key, x, g in uses]
            of_sample = functools.reduce(torch.add, parts)[0]
            total.addcmul_(of_sample, of_sample)
    elif convolution:
        _add_taps(layer, x, g, total)
    elif key == "weight" and isinstance(layer, nn.Linear):
        _add_products(g.flatten(1, -2), x.flatten(1, -2), total)
    elif isinstance(layer, nn.Embedding):
        _add_rows(layer, x.flatten(1), g.flatten(1, -2), total)
    else:
        total += _gradients(layer, key, x, g, total.shape).square().sum(0)


def _gradients(layer: Any, key: str, x: Tensor, g: Tensor, shape: torch.Size) -> Tensor:
    """Per-sample gradients `(batch, *shape)` of a layer's parameter.

    From x, its input, and g, the gradient of its output: `(batch, rows, ...)`, mostly with one row per sample.
    """
    if layer is None:
        return g.reshape(len(g), *shape)
    if key == "weight" and isinstance(layer, nn.Linear):
        return torch.bmm(g.flatten(1, -2).mT, x.flatten(1, -2))
    if isinstance(layer, nn.Embedding):
        found = g.new_zeros(len(g), *shape)
        for of_sample, at, values in zip(found, x.flatten(1), g.flatten(1, -2), strict=True):
            of_sample.index_add_(0, at, values)
        if layer.padding_idx is not None:
            found[:, layer.padding_idx] = 0
        return found
    if key == "weight" and isinstance(layer, CONVOLUTIONS):
        backward: Any = (conv1d_weight, conv2d_weight, conv3d_weight)[len(shape) - 3]
        how = layer.stride, _padding(layer), layer.dilation, layer.groups
        return torch.stack([backward(x1, shape, g1, *how) for x1, g1 in zip(x, g, strict=True)])
    t = (g * x if key == "weight" else g).flatten(0, 1)
    if t.dim() > 2 and not (isinstance(layer, LAST) and t.shape[-len(shape) :] == shape):
        t = t.flatten(2).sum(2)
    return t.reshape(len(g), -1, *shape).sum(1)


def _add_products(g: Tensor, x: Tensor, total: Tensor) -> None:
    """Adds the sum over samples of (g^T x)^2: g `(batch, positions, out)`, x `(batch, positions, in)`."""
    if g.shape[1] == 1:
        total.addmm_(g[:, 0].square().T, x[:, 0].square())
        return
    step = max(1, (SQUARES if g.device.type == "cpu" else 1 << 26) // total.numel())
    products = total.new_empty(min(step, len(g)), *total.shape)
    for some_g, some_x in zip(torch.split(g, step), torch.split(x, step), strict=True):
        found = torch.bmm(some_g.mT, some_x, out=products[: len(some_g)])
        if step == 1:
            total.addcmul_(found[0], found[0])
        else:
            total += found.square_().sum(0)


def _add_taps(layer: Any, x: Tensor, g: Tensor, total: Tensor) -> None:
    """Adds a convolution's squares tap by tap: products of matrices, at the outputs whose inputs are no padding."""
    size, (height, width) = len(g), total.shape[2:]
    g, x = (t.flatten(0, 1).permute(0, 2, 3, 1).contiguous() for t in (g, x))
    axes = list(zip(g.shape[1:], x.shape[1:], layer.stride, layer.dilation, _padding(layer), strict=False))
    for tap in itertools.product(range(height), range(width)):
        given, seen = [], []
        for at, (outputs, inputs, stride, dilation, padding) in zip(tap, axes, strict=True):
            offset = at * dilation - padding
            first = max(0, -(offset // stride))
            count = max(0, min(outputs, (inputs - 1 - offset) // stride + 1) - first)
            begin = first * stride + offset
            given.append(slice(first, first + count))
            seen.append(slice(begin, begin + count * stride, stride))
        some_g, some_x = g[:, given[0], given[1]], x[:, seen[0], seen[1]]
        if some_x.numel():
            of_tap = total[:, :, tap[0], tap[1]]
            _add_products(some_g.reshape(size, -1, g.shape[3]), some_x.reshape(size, -1, x.shape[3]), of_tap)


def _padding(layer: Any) -> Sequence[int]:
    if not isinstance(layer.padding, str):
        return cast(Sequence[int], layer.padding)
    whole = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [each // 2 if layer.padding == "same" else 0 for each in whole]


def _add_rows(layer: nn.Embedding, indices: Tensor, g: Tensor, total: Tensor) -> None:
    """Adds an embedding's squares; a row that comes up twice in a sample is summed before it is squared."""
    if layer.padding_idx is not None:
        g = g.masked_fill((indices == layer.padding_idx).unsqueeze(2), 0)
    samples = torch.arange(len(g), device=g.device).unsqueeze(1)
    pairs, place = torch.unique(samples * len(total) + indices, return_inverse=True)
    sums = g.new_zeros(len(pairs), g.shape[2]).index_add_(0, place.flatten(), g.flatten(0, 1))
    total.index_add_(0, pairs % len(total), sums.square_())
