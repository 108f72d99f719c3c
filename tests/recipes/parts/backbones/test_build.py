from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from recipes.parts.backbones import backbone_facts, build_backbone
from recipes.parts.backbones.backbone import Backbone
from recipes.parts.backbones.families import FAMILIES, Family
from recipes.parts.spelling import nearest_name

NAMES = [name for family in FAMILIES for name in family.names]
TORCHVISION = models.list_models(models)


class ParametersOnMeta(TorchFunctionMode):
    """Parameters take no memory, the rest is computed: RegNet's builder reads tensors back, and torch.device fails."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is Tensor.normal_ and args[0].is_meta:  # slow on meta, a third of all the time
            return args[0]
        if function is torch.empty:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return function(*args, **(kwargs or {}))


def build_on_meta(name: str, **options: Any) -> Backbone:
    with ParametersOnMeta():
        return build_backbone(name, **options)


def materialised(backbone: Backbone) -> Backbone:
    """The same on the CPU, with small random weights."""
    for module in backbone.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(0.05 * torch.randn(parameter.shape)))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.ones(buffer.shape, dtype=buffer.dtype))
    return backbone


def images(backbone: Backbone, size: int | None = None, batch: int = 2) -> Tensor:
    size = size or (backbone.input_size if backbone.facts.fixed_size else max(backbone.min_size, 64))
    return torch.rand(batch, 3, size, size, device=next(backbone.parameters()).device)


def assert_covered(backbone: Backbone) -> None:
    """Every parameter and buffer lies in exactly one block, at or below a path to a module or a parameter."""
    tensors = [name for name, _ in (*backbone.named_parameters(), *backbone.named_buffers())]
    held: Counter[str] = Counter()
    for block, paths in backbone.blocks.items():
        assert paths, block
        for path in paths:
            below = [name for name in tensors if name == path or name.startswith(f"{path}.")]
            assert below, path
            held.update(below)
            parent, _, leaf = path.rpartition(".")
            assert isinstance(getattr(backbone.get_submodule(parent), leaf), (nn.Module, nn.Parameter)), path
    assert held == Counter(tensors)


def called_blocks(backbone: Backbone, batch: Tensor) -> tuple[Any, list[str]]:
    """What `forward_aux` gives, and the blocks in the order their modules first run."""
    order: dict[str, None] = {}
    hooks = []
    for block, paths in backbone.blocks.items():
        for path in paths:
            try:
                module = backbone.get_submodule(path)
            except AttributeError:  # a parameter
                continue
            inner = [child for child in module.modules() if not isinstance(child, (nn.Sequential, nn.ModuleList))]
            for child in inner:
                hooks.append(child.register_forward_pre_hook(lambda *_, block=block: order.setdefault(block)))
    with torch.no_grad():
        output = backbone.forward_aux(batch)
    for hook in hooks:
        hook.remove()
    return output, list(order)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_blocks_cover_every_tensor_once(name: str) -> None:
    backbone = build_on_meta(name)
    assert backbone.name == name
    assert len(backbone.blocks) >= 3
    assert_covered(backbone)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.names[0])
def test_images_become_features_block_by_block(family: Family) -> None:
    backbone = build_on_meta(family.names[0]).eval()
    heavy = sum(parameter.numel() for parameter in backbone.parameters()) > 50e6
    backbone = backbone.to("meta") if heavy or family.names[0] == "maxvit_t" else materialised(backbone)
    (features, aux), order = called_blocks(backbone, images(backbone))
    assert features.shape == (2, backbone.width)
    assert aux == []
    assert features.is_meta or features.std() > 0
    assert order == list(backbone.blocks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("mobilenet_v3_small", {}),
        ("efficientnet_b0", {}),
        ("convnext_tiny", {}),
        ("densenet121", {}),
        ("googlenet", {"aux_logits": False, "init_weights": True, "transform_input": True}),
    ],
)
def test_features_are_what_torchvisions_classifier_reads(name: str, options: dict[str, Any]) -> None:
    reference = models.get_model(name, weights=None, **options).eval()
    backbone = build_backbone(name).eval()
    assert not backbone.net.load_state_dict(reference.state_dict(), strict=False).missing_keys
    read: list[Tensor] = []
    classifier = [module for module in reference.modules() if isinstance(module, nn.Linear)][-1]
    classifier.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    batch = images(backbone)
    with torch.no_grad():
        output = reference(batch)
        torch.testing.assert_close(classifier(backbone(batch)), output)
    scale = read[0].std()  # of fresh weights, where features can be so small that any would pass for equal
    torch.testing.assert_close(backbone(batch) / scale, read[0] / scale)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "inception_v3", "vgg11"])
def test_dropout_goes_with_the_classifier(name: str) -> None:
    assert not [module for module in build_on_meta(name).modules() if isinstance(module, nn.Dropout)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [family for family in FAMILIES if family.min_size > 1 and family.multiple_of == 1],
    ids=lambda family: family.names[0],
)
def test_min_size_is_the_smallest_that_runs(family: Family) -> None:
    backbone = build_on_meta(family.names[0]).to("meta").eval()
    backbone(images(backbone, family.min_size))
    below = images(backbone, family.min_size - 1)
    with pytest.raises(RuntimeError):
        backbone.net(below)
    with pytest.raises(ValueError, match=rf"takes images of {family.min_size} px and more; received "):
        backbone(below)
    with pytest.raises(ValueError, match=f"{family.min_size} px and more; received image_size={family.min_size - 1}$"):
        build_backbone(family.names[0], image_size=family.min_size - 1)


def test_convolutional_nets_take_other_sizes() -> None:
    backbone = build_backbone("resnet18", image_size=64).eval()
    assert backbone.input_size == 64
    for height, width in ((64, 64), (32, 48), (1, 1)):
        assert backbone(torch.rand(2, 3, height, width)).shape == (2, 512)


def test_vision_transformer_is_built_for_a_size() -> None:
    backbone = build_on_meta("vit_b_32", image_size=64).to("meta")
    assert backbone.input_size == 64
    assert backbone.net.encoder.pos_embedding.shape == (1, 1 + 4, 768)  # type: ignore[union-attr]
    assert list(backbone.blocks) == ["embeddings", *(f"layer{number}" for number in range(12)), "norm"]
    assert backbone(images(backbone)).shape == (2, 768)
    with pytest.raises(ValueError, match="'vit_b_32' was built for images of 64 px; received 96 x 96: resize them"):
        backbone(images(backbone, 96))
    with pytest.raises(ValueError, match="multiple of 32; received 100, between 96 and 128"):
        build_backbone("vit_b_32", image_size=100)
    with pytest.raises(ValueError, match="'maxvit_t' takes images of 224 px and more; received image_size=64"):
        build_backbone("maxvit_t", image_size=64)


@pytest.mark.slow
def test_auxiliary_branch_of_inception_needs_larger_images() -> None:
    backbone = build_on_meta("inception_v3", aux=True).to("meta")
    backbone.forward_aux(images(backbone, 299))
    with pytest.raises(RuntimeError):
        backbone.net(images(backbone, 298))
    with pytest.raises(ValueError, match="'inception_v3' takes images of 299 px and more; received 298 x 298"):
        backbone.forward_aux(images(backbone, 298))
    with pytest.raises(
        ValueError, match="'resnet18' has no auxiliary branches; aux=True is for inception_v3, googlenet"
    ):
        build_backbone("resnet18", aux=True)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "wide_resnet50_2"])
def test_small_stem_keeps_the_size_of_the_picture(name: str) -> None:
    backbone = build_on_meta(name, small_stem=True).to("meta")
    sizes: list[torch.Size] = []
    backbone.get_submodule("net.layer1").register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape))
    assert backbone(images(backbone, 32)).shape == (2, backbone.width)
    assert sizes == [(2, 64, 32, 32)]
    assert backbone.input_size == 32
    assert build_on_meta(name, small_stem=True, image_size=64).input_size == 64
    assert_covered(backbone)


@pytest.mark.parametrize("name", ["vgg11", "resnet20"])
def test_small_stem_is_refused_elsewhere(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"'{name}' has no stem to replace; small_stem=True is for torchvision's ResNets"
    ):
        build_backbone(name, small_stem=True)


def test_unknown_names_are_told_the_nearest() -> None:
    for name, guess in (("resnet5", "resnet50"), ("ResNet18", "resnet18"), ("vit_b16", "vit_b_16")):
        sentence = f"backbone '{name}' is not known; did you mean '{guess}'? python -m recipes ls backbones lists them."
        for function in (build_backbone, backbone_facts):
            with pytest.raises(ValueError) as error:
                function(name)
            assert str(error.value) == sentence
    with pytest.raises(ValueError, match="^backbone 'bert' is not known; python -m recipes ls backbones lists them.$"):
        build_backbone("bert")
    assert nearest_name("anything", []) is None


@pytest.mark.parametrize(
    "name, patch, size",
    [
        ("timm/test_vit", 16, 100),
        ("timm/mixer_s16_224", 16, 100),
        ("timm/eva02_tiny_patch14_224", 14, 96),
        ("timm/test_convnext", 4, 98),
        ("convnext_tiny", 4, 127),
        ("swin_t", 4, 98),
    ],
)
def test_a_size_whose_border_no_patch_would_see_is_refused(name: str, patch: int, size: int) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    below = size // patch * patch
    words = f"multiple of {patch}; received {size}, between {below} and {below + patch}"
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        build_backbone(name, image_size=size)
    assert build_backbone("resnet18", image_size=98).input_size == 98, "which sees all of any size"
