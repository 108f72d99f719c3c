"""Squares of every kind of layer agree with a loop over samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from callbacks.ewc.fisher import fisher_diagonal
from tests.callbacks.ewc.conftest import largest_difference


class ChannelNorm(nn.LayerNorm):
    """Over the channels of maps, as in ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Zoo(nn.Module):
    """One of everything: each kind of layer, a tied weight, a layer called twice, parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.wide = nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2))
        self.same = nn.Conv2d(12, 12, 3, padding="same", groups=3)
        self.point = nn.Conv2d(12, 8, 1)
        self.again, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.gn = nn.GroupNorm(2, 8)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.cn = ChannelNorm(8)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Parameter(torch.randn(13, 8))
        self.gain = nn.Parameter(torch.randn(8))
        self.words = nn.Embedding(11, 8, padding_idx=3)
        self.positions = nn.Embedding(5, 8)
        self.tied = nn.Linear(8, 11)
        self.tied.weight = self.words.weight
        self.ln = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4, bias=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = F.silu(self.bn(self.stem(batch["image"])), inplace=True)
        x = F.silu(self.wide(F.silu(self.depthwise(x))))
        x = self.gn(self.point(torch.tanh(self.same(x)))) * self.scale
        for _ in range(2):
            x = torch.tanh(self.cn(self.norm(self.again(x))))
        x = self.line(x.flatten(2)).transpose(1, 2)  # (batch, positions, 8)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        x = self.gain * (x + self.places)
        words = self.words(batch["words"]) + self.positions(torch.arange(batch["words"].shape[1]))
        tied = self.tied(words).softmax(-1) @ torch.linspace(0, 1, 11)
        x = self.ln(x + F.scaled_dot_product_attention(x, x, x))
        x = self.rms(x + F.scaled_dot_product_attention(x, words, words))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(x.mean(1)) + tied.mean(1, keepdim=True) * torch.arange(4)


def zoo() -> tuple[Zoo, list[dict[str, Tensor]]]:
    torch.manual_seed(3)
    net = Zoo().eval()
    net.bn.running_mean.normal_()
    net.bn.running_var.uniform_(0.5, 2)
    words = torch.randint(0, 11, (12, 5))
    words[:, 0], words[0] = 3, 5  # padding; a word five times
    whole = {"image": torch.randn(12, 3, 12, 12), "words": words}
    return net, [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 7), slice(7, 12))]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap of attention
def test_all_ways_agree_on_every_kind_of_layer() -> None:
    net, batches = zoo()
    parameters = dict(net.named_parameters())
    found = {
        way: fisher_diagonal(net, batches, parameters, module=net, way=way)[0]  # type: ignore[arg-type]
        for way in ("loop", "layers", "vmap")
    }
    assert found["loop"]["unused.weight"].eq(0).all()
    assert all(found["loop"][name].gt(0).any() for name in parameters if not name.startswith("unused"))
    assert largest_difference(found["layers"], found["loop"]) < 1e-5
    assert largest_difference(found["vmap"], found["loop"]) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("kernel", [1, 3, (5, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions_tap_by_tap(size: int, kernel: Any, stride: int, dilation: int) -> None:
    net = nn.Sequential(nn.Conv2d(70, 3, kernel, stride, padding=4, dilation=dilation), nn.Tanh(), nn.Flatten())
    x = torch.randn(4, 70, size, size) / 8
    parameters = dict(net.named_parameters())
    ways = [
        fisher_diagonal(net, [x], parameters, module=net, estimator="signs", way=way)[0] for way in ("layers", "loop")
    ]  # type: ignore[arg-type]
    assert largest_difference(*ways) < 1e-5
