"""Blocks are watched by name, and joined with the features, in training as in an export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recipes.deploy.restored import restore
from recipes.export import export
from recipes.parts.backbones import build_backbone
from recipes.parts.blocks import Watch
from recipes.text import TextClassifier
from tests.recipes.deploy.exports import fit_pictures, fit_texts
from tests.tiny_encoders import tiny_encoder


def test_blocks_are_watched_by_name() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    watch = Watch(net, {"body": ["0", "1"], "head": ["2"]}, ["body"], "match_blocks")
    x = torch.rand(4, 2)
    net(x)
    torch.testing.assert_close(watch.outputs["body"], net[0](x).relu())
    with pytest.raises(ValueError, match="match_blocks: Sequential has no block 'bodi'; did you mean 'body'"):
        Watch(net, {"body": ["0"], "head": ["2"]}, ["bodi"], "match_blocks")


@pytest.mark.parametrize(("name", "size"), [("resnet8", 32), ("swin_t", 64), ("timm/test_vit", 32)])
def test_a_backbone_gives_the_means_of_its_blocks_too(name: str, size: int) -> None:
    """Maps with channels first and last, and tokens."""
    plain, fused = (build_backbone(name, image_size=size).eval() for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    early, late = list(plain.blocks)[1], list(plain.blocks)[-1]
    kept = {}
    for block in (early, late):
        module = plain.get_submodule(plain.blocks[block][-1])
        module.register_forward_hook(lambda _, __, out, block=block: kept.update({block: out}))
    fused.fuse([early, late])
    images = torch.rand(3, 3, size, size)
    features, joined = plain(images), fused(images)
    assert fused.width == joined.shape[1] and torch.equal(joined[:, : plain.width], features)
    start = plain.width
    for block in (early, late):
        out = kept[block]
        axes = {"resnet8": (2, 3), "swin_t": (1, 2), "timm/test_vit": (1,)}[name]
        mean = out.mean(axes) if out.ndim > 2 else out
        end = start + mean.shape[1]
        torch.testing.assert_close(joined[:, start:end], F.layer_norm(mean, mean.shape[1:]), atol=1e-5, rtol=1e-5)
        start = end
    assert start == fused.width


def test_texts_join_layers_pooled_alike(own_folder: Path) -> None:
    encoder = str(tiny_encoder(own_folder / "bert"))
    for pooling in ("cls", "mean"):
        model = TextClassifier(3, encoder=encoder, pooling=pooling, fuse_blocks=["layer0"]).eval()  # type: ignore[arg-type]
        ids = torch.tensor([[2, 8, 9, 3]])
        out = model.net(input_ids=ids, output_hidden_states=True)
        first, last = (h[:, 0] if pooling == "cls" else h.mean(1) for h in out.hidden_states[1:])
        joined = torch.cat([last, F.layer_norm(first, first.shape[1:])], 1)
        torch.testing.assert_close(model(ids, torch.ones_like(ids)), model.head(joined))
        padded = torch.cat([ids, torch.full((1, 4), 7)], 1)
        mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 4, dtype=torch.long)], 1)
        torch.testing.assert_close(model(padded, mask), model.head(joined))
    with pytest.raises(ValueError, match="for fuse_blocks take pooling cls or mean"):
        TextClassifier(3, encoder=encoder, fuse_blocks=["layer0"])


@pytest.mark.slow
def test_a_fused_net_is_restored_and_exported_or_says_why_not(own_folder: Path) -> None:
    net = ["--model.backbone=resnet8", "--model.image_size=32", "--model.fuse_blocks=[layer1,layer2]"]
    checkpoints = [fit_pictures(own_folder, *net)]
    checkpoints += [fit_texts(own_folder, "--model.pooling=mean", "--model.fuse_blocks=[layer0]")]
    for number, checkpoint in enumerate(checkpoints):
        export(checkpoint, "onnx", own_folder / f"{number}", count=4)
        with pytest.raises(ValueError, match="no other library builds a net that joins blocks"):
            export(checkpoint, "safetensors", own_folder / f"plain{number}", count=4)
    assert restore(checkpoints[0]).model.head.in_features == 64 + 16 + 32
