"""What is frozen, what trains, and the way back to plain weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.parts.backbones import build_backbone
from recipes.parts.encoders import build_encoder, encoder_blocks
from recipes.parts.peft import Peft, adapt, adapters, channels_last, describe, follow_start, is_mergeable, merge
from tests.tiny_encoders import tiny_encoder

IDS = torch.tensor([[5, 9, 12, 7, 30], [6, 8, 11, 13, 14]])
LINEAR = [
    Peft("lora", rank=2),
    Peft("lora", rank=2, rank_stabilised=True, alpha=3),
    Peft("lora", rank=2, start="orthogonal"),
    Peft("lora", rank=2, start="pissa"),
    Peft("dora", rank=2),
    Peft("ia3"),
]


def encoder(folder: Path, how: Peft | None = None, **options: Any) -> Any:
    net = build_encoder(str(tiny_encoder(folder / "bert")), num_classes=3)
    if how is not None:
        adapt(net, how, encoder_blocks(net), lambda: net(input_ids=IDS), **options)
    return net.eval()


def shaken(net: Any) -> Any:
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("how", LINEAR, ids=lambda how: f"{how.method} {how.start} {how.rank_stabilised}")
def test_it_begins_as_the_net_and_can_be_merged(how: Peft, own_folder: Path) -> None:
    torch.manual_seed(0)
    plain = encoder(own_folder)
    torch.manual_seed(0)  # the same head
    net = encoder(own_folder, how)
    torch.testing.assert_close(net(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-6, rtol=0)
    logits = shaken(net)(input_ids=IDS).logits
    assert not torch.allclose(logits, plain(input_ids=IDS).logits, atol=1e-3)
    merge(net)
    torch.testing.assert_close(net(input_ids=IDS).logits, logits, atol=1e-5, rtol=0)
    assert net.state_dict().keys() == plain.state_dict().keys() and not adapters(net)


def test_the_scale_is_alpha_over_rank_or_over_its_root(own_folder: Path) -> None:
    for stabilised, scale in ((False, 3 / 2), (True, 3 / 2**0.5)):
        net = shaken(encoder(own_folder, Peft("lora", rank=2, alpha=3, rank_stabilised=stabilised)))
        layer: Any = net.get_submodule("bert.encoder.layer.0.output.dense")
        weight = layer.base_layer.weight.clone()
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        merge(net)
        merged = net.get_submodule("bert.encoder.layer.0.output.dense").weight
        torch.testing.assert_close(merged, weight + scale * product)


def test_adapters_and_head_train_and_what_is_asked_for(own_folder: Path) -> None:
    def trained(**options: Any) -> set[str]:
        net = encoder(own_folder, **options)
        return {name for name, p in net.named_parameters() if p.requires_grad and "lora" not in name}

    head = {"classifier.weight", "classifier.bias"}
    assert trained(how=Peft("lora")) == head
    assert trained(how=Peft("lora"), new=["bert.pooler.dense.weight"]) == {*head, "bert.pooler.dense.weight"}
    norms = trained(how=Peft("lora", train=["LayerNorm"]))
    assert len(norms) == 12 and all("LayerNorm" in name for name in norms - head)
    with pytest.raises(ValueError, match="peft.train: 'LayrNorm' matches no parameter; did you mean 'LayerNorm'"):
        trained(how=Peft("lora", train=["LayrNorm"]))


def test_pissa_begins_with_the_first_singular_vectors(own_folder: Path) -> None:
    weight = encoder(own_folder).get_submodule("bert.encoder.layer.0.output.dense").weight
    layer: Any = encoder(own_folder, Peft("lora", rank=2, start="pissa")).get_submodule(
        "bert.encoder.layer.0.output.dense"
    )
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(layer.get_delta_weight("default"), u[:, :2] * s[:2] @ v[:2], atol=1e-5, rtol=1e-4)


def test_a_weight_follows_the_start_of_a_checkpoint(own_folder: Path) -> None:
    """On another machine singular vectors come out otherwise, for one with another sign."""
    net = encoder(own_folder, Peft("lora", rank=2, start="pissa"))
    path = "bert.encoder.layer.0.output.dense"
    other = copy.deepcopy(net)
    turned: Any = other.get_submodule(path)
    turned.base_layer.weight.add_(turned.get_delta_weight("default").detach() * 0.5)  # as if half of it were taken
    turned.start_B.mul_(0.5)
    turned.lora_B["default"].weight.data.mul_(0.5)
    logits = shaken(other)(input_ids=IDS).logits

    saved = {name: value for name, value in other.state_dict().items() if "base_layer" not in name}
    follow_start(net, saved)
    net.load_state_dict(saved, strict=False)
    torch.testing.assert_close(net(input_ids=IDS).logits, logits, atol=1e-6, rtol=0)

    before = net.get_submodule(path).base_layer.weight.clone()  # type: ignore[union-attr]
    follow_start(net, net.state_dict())
    assert torch.equal(net.get_submodule(path).base_layer.weight, before)  # type: ignore[union-attr]  # bit for bit


def test_a_start_for_linear_layers_is_refused_on_convolutions() -> None:
    net = build_backbone("resnet8", image_size=8)
    with pytest.raises(
        ValueError, match=r"peft\.start pissa is for linear layers, and net\.layer1\.0\.conv1 is a conv"
    ):
        adapt(net, Peft("lora", start="pissa"), net.blocks, lambda: net(torch.zeros(1, 3, 8, 8)))


def test_dora_computes_with_weights_in_channels_last() -> None:
    net = build_backbone("resnet8", image_size=8)
    adapt(net, Peft("dora", rank=2), net.blocks, lambda: net(torch.zeros(1, 3, 8, 8)))
    images = torch.rand(2, 3, 8, 8)
    expected = shaken(net.eval())(images)
    channels_last(net)
    torch.testing.assert_close(net(images), expected)
    assert net.net.conv1.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]


def test_what_has_no_plain_weights_is_refused(own_folder: Path) -> None:
    net = encoder(own_folder, Peft("adapter"))
    assert not is_mergeable(net)
    with pytest.raises(ValueError, match=r"no plain weights can hold bert\.encoder\.layer\.0\.output\.dense"):
        merge(net)


def test_one_line_says_what_trains(own_folder: Path) -> None:
    how = Peft("lora", rank=2, alpha=4, targets="attention")
    line = describe(encoder(own_folder, how), how)
    assert line.startswith("peft: lora, rank 2, alpha 4, on 8 layers: bert.encoder.layer.*.attention.self.query, ")
    assert line.endswith("1,123 of 25,347 parameters train (4.43%)")
    assert describe(encoder(own_folder, Peft("ia3")), Peft("ia3")).startswith("peft: ia3, on 6 layers: ")
    how = Peft("prompt", tokens=3)
    assert describe(encoder(own_folder, how), how).startswith("peft: prompt, 3 tokens; ")


def test_nothing_else_gets_a_gradient(own_folder: Path) -> None:
    net = encoder(own_folder, Peft("lora")).train()
    loss: Tensor = net(input_ids=IDS).logits.square().sum()
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
