"""Which layers an adapter goes to, by what a forward pass calls."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recipes.parts.backbones import build_backbone
from recipes.parts.encoders import build_encoder, encoder_blocks
from recipes.parts.peft import Peft
from recipes.parts.peft.targets import called_layers, choose_layers, last_of_blocks
from tests.tiny_encoders import KINDS, tiny_encoder


class Odd(nn.Module):
    """A layer that is called second, one whose weight goes to a function, one that nobody asks."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first, self.inner = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.idle, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.linear(self.norm(self.first(x)), self.inner.weight))  # type: ignore[no-any-return]


def test_layers_come_in_the_order_of_their_calls_and_nothing_is_changed() -> None:
    net = Odd().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.idle.eval()
    assert list(called_layers(net, lambda: net(torch.ones(2, 3)))) == ["first", "second"]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.norm.training and not net.idle.training and not net.first._forward_hooks


def test_a_layer_that_is_never_called_is_refused_by_name() -> None:
    net = Odd()
    how = Peft("lora", targets=["inner"])
    with pytest.raises(ValueError, match="inner is never called as a layer"):
        choose_layers(net, how, {"all": [""]}, called_layers(net, lambda: net(torch.ones(2, 3))))


def chosen(name: str, how: Peft, size: int = 32) -> list[str]:
    """Kinds of chosen layers of a backbone, numbers as stars."""
    net = build_backbone(name, image_size=size)
    called = called_layers(net, lambda: net(torch.zeros(1, 3, size, size)))
    return kinds(choose_layers(net, how, net.blocks, called))


def kinds(names: object) -> list[str]:
    return sorted({re.sub(r"\d+", "*", name) for name in names})  # type: ignore[attr-defined]


def test_defaults_of_a_cnn() -> None:
    """All but the stem and grouped convolutions; adapters after each block's last layer; IA3 on every channel."""
    assert chosen("resnet18", Peft("adapter")) == ["net.layer*.*.conv*"]
    assert "net.layer*.*.downsample.*" in chosen("resnet18", Peft("lora"))
    assert "net.conv*" not in chosen("resnet18", Peft("lora"))
    assert chosen("resnet18", Peft("ia3")) == chosen("resnet18", Peft("lora"))
    assert chosen("timm/tf_efficientnet_lite0", Peft("lora")) == [
        "net.blocks.*.*.conv_pw",
        "net.blocks.*.*.conv_pwl",
        "net.conv_head",
    ]


def test_defaults_of_vision_transformers() -> None:
    """Torchvision's attention hands its weights to a function; timm's is made of layers."""
    assert chosen("timm/test_vit", Peft("lora", targets="attention")) == [
        "net.blocks.*.attn.proj",
        "net.blocks.*.attn.qkv",
    ]
    assert chosen("timm/test_vit", Peft("ia3")) == ["net.blocks.*.attn.qkv", "net.blocks.*.mlp.fc*"]
    assert chosen("timm/test_vit", Peft("adapter")) == ["net.blocks.*.mlp.fc*"]
    assert chosen("swin_t", Peft("lora")) == ["net.features.*.*.mlp.*", "net.features.*.reduction"]
    with pytest.raises(ValueError, match=r"attention: Backbone has no such layer; name some of net\.features"):
        chosen("swin_t", Peft("lora", targets="attention"))
    with pytest.raises(ValueError, match=r"net\.features\.1\.0\.attn\.qkv, .* is never called as a layer"):
        chosen("swin_t", Peft("lora", targets=["qkv"]))


SECOND = {"albert": "ffn_output", "distilbert": "ffn.lin2", "modernbert": "mlp.Wo"}
PROJECTIONS = {"distilbert": 8, "modernbert": 4, "albert": 4}  # of 2 layers; ALBERT's are one


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_of_encoders(kind: str, own_folder: Path) -> None:
    net = build_encoder(str(tiny_encoder(own_folder / kind, kind)), num_classes=2)
    called = called_layers(net, lambda: net(input_ids=torch.ones(1, 2, dtype=torch.long)))
    blocks = encoder_blocks(net)
    second = SECOND.get(kind, "output.dense")

    adapted = choose_layers(net, Peft("adapter"), blocks, called)
    assert len(adapted) == (1 if kind == "albert" else 2)
    assert all(name.endswith(second) and "attention" not in name for name in adapted)
    everything = choose_layers(net, Peft("lora"), blocks, called)
    assert not any(re.search("classifier|pooler|embeddings", name) for name in everything)
    attention = choose_layers(net, Peft("lora", targets="attention"), blocks, called)
    assert len(attention) == PROJECTIONS.get(kind, 8) and attention.keys() < everything.keys()
    scaled = choose_layers(net, Peft("ia3"), blocks, called)
    assert set(last_of_blocks(net, scaled)) == set(adapted)
    assert all(re.search("key|value|k_lin|v_lin|[.]k$|[.]v$|Wqkv", name) for name in scaled.keys() - adapted.keys())


def test_patterns_name_layers_or_are_refused() -> None:
    assert chosen("resnet18", Peft("lora", targets=["layer4.*conv2"])) == ["net.layer*.*.conv*"]
    assert chosen("resnet18", Peft("lora", targets=[r"net\.conv1"])) == ["net.conv*"]
    with pytest.raises(ValueError, match="'layr4' names no layer; did you mean 'layer4'"):
        chosen("resnet18", Peft("lora", targets=["layr4"]))
    with pytest.raises(ValueError, match="conv_dw, .* is a grouped convolution, which lora does not adapt"):
        chosen("timm/tf_efficientnet_lite0", Peft("lora", targets=["conv_dw"]))
    assert chosen("timm/tf_efficientnet_lite0", Peft("ia3", targets=["conv_dw"])) == ["net.blocks.*.*.conv_dw"]
