"""Smaller nets: channels and hidden units cut out of them, zeros that take no room, and what a net costs.

A net whose channels were cut has other shapes than its architecture says. What changed is noted as plain numbers
(`changes`), so that the architecture, built anew, can be brought into shape (`reshape`) without the tool that cut it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Numbers = dict[str, dict[str, Any]]  # path of a module -> its attributes that are whole numbers, or tuples of these


@torch.no_grad()
def macs(net: nn.Module, run: Callable[[nn.Module], Any]) -> int:
    """Multiplications with additions of a call of a net, those of products and convolutions."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for parameter in trained:  # the counter takes a parameter that is given to a module for an input with a gradient
        parameter.requires_grad = False
    try:
        with FlopCounterMode(display=False) as counter:
            run(net)
    finally:
        for parameter in trained:
            parameter.requires_grad = True
    return int(counter.get_total_flops()) // 2


def numbers_of(net: nn.Module) -> Numbers:
    """Sizes that modules know of themselves: channels, features, groups, heads."""
    found = {}
    for path, module in net.named_modules():
        own = {name: value for name, value in vars(module).items() if _is_size(value) and not name.startswith("_")}
        found[path] = own | ({"normalized_shape": tuple(module.normalized_shape)} if _has_shape(module) else {})
    return found


def changes(net: nn.Module, before: Numbers) -> Numbers:
    """The sizes that are others now, to be kept with the weights."""
    found = {path: {k: v for k, v in own.items() if before[path].get(k) != v} for path, own in numbers_of(net).items()}
    return {path: own for path, own in found.items() if own}


def reshape(net: nn.Module, sizes: Numbers, state: Mapping[str, Tensor]) -> None:
    """Bring a net into the shape of weights that are about to be loaded; its parameters stay the same objects.

    Args:
        net: As its architecture says.
        sizes: Of `changes`.
        state: The weights, by the net's names.
    """
    for path, own in sizes.items():
        for name, value in own.items():
            setattr(net.get_submodule(path), name, tuple(value) if isinstance(value, list) else value)
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        wanted = state.get(name)
        if wanted is not None and wanted.shape != tensor.shape:
            kind = torch.contiguous_format if tensor.is_contiguous() else torch.channels_last
            tensor.data = torch.zeros_like(wanted, dtype=tensor.dtype, device=tensor.device, memory_format=kind)
            tensor.grad = None


def cut_channels(
    net: nn.Module,
    run: Callable[[nn.Module], Any],
    share: float,
    *,
    only: Iterable[nn.Module] = (),
    kept: Iterable[nn.Module] = (),
    at_once: int = 50,
) -> None:
    """Cut out channels, with all that depends on them, those of the smallest weights, until a share of MACs is gone.

    In place, by Torch-Pruning (Fang et al. 2023, https://arxiv.org/abs/2301.12900).

    Args:
        net: In evaluation mode.
        run: Calls the net; what it returns need not be a tensor.
        share: Of the multiplications, above 0 and below 1.
        only: Layers that may lose outputs, each the same share of them; by default all may, ranked together.
        kept: Layers that keep their outputs: the last one, for a start.
        at_once: Bites until nothing is left; the more, the nearer the result is to the share.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: It can't follow the net; or the share can't be reached.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"the share of multiplications to cut must be above 0 and below 1; received {share:g}")
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError('cutting channels needs Torch-Pruning: pip install "finetuning-recipes[compress]"') from error
    chosen, whole = set(only), macs(net, run)
    kept = [*kept, *(m for m in net.modules() if chosen and m not in chosen and isinstance(m, CUTTABLE))]
    try:
        pruner = torch_pruning.pruner.BasePruner(
            net,
            None,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=not chosen,
            pruning_ratio=0.98,
            max_pruning_ratio=0.9,
            iterative_steps=at_once,
            ignored_layers=kept,
            round_to=4,
            forward_fn=lambda model, _: run(model),
        )
        for _ in range(at_once):
            pruner.step()
            if macs(net, run) <= (1 - share) * whole:
                return
    except (IndexError, RuntimeError, KeyError, AttributeError, TypeError, AssertionError) as error:
        raise ValueError(f"channels of this net can't be cut: Torch-Pruning can't follow it ({error})") from error
    left = macs(net, run) / whole
    raise ValueError(f"no more than {1 - left:.2f} of the multiplications can be cut; {share:g} was asked for")


CUTTABLE = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.LayerNorm)


def pack_zeros(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """A state's tensors without many zeros, and those with: as bits that say where, and the values.

    Only what gets smaller is packed.
    """
    dense, packed = {}, {}
    for name, tensor in state.items():
        there = tensor != 0
        values = tensor[there]
        if values.nbytes + tensor.numel() / 8 < 0.9 * tensor.nbytes:
            packed[name] = {"bits": _bits(there), "values": values, "shape": list(tensor.shape)}
        else:
            dense[name] = tensor
    return dense, packed


def unpack_zeros(packed: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors that `pack_zeros` packed, bit for bit."""
    found = {}
    for name, one in packed.items():
        there = (one["bits"][:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()
        whole = one["values"].new_zeros(math.prod(one["shape"]))
        whole[there[: len(whole)]] = one["values"]
        found[name] = whole.view(one["shape"])
    return found


def _bits(there: Tensor) -> Tensor:
    rows = nn.functional.pad(there.flatten().to(torch.uint8), (0, -there.numel() % 8)).view(-1, 8)
    return (rows << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def _is_size(value: Any) -> bool:
    return type(value) is int or (type(value) is tuple and bool(value) and all(type(one) is int for one in value))


def _has_shape(module: nn.Module) -> bool:
    return isinstance(getattr(module, "normalized_shape", None), tuple)
