"""Nets that the tests of groups and optimisers train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer


class Block(nn.Module):
    """Attention and a norm; a position table held by the block itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pos_bias = nn.Parameter(torch.zeros(5, width))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_bias
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


class Net(nn.Module):
    """Token embedding, convolution, attention, and an output tied to the embedding: (batch, 4) -> logits."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.conv = nn.Conv1d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm1d(width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.hidden = nn.Linear(width, width)
        self.fancy = FancyRMSNorm(width)
        self.head = nn.Linear(width, 3)
        self.tied = nn.Linear(width, 11, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(self.embed(x).mT)).mT
        y = self.blocks(torch.cat([self.token.expand(len(y), -1, -1), y], 1))
        y = self.fancy(torch.tanh(self.hidden(y[:, 0])))
        return self.head(y) + self.tied(y).mean(1, keepdim=True)


LAYERS = {
    "stem": ["embed", "token", "conv", "bn"],
    "block1": ["blocks.0"],
    "block2": ["blocks.1", "hidden", "fancy"],
    "head": ["head", "tied"],
}
SLOW: dict[str, Any] = {"layer_decay": 0.5, "lr_multipliers": {r"^head": 4.0}}


def loss_of(net: nn.Module) -> Tensor:
    """Of `(6, 4)` tokens, as numbers where the net starts with a matrix."""
    x = torch.arange(24).reshape(6, 4) % 11
    x = x / 10 if isinstance(next(net.children()), nn.Linear) else x
    return F.cross_entropy(net(x), torch.arange(6) % 3)


def take_steps(net: nn.Module, optimizer: Optimizer, steps: int = 3) -> list[float]:
    losses = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        losses.append(loss.item())
        return loss.item()

    for _ in range(steps):
        optimizer.step(closure)
    return losses


def group_of(net: nn.Module, optimizer: Optimizer, name: str) -> dict[str, Any]:
    (found,) = (g for g in optimizer.param_groups if any(p is net.get_parameter(name) for p in g["params"]))
    return found


class FancyRMSNorm(nn.Module):
    """A norm of its own making, as in transformers: only the name tells; its weight has two dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()


def torchvision_net(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name)  # type: ignore[no-any-return]


def timm_net(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)  # type: ignore[no-any-return]


def transformers_net(kind: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_config(AutoConfig.for_model(kind))  # type: ignore[no-any-return]
