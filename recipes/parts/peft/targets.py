"""Which layers of a net an adapter goes to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from ..spelling import did_you_mean, some
from .options import LOW_RANK, Peft

Layers: TypeAlias = dict[str, nn.Module]  # in the order in which they are called
KINDS = (nn.Linear, nn.Conv2d)
BLOCK = re.compile(
    r"(Layer|Block|Bottleneck|Residual|MBConv|SeparableConv)(V\d)?$"
)  # names of residual blocks' classes
BESIDE = re.compile(r"(^|\.)(downsample|shortcut|se)(\.|$)")  # called after a block's last layer, and not its output
ATTENTION = re.compile(
    r"(^|\.)(q|k|v|o|query|key|value|q_lin|k_lin|v_lin|out_lin|(query|key|value|out)_proj|Wqkv|to_qkv|qkv)$|attn\.(proj|Wo)$|"
    r"attention\.(output\.)?dense$"
)
SCALED = re.compile(
    r"(^|\.)(k|v|key|value|k_lin|v_lin|key_proj|value_proj|Wqkv|to_qkv|qkv)$"
)  # by IA3, at their outputs


@torch.no_grad()
def called_layers(net: nn.Module, run: Callable[[], Any]) -> Layers:
    """Linear layers and convolutions in the order in which a forward pass calls them.

    What is not among them is not called as a layer: torchvision's attention hands the weights of its layers to a
    function, and an adapter there would do nothing.

    Args:
        net: The net; its modes and statistics are left as they are.
        run: Runs it once, on whatever input.
    """
    names: dict[nn.Module, str] = {m: name for name, m in net.named_modules() if isinstance(m, KINDS)}
    called: Layers = {}

    def note(module: nn.Module, *_: Any) -> None:
        called.setdefault(names[module], module)

    hooks = [module.register_forward_hook(note) for module in names]
    modes = {module: module.training for module in net.modules()}
    try:
        net.eval()
        run()
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return called


def choose_layers(net: nn.Module, how: Peft, blocks: Mapping[str, Sequence[str]], called: Layers) -> Layers:
    """The layers to adapt.

    Args:
        net: The net.
        how: Its `method` and `targets`.
        blocks: Ordered, input to output; the first, a `pooler` and a `head` are left out unless patterns name them.
        called: From `called_layers`.

    Raises:
        ValueError: There is none; a pattern names no layer, one that is never called, a grouped convolution of too
            many groups for LoRA.
    """
    inner = [path for name, paths in list(blocks.items())[1:] if name not in ("pooler", "head") for path in paths]
    within = {name: layer for name, layer in called.items() if any(is_inside(name, path) for path in inner)}
    dense = {name: layer for name, layer in within.items() if getattr(layer, "groups", 1) == 1}
    if isinstance(how.targets, list):
        return _named(net, how, blocks, called)
    if how.targets == "attention":
        chosen = {name: layer for name, layer in dense.items() if ATTENTION.search(name)}
    elif how.targets == "all" or how.method in LOW_RANK:
        chosen = dense
    else:
        last = last_of_blocks(net, dense)
        if how.method == "adapter":
            chosen = {name: dense[name] for name in last}
        else:  # IA3: keys, values, and the input of each feed-forward net's second layer; every channel of a CNN
            scaled = [name for name in dense if SCALED.search(name)]
            chosen = {n: dense[n] for n in [*scaled, *last]} if scaled else dense
    if not chosen:
        raise ValueError(
            f"peft.targets {how.targets or 'by default'}: {type(net).__name__} has no such layer; name some of "
            f"{some(sorted(dense)) or 'none'}"
        )
    return chosen


def last_of_blocks(net: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the last layer of each innermost residual block or, of a net without any, of all layers."""
    last: dict[str, str] = {}
    names = [name for name, module in net.named_modules() if BLOCK.search(type(module).__name__)]
    for name in layers:
        home = max((block for block in names if name.startswith(f"{block}.")), key=len, default=None)
        if home is not None and not BESIDE.search(name):
            last[home] = name
    return list(last.values()) or list(layers)


def _named(net: nn.Module, how: Peft, blocks: Mapping[str, Sequence[str]], called: Layers) -> Layers:
    """Those that patterns name, outside of the head."""
    head = blocks.get("head", ())
    known = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, KINDS) and not any(is_inside(name, path) for path in head)
    }
    chosen: Layers = {}
    for pattern in how.targets or ():
        found = [name for name in known if re.search(pattern, name)]
        if not found:
            raise ValueError(f"peft.targets: {pattern!r} names no layer{did_you_mean(pattern, _words(known))}")
        chosen |= {name: known[name] for name in found}
    idle = [name for name in chosen if name not in called]
    if idle:
        raise ValueError(
            f"peft.targets: {some(idle)} is never called as a layer: its net hands the weight to a function, and an "
            "adapter there would do nothing; name others"
        )
    grouped = [n for n, layer in chosen.items() if getattr(layer, "groups", 1) > 1]
    if grouped and how.method != "ia3":
        raise ValueError(
            f"peft.targets: {some(grouped)} is a grouped convolution, which {how.method} does not adapt; name others"
        )
    return {name: chosen[name] for name in called if name in chosen}


def _words(names: Iterable[str]) -> list[str]:
    return sorted({part for name in names for part in [name, *name.split(".")]})


def is_inside(name: str, path: str) -> bool:
    """Whether a dotted name is a path, or one below it."""
    return name == path or name.startswith(f"{path}.")
