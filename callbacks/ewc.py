"""Elastic weight consolidation: learn a new task while the weights that mattered to the old ones are held.

The maths comes first, as functions for any loop: the Fisher information of a classifier, exact and per sample
(`fisher_diagonal`), and the penalty's value, gradient and proximal step. Then the callback.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import itertools
import json
import logging
import random
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, cast, get_args

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset, IterableDataset

log = logging.getLogger(__name__)

Tensors: TypeAlias = Mapping[str, Tensor]
Estimator: TypeAlias = Literal["auto", "exact", "signs", "sampled", "empirical"]
Way: TypeAlias = Literal["auto", "layers", "loop", "vmap"]
Reading: TypeAlias = Literal["first", "second", "shared"]

IGNORED = -100  # the label of a sample that does not count, as in torch's losses
EXACT_CLASSES = 10  # up to so many classes the exact expectation is worth its backward passes
BLOCK = 1 << 20  # numbers of each tensor that the penalty works on at a time on a CPU, for its cache
SQUARES = 1 << 18  # numbers of per-sample gradients at a time on a CPU, likewise
FISHER_BATCH = 16  # samples at a time at most; the result does not depend on it
READINGS: tuple[Reading, ...] = ("first", "second", "shared")
LABELS = ("label", "labels")
FORMAT = "ewc-fisher 1"
NO_LABELS = "the empirical Fisher needs true labels, and the batches bring none; take the estimator exact"


# The penalty


def penalty(parameters: Tensors, anchor: Tensors, fisher: Tensors, strength: float) -> Tensor:
    """Value of strength / 2 * sum F (theta - theta*)^2, the half included; differentiable.

    Args:
        parameters: theta by name; those without an anchor do not count.
        anchor: theta*, the weights after the old task.
        fisher: F, in the anchor's shapes.
        strength: Weight of the penalty.
    """
    moved = {name: parameters[name] - anchor[name] for name in fisher}
    return strength / 2 * torch.stack([(fisher[name] * d.square()).sum() for name, d in moved.items()]).sum()


@torch.no_grad()
def add_penalty_gradient_(parameters: Tensors, anchor: Tensors, fisher: Tensors, strength: float) -> None:
    """Adds the gradient of `penalty`, strength * F (theta - theta*), to `.grad`, which is made where there is none.

    Frozen parameters are left alone. Gradient descent on it diverges where rate * strength * F passes 2.

    Raises:
        RuntimeError: A gradient is sparse.
    """
    names = [name for name in fisher if name in parameters and parameters[name].requires_grad]
    for name in names:
        if (gradient := parameters[name].grad) is None:
            parameters[name].grad = torch.zeros_like(parameters[name])
        elif gradient.layout != torch.strided:
            raise RuntimeError(
                f"{name} has a sparse gradient, and the penalty's is dense; take EWC's mode proximal, or sparse=False"
            )
    gradients = {name: cast(Tensor, parameters[name].grad) for name in names}
    columns = [[table[name] for name in names] for table in (parameters, anchor, fisher, gradients)]
    if names and columns[0][0].device.type != "cpu":
        weights, anchors, fishers, grads = columns
        torch._foreach_addcmul_(grads, torch._foreach_sub(weights, anchors), fishers, strength)
        return
    for _, scratch, (w, a, f, g) in _pieces(columns):
        g.addcmul_(torch.sub(w, a, out=scratch), f, value=strength)


@torch.no_grad()
def proximal_step_(
    parameters: Tensors, anchor: Tensors, fisher: Tensors, coefficients: Mapping[str, float | Tensor]
) -> None:
    """Implicit step on the penalty: theta <- (theta + c F theta*) / (1 + c F), which diverges for no c.

    Args:
        parameters: theta by name, changed in place; frozen ones are left alone.
        anchor: theta*.
        fisher: F.
        coefficients: c = rate * strength by name; parameters without one are left alone.
    """
    names = [
        name
        for name, c in coefficients.items()
        if name in fisher and parameters[name].requires_grad and (isinstance(c, Tensor) or c > 0)
    ]
    # The share F / (F + 1 / c) of the way back is the same as c F / (1 + c F), and overflows for no c.
    inverse = [1 / coefficients[name] for name in names]
    columns = [[table[name] for name in names] for table in (parameters, anchor, fisher)]
    if names and columns[0][0].device.type != "cpu":
        weights, anchors, fishers = columns
        if any(isinstance(k, Tensor) for k in inverse):
            inverse = [
                torch.as_tensor(k, dtype=f.dtype, device=f.device) for k, f in zip(inverse, fishers, strict=True)
            ]
        share = torch._foreach_div(fishers, torch._foreach_add(fishers, inverse))  # type: ignore[arg-type]
        torch._foreach_lerp_(weights, anchors, share)
        return
    for row, scratch, (w, a, f) in _pieces(columns):
        torch.add(f, inverse[row], out=scratch)
        w.lerp_(a, torch.div(f, scratch, out=scratch))


def _pieces(columns: Sequence[Sequence[Tensor]]) -> Iterator[tuple[int, Tensor, tuple[Tensor, ...]]]:
    """Cuts matching tensors into pieces that stay in a CPU's cache; with their row and memory to work in."""
    scratch: dict[torch.dtype, Tensor] = {}
    for row, tensors in enumerate(zip(*columns, strict=True)):
        first = tensors[0]
        if not all(t.is_contiguous() for t in tensors):
            yield row, torch.empty_like(first), tensors
            continue
        if first.dtype not in scratch:
            scratch[first.dtype] = first.new_empty(BLOCK)
        for piece in zip(*(t.view(-1).split(BLOCK) for t in tensors), strict=True):
            yield row, scratch[first.dtype][: len(piece[0])], piece


