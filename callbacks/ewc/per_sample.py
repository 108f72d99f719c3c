"""Squares of per-sample gradients, summed layer by layer in one backward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .layers import LAYERS, NORMS, Use, add_squares
from .messages import say, some
from .penalty import Tensors

Parameters: TypeAlias = Mapping[str, nn.Parameter]
Logits: TypeAlias = Callable[[Any], Tensor]
Way: TypeAlias = Literal["auto", "layers", "loop", "vmap"]
Vectors: TypeAlias = Callable[[Tensor, slice], Iterator[Tensor]]  # of some samples, from their logits


class _Call(NamedTuple):
    """One call of a layer, with what the gradients of its parameters need."""

    layer: nn.Module | None  # None for the copies, one for each sample, of a parameter that no known layer owns
    names: dict[str, str]  # of the layer's parameters, by attribute
    x: Tensor  # the layer's input; of a norm its output before weight and bias
    at: Tensor | GradientEdge  # where the gradient with respect to the layer's output comes by


class SquaredGradients:
    """Sums over samples of squared gradients, computed in one of three ways."""

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
        self.totals = zeros_like(parameters, taps_first=self.way == "layers")

    def find_samples(self, batch: Any) -> int:
        """Index of the tensor whose length is the batch size: slicing there leaves as many rows of logits."""
        failure: Exception | None = None
        for index, t in enumerate(_tensors(batch)):
            if t.dim():
                try:
                    if len(self.checked(_cut(batch, 0, 2, len(t)))) == min(2, len(t)):
                        return index
                except Exception as error:  # of the net's own, where it is not the samples that were sliced
                    failure = failure or error
        raise failure or TypeError(
            f"no tensor of the batch, a {type(batch).__name__}, has its samples in the first dimension; batches must "
            "be tensors in tuples, lists or dictionaries"
        )

    def size(self, batch: Any) -> int:
        return len(_tensors(batch)[self.leaf])

    def checked(self, batch: Any) -> Tensor:
        return check_logits(self.logits(batch))

    def choose(self, batch: Any, way: Way) -> Way:
        """The way to go: layers where these account for all parameters, by a trial on two samples against the loop."""
        if way in ("loop", "vmap"):
            return way
        if (size := self.size(batch)) == 1:  # a trial would prove nothing, and the loop is as fast
            return "loop"
        batch = _cut(batch, 0, 2, size)

        def vectors(z: Tensor, rows: slice) -> Iterator[Tensor]:
            yield torch.randn(2, z.shape[1], generator=torch.Generator().manual_seed(0)).to(z)[rows]

        expected = zeros_like(self.parameters)
        self.add_loop(batch, vectors, expected)
        noise = 1e-10 * max(float(t.max()) for t in expected.values())
        missing = sorted({name for _, _, name in self.others} or self.parameters)
        for rank in (2, 3, 4) if self.others else (2,):
            self.rank, self.path, found = rank, None, zeros_like(self.parameters)
            with contextlib.suppress(Exception):  # of the net's own, where copies do not fit
                self.add_layers(batch, vectors, found)
                off = {name: float((found[name] - t).abs().max()) for name, t in expected.items()}
                missing = sorted(name for name, t in expected.items() if not off[name] <= noise + 0.01 * float(t.max()))
            if not missing:
                return "layers"
        if way == "layers":
            raise ValueError(f"no known layer accounts for {some(missing)}; use way='loop'")
        if next(iter(self.parameters.values())).device.type != "cpu":
            with contextlib.suppress(RuntimeError):  # torch.func does not support everything
                self.add_vmap(batch, vectors, expected)
                return "vmap"
        say("EWC: no known layer accounts for %s: per-sample gradients one by one", some(missing))
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
                raise TypeError(
                    f"a batch of 1 gave {len(z)} rows of logits; the first dimension of batches must be the samples"
                )
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
            with self.recorded(size, calls):
                z = self.checked(batch)
        except Exception:  # if the copies did not cause it, the loop meets it again
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
            uses: dict[str, list[Use]] = {}
            for call, g in zip(calls, gradients, strict=True):
                if g is not None:
                    x, g = (t.reshape(size, -1, *t.shape[1:]) for t in (call.x, g))
                    for key, name in call.names.items():
                        uses.setdefault(name, []).append((call.layer, key, x, g))
            for name, used in uses.items():
                add_squares(used, totals[name])

    @contextlib.contextmanager
    def recorded(self, size: int, calls: list[_Call]) -> Iterator[None]:
        """During it layers record their calls, and each sample has its own copy of the other parameters."""

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
    """Other tensors take the place of modules' parameters during it."""
    own = [(module, key, module._parameters[key]) for module, key, _ in tensors]
    try:
        for module, key, t in tensors:
            module._parameters[key] = t  # type: ignore[assignment]
        yield
    finally:
        for module, key, p in own:
            module._parameters[key] = p


def zeros_like(parameters: Parameters, taps_first: bool = False) -> dict[str, Tensor]:
    """Where sums of squares are collected; for convolutions tap by tap, with each tap's numbers side by side."""
    zeros = {}
    for name, p in parameters.items():
        order = [2, 3, 0, 1] if taps_first and p.dim() == 4 else list(range(p.dim()))
        ordered = torch.zeros([p.shape[d] for d in order], dtype=wide_dtype(p.dtype), device=p.device)
        zeros[name] = ordered.permute(order)
    return zeros


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, in float32 or 64, without autocast or compiling; all is restored afterwards."""
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


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 where it is that, else float32."""
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


def check_logits(z: Any) -> Tensor:
    """Refuse what are no logits `(batch, classes)`, or depend on no trained parameter."""
    if not isinstance(z, Tensor) or z.dim() != 2 or z.shape[1] < 2:
        found = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"expected logits of shape (batch, classes) with 2 classes or more, received {found}")
    if not z.requires_grad:
        raise ValueError(
            "the logits depend on no trained parameter; is there a no_grad or a detach on the way to them?"
        )
    return z
