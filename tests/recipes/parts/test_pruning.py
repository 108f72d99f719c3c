"""Nets that were cut come back in shape without the tool; zeros are packed and come back bit for bit."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recipes.parts.backbones import build_backbone
from recipes.parts.encoders import build_encoder
from recipes.parts.pruning import changes, cut_channels, macs, numbers_of, pack_zeros, reshape, unpack_zeros
from tests.tiny_encoders import tiny_encoder


def test_macs_are_those_of_products_and_convolutions() -> None:
    conv, linear = nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.Linear(5, 7)
    assert macs(conv, lambda net: net(torch.rand(2, 3, 4, 4))) == 2 * 16 * 8 * 27
    assert macs(linear, lambda net: net(torch.rand(2, 5))) == 2 * 35


def images(size: int) -> Callable[[nn.Module], Any]:
    return lambda net: net(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)))


NETS = {"resnet18": 64, "vgg11_bn": 64, "mobilenet_v3_small": 64, "timm/tf_efficientnet_lite0": 64}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "resnet18" else pytest.mark.slow) for n in NETS])
def test_a_net_that_was_cut_comes_back_in_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_pruning")
    if name.startswith("timm"):
        pytest.importorskip("timm")
    net, run = build_backbone(name, image_size=64).eval(), images(64)
    before, whole, kept = numbers_of(net), macs(net, run), dict(net.named_parameters())
    cut_channels(net, run, 0.5)
    assert 0.4 * whole < macs(net, run) <= 0.5 * whole
    sizes, state = changes(net, before), net.state_dict()
    assert all(type(value) in (int, tuple) for own in sizes.values() for value in own.values())

    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # not needed any more
    again = build_backbone(name, image_size=64).eval()
    parameters = dict(again.named_parameters())
    reshape(again, sizes, state)
    assert all(parameters[n] is p for n, p in again.named_parameters()), "whoever holds a parameter holds it still"
    again.load_state_dict(state)
    assert torch.equal(run(again), run(net))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in kept.values()) or name == "resnet18"
    run(again.train()).sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in again.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "distilbert", "deberta-v2"])
def test_hidden_units_of_an_encoder(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    tiny_encoder(tmp_path / kind, kind)
    net = build_encoder(str(tmp_path / kind)).eval()
    ids = torch.randint(5, 50, (2, 8), generator=torch.Generator().manual_seed(0))

    def run(net: nn.Module) -> Any:
        return net(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state

    hidden = [m for m in net.modules() if isinstance(m, nn.Linear) and m.out_features == 64]
    before, whole = numbers_of(net), macs(net, run)
    cut_channels(net, run, 0.2, only=hidden)
    assert macs(net, run) <= 0.8 * whole
    assert len({layer.out_features for layer in hidden}) == 1, "the same in every layer, as a config can say"
    sizes, again = changes(net, before), build_encoder(str(tmp_path / kind)).eval()
    reshape(again, sizes, net.state_dict())
    again.load_state_dict(net.state_dict())
    assert torch.equal(run(again), run(net))


def test_what_cannot_be_cut_gets_a_sentence() -> None:
    pytest.importorskip("torch_pruning")
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()

    def run(net: nn.Module) -> Any:
        return net(torch.rand(2, 8))

    with pytest.raises(ValueError, match="above 0 and below 1; received 1"):
        cut_channels(net, run, 1.0)
    with pytest.raises(ValueError, match=r"no more than 0\.\d+ of the multiplications can be cut; 0\.99 was asked"):
        cut_channels(net, run, 0.99, kept=[net[2]])
    odd = build_backbone("resnet8", image_size=8).eval()
    with pytest.raises(ValueError, match="channels of this net can't be cut: Torch-Pruning can't follow it"):
        cut_channels(odd, images(8), 0.5)


def test_without_the_tool_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"finetuning-recipes\[compress\]"):
        cut_channels(nn.Linear(2, 2), lambda net: net(torch.rand(1, 2)), 0.5)


def test_zeros_are_packed_where_that_is_smaller_and_come_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    weight = torch.randn(100, 33)
    weight[torch.rand(100, 33) < 0.8] = 0.0
    state = {"sparse": weight, "dense": torch.randn(50), "half": weight.half(), "count": torch.tensor(3)}
    dense, packed = pack_zeros(state)
    assert set(packed) == {"sparse", "half"} and set(dense) == {"dense", "count"}
    again = unpack_zeros(packed)
    assert all(torch.equal(again[name], state[name]) and again[name].dtype == state[name].dtype for name in packed)

    def size(content: Any) -> int:
        torch.save(content, buffer := io.BytesIO())
        return len(buffer.getvalue())

    assert size(packed["sparse"]) < 0.35 * size(weight)
    assert unpack_zeros(pack_zeros({"none": torch.zeros(9, 9)})[1])["none"].equal(torch.zeros(9, 9))
