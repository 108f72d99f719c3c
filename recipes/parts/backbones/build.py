"""Image backbones: pictures `(batch, 3, height, width)` in, features `(batch, width)` out.

`FAMILIES` is the whole list: every classifier of torchvision, and the small ResNets of He et al. for CIFAR.
Building one takes the classifier off, together with the dropout in front of it, and names its blocks from
input to output, so that freezing, learning rates and weight decay can be set by depth.

    backbone = build_backbone("resnet50")
    features = backbone(images)        # (batch, 2048)
    list(backbone.blocks)              # ["stem", "layer1", "layer2", "layer3", "layer4"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .small_resnet import SmallResNet

RGB = tuple[float, float, float]
Blocks = dict[str, list[str]]

IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
CIFAR10_MEAN: RGB = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: RGB = (0.2470, 0.2435, 0.2616)

_BSD = "BSD-3-Clause; trained on ImageNet, whose terms apply"
_BSD_OR_SWAG = f"{_BSD} (IMAGENET1K_SWAG_*: CC-BY-NC-4.0, https://arxiv.org/abs/2201.08371)"
_SWAG = "CC-BY-NC-4.0 (SWAG, https://arxiv.org/abs/2201.08371); trained on ImageNet, whose terms apply"


class BackboneFacts(NamedTuple):
    """What is known of a backbone without building it.

    Attributes:
        input_size: Side in pixels of the square pictures it is meant for.
        min_size: Smallest side in pixels it takes.
        mean: Mean per channel that its weights expect to be subtracted from pixel values in [0, 1].
        std: Standard deviation per channel that its weights expect the difference to be divided by.
        licence: Licence of its published weights.
        source: Link to the paper, or to the page of the weights.
        multiple_of: The side must be a multiple of this many pixels.
        fixed_size: Whether the side is fixed when the net is built; else it takes any from `min_size` on.
    """

    input_size: int
    min_size: int
    mean: RGB
    std: RGB
    licence: str
    source: str
    multiple_of: int = 1
    fixed_size: bool = False


class Backbone(nn.Module):
    """A net without its classifier, and what one must know to fine-tune it.

    The facts of most use are attributes of their own: `input_size`, `min_size`, `mean`, `std`.

    Args:
        net: The net, mapping `(batch, 3, height, width)` to `(batch, width)`.
        name: Name it was built from.
        facts: What is known of it; `input_size` is the side in pixels it was built for.
        width: Number of features.
        blocks: Ordered, input to output: name -> dotted paths inside this module of submodules or parameters.
            Every parameter, and every module with buffers, lies in exactly one block.
        head: Names of the classifiers taken off `net`: a state dict of the whole net has keys below them.
        aux_widths: Number of features of each auxiliary branch, in order of depth.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str,
        facts: BackboneFacts,
        width: int,
        blocks: Blocks,
        head: tuple[str, ...] = (),
        aux_widths: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.net = net
        self.name = name
        self.facts = facts
        self.width = width
        self.blocks = blocks
        self.head = head
        self.aux_widths = aux_widths
        self.input_size, self.min_size = facts.input_size, facts.min_size
        self.mean, self.std = facts.mean, facts.std

    def forward(self, images: Tensor) -> Tensor:
        """Images `(batch, 3, height, width)` to features `(batch, width)`.

        Raises:
            ValueError: The images have another number of dimensions or channels, or a size it does not take.
        """
        return self.forward_aux(images)[0]

    def forward_aux(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features, and those of the auxiliary branches, each for a classifier of its own.

        Auxiliary branches run only in training mode and where built with `aux=True`; else the list is empty.

        Args:
            images: `(batch, 3, height, width)`.

        Returns:
            Features `(batch, width)`, and one tensor `(batch, aux_width)` for each of `aux_widths`.

        Raises:
            ValueError: As in `forward`.
        """
        if not torch.compiler.is_compiling():
            self._check(images)
        features = self.net(images)
        if isinstance(features, tuple):  # torchvision's order: the net's output, then the branches, deepest first
            features, *aux = features
            return features, aux[::-1]
        return features, []

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            expected = "images (batch, 3, height, width)"
            raise ValueError(f"backbone {self.name!r} expects {expected}; received {tuple(images.shape)}")
        height, width = images.shape[2:]
        if self.facts.fixed_size and not height == width == self.input_size:
            raise ValueError(
                f"backbone {self.name!r} was built for images of {self.input_size} px; received "
                f"{height} x {width}: resize them, or build it with their image_size"
            )
        if min(height, width) < self.min_size:
            minimum = f"takes images of {self.min_size} px and more"
            raise ValueError(f"backbone {self.name!r} {minimum}; received {height} x {width}")


# Builders: (name, side of the pictures in pixels, auxiliary branches) -> net with its classifier


def _torchvision(name: str, size: int, aux: bool, **options: Any) -> nn.Module:
    from torchvision import models  # takes seconds to import, and the facts need none of it

    net: nn.Module = models.get_model(name, weights=None, **options)
    return net


def _sized(name: str, size: int, aux: bool) -> nn.Module:
    return _torchvision(name, size, aux, image_size=size)


def _grid_sized(name: str, size: int, aux: bool) -> nn.Module:
    return _torchvision(name, size, aux, input_size=(size, size))


def _inception(name: str, size: int, aux: bool) -> nn.Module:
    # transform_input: the weights come from TensorFlow, where pixels lie in [-1, 1]; the net itself converts
    # ImageNet-normalised pictures, as torchvision does for its own weights.
    return _torchvision(name, size, aux, aux_logits=aux, init_weights=True, transform_input=True)


def _small(name: str, size: int, aux: bool) -> nn.Module:
    return SmallResNet(int(name.removeprefix("resnet")))


# What takes the place of a stripped module


def _nothing(stripped: nn.Module) -> nn.Module:
    return nn.Identity()


def _pooling(stripped: nn.Module) -> nn.Module:
    return nn.AdaptiveAvgPool2d(1)


def _first(count: int) -> Callable[[nn.Module], nn.Module]:
    def keep(stripped: nn.Module) -> nn.Module:
        assert isinstance(stripped, nn.Sequential)
        return stripped[:count]

    return keep


# Blocks: net -> ordered name -> paths


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
            if _has_state(child):
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
        build: (name, side in pixels, auxiliary branches) -> net with its classifier.
        width: Number of features; None for what the last linear layer of the classifier reads.
        input_size: Side in pixels of the pictures the weights were evaluated at: one, or one for each name.
        min_size: Smallest side in pixels.
        multiple_of: Where above 1, the side is fixed when the net is built, to a multiple of this many pixels.
        mean: As in `BackboneFacts`; so are the next two.
        std: Standard deviation.
        licence: Licence of the weights.
        small_stem: Whether `build_backbone` can replace the first convolution for small pictures.
        aux: Auxiliary branch -> its classifier, in order of depth.
        aux_min_size: Smallest side in pixels with auxiliary branches.
    """

    names: tuple[str, ...]
    source: str
    blocks: Callable[[nn.Module], Blocks]
    strip: Mapping[str, Callable[[nn.Module], nn.Module]]
    build: Callable[[str, int, bool], nn.Module] = _torchvision
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
        build=_inception,
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
        build=_inception,
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
        build=_sized,
        min_size=16,
        multiple_of=16,
        licence=_BSD_OR_SWAG,
    ),
    Family(
        names=("vit_b_32", "vit_l_32"),
        source="https://arxiv.org/abs/2010.11929",
        blocks=_transformer_layers,
        strip={"heads": _nothing},
        build=_sized,
        min_size=32,
        multiple_of=32,
    ),
    Family(
        names=("vit_h_14",),
        source="https://arxiv.org/abs/2010.11929",
        blocks=_transformer_layers,
        strip={"heads": _nothing},
        build=_sized,
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
        build=_grid_sized,
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
        build=_small,
        width=64,
        input_size=32,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        licence="no published weights",
    ),
)

