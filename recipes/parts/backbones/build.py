"""Image backbones: images `(batch, 3, height, width)` in, features `(batch, width)` out.

`FAMILIES` is the whole list: every classifier of torchvision, and the small ResNets of He et al. for CIFAR.
Building one takes the classifier off, together with the dropout in front of it, and names its blocks from
input to output, so that freezing, learning rates and weight decay can be set by depth.

    backbone = build_backbone("resnet50")
    features = backbone(images)        # (batch, 2048)
    list(backbone.blocks)              # ["stem", "layer1", "layer2", "layer3", "layer4"]
"""

from __future__ import annotations

from itertools import chain

from torch import nn

from .backbone import Backbone, BackboneFacts, check_multiple, patch_of, unknown
from .families import FAMILIES, FAMILY_OF
from .timm_models import timm_backbone, timm_facts

# Builders: (name, side of the images in pixels, auxiliary branches) -> net with its classifier


# What takes the place of a stripped module


# Blocks: net -> ordered name -> paths


def backbone_facts(name: str) -> BackboneFacts:
    """Input size, normalisation, licence and source of a backbone, without building it.

    Args:
        name: As for `build_backbone`.

    Raises:
        ValueError: The name is not known.
        ImportError: The name begins with `timm/` and timm is not installed.
    """
    if name.startswith("timm/"):
        return timm_facts(name)
    if name not in FAMILY_OF:
        raise ValueError(unknown(name, FAMILY_OF))
    family = FAMILY_OF[name]
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
        image_size: Side of the square images in pixels; None for the size the net is meant for. Vision
            transformers and MaxViT are built for one size; the others take other sizes all the same.
        aux: Build the auxiliary branches of `inception_v3` or `googlenet`; see `Backbone.forward_aux`.
        small_stem: Replace the 7x7 stride-2 convolution and the max-pooling of torchvision's ResNets, ResNeXts
            and Wide ResNets by a 3x3 stride-1 convolution, for images of 64 px and less. Published weights
            fit all of it but that convolution. `image_size` is then 32 by default.

    Raises:
        ValueError: The name is not known, the size does not fit, or there are no auxiliary branches to build
            or no stem to replace.
        ImportError: The name begins with `timm/` and timm is not installed.
    """
    facts = backbone_facts(name)
    family = FAMILY_OF.get(name)  # None for timm
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
        return timm_backbone(name, image_size, facts)

    net = family.build(name, image_size, aux)
    check_multiple(name, image_size, patch_of(net, image_size, facts))
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


def _check_size(name: str, image_size: int, facts: BackboneFacts) -> None:
    if image_size < facts.min_size:
        minimum = f"takes images of {facts.min_size} px and more"
        raise ValueError(f"backbone {name!r} {minimum}; received image_size={image_size}")
    check_multiple(name, image_size, facts.multiple_of)


def _inputs(classifier: nn.Module) -> int:
    """Number of features that the last linear layer of a classifier reads."""
    return [module for module in classifier.modules() if isinstance(module, nn.Linear)][-1].in_features


def _small_stem() -> nn.Conv2d:
    conv = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


# timm: facts from the configuration of the weights, blocks from the model's own grouping of its parameters
