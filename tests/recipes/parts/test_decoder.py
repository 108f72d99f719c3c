"""From maps to masks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from recipes.parts.decoder import Decoder, as_map, blocks_for_masks


def test_tokens_are_a_map_without_those_in_front() -> None:
    places = torch.arange(9.0).view(1, 9, 1).expand(2, 9, 4)
    for extra in (0, 1, 2, 5):
        tokens = torch.cat([torch.full((2, extra, 4), -1.0), places], 1)
        found = as_map(tokens)
        assert found.shape == (2, 4, 3, 3)
        assert torch.equal(found[0, 0], torch.arange(9.0).view(3, 3))
    image = torch.rand(2, 3, 4, 5)
    assert as_map(image) is image
    with pytest.raises(ValueError, match="a mask needs blocks with places"):
        as_map(torch.rand(2, 3))


def test_the_last_block_of_each_resolution_or_four_of_one() -> None:
    net = {"stem": (1, 8, 32, 32), "one": (1, 8, 32, 32), "two": (1, 16, 16, 16), "three": (1, 32, 8, 8)}
    assert blocks_for_masks({**net, "pooled": (1, 64, 1, 1)}, 64) == ["one", "two", "three"]
    assert blocks_for_masks(net, 32) == ["two", "three"], "as fine as the image"
    assert blocks_for_masks({name: net[name] for name in ("one", "two")}, 32) == ["one", "two"]
    layers = {f"layer{number}": (1, 96, 14, 14) for number in range(12)}
    assert blocks_for_masks(layers, 224) == ["layer2", "layer5", "layer8", "layer11"]
    assert blocks_for_masks({name: layers[name] for name in ("layer0", "layer1")}, 224) == ["layer0", "layer1"]


def test_any_size_comes_out_and_all_maps_count() -> None:
    torch.manual_seed(0)
    decoder = Decoder([8, 16], classes=3, width=16)
    maps = [torch.rand(2, 8, 12, 12, requires_grad=True), torch.rand(2, 16, 6, 6, requires_grad=True)]
    out = decoder(maps, (50, 40))
    assert out.shape == (2, 3, 50, 40)
    out.sum().backward()
    assert all(values.grad is not None and values.grad.abs().sum() > 0 for values in maps)


def test_it_learns_where_things_are() -> None:
    torch.manual_seed(0)
    decoder = Decoder([1, 1], classes=2, width=8)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.02)
    for _ in range(150):
        truth = (torch.rand(8, 1, 4, 4) > 0.5).float()
        fine = F.interpolate(truth, (16, 16)) + 0.3 * torch.randn(8, 1, 16, 16)
        loss = F.cross_entropy(decoder([fine, truth], (16, 16)), F.interpolate(truth, (16, 16))[:, 0].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
