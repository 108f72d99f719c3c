"""A backbone keeps its facts and refuses what are no images."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from recipes.parts.backbones import backbone_facts, build_backbone
from tests.recipes.parts.backbones.test_build import assert_covered, build_on_meta, called_blocks, images


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3)])
def test_other_shapes_than_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"'resnet8' expects images \(batch, 3, height, width\); received \("):
        build_backbone("resnet8")(torch.rand(shape))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "branches", "widths"),
    [("inception_v3", ["aux"], (768,)), ("googlenet", ["aux1", "aux2"], (1024, 1024))],
)
def test_auxiliary_branches_give_features_in_training(name: str, branches: list[str], widths: tuple[int, ...]) -> None:
    assert not set(branches) & set(build_on_meta(name).blocks)
    backbone = build_on_meta(name, aux=True).to("meta")
    assert backbone.aux_widths == widths
    assert_covered(backbone)
    (features, aux), order = called_blocks(backbone, images(backbone))
    assert features.shape == (2, backbone.width)
    assert [branch.shape for branch in aux] == [(2, width) for width in widths]
    assert order == list(backbone.blocks)
    assert set(branches) < set(order)
    assert backbone(images(backbone)).shape == (2, backbone.width)
    (_, aux), order = called_blocks(backbone.eval(), images(backbone))
    assert aux == []
    assert not set(branches) & set(order)


@pytest.mark.slow
def test_auxiliary_features_come_in_order_of_depth() -> None:
    backbone = build_backbone("googlenet", aux=True)
    seen: list[Tensor] = []
    for branch in ("net.aux1", "net.aux2"):
        backbone.get_submodule(branch).register_forward_hook(lambda module, inputs, output: seen.append(output))
    _, (aux1, aux2) = backbone.forward_aux(images(backbone))
    assert aux1 is seen[0]
    assert aux2 is seen[1]


def test_copies_keep_the_facts() -> None:
    backbone = copy.deepcopy(build_backbone("resnet8"))
    assert (backbone.width, backbone.input_size, backbone.mean) == (64, 32, backbone_facts("resnet8").mean)
