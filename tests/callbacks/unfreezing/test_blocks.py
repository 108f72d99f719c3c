"""The blocks of a net: inferred, from patterns, from the module itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from callbacks import GradualUnfreezing
from callbacks.unfreezing.blocks import find_blocks, infer_blocks
from tests.nets import BLOCKS, Net


def test_blocks_are_inferred_in_order_and_hold_every_parameter_once() -> None:
    net = Net()
    blocks = find_blocks(net)
    assert list(blocks) == BLOCKS
    assert list(blocks["mix"]) == ["mix.weight", "mix.bias", "norm.weight", "norm.bias"]  # a norm joins the one before
    assert "head.up.weight" not in blocks["head"]  # tied: it belongs to mix alone
    assert sum(map(len, blocks.values())) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("resnet18", 6, "conv1", "fc"),
        ("resnet50", 6, "conv1", "fc"),
        ("vgg11", 11, "features.0", "classifier.6"),
        ("mobilenet_v2", 20, "features.0", "classifier"),
        ("vit_b_32", 14, "conv_proj", "heads"),
        ("convnext_tiny", 9, "features.0", "classifier"),
    ],
)
def test_blocks_of_torchvision(name: str, count: int, first: str, last: str) -> None:
    import torchvision

    with torch.device("meta"):
        net = getattr(torchvision.models, name)()
    blocks = list(infer_blocks(net))
    assert (len(blocks), blocks[0], blocks[-1]) == (count, first, last)
    assert sum(map(len, find_blocks(net).values())) == len(list(net.parameters()))


def test_blocks_of_a_transformer() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **sizes))
    layers = [f"bert.encoder.layer.{n}" for n in range(3)]
    assert list(infer_blocks(bert)) == ["bert.embeddings", *layers, "bert.pooler", "classifier"]


def test_blocks_from_patterns_take_the_first_match() -> None:
    blocks = find_blocks(Net(), ["stem|layer1", "layer", "."])
    assert [len(members) for members in blocks.values()] == [5, 3, 7]


def test_layer_groups_of_the_module_count() -> None:
    class Own(Net):
        def layer_groups(self) -> dict[str, list[str]]:
            return {"trunk": ["stem", "layer1", "layer2", "mix", "norm"], "top": ["head"]}

    assert list(find_blocks(Own())) == ["trunk", "top"]


def test_wrong_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'layer7' holds no parameter.*did you mean 'layer"):
        find_blocks(Net(), ["layer7", "."])
    with pytest.raises(ValueError, match=r"in no block: stem\.weight"):
        find_blocks(Net(), ["layer", "head"])
    with pytest.raises(ValueError, match="found 1 block in Linear"):
        GradualUnfreezing().plan(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="order must name each block once"):
        GradualUnfreezing(order=["head", "stem"]).plan(Net())
    with pytest.raises(ValueError, match="order must name each block once.*received topdown"):
        GradualUnfreezing(order="topdown").plan(Net())
