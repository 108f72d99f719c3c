"""Trunks of images and of texts: features as those of their nets, and maps of nets of every build."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.parts.decoder import blocks_for_masks
from recipes.parts.trunks import ImageTrunk, TextTrunk
from tests.tiny_encoders import tiny_encoder


def test_images_are_normalised_and_maps_come_of_the_same_pass() -> None:
    torch.manual_seed(0)
    trunk = ImageTrunk("resnet8", image_size=32).eval()
    trunk.watch(["layer1", "layer3"])
    images = torch.rand(2, 3, 32, 32)
    features, maps = trunk({"image": images})
    assert features.shape == (2, trunk.width) and list(maps) == ["layer1", "layer3"]
    assert trunk.watched is not None and not trunk.watched.outputs, "nothing keeps the graph alive"
    torch.testing.assert_close(features, trunk.net((images - trunk.mean) / trunk.std))
    torch.testing.assert_close(maps["layer3"].mean((2, 3)), features)  # which the net pools
    trunk.take_facts({"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 2.0], "name": "other"})
    assert trunk.facts() == {"mean": pytest.approx([0.1, 0.2, 0.3]), "std": [1.0, 1.0, 2.0]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "sides"),
    [
        ("resnet18", 64, [32, 16, 8, 4, 2]),
        ("vgg11_bn", 64, [32, 16, 8, 4]),
        ("mobilenet_v3_small", 64, [32, 16, 8, 4, 2]),
        ("efficientnet_b0", 64, [32, 16, 8, 4, 2]),
        ("convnext_tiny", 64, [16, 8, 4, 2]),
        ("swin_t", 64, [16, 8, 4, 2]),
        ("vit_b_32", 224, [7, 7, 7, 7]),
        ("timm/vit_tiny_patch16_224", 64, [4, 4, 4, 4]),
        ("timm/tf_efficientnet_lite0", 64, [32, 16, 8, 4, 2]),
    ],
)
def test_every_build_of_net_has_maps(name: str, size: int, sides: list[int]) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    trunk = ImageTrunk(name, image_size=size)
    shapes = trunk.map_shapes
    blocks = blocks_for_masks(shapes, size)
    found = [shapes[block][2] for block in blocks]
    assert found == [side for side in sides if side in found] and len(found) >= 3, found
    assert set(found) >= set(sides[-3:]), (found, blocks)
    trunk.watch(blocks)
    _, maps = trunk.eval()({"image": torch.rand(2, 3, size, size)})
    assert {block: values.shape[1:] for block, values in maps.items()} == {block: shapes[block][1:] for block in blocks}


def test_texts_are_pooled_over_their_own_tokens(tmp_path: Path) -> None:
    trunk = TextTrunk(str(tiny_encoder(tmp_path / "bert"))).eval()
    tokens = torch.randint(5, 20, (2, 8))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    features, maps = trunk({"input_ids": tokens, "attention_mask": mask, "index": torch.arange(2)})
    assert features.shape == (2, trunk.width) and not maps and not trunk.map_shapes
    short, _ = trunk({"input_ids": tokens[1:, :5], "attention_mask": mask[1:, :5]})
    torch.testing.assert_close(features[1:], short, rtol=1e-4, atol=1e-5)
    assert trunk.facts()["encoder"]["model_type"] == "bert"
    with pytest.raises(ValueError, match="pooling must be cls or mean"):
        TextTrunk(str(tmp_path / "bert"), pooling="model")
