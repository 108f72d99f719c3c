"""A net is frozen and gets its adapters; later they are merged into plain weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..spelling import did_you_mean, some
from .bottleneck import Bottleneck
from .options import VIRTUAL, Peft
from .targets import Layers, called_layers, choose_layers, is_inside, last_of_blocks
from .virtual import Prefix, Prompt, add_prefixes


def adapt(
    net: nn.Module,
    how: Peft,
    blocks: Mapping[str, Sequence[str]],
    run: Callable[[], Any],
    new: Iterable[str] = (),
) -> None:
    """Freeze a net but for its head, and give it adapters, in place.

    The adapted net computes what it did before, unless it got a prompt or a prefix. A block's adapters lie inside the
    block, so that learning rates by block and gradual unfreezing go on as they were.

    Args:
        net: Any; for a prompt or a prefix, of transformers.
        how: Method and options.
        blocks: Ordered, input to output: name -> dotted paths in `net`; a block `head` trains whole.
        run: Runs the net once, on whatever input, to see which layers it calls.
        new: Names of parameters that no pretrained weights were found for: they train, too.

    Raises:
        ValueError: The method does not go with the net; a pattern that matches nothing.
    """
    named, head = dict(net.named_parameters()), blocks.get("head", ())
    train = {*new, *_matching(named, how.train or ())}
    trains = {p for n, p in named.items() if n in train or any(is_inside(n, path) for path in head)}
    if how.method in VIRTUAL:
        _add_virtual(net, how)
    else:
        layers = choose_layers(net, how, blocks, called_layers(net, run))
        if how.method == "adapter":
            for name, layer in layers.items():
                net.set_submodule(name, Bottleneck(layer, how.rank, how.dropout))
        else:
            _inject(net, how, layers)
    for parameter in named.values():
        parameter.requires_grad_(parameter in trains)


def adapters(net: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of what was put into a net: adapted layers, prompts, prefixes."""
    kinds: tuple[type, ...] = (Bottleneck, Prompt, Prefix)
    return {n: m for n, m in net.named_modules() if isinstance(m, kinds) or _is_of_library(m)}


def is_mergeable(net: nn.Module) -> bool:
    """Whether plain weights can hold what its adapters learnt."""
    return all(_is_of_library(module) for module in adapters(net).values())


@torch.no_grad()
def merge(net: nn.Module) -> None:
    """Put what the adapters learnt into the weights and take them out, in place.

    Raises:
        ValueError: Adapters with a non-linearity, prompts or prefixes.
    """
    found = adapters(net)
    fixed = [name for name, module in found.items() if not _is_of_library(module)]
    if fixed:
        raise ValueError(f"no plain weights can hold {some(fixed)}: LoRA, DoRA and IA3 can be merged")
    for name, module in found.items():
        layer: Any = module
        layer.merge(safe_merge=True)
        net.set_submodule(name, layer.get_base_layer())
    vars(net).pop("peft_config", None)


def channels_last(net: nn.Module) -> None:
    """Lay out weights of convolutions as they are computed with fastest, on processors and GPUs alike.

    Not the matrices of DoRA, of which the library takes views.
    """
    net.to(memory_format=torch.channels_last)
    for layer in adapters(net).values():
        for parameter in layer.lora_A.parameters() if getattr(layer, "lora_variant", None) else ():  # type: ignore[union-attr, operator]
            parameter.data = parameter.data.contiguous()


def describe(net: nn.Module, how: Peft) -> str:
    """One line: the method, where it acts, what trains."""
    if how.method in VIRTUAL:
        where = f"{how.tokens} tokens"
    else:
        names = list(adapters(net))
        kinds = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))
        size = {"ia3": "", "adapter": f" {how.rank} wide,"}.get(how.method, f" rank {how.rank}, alpha {how.alpha:g},")
        where = f"{size.strip()} on {len(names)} layers: {', '.join(kinds[:8])}{' ...' if len(kinds) > 8 else ''}"
    counts = [(p.numel(), p.requires_grad) for p in net.parameters()]
    mine, total = sum(n for n, trains in counts if trains), sum(n for n, _ in counts)
    return f"peft: {how.method}, {where.strip()}; {mine:,} of {total:,} parameters train ({mine / total:.2%})"


@torch.no_grad()
def follow_start(net: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give frozen weights the remainder that they had where the matrices began otherwise.

    PiSSA takes the first singular vectors out of the weight; on another machine, or of another weight that differs in
    the last bit, they come out otherwise.

    Args:
        net: Adapted.
        saved: Of a checkpoint, by the net's own names.
    """
    for name, module in net.named_modules():
        layer: Any = module
        keys = [f"{name}.start_{side}" for side in "AB"]
        if not hasattr(layer, "start_A") or keys[0] not in saved:
            continue
        theirs = [saved[key].to(layer.start_A) for key in keys]
        if not all(torch.equal(mine, its) for mine, its in zip((layer.start_A, layer.start_B), theirs, strict=True)):
            taken = layer.start_B @ layer.start_A - theirs[1] @ theirs[0]
            layer.get_base_layer().weight.add_(taken, alpha=layer.scaling["default"])


def _add_virtual(net: Any, how: Peft) -> None:
    encoder = getattr(net, "base_model", None)
    if encoder is None:
        raise ValueError(f"peft.method {how.method} is for texts; for images take lora, dora, ia3 or adapter")
    if how.method == "prompt":
        Prompt(encoder, net, how.tokens)
    else:
        add_prefixes(net, how.tokens)


def _inject(net: nn.Module, how: Peft, layers: Layers) -> None:
    """The library's layers, in place."""
    from peft import inject_adapter_in_model  # takes a second

    from .fused import fuse

    convolution = next((name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)), None)
    if how.start != "default" and convolution:
        raise ValueError(f"peft.start {how.start} is for linear layers, and {convolution} is a convolution")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(library_config(how, net, layers), net)
    fuse(net)
    for module in adapters(net).values() if how.start == "pissa" else ():
        layer: Any = module
        for side in "AB":
            layer.register_buffer(f"start_{side}", getattr(layer, f"lora_{side}")["default"].weight.detach().clone())


def library_config(how: Peft, net: nn.Module, layers: Iterable[str], **options: Any) -> Any:
    """The library's own configuration of a method.

    Args:
        how: Method and options.
        net: Before or after it is adapted.
        layers: Names of the layers to adapt.
        **options: Others of the library's.
    """
    from peft import IA3Config, LoraConfig

    if how.method == "ia3":
        names = list(layers)
        second = last_of_blocks(net, names)  # IA3 scales what goes into a feed-forward net's second layer
        return IA3Config(
            target_modules=names, feedforward_modules=second if len(second) < len(names) else [], **options
        )
    return LoraConfig(
        r=how.rank,
        lora_alpha=how.alpha,  # type: ignore[arg-type]
        lora_dropout=how.dropout,
        target_modules=list(layers),
        init_lora_weights=True if how.start == "default" else how.start,
        use_rslora=how.rank_stabilised,
        use_dora=how.method == "dora",
        **options,
    )


def _is_of_library(module: nn.Module) -> bool:
    return any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__)  # without importing it


def _matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    found = {pattern: [name for name in names if re.search(pattern, name)] for pattern in patterns}
    for pattern, matches in found.items():
        if not matches:
            words = sorted({part for name in names for part in name.split(".")})
            raise ValueError(f"peft.train: {pattern!r} matches no parameter{did_you_mean(pattern, words)}")
    return {name for matches in found.values() for name in matches}
