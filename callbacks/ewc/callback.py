"""Elastic weight consolidation: learn a new task while the weights that mattered to the old ones are held.

The maths comes first, as functions for any loop: the penalty's value, gradient and proximal step, and the Fisher
information of a classifier, exact and per sample (`fisher_diagonal`). Then the callback.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset

log = logging.getLogger(__name__)

Tensors: TypeAlias = Mapping[str, Tensor]
Parameters: TypeAlias = Mapping[str, nn.Parameter]
Logits: TypeAlias = Callable[[Any], Tensor]
Estimator: TypeAlias = Literal["auto", "exact", "signs", "sampled", "empirical"]
Way: TypeAlias = Literal["auto", "layers", "loop", "vmap"]
Vectors: TypeAlias = Callable[[Tensor, slice], Iterator[Tensor]]  # of some samples, from their logits

IGNORED = -100  # the label of a sample that does not count, as in torch's losses
EXACT_CLASSES = 10  # up to so many classes the exact expectation is worth its backward passes
BLOCK = 1 << 20  # numbers of each tensor that the penalty works on at a time on a CPU, for its cache
SQUARES = 1 << 18  # numbers of per-sample gradients at a time on a CPU, likewise
FISHER_BATCH = 16  # samples at a time at most; the result does not depend on it
FORMAT = "ewc-fisher 1"
NO_LABELS = "the empirical Fisher needs true labels, and the batches bring none; take the estimator exact"


# The penalty


def penalty(parameters: Tensors, anchor: Tensors, fisher: Tensors, strength: float) -> Tensor:
    """Value of strength / 2 * sum F (theta - theta*)^2, the half included, over all names of F; differentiable.

    Args:
        parameters: theta by name.
        anchor: theta*, the weights after the old task.
        fisher: F, in the anchor's shapes.
        strength: Weight of the penalty.
    """
    terms = [(f * (parameters[name] - anchor[name]).square()).sum() for name, f in fisher.items()]
    return strength / 2 * torch.stack(terms).sum()


@torch.no_grad()
def add_penalty_gradient_(parameters: Tensors, anchor: Tensors, fisher: Tensors, strength: float) -> None:
    """Adds the gradient of `penalty`, strength * F (theta - theta*), to `.grad`, which is made where there is none.

    Frozen parameters are left alone, sparse gradients refused. Gradient descent on it diverges where
    rate * strength * F passes 2.
    """
    rows = []
    for name, f in fisher.items():
        if name not in parameters or not (p := parameters[name]).requires_grad:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        elif p.grad.layout != torch.strided:
            raise RuntimeError(
                f"{name} has a sparse gradient, and the penalty's is dense; take EWC's mode proximal, or sparse=False"
            )
        rows.append((p, anchor[name], f, p.grad))
    if rows and rows[0][0].device.type != "cpu":
        weights, anchors, fishers, grads = zip(*rows, strict=True)
        torch._foreach_addcmul_(grads, torch._foreach_sub(weights, anchors), fishers, strength)
        return
    for _, scratch, (w, a, f, g) in _pieces(rows):
        g.addcmul_(torch.sub(w, a, out=scratch), f, value=strength)


@torch.no_grad()
def proximal_step_(
    parameters: Tensors, anchor: Tensors, fisher: Tensors, coefficients: Mapping[str, float | Tensor]
) -> None:
    """Implicit step on the penalty: theta <- (theta + c F theta*) / (1 + c F), which diverges for no c.

    In place, for each name of `coefficients`, which holds c = rate * strength; frozen parameters are left alone.
    """
    names = [
        name
        for name, c in coefficients.items()
        if name in fisher and parameters[name].requires_grad and (isinstance(c, Tensor) or c > 0)
    ]
    rows = [(parameters[name], anchor[name], fisher[name]) for name in names]
    # The share F / (F + 1 / c) of the way back is the same as c F / (1 + c F), and overflows for no c.
    inverse: list[Any] = [1 / coefficients[name] for name in names]
    if rows and rows[0][0].device.type != "cpu":
        weights, anchors, fishers = zip(*rows, strict=True)
        if any(isinstance(k, Tensor) for k in inverse):
            inverse = [
                torch.as_tensor(k, dtype=f.dtype, device=f.device) for k, f in zip(inverse, fishers, strict=True)
            ]
        torch._foreach_lerp_(weights, anchors, torch._foreach_div(fishers, torch._foreach_add(fishers, inverse)))
        return
    for row, scratch, (w, a, f) in _pieces(rows):
        torch.add(f, inverse[row], out=scratch)
        w.lerp_(a, torch.div(f, scratch, out=scratch))


def _pieces(rows: Sequence[tuple[Tensor, ...]]) -> Iterator[tuple[int, Tensor, tuple[Tensor, ...]]]:
    """Cuts matching tensors into pieces that stay in a CPU's cache; with their row and memory to work in."""
    scratch: dict[torch.dtype, Tensor] = {}
    for row, tensors in enumerate(rows):
        first = tensors[0]
        if not all(t.is_contiguous() for t in tensors):
            yield row, torch.empty_like(first), tensors
            continue
        if first.dtype not in scratch:
            scratch[first.dtype] = first.new_empty(BLOCK)
        for piece in zip(*(torch.split(t.view(-1), BLOCK) for t in tensors), strict=True):
            yield row, scratch[first.dtype][: len(piece[0])], piece


