"""Weights between nets: the line from one to another, the mean of several, and how good it is there.

References:
    1. Wortsman et al. 2022, Robust fine-tuning of zero-shot models, https://arxiv.org/abs/2109.01903: the line from
       the net before fine-tuning to the one after it is often better at what was known than its end.
    2. Wortsman et al. 2022, Model soups, https://arxiv.org/abs/2203.05482: the mean of nets that were fine-tuned
       from the same start.
    3. Frankle et al. 2020, Linear mode connectivity, https://arxiv.org/abs/1912.05671: where between two nets there
       is a barrier, their mean is of no use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

Weights: TypeAlias = Mapping[str, Tensor]


def interpolate(start: Weights, end: Weights, at: float | Mapping[str, float]) -> Iterator[tuple[str, Tensor]]:
    """(1 - a) * start + a * end of each tensor of the end, one after the other.

    Bitwise the start's at 0 and the end's at 1. Tensors that the start lacks are the end's; so are integers, but at 0.

    Args:
        start: By name.
        end: By name, of the same shapes.
        at: The place on the line, a; below 0 or above 1 it lies beyond the ends. Or one for each name, 1 if not given.
    """
    for name, last in end.items():
        a, first = at.get(name, 1.0) if isinstance(at, Mapping) else at, start.get(name)
        if first is None or a == 1:
            yield name, last
        elif a == 0:
            yield name, first
        else:
            yield name, torch.lerp(first.float(), last.float(), a).to(last) if last.is_floating_point() else last


def mean_of(nets: Sequence[Weights]) -> Iterator[tuple[str, Tensor]]:
    """The mean of each tensor of several nets, one after the other; of one net, bitwise its own; integers: the first's.

    Args:
        nets: Each by name, of the same shapes.
    """
    for name, first in nets[0].items():
        if len(nets) == 1 or not first.is_floating_point():
            yield name, first
            continue
        total = first.double()
        for other in nets[1:]:
            total = total + other[name].double()
        yield name, (total / len(nets)).to(first)


def fill(net: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy weights into a net in place, tensor by tensor.

    Raises:
        KeyError: The net has no such tensor.
    """
    own = net.state_dict()
    for name, tensor in weights:
        own[name].copy_(tensor)


def remeasure_norms(net: nn.Module, batches: Callable[[], Iterable[Tensor]], run: Callable[[Tensor], object]) -> bool:
    """Measure anew the statistics of BatchNorm, which no mean of two nets' statistics is; False where there is none.

    Args:
        net: Whose layers keep statistics.
        batches: Gives the inputs.
        run: Runs the net on one of them.
    """
    norms = [module for module in net.modules() if getattr(module, "running_mean", None) is not None]
    if not norms:
        return False
    kept = [(norm, norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()  # type: ignore[operator]
        norm.training, norm.momentum = True, None  # type: ignore[assignment]  # the mean over all batches
    with torch.no_grad():
        for batch in batches():
            run(batch)
    for norm, momentum, training in kept:
        norm.momentum, norm.training = momentum, training  # type: ignore[assignment]
    return True


def barrier(values: Mapping[float, float], *, rises: bool) -> float:
    """How far the worst place on a line lies below what its ends lead to expect; 0 where none does (Frankle et al.).

    Args:
        values: A figure at each place, those at 0 and 1 among them.
        rises: Whether it gets better as it rises.
    """
    sign = 1 if rises else -1
    expected = {a: (1 - a) * values[0.0] + a * values[1.0] for a in values if 0 <= a <= 1}
    return max(0.0, *(sign * (expected[a] - values[a]) for a in expected))


def greedy(names: Sequence[str], score: Callable[[Sequence[str]], float]) -> tuple[str, ...]:
    """The soup that starts with the best net and takes in each other one that does it no harm (Wortsman et al.).

    Args:
        names: Of nets, the best first.
        score: Of the mean of some of them; the higher, the better.
    """
    chosen: tuple[str, ...] = (names[0],)
    best = score(chosen)
    for name in names[1:]:
        found = score((*chosen, name))
        if found >= best:
            chosen, best = (*chosen, name), found
    return chosen


def search_blocks(
    start: Mapping[str, float], grid: Sequence[float], score: Callable[[Mapping[str, float]], float]
) -> dict[str, float]:
    """A place for each block, changed one block after the other, from the last to the first, where that is better.

    Args:
        start: The place of each block to begin with, input to output.
        grid: Places to try.
        score: Of places; the higher, the better.
    """
    chosen = dict(start)
    best = score(chosen)
    for block in reversed(chosen):
        for a in grid:
            if a != chosen[block]:
                found = score(chosen | {block: a})
                if found > best:
                    chosen, best = chosen | {block: a}, found
    return chosen