_FAMILY_OF = {name: family for family in FAMILIES for name in family.names}


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, for "did you mean"; None when nothing is like it.

    Where several are as near, the first: `resnet50` for `resnet5`, not `resnet56`.
    """

    def likeness(other: str) -> float:
        return SequenceMatcher(None, name.lower(), other.lower()).ratio()

    nearest = max(known, key=likeness, default="")
    return nearest if likeness(nearest) > 0.6 else None


def backbone_facts(name: str) -> BackboneFacts:
    """Input size, normalisation, licence and source of a backbone, without building it.

    Args:
        name: As for `build_backbone`.

    Raises:
        ValueError: The name is not known.
        ImportError: The name begins with `timm/` and timm is not installed.
    """
    if name.startswith("timm/"):
        return _timm_facts(name)
    if name not in _FAMILY_OF:
        raise ValueError(_unknown(name, _FAMILY_OF))
    family = _FAMILY_OF[name]
    size = family.input_size
    return BackboneFacts(
        input_size=size if isinstance(size, int) else size[family.names.index(name)],
        min_size=family.min_size,
        mean=family.mean,
        std=family.std,
        licence=family.licence,
        source=family.source,
        multiple_of=family.multiple_of,
        fixed_size=family.multiple_of > 1,
    )


def build_backbone(
    name: str, *, image_size: int | None = None, aux: bool = False, small_stem: bool = False
) -> Backbone:
    """A backbone with fresh weights, initialised as its family does; `weights.load_weights` loads trained ones.

    Args:
        name: A name of `FAMILIES`, or `timm/<name>` for any model of timm.
        image_size: Side of the square pictures in pixels; None for the size the net is meant for. Vision
            transformers and MaxViT are built for one size; the others take other sizes all the same.
        aux: Build the auxiliary branches of `inception_v3` or `googlenet`; see `Backbone.forward_aux`.
        small_stem: Replace the 7x7 stride-2 convolution and the max-pooling of torchvision's ResNets, ResNeXts
            and Wide ResNets by a 3x3 stride-1 convolution, for pictures of 64 px and less. Published weights
            fit all of it but that convolution. `image_size` is then 32 by default.

    Raises:
        ValueError: The name is not known, the size does not fit, or there are no auxiliary branches to build
            or no stem to replace.
        ImportError: The name begins with `timm/` and timm is not installed.
    """
    facts = backbone_facts(name)
    family = _FAMILY_OF.get(name)  # None for timm
    if aux and not (family and family.aux):
        known = ", ".join(chain.from_iterable(family.names for family in FAMILIES if family.aux))
        raise ValueError(f"backbone {name!r} has no auxiliary branches; aux=True is for {known}")
    if small_stem and not (family and family.small_stem):
        known = "torchvision's ResNets, ResNeXts and Wide ResNets"
        raise ValueError(f"backbone {name!r} has no stem to replace; small_stem=True is for {known}")
    if image_size is None:
        image_size = 32 if small_stem else facts.input_size
    if family and aux:
        facts = facts._replace(min_size=family.aux_min_size)
    _check_size(name, image_size, facts)
    if family is None:
        return _timm_backbone(name, image_size, facts)

    net = family.build(name, image_size, aux)
    _check_multiple(name, image_size, _patch_of(net, image_size, facts))
    width = family.width or _inputs(net.get_submodule(next(iter(family.strip))))
    for module, replacement in family.strip.items():
        setattr(net, module, replacement(net.get_submodule(module)))
    aux_widths = []
    for branch, classifier in family.aux.items() if aux else ():
        aux_widths.append(_inputs(net.get_submodule(f"{branch}.{classifier}")))
        setattr(net.get_submodule(branch), classifier, nn.Identity())
    if small_stem:
        net.conv1, net.maxpool = _small_stem(), nn.Identity()
    return Backbone(
        net,
        name=name,
        facts=facts._replace(input_size=image_size),
        width=width,
        blocks={
            block: [f"net.{path}" for path in paths]
            for block, paths in family.blocks(net).items()
            if aux or not set(paths) & set(family.aux)
        },
        head=(
            *list(family.strip)[:1],
            *(f"{branch}.{classifier}" if aux else branch for branch, classifier in family.aux.items()),
        ),
        aux_widths=tuple(aux_widths),
    )


def _unknown(name: str, known: Iterable[str]) -> str:
    nearest = nearest_name(name, known)
    guess = f"did you mean {nearest!r}? " if nearest else ""
    return f"backbone {name!r} is not known; {guess}python -m recipes ls backbones lists them."


def _check_size(name: str, image_size: int, facts: BackboneFacts) -> None:
    if image_size < facts.min_size:
        minimum = f"takes images of {facts.min_size} px and more"
        raise ValueError(f"backbone {name!r} {minimum}; received image_size={image_size}")
    _check_multiple(name, image_size, facts.multiple_of)


def _check_multiple(name: str, image_size: int, patch: int) -> None:
    remainder = image_size % patch
    if remainder:
        below = image_size - remainder
        raise ValueError(
            f"backbone {name!r} needs an image_size that is a multiple of {patch}; received "
            f"{image_size}, between {below} and {below + patch}"
        )


def _patch_of(net: nn.Module, image_size: int, facts: BackboneFacts) -> int:
    """Side in pixels of the patches that a net cuts a picture into, where it leaves out what makes none; else 1.

    At the size that it was trained at, a border is unseen in training, too.
    """
    first = next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)
    padded = any(getattr(module, "dynamic_img_pad", False) for module in net.modules())
    if first is None or padded or image_size == facts.input_size or first.padding not in ((0, 0), "valid"):
        return 1
    return int(first.stride[0]) if first.stride == first.kernel_size else 1


def _inputs(classifier: nn.Module) -> int:
    """Number of features that the last linear layer of a classifier reads."""
    return [module for module in classifier.modules() if isinstance(module, nn.Linear)][-1].in_features


def _small_stem() -> nn.Conv2d:
    conv = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in chain(module.parameters(), module.buffers()))


# timm: facts from the configuration of the weights, blocks from the model's own grouping of its parameters


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ImportError('backbones named timm/<name> need timm: pip install "finetuning-recipes[timm]"') from error
    return timm


def _timm_config(name: str) -> Any:
    timm = _timm()
    try:
        return timm.get_pretrained_cfg(name.removeprefix("timm/"), allow_unregistered=False)
    except RuntimeError:
        known = [f"timm/{known}" for known in (*timm.list_models(), *timm.list_pretrained())]
        raise ValueError(_unknown(name, known)) from None


def _timm_facts(name: str) -> BackboneFacts:
    config = _timm_config(name)
    return BackboneFacts(
        input_size=config.input_size[-1],
        min_size=max((config.min_input_size or (3, 1, 1))[1:]),
        mean=tuple(config.mean),
        std=tuple(config.std),
        licence=config.license or "not stated; see the source",
        source=f"https://huggingface.co/{config.hf_hub_id or 'timm'}",
        fixed_size=config.fixed_input_size,
    )


def _timm_backbone(name: str, image_size: int, facts: BackboneFacts) -> Backbone:
    resized = facts.fixed_size and image_size != facts.input_size
    options = {"img_size": image_size} if resized else {}
    try:
        net = _timm().create_model(name.removeprefix("timm/"), pretrained=False, num_classes=0, **options)
    except (TypeError, ValueError, AssertionError) as error:
        if not resized:
            raise
        raise ValueError(
            f"backbone {name!r} cannot be built for images of {image_size} px, only for its own "
            f"{facts.input_size} px; timm says: {error}"
        ) from error
    _check_multiple(name, image_size, _patch_of(net, image_size, facts))
    classifier = _timm_config(name).classifier or ()
    return Backbone(
        net,
        name=name,
        facts=facts._replace(input_size=image_size),
        # num_features is what the pooling reads; some nets, as MobileNetV3, have a wider layer after it.
        width=getattr(net, "head_hidden_size", None) or net.num_features,
        blocks=_timm_blocks(net),
        head=(classifier,) if isinstance(classifier, str) else tuple(classifier),
    )


def _timm_blocks(net: Any) -> Blocks:
    """Blocks by timm's own grouping for learning rates by depth, or else one for each child of the net."""
    from timm.models import group_parameters

    try:
        number_of = group_parameters(net, net.group_matcher(coarse=True), reverse=True)
    except (AttributeError, NotImplementedError):
        children = [name for name, _ in net.named_children()]
        number_of = {name: children.index(name.partition(".")[0]) for name, _ in net.named_parameters()}
    numbered: dict[int, list[str]] = {}
    number = 0
    for path, number_here in _whole_modules(net, "", number_of):
        number = number if number_here is None else number_here
        numbered.setdefault(number, []).append(f"net.{path}")
    stem, *later = (paths for _, paths in sorted(numbered.items()))
    return {"stem": stem, **{paths[0].removeprefix("net.").replace(".", ""): paths for paths in later}}


def _whole_modules(module: nn.Module, path: str, number_of: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
    """Paths of the largest modules, or of single parameters, that lie in one block, with the block's number.

    The number is None for a module with buffers only.
    """
    prefix = path and f"{path}."
    below = (prefix + name for name, _ in module.named_parameters())
    numbers = {number_of[name] for name in below if name in number_of}
    if len(numbers) > 1:
        for name, _ in module.named_parameters(recurse=False):
            yield prefix + name, number_of[prefix + name]
        for name, child in module.named_children():
            yield from _whole_modules(child, prefix + name, number_of)
    elif _has_state(module):
        yield path, next(iter(numbers), None)
