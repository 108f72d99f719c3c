"""Classifiers to put on top of a backbone's features, and how to initialise them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HeadKind: TypeAlias = Literal["linear", "mlp", "cosine"]
HeadInit: TypeAlias = Literal["default", "kaiming", "xavier", "zeros", "normal"]


class CosineHead(nn.Module):
    """Cosine similarity between features and one learnt direction per class, times a learnt scale.

    Independent of the features' norm, which helps with few or unbalanced images (Gidaris & Komodakis 2018,
    https://arxiv.org/abs/1804.09458).

    Args:
        width: Features.
        num_classes: Classes.
        scale: Starting value of the scale, an inverse temperature.
    """

    def __init__(self, width: int, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, width))
        self.scale = nn.Parameter(torch.tensor(scale))
        nn.init.normal_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Features `(batch, width)` to logits `(batch, num_classes)`."""
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


def build_head(
    kind: HeadKind, width: int, num_classes: int, *, hidden: int = 512, dropout: float = 0.0, init: HeadInit = "default"
) -> nn.Module:
    """A classifier from features `(batch, width)` to logits `(batch, num_classes)`.

    Args:
        kind: `linear`; `mlp`, one hidden layer with batch normalisation as is usual on VGG16's convolutions
            for CIFAR-10; or `cosine`.
        width: Features.
        num_classes: Classes.
        hidden: Width of the hidden layer of `mlp`.
        dropout: Probability of dropping a feature before each linear layer.
        init: How the weights start. `default`: torch's for linear layers. `kaiming` (He et al. 2015), `xavier`
            (Glorot & Bengio 2010), `normal` (standard deviation 0.01), `zeros` (the last layer only: every
            class starts equally likely, and the first step leaves the backbone as it is).
    """
    if kind == "linear":
        layers: list[nn.Module] = [nn.Linear(width, num_classes)]
    elif kind == "mlp":
        layers = [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, num_classes)]
    elif kind == "cosine":
        layers = [CosineHead(width, num_classes)]
    else:
        raise ValueError(f"head {kind!r} is not known; expected one of {', '.join(get_args(HeadKind))}")
    if dropout:
        layers.insert(len(layers) - 1, nn.Dropout(dropout))
        if kind == "mlp":
            layers.insert(0, nn.Dropout(dropout))
    head = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
    initialise(head, init)
    return head


@contextmanager
def on_own_scale(head: nn.Module, scale: Tensor) -> Iterator[None]:
    """While it lasts, a head's last linear layer gives scores times a spread plus a mean, as other programs want it.

    Args:
        head: The head, or a net that ends in it.
        scale: Mean and spread, `(2,)`.
    """
    last = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
    weight, bias = last.weight.detach().clone(), last.bias.detach().clone()
    with torch.no_grad():
        last.weight.mul_(scale[1])
        last.bias.mul_(scale[1]).add_(scale[0])
    try:
        yield
    finally:
        with torch.no_grad():
            last.weight.copy_(weight)
            last.bias.copy_(bias)


def initialise(head: nn.Module, init: HeadInit) -> None:
    """Set the starting weights of every linear layer of a head, in place; biases start at zero."""
    if init == "default":
        return
    linears = [module for module in head.modules() if isinstance(module, (nn.Linear, CosineHead))]
    for linear in linears:
        if init == "kaiming":
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        elif init == "xavier":
            nn.init.xavier_uniform_(linear.weight)
        elif init == "normal" or (init == "zeros" and linear is not linears[-1]):
            nn.init.normal_(linear.weight, std=0.01)
        elif isinstance(linear, CosineHead):
            raise ValueError("a cosine head can't start at zero: a zero vector has no direction; use init normal")
        elif init == "zeros":
            nn.init.zeros_(linear.weight)
        else:
            raise ValueError(f"init {init!r} is not known; expected one of {', '.join(get_args(HeadInit))}")
        if isinstance(linear, nn.Linear):
            nn.init.zeros_(linear.bias)