def merge(
    first: tuple[Tensors, Tensors], second: tuple[Tensors, Tensors], decay: float | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Two tasks' (Fisher, anchor) as one: what a step costs does not grow with the number of tasks.

    A sum of quadratics is a quadratic: with separate anchors, and for all theta,

        sum F1 (theta - theta1)^2 + sum F2 (theta - theta2)^2  =  sum F (theta - anchor)^2 + constant

    where F = F1 + F2 and the anchor is the mean of the two, weighted with F1 and F2.

    Args:
        first: Of the older task or tasks.
        second: Of the newer one; the names may differ.
        decay: None for separate anchors. A number for the online form: F = decay * F1 + F2 at the newest anchor
            (Schwarz et al. 2018, https://arxiv.org/abs/1805.06370).

    Returns:
        Fisher, anchor and the constant.
    """
    (old, old_anchor), (new, new_anchor) = first, second
    fisher, anchor, constant = {**old, **new}, {**old_anchor, **new_anchor}, 0.0
    for name in old.keys() & new.keys():
        one, at_one, two, at_two = (t.float() for t in (old[name], old_anchor[name], new[name], new_anchor[name]))
        if decay is not None:
            fisher[name] = decay * one + two
            continue
        fisher[name] = one + two
        share = torch.where(fisher[name] > 0, two / fisher[name], 1.0)
        anchor[name] = torch.lerp(at_one, at_two, share)
        constant += float((one * share * (at_one - at_two).square()).sum(dtype=torch.float64))
    if decay is not None:
        fisher |= {name: decay * old[name] for name in old.keys() - new.keys()}
    return fisher, anchor, constant


# The Fisher information


def fisher_diagonal(
    logits: Callable[[Any], Tensor],
    batches: Iterable[Any],
    parameters: Mapping[str, nn.Parameter],
    *,
    module: nn.Module,
    labels: Callable[[Any], Tensor | None] = lambda batch: None,
    positions: Iterable[int] | None = None,
    estimator: Estimator = "auto",
    draws: int = 1,
    seed: int = 0,
    way: Way = "auto",
) -> tuple[dict[str, Tensor], int]:
    """Diagonal of a classifier's Fisher information: mean over samples of E[(d log p(y|x) / d theta)^2].

    Gradients are squared sample by sample, so the batch size has no influence. Modules are in evaluation mode,
    in float32 (or 64) and outside autocast meanwhile; all is put back, and `.grad` is not touched.

    Args:
        logits: From a batch to logits `(batch, classes)`, through `module`.
        batches: Tensors in tuples, lists, dictionaries or alone, with the samples in their first dimension.
        parameters: Those to differentiate by, by name.
        module: All modules that take part.
        labels: From a batch to labels `(batch,)`; a sample labelled -100 does not count.
        positions: A number for each sample, from which its draws are made; 0, 1, 2, ... if not given.
        estimator: `exact`: expectation over all classes, a backward pass for each but one. `signs`: over `draws`
            random combinations of all classes. `sampled`: over `draws` labels from the model's own distribution.
            All three have the same expectation. `empirical`: at the true labels, which is another quantity and
            vanishes as the fit gets better (Kunstner et al. 2019, https://arxiv.org/abs/1905.12558). `auto`: exact
            for up to 10 classes, else signs.
        draws: Backward passes per sample, for `signs` and `sampled`.
        seed: Of the draws.
        way: How per-sample gradients are made; all agree. `layers`: whole batches, from the inputs of layers and
            the gradients of their outputs. `loop`: one sample at a time, for any model. `vmap`: by torch.func.
            `auto`: layers where these account for all parameters, as a trial on the first samples tells; else
            vmap on a GPU and the loop on a CPU.

    Returns:
        The mean by name, zeros if nothing counted, and the number of samples that did.

    Raises:
        ValueError: No logits of shape (batch, classes); `empirical` without labels; `layers` does not account for
            a parameter.
        TypeError: Batches that cannot be cut into samples.
    """
    numbers = iter(itertools.count() if positions is None else positions)
    count, squares = 0, None
    with _evaluating(module):
        for batch in batches:
            if squares is None:
                squares = _Squares(logits, batch, parameters, module, way)
            size = squares.size(batch)
            known = labels(batch)
            if known is None and estimator == "empirical":
                raise ValueError(NO_LABELS)
            numbered = list(itertools.islice(numbers, size))

            def vectors(
                z: Tensor, rows: slice, known: Tensor | None = known, numbered: Sequence[int] = numbered
            ) -> Iterator[Tensor]:
                return score_vectors(
                    z,
                    choose_estimator(estimator, z.shape[1]),
                    labels=None if known is None else known[rows],
                    positions=numbered[rows],
                    draws=draws,
                    seed=seed,
                )

            squares.add(batch, vectors)
            count += size if known is None else int((known != IGNORED).sum())
    if squares is None:
        return {name: torch.zeros_like(p, dtype=_wide(p.dtype)) for name, p in parameters.items()}, 0
    return {name: (total / max(count, 1)).contiguous() for name, total in squares.totals.items()}, count


def choose_estimator(estimator: Estimator, classes: int) -> Estimator:
    """What `auto` means for a number of classes."""
    if estimator == "auto":
        return "exact" if classes <= EXACT_CLASSES else "signs"
    return estimator


def score_vectors(
    logits: Tensor,
    estimator: Estimator = "exact",
    *,
    labels: Tensor | None = None,
    positions: Sequence[int] = (),
    draws: int = 1,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Vectors v, one backward pass each, whose sum of v v^T is the Fisher information of the logits.

    That is diag(p) - p p^T, in expectation; the Fisher of the weights follows as the sum of the squared gradients
    of v . logits.

    * `exact` takes one vector fewer than classes: a choice among n classes is n - 1 choices, each between a class
      and those after it, which is the Cholesky factor of diag(p) - p p^T (Tanabe & Sagae 1992).
    * `signs` takes s - p sum(s) at s = sqrt(p) with random signs: all classes take part in each, so the variance is
      small (for diagonals in general: Bekas et al. 2007, https://doi.org/10.1016/j.apnum.2007.01.003).
    * `sampled` takes onehot(y) - p at labels y whose quantiles lie evenly. Once a model is sure of its labels,
      the rare other ones carry nearly all of the Fisher, and few draws tell little about it.

    Args:
        logits: `(batch, classes)`.
        estimator: `exact`, `signs`, `sampled` or `empirical`.
        labels: `(batch,)`; needed for `empirical`. Samples labelled -100 get zeros.
        positions: A number per sample, which with the seed makes its draws.
        draws: Vectors, for `signs` and `sampled`.
        seed: Of the draws.

    Yields:
        `(batch, classes)`, detached, like the logits.
    """
    log_p = logits.detach().cpu().double().log_softmax(-1).clamp(min=-1e3)  # -inf would make differences of infinities
    counted = 1.0 if labels is None else (labels != IGNORED).unsqueeze(1).to(log_p)
    classes = log_p.shape[1]
    if estimator == "exact":
        rest = log_p.flip(1).logcumsumexp(1).flip(1)  # log of the sum of p from each class on
        for k in range(classes - 1):
            here, after = rest[:, k, None], rest[:, k + 1, None]
            column = -torch.exp(log_p + (log_p[:, k, None] - here - after) / 2)
            column[:, :k] = 0
            column[:, k] = torch.exp((log_p[:, k, None] + after - here) / 2).squeeze(1)
            yield (column * counted).to(logits)
        return
    p = log_p.exp()
    if estimator == "empirical":
        scores = [F.one_hot(cast(Tensor, labels).cpu().clamp(min=0), classes) - p]
    else:
        generators = [torch.Generator().manual_seed(random.Random(f"{seed} {at}").getrandbits(63)) for at in positions]
        if estimator == "signs":
            signs = torch.stack([torch.randint(2, (draws, classes), generator=g) * 2 - 1 for g in generators], 1)
            mixed = p.sqrt() * signs  # (draws, batch, classes)
            scores = list(mixed - p * mixed.sum(2, keepdim=True))
        else:
            starts = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
            quantiles = (starts.unsqueeze(1) + torch.arange(draws)) / draws
            drawn = torch.searchsorted(p.cumsum(1), quantiles).clamp(max=classes - 1)
            scores = [F.one_hot(y, classes) - p for y in drawn.T]
    for score in scores:
        yield (score * counted / len(scores) ** 0.5).to(logits)


def _check_logits(z: Any) -> Tensor:
    if not isinstance(z, Tensor) or z.dim() != 2 or z.shape[1] < 2:
        found = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"expected logits of shape (batch, classes) with 2 classes or more, received {found}")
    if torch.is_grad_enabled() and not z.requires_grad:
        raise ValueError(
            "the logits depend on no trained parameter; is there a no_grad or a detach on the way to them?"
        )
    return z


class _Squares:
    """Sums over samples of squared gradients, made in one of three ways."""

    def __init__(
        self,
        logits: Callable[[Any], Tensor],
        batch: Any,
        parameters: Mapping[str, nn.Parameter],
        module: nn.Module,
        way: Way,
    ) -> None:
        self.logits, self.module, self.parameters = logits, module, parameters
        self.readings: dict[str, Reading] = {}
        self.path: dict[str, list[type[_Use]]] = {}
        self.leaf = self.find_samples(batch)
        self.way = self.choose(batch, self.size(batch), way)
        self.totals = {name: self.zeros(p) for name, p in parameters.items()}

    def zeros(self, parameter: Tensor) -> Tensor:
        """Where sums of squares are collected; for convolutions of whole batches tap by tap."""
        dtype = _wide(parameter.dtype)
        if self.way == "layers" and parameter.dim() == 4:
            out, channels, *taps = parameter.shape
            return parameter.new_zeros(*taps, out, channels, dtype=dtype).permute(2, 3, 0, 1)
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)

    def find_samples(self, batch: Any) -> int:
        """Which tensor of a batch tells how many samples it has: cutting there leaves as many rows of logits."""
        failure: Exception | None = None
        for index, t in enumerate(_tensors(batch)):
            if t.dim():
                try:
                    if len(self.checked(_cut(batch, 0, 2, len(t)))) == min(2, len(t)):
                        return index
                except Exception as error:  # of the net's own, where it is not the samples that were cut
                    failure = failure or error
        raise failure or TypeError(
            f"no tensor of the batch, a {type(batch).__name__}, has its samples in the first dimension; batches must "
            "be tensors in tuples, lists or dictionaries"
        )

    def size(self, batch: Any) -> int:
        """Samples in a batch."""
        return len(_tensors(batch)[self.leaf])

    def checked(self, batch: Any) -> Tensor:
        """Logits, if they are any."""
        return _check_logits(self.logits(batch))

    def add(self, batch: Any, vectors: Callable[[Tensor, slice], Iterator[Tensor]]) -> None:
        """Adds a batch's squares."""
        size = self.size(batch)
        if self.way == "layers":
            self.add_layers(batch, size, vectors, self.totals)
        elif self.way == "vmap":
            self.add_vmap(batch, size, vectors, self.totals)
        else:
            self.add_loop(batch, size, vectors, self.totals)

    def add_loop(self, batch: Any, size: int, vectors: Any, totals: Mapping[str, Tensor]) -> None:
        """One sample at a time."""
        for row in range(size):
            z = self.checked(_cut(batch, row, row + 1, size))
            if len(z) != 1:
                raise TypeError(f"a batch of 1 gave {len(z)} rows of logits; batches must hold samples first")
            for v in vectors(z, slice(row, row + 1)):
                gradients = torch.autograd.grad(
                    z, list(self.parameters.values()), v, retain_graph=True, allow_unused=True
                )
                used = [(totals[name], g) for name, g in zip(self.parameters, gradients, strict=True) if g is not None]
                if used:
                    sums, squared = zip(*used, strict=True)
                    torch._foreach_addcmul_(sums, squared, squared)

    def add_vmap(self, batch: Any, size: int, vectors: Any, totals: dict[str, Tensor]) -> None:
        """Several samples at a time, by torch.func."""
        call = _Call(self.module, self.logits)
        names = {id(p): name for name, p in call.named_parameters()}
        values = {names[id(p)]: p.detach() for p in self.parameters.values()}
        with torch.no_grad():
            stacked = torch.stack(list(vectors(self.checked(batch), slice(0, size))), 1)
        step = max(1, (1 << 27) // sum(p.numel() for p in values.values()))

        def squares(leaves: list[Tensor], sized: list[bool], of_sample: Tensor) -> dict[str, Tensor]:
            sample = _rebuild(batch, [t.unsqueeze(0) if yes else t for t, yes in zip(leaves, sized, strict=True)])
            found = torch.func.vjp(lambda v: torch.func.functional_call(call, v, (sample,))[0], values)
            pulled = [found[1](v)[0] for v in of_sample]
            return {name: sum(g[name].square() for g in pulled) for name in values}  # type: ignore[misc]

        for start in range(0, size, step):
            piece = _tensors(_cut(batch, start, start + step, size))
            sized = [t.shape[:1] == (size,) for t in _tensors(batch)]
            dims = [0 if yes else None for yes in sized]
            mapped = torch.vmap(lambda leaves, v, sized=sized: squares(leaves, sized, v), in_dims=(dims, 0))
            found = mapped(piece, stacked[start : start + step])
            for name, p in self.parameters.items():
                totals[name] += found[names[id(p)]].sum(0)

    def add_layers(
        self, batch: Any, size: int, vectors: Any, totals: Mapping[str, Tensor], *, trial: bool = False
    ) -> set[str]:
        """A batch at a time; a trial returns the parameters that it cannot account for, instead of raising."""
        calls = _Calls(self.parameters, size, self.readings)
        with calls:
            z = self.checked(batch)
        path = {name: [type(use) for use in uses] for name, uses in calls.uses.items()}
        if trial:
            self.path = path
        elif path != self.path or calls.elsewhere:  # this batch goes another way through the net than the first
            self.add_loop(batch, size, vectors, totals)
            return calls.elsewhere
        for v in vectors(z, slice(0, size)):
            gradients = torch.autograd.grad(z, calls.edges, v, retain_graph=True, allow_unused=True)
            for name in calls.uses.keys() & totals.keys():
                live = [(use, g) for use in calls.uses[name] if (g := gradients[use.edge]) is not None]
                try:
                    _add_uses(live, size, totals[name])
                except Exception:
                    if not trial:
                        raise
                    calls.elsewhere.add(name)
        return calls.elsewhere

    def choose(self, batch: Any, size: int, way: Way) -> Way:
        """Whether layers account for all parameters, and how they have their samples lie, by trial."""
        if way in ("loop", "vmap"):
            return way
        if size == 1:  # which tells nothing, and is the same
            return "loop"
        few = 2
        trial = _cut(batch, 0, few, size)
        generator = torch.Generator().manual_seed(0)

        def vectors(z: Tensor, rows: slice) -> Iterator[Tensor]:
            generator.manual_seed(0)
            yield torch.randn(few, z.shape[1], generator=generator).to(z)[rows]

        expected = {name: torch.zeros_like(p, dtype=_wide(p.dtype)) for name, p in self.parameters.items()}
        self.add_loop(trial, few, vectors, expected)
        noise = 1e-10 * max(float(t.max()) for t in expected.values())
        missing = set(self.parameters)
        for reading in READINGS:
            self.readings |= dict.fromkeys(missing, reading)
            found = {name: torch.zeros_like(expected[name]) for name in missing}
            try:
                elsewhere = self.add_layers(trial, few, vectors, found, trial=True)
            except Exception:  # whatever the net says to it: samples do not lie so
                continue
            for name in sorted(missing - elsewhere):
                off = float((found[name] - expected[name]).abs().max())
                if off <= noise + 0.01 * float(expected[name].max()):
                    missing.discard(name)
            if not missing:
                return "layers"
        if way == "layers":
            raise ValueError(f"no known layer accounts for {_some(sorted(missing))}; take way='loop'")
        if next(iter(self.parameters.values())).device.type != "cpu":
            with contextlib.suppress(RuntimeError):  # torch.func knows not everything
                self.add_vmap(trial, few, vectors, expected)
                return "vmap"
        log.info("EWC: no known layer accounts for %s: per-sample gradients one by one", _some(sorted(missing)))
        return "loop"


class _Call(nn.Module):
    """A function that calls a module, as a module, for functional_call."""

    def __init__(self, module: nn.Module, function: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.module, self.held = module, (function,)  # in a tuple: it may be the module, which must not be here twice

    def forward(self, batch: Any) -> Tensor:
        return self.held[0](batch)


class _Calls(TorchFunctionMode):
    """Keeps what per-sample gradients need of each call of torch that a parameter takes part in."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], size: int, readings: Mapping[str, Reading]) -> None:
        super().__init__()
        self.size, self.readings = size, readings
        self.known: dict[int, _Known] = {id(p): _Known(name, p) for name, p in parameters.items()}
        self.uses: dict[str, list[_Use]] = {}
        self.edges: list[GradientEdge] = []  # where gradients with respect to the calls' outputs come by
        self.elsewhere: set[str] = set()  # parameters that something else works with

    def __torch_function__(
        self, func: Any, types_: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        given += [inner for value in given if isinstance(value, (list, tuple)) for inner in value]
        known = [self.known[id(value)] for value in given if id(value) in self.known]
        if not known:
            return func(*args, **kwargs)
        rule = RULES.get(func) or RULES.get(getattr(func, "__name__", ""))
        if rule is None and _is_composite(func):
            with self:
                return _seen_through(func)(*args, **kwargs)
        names = {one.name for one in known}
        readings = {name: self.readings.get(name, "first") for name in names}
        if (
            rule is not None and "shared" in readings.values()
        ):  # by all samples, as positions' numbers are: give each its own
            shared = args[0] if args[0].shape[0] == 1 else args[0].unsqueeze(0)
            args = (shared.expand(self.size, *shared.shape[1:]), *args[1:])
        out = func(*args, **kwargs)
        several = isinstance(out, (list, tuple))
        outputs = {
            index: t
            for index, t in enumerate(out if several else [out])
            if isinstance(t, Tensor) and t.requires_grad and id(t) not in self.known
        }
        if not outputs:  # a shape, a type, a detached copy
            return out
        if rule is not None:
            with torch.no_grad():
                for parameter, use in rule(out, *args, **kwargs):
                    if (one := self.known.get(id(parameter))) is not None and use is not None:
                        use.size, use.reading, use.edge, use.view = (
                            self.size,
                            readings[one.name],
                            len(self.edges),
                            one.view,
                        )
                        self.uses.setdefault(one.name, []).append(use)
                        names.discard(one.name)
            self.edges.append(get_gradient_edge(out))  # not the tensor: what follows may change it in place
        elif args and (one := self.known.get(id(args[0]))) is not None and _are_views(outputs.values(), one.tensor):
            for index, t in outputs.items():
                again = functools.partial(_view_again, one.view, func, args[1:], kwargs, index if several else None)
                self.known[id(t)] = _Known(one.name, t, again)
            names.discard(one.name)
        self.elsewhere |= names
        return out


@dataclass
class _Known:
    """A parameter, or a view of one with what makes the same view of any tensor of its shape."""

    name: str
    tensor: Tensor  # kept, so that no other takes over its id
    view: Callable[[Tensor], Tensor] = lambda t: t


def _are_views(outputs: Iterable[Tensor], base: Tensor) -> bool:
    return all(t.untyped_storage().data_ptr() == base.untyped_storage().data_ptr() for t in outputs)


def _view_again(
    view: Callable[[Tensor], Tensor], func: Any, rest: Any, kwargs: Any, index: int | None, t: Tensor
) -> Tensor:
    """The view of a view of t that a call made of a parameter."""
    found = func(view(t), *rest, **kwargs)
    seen = cast(Tensor, found if index is None else found[index])
    if not _are_views([seen], t):
        raise ValueError("not a view in this memory layout")
    return seen


def _is_composite(func: Any) -> bool:
    """Whether a function of torch is made of others, such as multi_head_attention_forward."""
    return isinstance(func, types.FunctionType) and any(n.startswith("has_torch_function") for n in _names_in(func))


def _seen_through(func: types.FunctionType) -> Callable[..., Any]:
    """The same function, without asking for overrides of itself, so that those of its parts are asked for."""
    scope = {name: (lambda *_: False) for name in _names_in(func) if name.startswith("has_torch_function")}
    opened = types.FunctionType(
        func.__code__, {**func.__globals__, **scope}, func.__name__, func.__defaults__, func.__closure__
    )
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened


def _names_in(func: types.FunctionType) -> tuple[str, ...]:
    return func.__code__.co_names


def _add_uses(uses: Sequence[tuple[_Use, Tensor]], size: int, total: Tensor) -> None:
    """Adds the squares of one parameter; what is used more than once is summed for each sample first."""
    if len(uses) == 1:
        use, g = uses[0]
        use.add_squares(g, use.view(total))
        return
    for row in range(size if uses else 0):
        of_sample = torch.zeros_like(total)
        for use, g in uses:
            part = use.view(of_sample)
            part += use.gradients(g, slice(row, row + 1)).view_as(part)
        total.addcmul_(of_sample, of_sample)


@dataclass
class _Use:
    """One call that a parameter takes part in; subclasses know its gradient for each sample."""

    size: int = field(default=0, init=False)
    reading: Reading = field(default="first", init=False)
    edge: int = field(default=0, init=False)
    view: Callable[[Tensor], Tensor] = field(default=lambda t: t, init=False)  # of the parameter that takes part

    def by_sample(self, t: Tensor) -> Tensor:
        """`(batch, rows, ...)` of a tensor that holds the samples in its first dimension, or its second."""
        if self.reading == "second":
            rest = t.shape[2:] if t.dim() > 2 else t.shape[1:]
            return t.reshape(-1, self.size, *rest).transpose(0, 1)
        return t.reshape(self.size, -1, *t.shape[1:])

    def gradients(self, g: Tensor, rows: slice) -> Tensor:
        """`(rows, *parameter.shape)` of the gradient g of the call's output."""
        raise NotImplementedError

    def add_squares(self, g: Tensor, total: Tensor) -> None:
        """Adds the sum over samples of squared gradients."""
        raise NotImplementedError


@dataclass
class _Broadcast(_Use):
    """A parameter that is added, or multiplied with `scale`, over all positions; `shape` aligns it to the output."""

    shape: torch.Size
    scale: Tensor | None = None

    def gradients(self, g: Tensor, rows: slice) -> Tensor:
        parts = self.by_sample(g)[rows]
        if self.scale is not None:
            parts = parts * self.by_sample(self.scale.expand(g.shape))[rows]
        aligned = [1] * (g.dim() - len(self.shape)) + list(self.shape)
        if self.reading == "second" and g.dim() > 2:
            del aligned[1]
        spread = [dim for dim, length in enumerate(aligned, 1) if length == 1]
        return (parts.sum(spread) if spread else parts).reshape(len(parts), *self.shape)

    def add_squares(self, g: Tensor, total: Tensor) -> None:
        total += self.gradients(g, slice(None)).square().sum(0).view_as(total)


@dataclass
class _Matrix(_Use):
    """The weight of a linear map of x `(batch, positions, in)`, with g `(batch, positions, out)`."""

    x: Tensor

    def gradients(self, g: Tensor, rows: slice) -> Tensor:
        g, x = self.by_sample(g)[rows].flatten(1, -2), self.by_sample(self.x)[rows].flatten(1, -2)
        return torch.bmm(g.transpose(1, 2), x)

    def add_squares(self, g: Tensor, total: Tensor) -> None:
        g, x = self.by_sample(g).flatten(1, -2), self.by_sample(self.x).flatten(1, -2)
        _add_products(g, x, total)


@dataclass
class _Convolution(_Use):
    """The weight of a convolution."""

    x: Tensor
    weight: torch.Size
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def gradients(self, g: Tensor, rows: slice) -> Tensor:
        backward = {3: conv1d_weight, 4: conv2d_weight, 5: conv3d_weight}[g.dim()]
        return torch.stack(
            [
                backward(x, self.weight, g1, self.stride, self.padding, self.dilation, self.groups)  # type: ignore
                for x, g1 in zip(self.by_sample(self.x)[rows], self.by_sample(g)[rows], strict=True)
            ]
        )

    def add_squares(self, g: Tensor, total: Tensor) -> None:
        """Tap by tap where maps are small: products of matrices, and at a single position one of squares."""
        positions = g.numel() // (self.size * g.shape[1])
        if g.dim() != 4 or self.groups > 1 or (positions > self.x.shape[1] and g.device.type == "cpu"):
            for row in range(self.size):
                of_sample = self.gradients(g, slice(row, row + 1))[0]
                total.addcmul_(of_sample, of_sample)
            return
        g, x = (t.permute(0, 2, 3, 1).contiguous() for t in (g, self.x))
        for i, of_row in enumerate(total.permute(2, 3, 0, 1)):
            for j, of_tap in enumerate(of_row):
                offsets = [at * d - p for at, d, p in zip((i, j), self.dilation, self.padding, strict=True)]
                (up, down), (left, right) = (
                    _overlap(g.shape[1 + axis], x.shape[1 + axis], self.stride[axis], offsets[axis]) for axis in (0, 1)
                )
                seen, given = x[:, down, right], g[:, up, left]
                if seen.numel():
                    _add_products(
                        given.reshape(self.size, -1, g.shape[3]), seen.reshape(self.size, -1, x.shape[3]), of_tap
                    )


def _overlap(outputs: int, inputs: int, stride: int, offset: int) -> tuple[slice, slice]:
    """Along an axis, which outputs a tap of a convolution serves and which inputs it reads for them."""
    first = max(0, -(offset // stride))
    last = min(outputs - 1, (inputs - 1 - offset) // stride)
    count = max(0, last - first + 1)
    begin = first * stride + offset
    return slice(first, first + count), slice(begin, begin + count * stride, stride) if count else slice(0, 0)


def _add_products(g: Tensor, x: Tensor, total: Tensor) -> None:
    """Adds the sum over samples of (g^T x)^2: g `(batch, positions, out)`, x `(batch, positions, in)`."""
    if g.shape[1] == 1:
        total.addmm_(g[:, 0].square().T, x[:, 0].square())
        return
    step = max(1, (SQUARES if g.device.type == "cpu" else 1 << 26) // total.numel())
    products = total.new_empty(min(step, len(g)), *total.shape)
    for some_g, some_x in zip(torch.split(g, step), torch.split(x, step), strict=True):
        found = torch.bmm(some_g.transpose(1, 2), some_x, out=products[: len(some_g)])
        if step == 1:
            total.addcmul_(found[0], found[0])
        else:
            total += found.square_().sum(0)


@dataclass
class _Rows(_Use):
    """The weight of an embedding."""

    indices: Tensor
    weight: torch.Size
    padding: int | None

    def rows_and_values(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """`(batch, positions)` of rows and `(batch, positions, width)` of their gradients."""
        indices, g = self.by_sample(self.indices.unsqueeze(-1)).flatten(1), self.by_sample(g).flatten(1, -2)
        if self.padding is not None:
            g = g.masked_fill((indices == self.padding).unsqueeze(-1), 0.0)
        return indices, g

    def gradients(self, g: Tensor, rows: slice) -> Tensor:
        indices, g = (t[rows] for t in self.rows_and_values(g))
        found = g.new_zeros(len(g), *self.weight)
        for of_sample, at, values in zip(found, indices, g, strict=True):
            of_sample.index_add_(0, at, values)
        return found

    def add_squares(self, g: Tensor, total: Tensor) -> None:
        """A row that comes up twice in a sample is summed before it is squared."""
        indices, g = self.rows_and_values(g)
        samples = torch.arange(len(g), device=g.device).unsqueeze(1)
        pairs, place = torch.unique(samples * self.weight[0] + indices, return_inverse=True)
        sums = g.new_zeros(len(pairs), self.weight[1]).index_add_(0, place.flatten(), g.flatten(0, 1))
        total.index_add_(0, pairs % self.weight[0], sums.square_())


# From a call of torch to (parameter, use) pairs. The arguments carry torch's names, for calls with keywords.

_Uses: TypeAlias = Iterator[tuple[Any, _Use | None]]


def _linear(out: Tensor, input: Tensor, weight: Any, bias: Any = None) -> _Uses:
    yield weight, _Matrix(input.detach())
    yield bias, _Broadcast(out.shape[-1:])


def _conv(
    out: Tensor,
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Uses:
    axes = weight.dim() - 2
    stride, dilation = ([value] * axes if isinstance(value, int) else value for value in (stride, dilation))
    if isinstance(padding, str):
        whole = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = [each // 2 for each in whole]
        known = not any(each % 2 for each in whole)
    else:
        padding, known = [padding] * axes if isinstance(padding, int) else padding, True
    known = known and input.dim() == weight.dim()
    yield weight, _Convolution(input.detach(), weight.shape, stride, padding, dilation, groups) if known else None
    yield bias, _Broadcast(torch.Size((len(weight), *[1] * axes)))


def _norm(func: Callable[..., Tensor]) -> Callable[..., _Uses]:
    signature = inspect.signature(func)

    def rule(out: Tensor, *args: Any, **kwargs: Any) -> _Uses:
        given = signature.bind(*args, **kwargs).arguments
        weight, bias = given.pop("weight", None), given.pop("bias", None)
        per_channel = func in (F.batch_norm, F.group_norm)
        for parameter, scale in ((weight, func(**given).detach()), (bias, None)):
            if parameter is not None:
                ones = [1] * (out.dim() - 2) if per_channel else []
                yield parameter, _Broadcast(torch.Size((*parameter.shape, *ones)), scale)

    return rule


def _embedding(
    out: Tensor,
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> _Uses:
    padding = None if padding_idx is None else padding_idx % len(weight)
    yield weight, None if scale_grad_by_freq else _Rows(input, weight.shape, padding)


def _add(out: Tensor, input: Any, other: Any, *, alpha: float = 1) -> _Uses:
    for parameter in (input, other):
        if isinstance(parameter, Tensor):
            yield parameter, _Broadcast(parameter.shape) if alpha == 1 else None


def _mul(out: Tensor, input: Any, other: Any) -> _Uses:
    for parameter, factor in ((input, other), (other, input)):
        if isinstance(parameter, Tensor):
            yield parameter, _Broadcast(parameter.shape, torch.as_tensor(factor, device=out.device).detach())


def _expand(out: Tensor, input: Any, *sizes: Any) -> _Uses:
    yield input, _Broadcast(input.shape)


RULES: dict[Any, Callable[..., _Uses]] = {
    F.linear: _linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _conv),
    **{norm: _norm(norm) for norm in (F.layer_norm, F.rms_norm, F.batch_norm, F.group_norm)},
    F.embedding: _embedding,
    **dict.fromkeys(("add", "add_"), _add),
    **dict.fromkeys(("mul", "mul_"), _mul),
    "expand": _expand,
}


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, in float32 or 64, without autocast or compiling; all as before afterwards."""
    modes = {part: part.training for part in module.modules()}
    tensors = [
        t for t in itertools.chain(module.parameters(), module.buffers()) if t.dtype in (torch.half, torch.bfloat16)
    ]
    narrow = [t.data for t in tensors]
    device = next(itertools.chain(module.parameters(), [torch.empty(0)])).device.type
    module.eval()
    try:
        for t in tensors:
            t.data = t.data.float()
        with torch.enable_grad(), torch.autocast(device, enabled=False), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for t, data in zip(tensors, narrow, strict=True):
            t.data = data
        for part, mode in modes.items():
            part.training = mode


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tensors(batch: Any) -> list[Tensor]:
    """All tensors of a batch, in order."""
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    apply_to_collection(batch, Tensor, keep)
    return found


def _rebuild(batch: Any, tensors: Iterable[Tensor]) -> Any:
    """The batch with other tensors, in order."""
    queue = iter(tensors)
    return apply_to_collection(batch, Tensor, lambda t: next(queue))


def _cut(batch: Any, start: int, stop: int, size: int) -> Any:
    """Some samples of a batch."""
    if (start, stop) == (0, size):
        return batch
    return apply_to_collection(batch, Tensor, lambda t: t[start:stop] if t.shape[:1] == (size,) else t)


# Samples for the Fisher


class FisherData(Protocol):
    """What a data module may have for EWC; without it the training loader's data set is read as it is."""

    def fisher_dataloader(self) -> DataLoader[Any]:
        """The training samples with the transforms of evaluation: all of them on every rank, not shuffled."""


def choose_samples(labels: Sequence[int] | Tensor | None, size: int, samples: int | None, seed: int) -> list[int]:
    """A random subset of a data set in ascending order, in which each class keeps its share.

    Args:
        labels: A class per sample; None where they are not known.
        size: Samples in the data set.
        samples: How many to take; None for all.
        seed: Decides which.
    """
    if samples is None or samples >= size:
        return list(range(size))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    if labels is not None:
        _, classes, counts = torch.unique(torch.as_tensor(labels)[order], return_inverse=True, return_counts=True)
        by_class = classes.argsort(stable=True)
        place = torch.empty(size)  # of a sample within its class, from 0 to 1
        starts = counts.cumsum(0) - counts
        place[by_class] = (torch.arange(size) - starts.repeat_interleave(counts) + 0.5) / counts.repeat_interleave(
            counts
        )
        order = order[place.argsort(stable=True)]
    return sorted(order[:samples].tolist())


def dataset_labels(dataset: Any) -> Tensor | None:
    """Class of each sample, `(samples,)`, where a data set or what it is a subset of has `targets` or `labels`."""
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        inner = dataset_labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    for name in ("targets", "labels"):
        try:
            found = torch.as_tensor(getattr(dataset, name))
        except (AttributeError, TypeError, ValueError, RuntimeError):
            continue
        if found.shape == (len(dataset),):
            return found
    return None


class _Chosen(Dataset[Any]):
    """Some of a data set's samples; what its transforms draw depends on the sample and the seed alone."""

    def __init__(self, dataset: Any, items: Sequence[Any], positions: Sequence[int], seed: int) -> None:
        self.dataset, self.items, self.positions, self.seed = dataset, items, positions, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self._reseed(index)
        return self.dataset[self.items[index]]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """A batch: sample by sample, unless the data set knows no single ones."""
        if type(self.dataset).__getitem__ is not Dataset.__getitem__:
            return [self[index] for index in indices]
        self._reseed(indices[0])
        return self.dataset.__getitems__([self.items[index] for index in indices])

    def _reseed(self, index: int) -> None:
        word = random.Random(f"{self.seed} {self.positions[index]}").getrandbits(63)
        torch.random.default_generator.manual_seed(word)
        random.seed(word)


def logits_of(pl_module: nn.Module, batch: Any) -> Tensor:
    """Logits `(batch, classes)` of any classifier, from the usual kinds of batches.

    `pl_module.logits(batch)` where there is such a method. Else the module is called: with the tensors of a
    dictionary that has `input_ids`, but for labels and what `forward` does not take; with `image` of a dictionary;
    with the first of a tuple or list; with a tensor. What it returns is a tensor or has `logits`.

    Raises:
        TypeError: None of these.
    """
    if callable(own := getattr(pl_module, "logits", None)) and not isinstance(own, nn.Module):
        return cast(Tensor, own(batch))
    if isinstance(batch, Mapping) and "input_ids" in batch:
        takes = inspect.signature(pl_module.forward).parameters  # type: ignore[arg-type]
        anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        inputs = {key: value for key, value in batch.items() if (anything or key in takes) and key not in LABELS}
        out = pl_module(**inputs)
    elif isinstance(batch, Mapping) and "image" in batch:
        out = pl_module(batch["image"])
    elif isinstance(batch, (tuple, list)) and batch:
        out = pl_module(batch[0])
    elif isinstance(batch, Tensor):
        out = pl_module(batch)
    else:
        keys = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise TypeError(
            f"EWC does not know how {type(pl_module).__name__} makes logits of a {type(batch).__name__}{keys}; give "
            "the module a method logits(batch) that returns them, (batch, classes)"
        )
    found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if found is None:
        raise TypeError(
            f"{type(pl_module).__name__} returned a {type(out).__name__} without logits; give it a method "
            "logits(batch) that returns them, (batch, classes)"
        )
    return cast(Tensor, found)


def labels_of(batch: Any) -> Tensor | None:
    """True labels `(batch,)`: `label` or `labels` of a dictionary, the second of a tuple or list."""
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABELS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    whole = isinstance(found, Tensor) and found.dim() == 1 and not found.is_floating_point()
    return found if whole else None


# What is remembered of earlier tasks, and its file


@dataclass
class Memory:
    """Fisher and anchor of all tasks so far, as one quadratic; `constant` is what it lacks to their sum."""

    fisher: dict[str, Tensor]
    anchor: dict[str, Tensor]
    tasks: list[dict[str, Any]]  # name, samples, estimator, draws, normalised, mean
    constant: float = 0.0


def save_memory(path: Path, memory: Memory) -> None:
    """Writes a `fisher.safetensors`, whole or not at all."""
    tensors = {f"fisher/{name}": t for name, t in memory.fisher.items()}
    tensors |= {f"anchor/{name}": t for name, t in memory.anchor.items()}
    metadata = {"format": FORMAT, "tasks": json.dumps(memory.tasks), "constant": repr(memory.constant)}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside, metadata)
    beside.replace(path)


def load_memory(path: Path) -> Memory:
    """Reads a `fisher.safetensors`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is something else, or its Fisher is zero everywhere, negative or not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no Fisher at {path}; a fit with EWC(save=...) writes one at its end")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no Fisher of this kind; expected the format {FORMAT!r}, as EWC(save=...) writes"
        )
    tables: dict[str, dict[str, Tensor]] = {"fisher": {}, "anchor": {}}
    for key, t in tensors.items():
        kind, name = key.split("/", 1)
        tables[kind][name] = t
    memory = Memory(tables["fisher"], tables["anchor"], json.loads(metadata["tasks"]), float(metadata["constant"]))
    check_fisher(memory.fisher, str(path))
    return memory


def check_fisher(fisher: Tensors, source: str) -> None:
    """Refuses a Fisher that would hold nothing, or break everything.

    Raises:
        ValueError: It is zero everywhere, negative or not finite.
    """
    for name, t in fisher.items():
        if not bool(torch.isfinite(t).all()) or bool((t < 0).any()):
            raise ValueError(f"{source}: the Fisher of {name} has numbers that are not finite or below 0; make it anew")
    if not any(bool(t.any()) for t in fisher.values()):
        raise ValueError(
            f"{source}: the Fisher is zero everywhere, so the penalty would hold nothing; the logits do not depend "
            "on the trained parameters, or the model is so sure of its labels that float32 has no gradient left"
        )


# The callback


class EWC(Callback):
    """Holds the weights that mattered to earlier tasks while a new one is learnt.

    At the end of a fit the diagonal Fisher information of its task is taken, with the weights of the last step,
    and kept with these weights, the anchor. In later fits the penalty

        strength / 2 * sum F (theta - theta*)^2

    draws the weights back: in the mode `proximal` by an implicit step after each update of the optimiser, which
    diverges at no strength; in the mode `gradient` by its gradient, once per optimiser step and before clipping,
    which diverges where rate * strength * F passes 2 (a warning tells). Either follows each group's learning rate
    as it is, warm-up included, leaves frozen parameters alone and is the same on all ranks.

    One instance serves a sequence of fits in one process. Between processes, `save` writes the Fisher and `load`
    reads it; the data of the old task is not needed. Several tasks cost what one costs: their penalties' sum is
    one quadratic, of two tensors per parameter. A file holds this sum, so the next fit loads the newest file only.
    A resumed fit needs no file, its checkpoint has all. Not held: buffers, such as BatchNorm's statistics;
    parameters that were frozen when the Fisher was taken; those that `exclude` names, to which a head belongs whose
    classes change.

    The Fisher is taken over a subset of the training samples: of `trainer.datamodule.fisher_dataloader()` where
    it exists (see `FisherData`), else of the training loader's data set, with its transforms, whose draws from
    torch and Python are fixed per sample; batch transfer hooks do as in validation. It is the same for every batch
    size and number of ranks. A first batch is tried before training, so that a model whose logits cannot be found
    is refused in time; `logits` and `labels` may be overridden.

    Runs on: fit (start, before optimiser steps or after them, end of batch and of training). Touches: gradients or
    weights, `ewc/penalty` and `ewc/ratio` (penalty to loss) in steps that log, one file.

    Args:
        strength: Weight of the penalty. In the mode `proximal` 1e3 to 1e6 is worth a try with SGD; a step of Adam does
            not shrink with its gradient, and takes far more to be held.
        mode: `proximal` or `gradient`.
        load: Files to start from, each of other tasks.
        save: Where to write the Fisher at the end of the fit; `fisher.safetensors` in the trainer's log folder if
            not given.
        consolidate: Whether to take the Fisher at the end of a fit. If not given: unless files are loaded and none
            is to be saved.
        samples: Training samples to take the Fisher of, each class by its share; None for all.
        estimator: See `fisher_diagonal`.
        draws: Backward passes per sample, for the estimators `signs` and `sampled`.
        exclude: Regular expressions looked for in the names of parameters that are not held.
        normalise: Whether to divide each task's Fisher by its mean, which makes strengths comparable.
        online_decay: None holds each task at its own anchor. A number from 0 to 1 holds all at the newest one,
            with the older Fishers multiplied by it once per task.
        task: Name of the task for the file and the log.
        seed: Decides the subset and all draws.

    Raises:
        ValueError: A Fisher that is zero everywhere, not finite, or of other parameters; a pattern that matches
            nothing.
        TypeError: Logits or data that cannot be found.
        RuntimeError: FSDP and DeepSpeed, which split parameters.

    Sources: Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796. Online: Schwarz et al. 2018,
    https://arxiv.org/abs/1805.06370.

    Example:
        >>> Trainer(callbacks=[EWC(save="a.safetensors")]).fit(model, data_a)  # doctest: +SKIP
        >>> Trainer(callbacks=[EWC(load="a.safetensors", exclude=["^head"])]).fit(model, data_b)  # doctest: +SKIP
    """

    def __init__(
        self,
        strength: float = 1e4,
        mode: Literal["proximal", "gradient"] = "proximal",
        load: str | Path | Sequence[str | Path] = (),
        save: str | Path | None = None,
        consolidate: bool | None = None,
        samples: int | None = 1000,
        estimator: Estimator = "auto",
        draws: int = 1,
        exclude: Sequence[str] = (),
        normalise: bool = False,
        online_decay: float | None = None,
        task: str | None = None,
        seed: int = 0,
    ) -> None:
        _check("strength", strength, 0 <= strength < float("inf"), "a number of at least 0")
        _check("mode", mode, mode in ("proximal", "gradient"), "proximal or gradient")
        _check("samples", samples, samples is None or samples > 0, "1 or more, or none for all")
        _check("estimator", estimator, estimator in get_args(Estimator), f"one of {', '.join(get_args(Estimator))}")
        _check("draws", draws, draws > 0, "1 or more")
        _check("online_decay", online_decay, online_decay is None or 0 < online_decay <= 1, "above 0 and at most 1")
        self.strength, self.mode, self.samples, self.estimator, self.draws = strength, mode, samples, estimator, draws
        self.load = [Path(load)] if isinstance(load, (str, Path)) else [Path(path) for path in load]
        self.save = None if save is None else Path(save)
        self.consolidate = (save is not None or not self.load) if consolidate is None else consolidate
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.normalise, self.online_decay, self.task, self.seed = normalise, online_decay, task, seed
        self.memory: Memory | None = None  # of the tasks before the next fit
        self.active: Memory | None = None  # what the present fit is held by
        self._hooks: list[Any] = []
        self._rates: dict[int, list[Any]] = {}
        self._names: dict[int, str] = {}
        self._penalty: Tensor | None = None
        self._classes = 0

    def logits(self, pl_module: LightningModule, batch: Any) -> Tensor:
        """Logits `(batch, classes)`; override it for a module that `logits_of` does not know."""
        return logits_of(pl_module, batch)

    def labels(self, batch: Any) -> Tensor | None:
        """True labels `(batch,)`; samples labelled -100 do not count."""
        return labels_of(batch)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; forget the last fit's run, but not its task."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
            raise RuntimeError(
                f"EWC needs whole parameters, and {type(trainer.strategy).__name__} splits them; take ddp or one device"
            )
        self.active = None
        self._penalty = None
        self._rates.clear()

    def state_dict(self) -> dict[str, Any]:
        """What this fit is held by."""
        memory = self.active or Memory({}, {}, [])  # never empty: Lightning would not save it, nor restore
        return {"fisher": memory.fisher, "anchor": memory.anchor, "tasks": memory.tasks, "constant": memory.constant}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what the checkpoint's fit was held by, whatever has been learnt since."""
        self.memory = Memory(**state_dict) if state_dict["tasks"] else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load, and match names and shapes."""
        if self.memory is None and self.load:
            self.memory = self._load()
        names = {name: p.shape for name, p in _parameters(pl_module).items()}
        known = set(names) | set(self.memory.fisher if self.memory else ())
        for pattern in self.exclude:
            if not any(re.search(pattern, name) for name in known):
                raise ValueError(f"exclude: {pattern!r} matches no parameter" + _did_you_mean(pattern, known))
        if self.memory is None:
            return
        for table in (self.memory.fisher, self.memory.anchor):
            for name in [name for name in table if self._excluded(name)]:
                del table[name]
        for name, t in self.memory.fisher.items():
            if name not in names:
                raise ValueError(
                    f"the Fisher knows {name!r}, which {type(pl_module).__name__} lacks{_did_you_mean(name, names)}; "
                    f"if it is meant to be new, exclude it: exclude: ['^{re.escape(name)}$']"
                )
            if t.shape != names[name]:
                raise ValueError(
                    f"{name} is {tuple(names[name])} in {type(pl_module).__name__} and {tuple(t.shape)} in the Fisher, "
                    "of other classes perhaps; exclude what has changed, such as the head: "
                    f"exclude: ['^{name.rpartition('.')[0] or name}']"
                )
        if not self.memory.fisher:
            raise ValueError(f"exclude: {self.exclude} leaves nothing of the Fisher to hold; name fewer parameters")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place the anchors beside the parameters, hook into the optimisers, try a first batch of the Fisher."""
        parameters = _parameters(pl_module)
        self._remove_hooks()
        if self.memory is not None:
            self.active = self.memory
            for table in (self.active.fisher, self.active.anchor):
                for name in table:
                    table[name] = _beside(parameters[name], table[name])
            self._names = {id(parameters[name]): name for name in self.active.fisher}
            for optimizer in trainer.optimizers:
                self._attach(optimizer)
            self._report(trainer, parameters)
        if self.consolidate:
            self._rehearse(trainer, pl_module)

    def _attach(self, optimizer: Optimizer) -> None:
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # else gradients come scaled
        if self.mode == "proximal":
            self._hooks.append(optimizer.register_step_pre_hook(self._read_rates))
            self._hooks.append(optimizer.register_step_post_hook(self._pull))
        elif optimizer.param_groups[0].get("line_search_fn"):
            raise ValueError(
                "L-BFGS's line search compares losses, and the penalty is not in them; take EWC's mode proximal"
            )

    def _report(self, trainer: Trainer, parameters: Mapping[str, nn.Parameter]) -> None:
        memory = cast(Memory, self.active)
        numbers = sum(t.numel() for t in memory.fisher.values())
        if trainer.is_global_zero:
            free = [name for name, p in parameters.items() if p.requires_grad and name not in memory.fisher]
            log.info(
                "EWC: %d tensors of %s numbers are held at %s, %s, strength %g; free: %s",
                len(memory.fisher),
                f"{numbers:,}",
                ", ".join(task["name"] for task in memory.tasks),
                self.mode,
                self.strength,
                _some(free) or "none",
            )
        if self.mode == "gradient":
            rates = {
                self._names[id(p)]: _peak_rate(group)
                for optimizer in trainer.optimizers
                for group in optimizer.param_groups
                for p in group["params"]
                if id(p) in self._names
            }
            steps = {name: rate * self.strength * float(memory.fisher[name].max()) for name, rate in rates.items()}
            name = max(steps, key=lambda name: steps[name], default="")
            if steps and steps[name] > 2:
                rank_zero_warn(
                    f"EWC: rate * strength * F reaches {steps[name]:.3g} in {name}; gradient descent on the penalty "
                    f"diverges above 2. Take mode proximal, or a strength below {self.strength * 2 / steps[name]:.2g}"
                )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Value of the penalty in steps that log; its gradient in the mode gradient."""
        if self.active is None:
            return
        memory = self.active
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0:
            with torch.no_grad():
                value = penalty(_parameters(pl_module), memory.anchor, memory.fisher, self.strength)
                self._penalty = value + self.strength / 2 * memory.constant
        if self.mode == "gradient":
            mine = {
                self._names[id(p)]: p
                for group in optimizer.param_groups
                for p in group["params"]
                if id(p) in self._names
            }
            add_penalty_gradient_(mine, memory.anchor, memory.fisher, self.strength)

    def _read_rates(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The rates of this step: another hook may put them back before ours comes after it."""
        rates = (group["lr"] for group in optimizer.param_groups)
        self._rates[id(optimizer)] = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    def _pull(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The proximal step."""
        memory = cast(Memory, self.active)
        parameters, coefficients = {}, {}
        for group, rate in zip(optimizer.param_groups, self._rates[id(optimizer)], strict=True):
            for p in group["params"]:
                if (name := self._names.get(id(p))) is not None:
                    parameters[name], coefficients[name] = p, rate * self.strength
        proximal_step_(parameters, memory.anchor, memory.fisher, coefficients)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log."""
        if self._penalty is None:
            return
        pl_module.log("ewc/penalty", self._penalty)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):  # Lightning has divided it
            pl_module.log("ewc/ratio", self._penalty / (loss * trainer.accumulate_grad_batches))
        self._penalty = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the Fisher, with the weights as they are after the last step."""
        self._remove_hooks()
        if not self.consolidate:
            return
        started = time.monotonic()
        self.memory = self._joined(self.active, self._take(trainer, pl_module))
        path = self.save or Path(trainer.log_dir or trainer.default_root_dir) / "fisher.safetensors"
        if trainer.is_global_zero:
            save_memory(path, self.memory)
            newest, seconds = self.memory.tasks[-1], time.monotonic() - started
            log.info("EWC: Fisher of %(samples)d samples (%(estimator)s)", newest)
            log.info("EWC: took %.1f s; written to %s", seconds, path)
        trainer.strategy.barrier("Fisher written")

    def _take(self, trainer: Trainer, pl_module: LightningModule) -> Memory:
        """Fisher and anchor of the task that has just been learnt."""
        parameters = {
            name: p for name, p in _parameters(pl_module).items() if p.requires_grad and not self._excluded(name)
        }
        if not parameters:
            raise ValueError("EWC: every parameter is frozen or excluded, so there is nothing to take a Fisher of")
        with _aside(trainer, pl_module.device):
            batches, positions = self._batches(trainer, pl_module, self.samples)
            mean, counted = fisher_diagonal(
                functools.partial(self.logits, pl_module),
                batches,
                parameters,
                module=pl_module,
                labels=self.labels,
                positions=positions,
                estimator=self.estimator,
                draws=self.draws,
                seed=self.seed,
            )
        add = functools.partial(trainer.strategy.reduce, reduce_op="sum")
        samples = int(cast(Tensor, add(torch.tensor(counted, device=pl_module.device))))
        fisher = {name: cast(Tensor, add(t * counted)) / max(samples, 1) for name, t in mean.items()}
        check_fisher(fisher, f"EWC, after {samples} samples")
        average = sum(float(t.sum(dtype=torch.float64)) for t in fisher.values())
        average /= sum(t.numel() for t in fisher.values())
        if self.normalise:
            fisher = {name: t / average for name, t in fisher.items()}
        task = {
            "name": self.task or f"task {len(self.active.tasks) + 1 if self.active else 1}",
            "samples": samples,
            "estimator": choose_estimator(self.estimator, self._classes),
            "draws": self.draws,
            "normalised": self.normalise,
            "mean": average,
        }
        return Memory(fisher, {name: p.detach().clone() for name, p in parameters.items()}, [task])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimisers."""
        self._remove_hooks()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the device's memory to others."""
        self._remove_hooks()
        for memory in (self.memory, self.active):
            for table in (memory.fisher, memory.anchor) if memory else ():
                for name in table:
                    table[name] = table[name].cpu()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _excluded(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.exclude)

    def _load(self) -> Memory:
        """All files as one."""
        joined: Memory | None = None
        for path in self.load:
            memory = load_memory(path)
            for task in memory.tasks:
                if task["normalised"] != self.normalise:
                    raise ValueError(
                        f"{path}: the Fisher of {task['name']!r} was taken with normalise={task['normalised']}, and "
                        f"this is normalise={self.normalise}; make them equal. Its mean was {task['mean']:.3g}: a "
                        f"strength s on the normalised Fisher is s / {task['mean']:.3g} on the other"
                    )
                if joined and task in joined.tasks:
                    raise ValueError(
                        f"{path} holds {task['name']!r} as another of the loaded files does; a file holds all earlier "
                        "tasks too, so load the newest only"
                    )
            joined = self._joined(joined, memory)
        return cast(Memory, joined)

    def _joined(self, old: Memory | None, new: Memory) -> Memory:
        if old is None:
            return new
        fisher, anchor, constant = merge((old.fisher, old.anchor), (new.fisher, new.anchor), self.online_decay)
        online = self.online_decay is not None
        return Memory(fisher, anchor, old.tasks + new.tasks, 0.0 if online else old.constant + new.constant + constant)

    def _batches(
        self, trainer: Trainer, pl_module: LightningModule, samples: int | None
    ) -> tuple[Iterator[Any], Sequence[int]]:
        """This rank's batches on its device, after all transfer hooks, and the positions of their samples."""
        data: Any = getattr(trainer, "datamodule", None)
        own = hasattr(data, "fisher_dataloader")
        loader = data.fisher_dataloader() if own else trainer.train_dataloader
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise TypeError(
                "EWC takes the Fisher of samples of one DataLoader over a data set with a length, received "
                f"{type(loader).__name__}; give the data module a method fisher_dataloader() that returns such a one"
            )
        dataset: Any = loader.dataset
        items = list(loader.sampler) if own else list(range(len(dataset)))
        labels = dataset_labels(dataset)
        if not items:
            raise ValueError("EWC: there are no samples to take a Fisher of; the training data are empty")
        if labels is not None and isinstance(items[0], int):
            labels = labels[torch.tensor(items)]
        if labels is not None and len(labels) != len(items):
            labels = None
        chosen = choose_samples(labels, len(items), samples, self.seed)
        positions = range(len(chosen))[trainer.global_rank :: trainer.world_size]
        taken = [chosen[position] for position in positions]
        workers = loader.num_workers if len(taken) > FISHER_BATCH else 0
        batches: DataLoader[Any] = DataLoader(
            _Chosen(dataset, [items[index] for index in taken], taken, self.seed),
            batch_size=min(loader.batch_size or FISHER_BATCH, FISHER_BATCH),
            collate_fn=loader.collate_fn,
            num_workers=workers,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context if workers else None,
        )
        wide = _wide(next(pl_module.parameters()).dtype)

        def widened(t: Tensor) -> Tensor:
            return t.to(wide) if t.is_floating_point() else t

        moved = (trainer.strategy.batch_to_device(batch, dataloader_idx=0) for batch in batches)
        return (apply_to_collection(batch, Tensor, widened) for batch in moved), positions

    def _rehearse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out before training what would fail after it."""
        with _aside(trainer, pl_module.device), _evaluating(pl_module):
            batches, _ = self._batches(trainer, pl_module, 2 * trainer.world_size)
            for batch in batches:
                self._classes = _check_logits(self.logits(pl_module, batch)).shape[1]
                if self.estimator == "empirical" and self.labels(batch) is None:
                    raise ValueError(NO_LABELS)


@contextlib.contextmanager
def _aside(trainer: Trainer, device: torch.device) -> Iterator[None]:
    """Leaves torch's and Python's random numbers as they were; transfer hooks see a validation, not a training."""
    stage, state = trainer.state.stage, random.getstate()
    trainer.state.stage = RunningStage.VALIDATING
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        trainer.state.stage = stage
        random.setstate(state)


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, each once; a compiled part is named as if it were not."""
    return {name.replace("_orig_mod.", ""): p for name, p in module.named_parameters()}


def _beside(parameter: Tensor, t: Tensor) -> Tensor:
    """A tensor on the parameter's device, in its type and memory layout."""
    if t.device == parameter.device and t.dtype == parameter.dtype and t.stride() == parameter.stride():
        return t
    return torch.empty_like(parameter, requires_grad=False).copy_(t)


def _peak_rate(group: Mapping[str, Any]) -> float:
    """The highest rate that a group is known to get: schedules note theirs."""
    return max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(re.sub(r"[\^$\\]", "", word), sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise ValueError(f"{name} must be {expected}; received {value!r}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
