"""Backbones of timm are as those of torchvision."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from torch import nn

from recipes.parts.backbones import backbone_facts, build_backbone, timm_models
from tests.recipes.parts.backbones.test_build import assert_covered, build_on_meta, called_blocks, images


class TestTimm:
    @pytest.fixture(autouse=True)
    def timm(self) -> Any:
        return pytest.importorskip("timm")

    @pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_maxvit"])
    def test_images_become_features_block_by_block(self, name: str) -> None:
        backbone = build_backbone(f"timm/{name}").eval()
        assert_covered(backbone)
        (features, _), order = called_blocks(backbone, images(backbone, backbone.input_size))
        assert features.shape == (2, backbone.width)
        assert order == list(backbone.blocks)
        assert backbone.input_size == 160

    def test_facts_are_those_of_the_weights(self, timm: Any) -> None:
        config = timm.get_pretrained_cfg("test_vit")
        facts = backbone_facts("timm/test_vit")
        assert (facts.mean, facts.std) == (tuple(config.mean), tuple(config.std))
        assert (facts.input_size, facts.fixed_size, facts.licence) == (160, True, "apache-2.0")
        assert facts.source == "https://huggingface.co/timm/test_vit.r160_in1k"

    def test_width_is_that_of_the_pooled_features(self) -> None:
        backbone = build_on_meta("timm/mobilenetv3_small_050").to("meta").eval()
        assert backbone.width == 1024  # num_features says 288
        assert backbone(images(backbone)).shape == (2, 1024)

    def test_without_a_grouping_each_child_is_a_block(self, monkeypatch: pytest.MonkeyPatch, timm: Any) -> None:
        monkeypatch.delattr(timm.models.resnet.ResNet, "group_matcher")
        backbone = build_backbone("timm/test_resnet")
        assert list(backbone.blocks) == ["stem", "bn1", "layer1", "layer2", "layer3", "layer4"]
        assert_covered(backbone)

    def test_modules_with_buffers_only_join_the_block_before(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 5, 1), nn.ReLU())
        assert timm_models._timm_blocks(net) == {"stem": ["net.0", "net.1"], "2": ["net.2"]}

    def test_image_size_of_nets_with_a_fixed_one(self, monkeypatch: pytest.MonkeyPatch, timm: Any) -> None:
        backbone = build_backbone("timm/test_vit", image_size=64).eval()
        assert backbone(images(backbone, 64)).shape == (2, 64)
        with pytest.raises(ValueError, match="built for images of 64 px; received 160 x 160"):
            backbone(images(backbone, 160))

        def create_model(name: str, **options: Any) -> nn.Module:
            raise TypeError("unexpected keyword argument 'img_size'")

        monkeypatch.setattr(timm, "create_model", create_model)
        with pytest.raises(ValueError, match="cannot be built for images of 64 px, only for its own 160 px"):
            build_backbone("timm/test_vit", image_size=64)

    def test_unknown_names_are_told_the_nearest(self) -> None:
        with pytest.raises(ValueError, match="'timm/test_vitt' is not known; did you mean 'timm/test_vit'?"):
            build_backbone("timm/test_vitt")

    def test_options_of_torchvision_are_refused(self) -> None:
        with pytest.raises(ValueError, match="no stem to replace"):
            build_backbone("timm/test_resnet", small_stem=True)
        with pytest.raises(ValueError, match="no auxiliary branches"):
            build_backbone("timm/test_resnet", aux=True)


def test_missing_timm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'need timm: pip install "finetuning-recipes\[timm\]"'):
        build_backbone("timm/test_resnet")
