from __future__ import annotations

import ast
import copy
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from recipes.parts.backbones import backbone_facts, build_backbone
from recipes.parts.backbones import build as backbones
from recipes.parts.backbones.backbone import Backbone
from recipes.parts.backbones.families import FAMILIES, Family
from recipes.parts.backbones.small_resnet import SmallResNet
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


def test_every_torchvision_classifier_is_there_once() -> None:
    own = ["resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56"]
    assert sorted(NAMES) == sorted(TORCHVISION + own)


def test_names_can_be_read_from_the_syntax_tree() -> None:
    tree = ast.parse(Path(backbones.__file__).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    tuples = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "names"]
    assert [ast.literal_eval(node) for node in tuples] == [family.names for family in FAMILIES]


@pytest.mark.parametrize("name", NAMES)
def test_blocks_cover_every_tensor_once(name: str) -> None:
    backbone = build_on_meta(name)
    assert backbone.name == name
    assert len(backbone.blocks) >= 3
    assert_covered(backbone)


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


@pytest.mark.parametrize("name", TORCHVISION)
def test_facts_are_those_of_the_published_weights(name: str) -> None:
    weights = models.get_model_weights(name)
    preset = weights["DEFAULT"].transforms()
    facts = backbone_facts(name)
    assert [facts.input_size] == preset.crop_size
    assert (facts.mean, facts.std) == (tuple(preset.mean), tuple(preset.std))
    swag = ["SWAG" in entry.meta.get("license", "") for entry in weights]
    assert facts.licence.startswith("CC-BY-NC-4.0") == all(swag)
    assert ("CC-BY-NC-4.0" in facts.licence) == any(swag)
    assert facts.source.startswith("https://arxiv.org/abs/")


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


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3)])
def test_other_shapes_than_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"'resnet8' expects images \(batch, 3, height, width\); received \("):
        build_backbone("resnet8")(torch.rand(shape))


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


def test_auxiliary_features_come_in_order_of_depth() -> None:
    backbone = build_backbone("googlenet", aux=True)
    seen: list[Tensor] = []
    for branch in ("net.aux1", "net.aux2"):
        backbone.get_submodule(branch).register_forward_hook(lambda module, inputs, output: seen.append(output))
    _, (aux1, aux2) = backbone.forward_aux(images(backbone))
    assert aux1 is seen[0]
    assert aux2 is seen[1]


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


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_small_resnets_have_the_papers_layers_and_parameters(depth: int, millions: float) -> None:
    net = SmallResNet(depth)
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) + 1 == depth
    classifier = 64 * 10 + 10
    assert round((sum(p.numel() for p in net.parameters()) + classifier) / 1e6, 2) == millions


def test_small_resnets_halve_the_picture_twice() -> None:
    net = SmallResNet(8)
    assert net.layer3(net.layer2(net.layer1(torch.rand(1, 16, 32, 32)))).shape == (1, 64, 8, 8)
    assert net(torch.rand(2, 3, 33, 31)).shape == (2, 64)
    for depth in (2, 7, 18):
        with pytest.raises(ValueError, match=rf"depth must be 6n \+ 2 with n of 1 or more; received {depth}"):
            SmallResNet(depth)


def test_shortcut_takes_every_other_pixel_and_pads_channels_at_the_end() -> None:
    block = build_backbone("resnet8").get_submodule("net.layer2.0").eval()
    nn.init.zeros_(block.bn2.weight)  # type: ignore[arg-type, union-attr]
    images = torch.rand(1, 16, 32, 32)
    output = block(images)
    torch.testing.assert_close(output[:, :16], images[:, :, ::2, ::2])
    assert output[:, 16:].eq(0).all()


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


def test_copies_keep_the_facts() -> None:
    backbone = copy.deepcopy(build_backbone("resnet8"))
    assert (backbone.width, backbone.input_size, backbone.mean) == (64, 32, backbone_facts("resnet8").mean)


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
        assert backbones._timm_blocks(net) == {"stem": ["net.0", "net.1"], "2": ["net.2"]}

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
