"""What a recovery changes in a config, and which layers are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from recipes.deploy.restored import restore
from recipes.deploy.shrinking import Recovery, cut, feed_forward, pack, streams
from recipes.parts.backbones import build_backbone
from recipes.parts.checkpoints import load_checkpoint
from recipes.parts.encoders import build_encoder
from tests.nets import same
from tests.tiny_encoders import tiny_encoder


def test_a_recovery_has_a_length_of_its_own_and_freezes_nothing() -> None:
    prune = {"class_path": "callbacks.Prune", "init_args": {"sparsity": 0.5}}
    config = {
        "model": {"backbone": "resnet8", "weights": "some", "lr_factor": 3},
        "trainer": {
            "max_epochs": 9,
            "max_steps": 100,
            "callbacks": [{"class_path": "callbacks.GradualUnfreezing"}, {"class_path": "callbacks.LRWarmup"}, prune],
        },
    }
    changed = Recovery(lambda _: None, 2, callbacks=[prune], lr_factor=0.5).applied(config)
    assert [one["class_path"] for one in changed["trainer"]["callbacks"]] == ["callbacks.LRWarmup", "callbacks.Prune"]
    assert changed["trainer"]["max_epochs"] == 2 and changed["trainer"]["max_steps"] == -1
    assert changed["model"]["weights"] is None and changed["model"]["lr_factor"] == 0.5
    assert "pretrained" not in changed["model"]


def test_the_streams_of_small_resnets_are_left_whole() -> None:
    net = build_backbone("resnet14", image_size=8)
    names = {name for name, module in net.named_modules() if module in set(streams(net))}
    assert "net.conv1" in names and "net.layer3.1.conv2" in names and "net.layer3.1.conv1" not in names
    assert not streams(build_backbone("resnet18", image_size=64))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "albert"])
def test_the_first_layers_of_feed_forward_blocks_are_found(kind: str, tmp_path: Path) -> None:
    tiny_encoder(tmp_path / kind, kind)
    net = build_encoder(str(tmp_path / kind))
    found = feed_forward(net)
    layers = (
        1
        if kind == "albert"
        else len(net.encoder.layer if kind == "bert" else net.transformer.layer if kind == "distilbert" else net.layers)
    )
    assert len(found) == layers and all(isinstance(layer, nn.Linear) for layer in found)


@pytest.mark.slow
def test_a_packed_checkpoint_is_the_same_net(old_and_new: tuple[str, str]) -> None:
    pytest.importorskip("torch_pruning")
    best = Path(old_and_new[1], "checkpoints", "best.ckpt")
    net = restore(best)
    for layer in net.model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data[layer.weight.abs() < layer.weight.abs().median()] = 0
    import torch

    torch.save(load_checkpoint(best) | {"state_dict": net.model.state_dict()}, best)
    size = best.stat().st_size
    pack(best)
    assert best.stat().st_size < size and same(restore(best).model, net.model)
    sizes = cut(net, 0.3)
    assert sizes and all(isinstance(own, dict) for own in sizes.values())
