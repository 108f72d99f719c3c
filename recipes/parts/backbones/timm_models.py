"""Backbones of timm, by the name timm/<name>."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from .backbone import Backbone, BackboneFacts, Blocks, check_multiple, has_state, patch_of, unknown


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
        raise ValueError(unknown(name, known)) from None


def timm_facts(name: str) -> BackboneFacts:
    """Facts of `timm/<name>`, as timm states them."""
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


def timm_backbone(name: str, image_size: int, facts: BackboneFacts) -> Backbone:
    """Build `timm/<name>`, without weights."""
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
    check_multiple(name, image_size, patch_of(net, image_size, facts))
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
    elif has_state(module):
        yield path, next(iter(numbers), None)
