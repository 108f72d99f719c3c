"""The table of backbones of torchvision and of this package: a family a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .backbone import RGB, Blocks, has_state
from .small_resnet import SmallResNet

IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
CIFAR10_MEAN: RGB = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: RGB = (0.2470, 0.2435, 0.2616)
_BSD = "BSD-3-Clause; trained on ImageNet, whose terms apply"
_BSD_OR_SWAG = f"{_BSD} (IMAGENET1K_SWAG_*: CC-BY-NC-4.0, https://arxiv.org/abs/2201.08371)"
_SWAG = "CC-BY-NC-4.0 (SWAG, https://arxiv.org/abs/2201.08371); trained on ImageNet, whose terms apply"


def _plain(size: int, aux: bool) -> dict[str, Any]:
    return {}


def _sized(size: int, aux: bool) -> dict[str, Any]:
    return {"image_size": size}


def _grid_sized(size: int, aux: bool) -> dict[str, Any]:
    return {"input_size": (size, size)}


def _inception(size: int, aux: bool) -> dict[str, Any]:
    # transform_input: the weights come from TensorFlow, where pixels lie in [-1, 1]; the net itself converts
    # ImageNet-normalised images, as torchvision does for its own weights.
    return {"aux_logits": aux, "init_weights": True, "transform_input": True}


def _nothing(stripped: nn.Module) -> nn.Module:
    return nn.Identity()


def _pooling(stripped: nn.Module) -> nn.Module:
    return nn.AdaptiveAvgPool2d(1)


def _first(count: int) -> Callable[[nn.Module], nn.Module]:
    def keep(stripped: nn.Module) -> nn.Module:
        assert isinstance(stripped, nn.Sequential)
        return stripped[:count]

    return keep


def _named(**paths: str) -> Callable[[nn.Module], Blocks]:
    """The same blocks for every net of the family; paths separated by blanks."""
    return lambda net: {name: below.split() for name, below in paths.items()}


def _split(trunk: str, starts_block: Callable[[nn.Module], bool], **after: str) -> Callable[[nn.Module], Blocks]:
    """One block from each child of the sequential `trunk` for which `starts_block` holds up to the next."""

    def blocks(net: nn.Module) -> Blocks:
        runs: list[list[str]] = [[]]
        for index, (name, child) in enumerate(net.get_submodule(trunk).named_children()):
            if index and starts_block(child):
                runs.append([])
            if has_state(child):
                runs[-1].append(f"{trunk}.{name}")
        stem, *stages = filter(None, runs)
        named = {f"stage{number}": run for number, run in enumerate(stages, start=1)}
        return {"stem": stem, **named, **_named(**after)(net)}

    return blocks


def _each(child: nn.Module) -> bool:
    return True


def _pools(child: nn.Module) -> bool:
    return isinstance(child, nn.MaxPool2d)


def _strides(child: nn.Module) -> bool:
    return any(module.stride[0] > 1 for module in child.modules() if isinstance(module, nn.Conv2d))


def _transformer_layers(net: nn.Module) -> Blocks:
    layers = net.get_submodule("encoder.layers").named_children()
    return {
        "embeddings": ["conv_proj", "class_token", "encoder.pos_embedding"],
        **{f"layer{number}": [f"encoder.layers.{name}"] for number, (name, _) in enumerate(layers)},
        "norm": ["encoder.ln"],
    }


_REGNET_BLOCKS = _named(
    stem="stem",
    stage1="trunk_output.block1",
    stage2="trunk_output.block2",
    stage3="trunk_output.block3",
    stage4="trunk_output.block4",
)
_RESNET_BLOCKS = _named(stem="conv1 bn1", layer1="layer1", layer2="layer2", layer3="layer3", layer4="layer4")
_STAGES = {
    "stem": "features.0",
    "stage1": "features.1",
    "stage2": "features.2 features.3",  # each later stage begins with its downsampling
    "stage3": "features.4 features.5",
    "stage4": "features.6 features.7",
}


@dataclass(frozen=True)
class Family:
    """Backbones that share a paper and a structure.

    Attributes:
        names: What `build_backbone` takes.
        source: Link to the paper.
        blocks: Net -> its blocks, with paths inside the net.
        strip: Name of a module -> what takes its place. The first is the classifier.
        options: (side in pixels, auxiliary branches) -> what torchvision builds the net with.
        width: Number of features; None for what the last linear layer of the classifier reads.
        input_size: Side in pixels of the images the weights were evaluated at: one, or one for each name.
        min_size: Smallest side in pixels.
        multiple_of: Where above 1, the side is fixed when the net is built, to a multiple of this many pixels.
        mean: As in `BackboneFacts`; so are the next two.
        std: Standard deviation.
        licence: Licence of the weights.
        small_stem: Whether `build_backbone` can replace the first convolution for small images.
        aux: Auxiliary branch -> its classifier, in order of depth.
        aux_min_size: Smallest side in pixels with auxiliary branches.
    """

    names: tuple[str, ...]
    source: str
    blocks: Callable[[nn.Module], Blocks]
    strip: Mapping[str, Callable[[nn.Module], nn.Module]]
    options: Callable[[int, bool], dict[str, Any]] = _plain
    width: int | None = None
    input_size: int | tuple[int, ...] = 224
    min_size: int = 1
    multiple_of: int = 1
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD
    licence: str = _BSD
    small_stem: bool = False
    aux: Mapping[str, str] = field(default_factory=dict)
    aux_min_size: int = 1

    def build(self, name: str, size: int, aux: bool) -> nn.Module:
        """A net of the family with its classifier, without weights."""
        if not self.strip:
            return SmallResNet(int(name.removeprefix("resnet")))
        from torchvision import models  # takes seconds to import, and the facts need none of it

        net: nn.Module = models.get_model(name, weights=None, **self.options(size, aux))
        return net


FAMILIES: tuple[Family, ...] = (
    Family(
        names=("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        source="https://arxiv.org/abs/1512.03385",
        blocks=_RESNET_BLOCKS,
        strip={"fc": _nothing},
        small_stem=True,
    ),
    Family(
        names=("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
        source="https://arxiv.org/abs/1611.05431",
        blocks=_RESNET_BLOCKS,
        strip={"fc": _nothing},
        small_stem=True,
    ),
    Family(
        names=("wide_resnet50_2", "wide_resnet101_2"),
        source="https://arxiv.org/abs/1605.07146",
        blocks=_RESNET_BLOCKS,
        strip={"fc": _nothing},
        small_stem=True,
    ),
    Family(
        names=("alexnet",),
        source="https://arxiv.org/abs/1404.5997",
        blocks=_split("features", _pools),
        strip={"classifier": _nothing, "avgpool": _pooling},
        width=256,
        min_size=63,
    ),
    # The two fully connected layers below the classifier go with it: they hold 119 of VGG16's 138 million
    # parameters, and tie it to 224 px.
    Family(
        names=("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
        source="https://arxiv.org/abs/1409.1556",
        blocks=_split("features", _pools),
        strip={"classifier": _nothing, "avgpool": _pooling},
        width=512,
        min_size=32,
    ),
    Family(
        names=("inception_v3",),
        source="https://arxiv.org/abs/1512.00567",
        blocks=_named(
            stem="Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Conv2d_3b_1x1 Conv2d_4a_3x3",
            mixed5="Mixed_5b Mixed_5c Mixed_5d",
            mixed6="Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e",
            aux="AuxLogits",
            mixed7="Mixed_7a Mixed_7b Mixed_7c",
        ),
        strip={"fc": _nothing, "dropout": _nothing},
        options=_inception,
        input_size=299,
        min_size=75,
        aux={"AuxLogits": "fc"},
        aux_min_size=299,
    ),
    Family(
        names=("googlenet",),
        source="https://arxiv.org/abs/1409.4842",
        blocks=_named(
            stem="conv1 conv2 conv3",
            inception3="inception3a inception3b",
            inception4="inception4a inception4b inception4c inception4d inception4e",
            aux1="aux1",
            aux2="aux2",
            inception5="inception5a inception5b",
        ),
        strip={"fc": _nothing, "dropout": _nothing},
        options=_inception,
        min_size=15,
        aux={"aux1": "fc2", "aux2": "fc2"},
        aux_min_size=15,
    ),
    Family(
        names=("mobilenet_v2",),
        source="https://arxiv.org/abs/1801.04381",
        blocks=_split("features", _strides),
        strip={"classifier": _nothing},
    ),
    Family(
        names=("mobilenet_v3_small", "mobilenet_v3_large"),
        source="https://arxiv.org/abs/1905.02244",
        blocks=_split("features", _strides, neck="classifier"),
        strip={"classifier": _first(2)},  # the wide linear layer before the classifier is part of the trunk
    ),
    Family(
        names=(
            "efficientnet_b0",
            "efficientnet_b1",
            "efficientnet_b2",
            "efficientnet_b3",
            "efficientnet_b4",
            "efficientnet_b5",
            "efficientnet_b6",
            "efficientnet_b7",
        ),
        source="https://arxiv.org/abs/1905.11946",
        blocks=_split("features", _each),
        strip={"classifier": _nothing},
        input_size=(224, 240, 288, 300, 380, 456, 528, 600),
    ),
    Family(
        names=("efficientnet_v2_s", "efficientnet_v2_m"),
        source="https://arxiv.org/abs/2104.00298",
        blocks=_split("features", _each),
        strip={"classifier": _nothing},
        input_size=(384, 480),
    ),
    Family(
        names=("efficientnet_v2_l",),
        source="https://arxiv.org/abs/2104.00298",
        blocks=_split("features", _each),
        strip={"classifier": _nothing},
        input_size=480,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    Family(
        names=("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
        source="https://arxiv.org/abs/2201.03545",
        blocks=_named(**_STAGES, norm="classifier"),
        strip={"classifier": _first(2)},  # layer normalisation and flattening
        min_size=32,
    ),
    Family(
        names=("vit_b_16", "vit_l_16"),
        source="https://arxiv.org/abs/2010.11929",
        blocks=_transformer_layers,
        strip={"heads": _nothing},
        options=_sized,
        min_size=16,
        multiple_of=16,
        licence=_BSD_OR_SWAG,
    ),
    Family(
        names=("vit_b_32", "vit_l_32"),
        source="https://arxiv.org/abs/2010.11929",
        blocks=_transformer_layers,
        strip={"heads": _nothing},
        options=_sized,
        min_size=32,
        multiple_of=32,
    ),
    Family(
        names=("vit_h_14",),
        source="https://arxiv.org/abs/2010.11929",
        blocks=_transformer_layers,
        strip={"heads": _nothing},
        options=_sized,
        input_size=518,
        min_size=14,
        multiple_of=14,
        licence=_SWAG,
    ),
    Family(
        names=("swin_t", "swin_s", "swin_b"),
        source="https://arxiv.org/abs/2103.14030",
        blocks=_named(**_STAGES, norm="norm"),
        strip={"head": _nothing},
        min_size=4,
    ),
    Family(
        names=("swin_v2_t", "swin_v2_s", "swin_v2_b"),
        source="https://arxiv.org/abs/2111.09883",
        blocks=_named(**_STAGES, norm="norm"),
        strip={"head": _nothing},
        min_size=4,
        input_size=256,
    ),
    Family(
        names=("maxvit_t",),
        source="https://arxiv.org/abs/2204.01697",
        blocks=_named(
            stem="stem",
            stage1="blocks.0",
            stage2="blocks.1",
            stage3="blocks.2",
            stage4="blocks.3",
            neck="classifier",
        ),
        strip={"classifier": _first(5)},  # pooling, flattening, normalisation, a linear layer, tanh
        options=_grid_sized,
        min_size=224,
        multiple_of=224,
    ),
    Family(
        names=("squeezenet1_0",),
        source="https://arxiv.org/abs/1602.07360",
        blocks=_split("features", _pools),
        strip={"classifier": _pooling},
        width=512,
        min_size=21,
    ),
    Family(
        names=("squeezenet1_1",),
        source="https://arxiv.org/abs/1602.07360",
        blocks=_split("features", _pools),
        strip={"classifier": _pooling},
        width=512,
        min_size=17,
    ),
    Family(
        names=("densenet121", "densenet161", "densenet169", "densenet201"),
        source="https://arxiv.org/abs/1608.06993",
        blocks=_named(
            stem="features.conv0 features.norm0",
            block1="features.denseblock1 features.transition1",
            block2="features.denseblock2 features.transition2",
            block3="features.denseblock3 features.transition3",
            block4="features.denseblock4 features.norm5",
        ),
        strip={"classifier": _nothing},
        min_size=29,
    ),
    Family(
        names=(
            "regnet_x_400mf",
            "regnet_x_800mf",
            "regnet_x_1_6gf",
            "regnet_x_3_2gf",
            "regnet_x_8gf",
            "regnet_x_16gf",
            "regnet_x_32gf",
            "regnet_y_400mf",
            "regnet_y_800mf",
            "regnet_y_1_6gf",
            "regnet_y_3_2gf",
            "regnet_y_8gf",
        ),
        source="https://arxiv.org/abs/2003.13678",
        blocks=_REGNET_BLOCKS,
        strip={"fc": _nothing},
    ),
    Family(
        names=("regnet_y_16gf", "regnet_y_32gf"),
        source="https://arxiv.org/abs/2003.13678",
        blocks=_REGNET_BLOCKS,
        strip={"fc": _nothing},
        licence=_BSD_OR_SWAG,
    ),
    Family(
        names=("regnet_y_128gf",),
        source="https://arxiv.org/abs/2003.13678",
        blocks=_REGNET_BLOCKS,
        strip={"fc": _nothing},
        input_size=384,
        licence=_SWAG,
    ),
    Family(
        names=("mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"),
        source="https://arxiv.org/abs/1807.11626",
        blocks=_split("layers", _strides),
        strip={"classifier": _nothing},
    ),
    Family(
        names=("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"),
        source="https://arxiv.org/abs/1807.11164",
        blocks=_named(stem="conv1", stage2="stage2", stage3="stage3", stage4="stage4", neck="conv5"),
        strip={"fc": _nothing},
    ),
    Family(
        names=("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56"),
        source="https://arxiv.org/abs/1512.03385",
        blocks=_named(stem="conv1 bn1", layer1="layer1", layer2="layer2", layer3="layer3"),
        strip={},
        width=64,
        input_size=32,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        licence="no published weights",
    ),
)
FAMILY_OF = {name: family for family in FAMILIES for name in family.names}