def merge(
    first: tuple[Tensors, Tensors], second: tuple[Tensors, Tensors], decay: float | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Two tasks' (Fisher, anchor) as one: what a step costs does not grow with the number of tasks.

    A sum of quadratics is a quadratic: with separate anchors, and for all theta,

        sum F1 (theta - theta1)^2 + sum F2 (theta - theta2)^2  =  sum F (theta - anchor)^2 + constant

    where F = F1 + F2 and the anchor is the mean of the two, weighted with F1 and F2. With a `decay` the online form:
    F = decay * F1 + F2 at the newest anchor (Schwarz et al. 2018, https://arxiv.org/abs/1805.06370).

    Returns:
        Fisher, anchor and the constant; names of either task are kept.
    """
    (old, old_anchor), (new, new_anchor) = first, second
    if decay is not None:
        faded = {name: decay * f.float() for name, f in old.items()}
        fisher = faded | {name: f.float() + faded[name] if name in faded else f for name, f in new.items()}
        return fisher, {**old_anchor, **new_anchor}, 0.0
    fisher, anchor, constant = {**old, **new}, {**old_anchor, **new_anchor}, 0.0
    for name in old.keys() & new.keys():
        one, at_one, two, at_two = (t.float() for t in (old[name], old_anchor[name], new[name], new_anchor[name]))
        fisher[name] = one + two
        share = torch.where(fisher[name] > 0, two / fisher[name], 1.0)
        anchor[name] = torch.lerp(at_one, at_two, share)
        constant += float((one * share * (at_one - at_two).square()).sum(dtype=torch.float64))
    return fisher, anchor, constant


# The Fisher information


def fisher_diagonal(
    logits: Logits,
    batches: Iterable[Any],
    parameters: Parameters,
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
            All three have the same expectation. `empirical`: at the true labels, another quantity, which vanishes as
            the fit gets better (https://arxiv.org/abs/1905.12558). `auto`: exact up to 10 classes, else signs.
        draws: Backward passes per sample, for `signs` and `sampled`.
        seed: Of the draws.
        way: How per-sample gradients are made; all agree. `layers`: whole batches, from the inputs of layers and
            the gradients of their outputs. `loop`: one sample at a time, for any model. `vmap`: by torch.func.
            `auto`: layers where these account for all parameters, as a trial on the first two samples tells; else
            vmap on a GPU and the loop on a CPU.

    Returns:
        The mean by name, zeros if nothing counted, and the number of samples that did.

    Raises:
        ValueError: No logits of shape (batch, classes); `empirical` without labels; `layers` does not account for
            a parameter.
        TypeError: Batches that cannot be cut into samples.
    """
    known: Tensor | None = None  # labels of the batch at hand
    numbered: list[int] = []

    def vectors(z: Tensor, rows: slice) -> Iterator[Tensor]:
        some = None if known is None else known[rows]
        return score_vectors(z, estimator, labels=some, positions=numbered[rows], draws=draws, seed=seed)

    numbers = iter(itertools.count() if positions is None else positions)
    count, squares = 0, None
    with _evaluating(module):
        for batch in batches:
            squares = squares or _Squares(logits, batch, parameters, module, way)
            size, known = squares.size(batch), labels(batch)
            if known is None and estimator == "empirical":
                raise ValueError(NO_LABELS)
            numbered = list(itertools.islice(numbers, size))
            squares.add(batch, vectors)
            count += size if known is None else int((known != IGNORED).sum())
    totals = squares.totals if squares else _zeros(parameters)
    return {name: (total / max(count, 1)).contiguous() for name, total in totals.items()}, count


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

    Arguments are those of `fisher_diagonal`, for logits `(batch, classes)`, with labels `(batch,)` and a position for
    each sample. Yields `(batch, classes)`, detached; zeros for samples that do not count.
    """
    log_p = logits.detach().cpu().double().log_softmax(-1).clamp(min=-1e3)  # -inf would make differences of infinities
    counted = 1.0 if labels is None else (labels != IGNORED).unsqueeze(1).to(log_p)
    classes = log_p.shape[1]
    estimator = choose_estimator(estimator, classes)
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
    if not z.requires_grad:
        raise ValueError(
            "the logits depend on no trained parameter; is there a no_grad or a detach on the way to them?"
        )
    return z


# Squared gradients of single samples

LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)  # features in the last dimension; in the second of the others
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, nn.Embedding, *NORMS, *CONVOLUTIONS)


class _Call(NamedTuple):
    """One call of a layer, with what the gradients of its parameters need."""

    layer: nn.Module | None  # None for the copies, one for each sample, of a parameter that no known layer owns
    names: dict[str, str]  # of the layer's parameters, by attribute
    x: Tensor  # the layer's input; of a norm its output before weight and bias
    at: Tensor | GradientEdge  # where the gradient with respect to the layer's output comes by


_Use: TypeAlias = tuple[nn.Module | None, str, Tensor, Tensor]  # the first arguments of `_gradients`


class _Squares:
    """Sums over samples of squared gradients, made in one of three ways."""

    def __init__(self, logits: Logits, batch: Any, parameters: Parameters, module: nn.Module, way: Way) -> None:
        self.logits, self.parameters = logits, parameters
        names = {id(p): name for name, p in parameters.items()}
        entries = [(owner, key, p) for owner in module.modules() for key, p in owner._parameters.items()]
        self.owned = [(owner, key, names[id(p)]) for owner, key, p in entries if id(p) in names]
        self.layers: dict[nn.Module, dict[str, str]] = {}  # names by attribute
        self.others: list[tuple[nn.Module, str, str]] = []
        for owner, key, name in self.owned:
            if isinstance(owner, LAYERS) and key in ("weight", "bias"):
                self.layers.setdefault(owner, {})[key] = name
            else:
                self.others.append((owner, key, name))
        # What a trial finds:
        self.path: list[nn.Module | None] | None = None  # the layers that are called, in order
        self.shared: set[nn.Module] = set()  # layers whose input all samples share, as positions' numbers are
        self.rank = 2  # of the tensors that the copies of other parameters fit
        self.leaf = self.find_samples(batch)
        self.way = self.choose(batch, way)
        self.totals = _zeros(parameters, taps_first=self.way == "layers")

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
        return len(_tensors(batch)[self.leaf])

    def checked(self, batch: Any) -> Tensor:
        return _check_logits(self.logits(batch))

    def choose(self, batch: Any, way: Way) -> Way:
        """Whether layers account for all parameters, by a trial on two samples against the loop."""
        if way in ("loop", "vmap"):
            return way
        if (size := self.size(batch)) == 1:  # which tells nothing, and is the same
            return "loop"
        batch = _cut(batch, 0, 2, size)

        def vectors(z: Tensor, rows: slice) -> Iterator[Tensor]:
            yield torch.randn(2, z.shape[1], generator=torch.Generator().manual_seed(0)).to(z)[rows]

        expected = _zeros(self.parameters)
        self.add_loop(batch, vectors, expected)
        noise = 1e-10 * max(float(t.max()) for t in expected.values())
        missing = sorted({name for _, _, name in self.others} or self.parameters)
        for rank in (2, 3, 4) if self.others else (2,):
            self.rank, self.path, found = rank, None, _zeros(self.parameters)
            with contextlib.suppress(Exception):  # of the net's own, where copies do not fit
                self.add_layers(batch, vectors, found)
                off = {name: float((found[name] - t).abs().max()) for name, t in expected.items()}
                missing = sorted(name for name, t in expected.items() if not off[name] <= noise + 0.01 * float(t.max()))
            if not missing:
                return "layers"
        if way == "layers":
            raise ValueError(f"no known layer accounts for {_some(missing)}; take way='loop'")
        if next(iter(self.parameters.values())).device.type != "cpu":
            with contextlib.suppress(RuntimeError):  # torch.func knows not everything
                self.add_vmap(batch, vectors, expected)
                return "vmap"
        _say("EWC: no known layer accounts for %s: per-sample gradients one by one", _some(missing))
        return "loop"

    def add(self, batch: Any, vectors: Vectors) -> None:
        """Adds a batch's squares."""
        ways = {"layers": self.add_layers, "vmap": self.add_vmap, "loop": self.add_loop}
        ways[self.way](batch, vectors, self.totals)

    def add_loop(self, batch: Any, vectors: Vectors, totals: Tensors) -> None:
        """One sample at a time."""
        size, parameters = self.size(batch), list(self.parameters.values())
        for row in range(size):
            z = self.checked(_cut(batch, row, row + 1, size))
            if len(z) != 1:
                raise TypeError(f"a batch of 1 gave {len(z)} rows of logits; batches must hold samples first")
            for v in vectors(z, slice(row, row + 1)):
                gradients = torch.autograd.grad(z, parameters, v, retain_graph=True, allow_unused=True)
                used = [(totals[name], g) for name, g in zip(self.parameters, gradients, strict=True) if g is not None]
                if used:
                    sums, squared = zip(*used, strict=True)
                    torch._foreach_addcmul_(sums, squared, squared)

    def add_vmap(self, batch: Any, vectors: Vectors, totals: Tensors) -> None:
        """Several samples at a time, by torch.func."""
        size = self.size(batch)
        values = {name: p.detach() for name, p in self.parameters.items()}
        with torch.no_grad():
            stacked = torch.stack(list(vectors(self.logits(batch), slice(0, size))), 1)
        sized = [t.shape[:1] == (size,) for t in _tensors(batch)]

        def squares(leaves: list[Tensor], of_sample: Tensor) -> dict[str, Tensor]:
            queue = iter([t.unsqueeze(0) if yes else t for t, yes in zip(leaves, sized, strict=True)])
            sample = apply_to_collection(batch, Tensor, lambda t: next(queue))

            def logits(values: Tensors) -> Tensor:
                with _swapped([(owner, key, values[name]) for owner, key, name in self.owned]):
                    return self.logits(sample)[0]

            pull = torch.func.vjp(logits, values)[1]
            pulled = [pull(v)[0] for v in of_sample]
            return {name: functools.reduce(torch.add, [g[name].square() for g in pulled]) for name in values}

        mapped = torch.vmap(squares, in_dims=([0 if yes else None for yes in sized], 0))
        step = max(1, (1 << 27) // sum(p.numel() for p in values.values()))
        for start in range(0, size, step):
            found = mapped(_tensors(_cut(batch, start, start + step, size)), stacked[start : start + step])
            for name, total in totals.items():
                total += found[name].sum(0)

    def add_layers(self, batch: Any, vectors: Vectors, totals: Tensors) -> None:
        """A batch at a time, from inputs of layers and gradients of their outputs."""
        size, trial = self.size(batch), self.path is None
        calls: list[_Call] = []
        try:
            with self.noted(size, calls):
                z = self.checked(batch)
        except Exception:  # if it is not of the copies, the loop meets it again
            if trial:
                raise
            calls = []
        path = [call.layer for call in calls]
        if trial:
            self.path = path
        elif path != self.path or any(len(call.x) % size for call in calls):  # not as in the trial
            self.add_loop(batch, vectors, totals)
            return
        for v in vectors(z, slice(0, size)):
            edges = cast(list[Tensor], [call.at for call in calls])
            gradients = torch.autograd.grad(z, edges, v, retain_graph=True, allow_unused=True)
            uses: dict[str, list[_Use]] = {}
            for call, g in zip(calls, gradients, strict=True):
                if g is not None:
                    x, g = (t.reshape(size, -1, *t.shape[1:]) for t in (call.x, g))
                    for key, name in call.names.items():
                        uses.setdefault(name, []).append((call.layer, key, x, g))
            for name, used in uses.items():
                _add_squares(used, totals[name])

    @contextlib.contextmanager
    def noted(self, size: int, calls: list[_Call]) -> Iterator[None]:
        """Meanwhile layers note their calls, and each sample has its own copy of the other parameters."""

        def before(layer: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0]
            if x.shape[0] == 1 or x.dim() == 1:  # one row for all samples, or one number for each position
                if self.path is None and x.shape[0] != size:
                    self.shared.add(layer)
                if layer in self.shared:
                    x = x if x.shape[0] == 1 else x.unsqueeze(0)
                    return x.expand(size, *x.shape[1:]), *args[1:]
            return None

        def after(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            x = args[0].detach()
            if isinstance(layer, NORMS):
                given = [(key, p) for key, p in layer._parameters.items() if p is not None]
                plain = [(layer, key, torch.full_like(p, key == "weight")) for key, p in given]
                with torch.no_grad(), _swapped(plain):
                    x = layer.forward(x)
            calls.append(_Call(layer, self.layers[layer], x, get_gradient_edge(out)))

        copies: dict[str, Tensor] = {}
        for name in {name: None for _, _, name in self.others}:
            p = self.parameters[name].detach()
            if p.dim() < 2 or p.shape[0] != 1:
                p = p.view(1, *[1] * (self.rank - 1 - p.dim()), *p.shape)
            copies[name] = p.expand(size, *p.shape[1:]).requires_grad_()
            calls.append(_Call(None, {"": name}, copies[name], copies[name]))
        hooks = [layer.register_forward_pre_hook(before) for layer in self.layers]
        hooks += [layer.register_forward_hook(after) for layer in self.layers]
        try:
            with _swapped([(owner, key, copies[name]) for owner, key, name in self.others]):
                yield
        finally:
            for hook in hooks:
                hook.remove()


@contextlib.contextmanager
def _swapped(tensors: Sequence[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Modules have other tensors in the place of parameters, and then their own again."""
    own = [(module, key, module._parameters[key]) for module, key, _ in tensors]
    try:
        for module, key, t in tensors:
            module._parameters[key] = t  # type: ignore[assignment]
        yield
    finally:
        for module, key, p in own:
            module._parameters[key] = p


def _zeros(parameters: Parameters, taps_first: bool = False) -> dict[str, Tensor]:
    """Where sums of squares are collected; for convolutions tap by tap, with each tap's numbers side by side."""
    zeros = {}
    for name, p in parameters.items():
        order = [2, 3, 0, 1] if taps_first and p.dim() == 4 else list(range(p.dim()))
        zeros[name] = torch.zeros([p.shape[d] for d in order], dtype=_wide(p.dtype), device=p.device).permute(order)
    return zeros


def _add_squares(uses: Sequence[_Use], total: Tensor) -> None:
    """Adds one parameter's squares, from all its uses."""
    layer, key, x, g = uses[0]
    convolution = key == "weight" and isinstance(layer, CONVOLUTIONS)
    # Tap by tap pays off where maps are small; elsewhere on a CPU one gradient at a time stays in its cache.
    small = convolution and (g.device.type != "cpu" or g[0, :, 0].numel() <= x.shape[2])
    if len(uses) > 1 or (convolution and not (small and isinstance(layer, nn.Conv2d) and layer.groups == 1)):
        for row in range(len(g)):  # what is used more than once is summed before it is squared
            parts = [_gradients(layer, key, x[row, None], g[row, None], total.shape) for layer, key, x, g in uses]
            of_sample = functools.reduce(torch.add, parts)[0]
            total.addcmul_(of_sample, of_sample)
    elif convolution:
        _add_taps(layer, x, g, total)
    elif key == "weight" and isinstance(layer, nn.Linear):
        _add_products(g.flatten(1, -2), x.flatten(1, -2), total)
    elif isinstance(layer, nn.Embedding):
        _add_rows(layer, x.flatten(1), g.flatten(1, -2), total)
    else:
        total += _gradients(layer, key, x, g, total.shape).square().sum(0)


def _gradients(layer: Any, key: str, x: Tensor, g: Tensor, shape: torch.Size) -> Tensor:
    """Per-sample gradients `(batch, *shape)` of a layer's parameter.

    From x, its input, and g, the gradient of its output: `(batch, rows, ...)`, mostly with one row per sample.
    """
    if layer is None:
        return g.reshape(len(g), *shape)
    if key == "weight" and isinstance(layer, nn.Linear):
        return torch.bmm(g.flatten(1, -2).mT, x.flatten(1, -2))
    if isinstance(layer, nn.Embedding):
        found = g.new_zeros(len(g), *shape)
        for of_sample, at, values in zip(found, x.flatten(1), g.flatten(1, -2), strict=True):
            of_sample.index_add_(0, at, values)
        if layer.padding_idx is not None:
            found[:, layer.padding_idx] = 0
        return found
    if key == "weight" and isinstance(layer, CONVOLUTIONS):
        backward: Any = (conv1d_weight, conv2d_weight, conv3d_weight)[len(shape) - 3]
        how = layer.stride, _padding(layer), layer.dilation, layer.groups
        return torch.stack([backward(x1, shape, g1, *how) for x1, g1 in zip(x, g, strict=True)])
    t = (g * x if key == "weight" else g).flatten(0, 1)
    if t.dim() > 2 and not (isinstance(layer, LAST) and t.shape[-len(shape) :] == shape):
        t = t.flatten(2).sum(2)
    return t.reshape(len(g), -1, *shape).sum(1)


def _add_products(g: Tensor, x: Tensor, total: Tensor) -> None:
    """Adds the sum over samples of (g^T x)^2: g `(batch, positions, out)`, x `(batch, positions, in)`."""
    if g.shape[1] == 1:
        total.addmm_(g[:, 0].square().T, x[:, 0].square())
        return
    step = max(1, (SQUARES if g.device.type == "cpu" else 1 << 26) // total.numel())
    products = total.new_empty(min(step, len(g)), *total.shape)
    for some_g, some_x in zip(torch.split(g, step), torch.split(x, step), strict=True):
        found = torch.bmm(some_g.mT, some_x, out=products[: len(some_g)])
        if step == 1:
            total.addcmul_(found[0], found[0])
        else:
            total += found.square_().sum(0)


def _add_taps(layer: Any, x: Tensor, g: Tensor, total: Tensor) -> None:
    """Adds a convolution's squares tap by tap: products of matrices, at the outputs whose inputs are no padding."""
    size, (height, width) = len(g), total.shape[2:]
    g, x = (t.flatten(0, 1).permute(0, 2, 3, 1).contiguous() for t in (g, x))
    axes = list(zip(g.shape[1:], x.shape[1:], layer.stride, layer.dilation, _padding(layer), strict=False))
    for tap in itertools.product(range(height), range(width)):
        given, seen = [], []
        for at, (outputs, inputs, stride, dilation, padding) in zip(tap, axes, strict=True):
            offset = at * dilation - padding
            first = max(0, -(offset // stride))
            count = max(0, min(outputs, (inputs - 1 - offset) // stride + 1) - first)
            begin = first * stride + offset
            given.append(slice(first, first + count))
            seen.append(slice(begin, begin + count * stride, stride))
        some_g, some_x = g[:, given[0], given[1]], x[:, seen[0], seen[1]]
        if some_x.numel():
            of_tap = total[:, :, tap[0], tap[1]]
            _add_products(some_g.reshape(size, -1, g.shape[3]), some_x.reshape(size, -1, x.shape[3]), of_tap)


def _padding(layer: Any) -> Sequence[int]:
    if not isinstance(layer.padding, str):
        return cast(Sequence[int], layer.padding)
    whole = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [each // 2 if layer.padding == "same" else 0 for each in whole]


def _add_rows(layer: nn.Embedding, indices: Tensor, g: Tensor, total: Tensor) -> None:
    """Adds an embedding's squares; a row that comes up twice in a sample is summed before it is squared."""
    if layer.padding_idx is not None:
        g = g.masked_fill((indices == layer.padding_idx).unsqueeze(2), 0)
    samples = torch.arange(len(g), device=g.device).unsqueeze(1)
    pairs, place = torch.unique(samples * len(total) + indices, return_inverse=True)
    sums = g.new_zeros(len(pairs), g.shape[2]).index_add_(0, place.flatten(), g.flatten(0, 1))
    total.index_add_(0, pairs % len(total), sums.square_())


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, in float32 or 64, without autocast or compiling; all as before afterwards."""
    modes = {part: part.training for part in module.modules()}
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device.type if tensors else "cpu"
    narrow = [(t, t.data) for t in tensors if t.dtype in (torch.half, torch.bfloat16)]
    module.eval()
    try:
        for t, data in narrow:
            t.data = data.float()
        with torch.enable_grad(), torch.autocast(device, enabled=False), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for t, data in narrow:
            t.data = data
        for part, mode in modes.items():
            part.training = mode


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tensors(batch: Any) -> list[Tensor]:
    """All tensors of a batch, in order."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def _cut(batch: Any, start: int, stop: int, size: int) -> Any:
    """Some samples of a batch."""
    if (start, stop) == (0, size):
        return batch
    return apply_to_collection(batch, Tensor, lambda t: t[start:stop] if t.shape[:1] == (size,) else t)


# Samples for the Fisher


def choose_samples(labels: Sequence[int] | Tensor | None, size: int, samples: int | None, seed: int) -> list[int]:
    """Some of `size` samples, or all at None, in ascending order; each class keeps its share where labels are known."""
    if samples is None or samples >= size:
        return list(range(size))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    if labels is not None:
        _, classes, counts = torch.unique(torch.as_tensor(labels)[order], return_inverse=True, return_counts=True)
        within = torch.cat([torch.arange(count) for count in counts])
        place = torch.empty(size)  # of a sample within its class, from 0 to 1
        place[classes.argsort(stable=True)] = (within + 0.5) / counts.repeat_interleave(counts)
        order = order[place.argsort(stable=True)]
    return sorted(order[:samples].tolist())


def dataset_labels(dataset: Any) -> Tensor | None:
    """Class of each sample, `(samples,)`, where a data set or what it is a subset of has `targets` or `labels`."""
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        inner = dataset_labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    for name in ("targets", "labels"):
        with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
            found = torch.as_tensor(getattr(dataset, name))
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
    """Logits `(batch, classes)` of any classifier, from the usual kinds of batches; a TypeError tells what is missing.

    `pl_module.logits(batch)` where there is such a method. Else the module is called: with the tensors of a
    dictionary that has `input_ids`, but for labels and what `forward` does not take; with `image` of a dictionary;
    with the first of a tuple or list; with a tensor. What it returns is a tensor or has `logits`.
    """
    if callable(own := getattr(pl_module, "logits", None)) and not isinstance(own, nn.Module):
        return cast(Tensor, own(batch))
    name, ask = type(pl_module).__name__, "a method logits(batch) that returns them, (batch, classes)"
    if isinstance(batch, Mapping) and "input_ids" in batch:
        takes = inspect.signature(pl_module.forward).parameters  # type: ignore[arg-type]
        anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        names = [key for key in batch if (anything or key in takes) and key not in ("label", "labels")]
        out = pl_module(**{key: batch[key] for key in names})
    elif isinstance(batch, Mapping) and "image" in batch:
        out = pl_module(batch["image"])
    elif isinstance(batch, (tuple, list)) and batch:
        out = pl_module(batch[0])
    elif isinstance(batch, Tensor):
        out = pl_module(batch)
    else:
        keys = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        kind = type(batch).__name__ + keys
        raise TypeError(f"EWC does not know how {name} makes logits of a {kind}; give the module {ask}")
    found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if found is None:
        raise TypeError(f"{name} returned a {type(out).__name__} without logits; give it {ask}")
    return cast(Tensor, found)


def labels_of(batch: Any) -> Tensor | None:
    """True labels `(batch,)`: `label` or `labels` of a dictionary, the second of a tuple or list."""
    found = None
    if isinstance(batch, Mapping):
        found = batch.get("label", batch.get("labels"))
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
    tensors = {
        f"{kind}/{name}": t.detach().cpu().contiguous()
        for kind, table in (("fisher", memory.fisher), ("anchor", memory.anchor))
        for name, t in table.items()
    }
    metadata = {"format": FORMAT, "tasks": json.dumps(memory.tasks), "constant": repr(memory.constant)}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    save_file(tensors, beside, metadata)
    beside.replace(path)


def load_memory(path: Path) -> Memory:
    """Reads a `fisher.safetensors`; refuses other files, and a Fisher that is no use."""
    if not path.is_file():
        raise FileNotFoundError(f"no Fisher at {path}; a fit with EWC(save=...) writes one at its end")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no Fisher of this kind; expected {FORMAT!r}, as EWC(save=...) writes")
    tables: dict[str, dict[str, Tensor]] = {"fisher": {}, "anchor": {}}
    for key, t in tensors.items():
        kind, name = key.split("/", 1)
        tables[kind][name] = t
    check_fisher(tables["fisher"], str(path))
    return Memory(**tables, tasks=json.loads(metadata["tasks"]), constant=float(metadata["constant"]))


def check_fisher(fisher: Tensors, source: str) -> None:
    """Raises a ValueError for a Fisher that would hold nothing, or break everything."""
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

    The Fisher is taken over a subset of the training samples: of `trainer.datamodule.fisher_dataloader()` where it
    exists (a DataLoader with the transforms of evaluation: all samples on every rank, not shuffled), else of the
    training loader's data set, with its transforms, whose draws from torch and Python are fixed per sample; batch
    transfer hooks do as in validation. It is the same for every batch size and number of ranks. A first batch is
    tried before training, so that a model whose logits cannot be found is refused in time; `logits` and `labels`
    may be overridden.

    Runs on: fit (start, before optimiser steps or after them, end of batch and of training). Touches: gradients or
    weights, `ewc/penalty` and `ewc/ratio` (penalty to loss) in steps that log, one file.

    Args:
        strength: Weight of the penalty. In the mode `proximal` 1e3 to 1e6 is worth a try with SGD; a step of Adam does
            not shrink with its gradient, and takes far more to be held.
        mode: `proximal` or `gradient`.
        load: Files to start from, each of other tasks.
        save: Where to write the Fisher; `fisher.safetensors` in the trainer's log folder if not given.
        consolidate: Whether to take the Fisher at the end. If not given: unless files are loaded and none is saved.
        samples: Training samples to take the Fisher of, each class by its share; None for all.
        estimator: See `fisher_diagonal`.
        draws: Backward passes per sample, for the estimators `signs` and `sampled`.
        exclude: Regular expressions looked for in the names of parameters that are not held.
        normalise: Whether to divide each task's Fisher by its mean, which makes strengths comparable.
        online_decay: None holds each task at its own anchor. A number from 0 to 1 holds all at the newest one,
            with the older Fishers multiplied by it once per task.
        task: Name of the task for the file and the log.
        seed: Decides the subset and all draws.

    Raises before the first step where it can: ValueError for a Fisher that is zero everywhere, not finite or of other
    parameters, and for a pattern without a match; TypeError for logits or data that cannot be found; RuntimeError for
    FSDP and DeepSpeed, which split parameters.

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
        self._names: dict[int, str] = {}
        self._rates: dict[int, Any] = {}  # of parameter groups, in the step at hand
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
        if _is(trainer.strategy, "FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
            name = type(trainer.strategy).__name__
            raise RuntimeError(f"EWC needs whole parameters, and {name} splits them; take ddp or one device")
        self.active = self._penalty = None

    def state_dict(self) -> dict[str, Any]:
        """What this fit is held by."""
        return dict(vars(self.active or Memory({}, {}, [])))  # never empty: Lightning would neither save nor restore it

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
        owner = type(pl_module).__name__
        for name, t in self.memory.fisher.items():
            if name not in names:
                raise ValueError(
                    f"the Fisher knows {name!r}, which {owner} lacks{_did_you_mean(name, names)}; "
                    f"if it is meant to be new, exclude it: exclude: ['^{re.escape(name)}$']"
                )
            if t.shape != names[name]:
                raise ValueError(
                    f"{name} is {tuple(names[name])} in {owner} and {tuple(t.shape)} in the Fisher, of other "
                    "classes perhaps; exclude what has changed, such as the head: "
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
                for name, t in table.items():  # in the parameter's type and memory layout
                    p = parameters[name]
                    if (t.device, t.dtype, t.stride()) != (p.device, p.dtype, p.stride()):
                        table[name] = torch.empty_like(p, requires_grad=False).copy_(t)
            self._names = {id(parameters[name]): name for name in self.active.fisher}
            for optimizer in trainer.optimizers:
                optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # else gradients come scaled
                if self.mode == "proximal":
                    self._hooks.append(optimizer.register_step_pre_hook(self._read_rates))
                    self._hooks.append(optimizer.register_step_post_hook(self._pull))
                elif optimizer.param_groups[0].get("line_search_fn"):
                    raise ValueError(
                        "L-BFGS's line search compares losses, and the penalty is not in them; take EWC's mode proximal"
                    )
            self._report(trainer, self.active, [n for n, p in parameters.items() if p.requires_grad])
        if self.consolidate:  # what would fail after training fails here
            with _aside(trainer, pl_module.device), _evaluating(pl_module):
                for batch in self._batches(trainer, pl_module, 2 * trainer.world_size)[0]:
                    self._classes = _check_logits(self.logits(pl_module, batch)).shape[1]
                    if self.estimator == "empirical" and self.labels(batch) is None:
                        raise ValueError(NO_LABELS)

    def _report(self, trainer: Trainer, memory: Memory, trained: Sequence[str]) -> None:
        """Say what is held; warn where the mode gradient would diverge."""
        if trainer.is_global_zero:
            _say(
                "EWC: %d tensors of %s numbers are held at %s, %s, strength %g; free: %s",
                len(memory.fisher),
                f"{sum(t.numel() for t in memory.fisher.values()):,}",
                ", ".join(task["name"] for task in memory.tasks),
                self.mode,
                self.strength,
                _some([name for name in trained if name not in memory.fisher]) or "none",
            )
        if self.mode == "gradient":
            # Schedules note the highest rate that a group will get.
            steps = {
                name: max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
                * self.strength
                * float(memory.fisher[name].max())
                for optimizer in trainer.optimizers
                for name, _, group in self._held(optimizer)
            }
            name = max(steps, key=lambda name: steps[name], default="")
            if steps and steps[name] > 2:
                rank_zero_warn(
                    f"EWC: rate * strength * F reaches {steps[name]:.3g} in {name}; gradient descent on the penalty "
                    f"diverges above 2. Take mode proximal, or a strength below {self.strength * 2 / steps[name]:.2g}"
                )

    def _held(self, optimizer: Optimizer) -> list[tuple[str, nn.Parameter, dict[str, Any]]]:
        """Name, parameter and group of all in an optimiser that are held."""
        pairs = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        return [(self._names[id(p)], p, group) for p, group in pairs if id(p) in self._names]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Value of the penalty in steps that log; its gradient in the mode gradient."""
        if (memory := self.active) is None:
            return
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0:
            with torch.no_grad():
                value = penalty(_parameters(pl_module), memory.anchor, memory.fisher, self.strength)
                self._penalty = value + self.strength / 2 * memory.constant
        if self.mode == "gradient":
            mine = {name: p for name, p, _ in self._held(optimizer)}
            add_penalty_gradient_(mine, memory.anchor, memory.fisher, self.strength)

    def _read_rates(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The rates of this step: another hook may put them back before ours comes after it."""
        for group in optimizer.param_groups:
            rate = group["lr"]
            self._rates[id(group)] = rate.clone() if isinstance(rate, Tensor) else rate

    def _pull(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The proximal step."""
        memory, held = cast(Memory, self.active), self._held(optimizer)
        coefficients = {name: self._rates[id(group)] * self.strength for name, _, group in held}
        proximal_step_({name: p for name, p, _ in held}, memory.anchor, memory.fisher, coefficients)

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
            _say("EWC: Fisher of %(samples)d samples (%(estimator)s)", self.memory.tasks[-1])
            _say("EWC: took %.1f s; written to %s", time.monotonic() - started, path)
        trainer.strategy.barrier("Fisher written")

    def _take(self, trainer: Trainer, pl_module: LightningModule) -> Memory:
        """Fisher and anchor of the task that has just been learnt."""
        named = _parameters(pl_module).items()
        parameters = {name: p for name, p in named if p.requires_grad and not self._excluded(name)}
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
        self._remove_hooks()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove_hooks()
        for memory in (self.memory, self.active):
            for table in (memory.fisher, memory.anchor) if memory else ():
                table.update({name: t.cpu() for name, t in table.items()})

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
                        f"this is normalise={self.normalise}; make them equal. A strength s on the normalised Fisher "
                        f"is s / {task['mean']:.3g} on the other"
                    )
                if joined and task in joined.tasks:
                    raise ValueError(
                        f"{path} holds {task['name']!r} as another of the loaded files does; load the newest only"
                    )
            joined = self._joined(joined, memory)
        return cast(Memory, joined)

    def _joined(self, old: Memory | None, new: Memory) -> Memory:
        if old is None:
            return new
        fisher, anchor, constant = merge((old.fisher, old.anchor), (new.fisher, new.anchor), self.online_decay)
        constant = constant + old.constant + new.constant if self.online_decay is None else 0.0
        return Memory(fisher, anchor, old.tasks + new.tasks, constant)

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
        if not items:
            raise ValueError("EWC: there are no samples to take a Fisher of; the training data are empty")
        labels = dataset_labels(dataset)
        if labels is not None and isinstance(items[0], int):
            labels = labels[torch.tensor(items)]
        fit = labels is not None and len(labels) == len(items)
        chosen = choose_samples(labels if fit else None, len(items), samples, self.seed)
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

        def moved(batch: Any) -> Any:
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            return apply_to_collection(batch, Tensor, lambda t: t.to(wide) if t.is_floating_point() else t)

        return map(moved, batches), positions


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


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(re.sub(r"[\^$\\]", "", word), sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise ValueError(f"{name} must be {expected}; received {value!r}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is(thing: Any, *names: str) -> bool:
    """Whether it is of one of these classes or derived from one, in lightning or in pytorch_lightning."""
    return any(kind.__name__ in names for kind in thing.__class__.__mro__)


def _say(text: str, *values: Any) -> None:
    """To this project's log or, where that shows no information, to where Lightning says things, once."""
    (log.info if log.isEnabledFor(logging.INFO) else rank_zero_info)(text, *values)
