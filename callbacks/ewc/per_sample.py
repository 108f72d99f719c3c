"""Squares of per-sample gradients, summed layer by layer in one backward pass."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from .messages import say, some
from .penalty import Tensors

Parameters: TypeAlias = Mapping[str, nn.Parameter]
Logits: TypeAlias = Callable[[Any], Tensor]
Way: TypeAlias = Literal["auto", "layers", "loop", "vmap"]
Vectors: TypeAlias = Callable[[Tensor, slice], Iterator[Tensor]]  # of some samples, from their logits
SQUARES = 1 << 18  # numbers of per-sample gradients at a time on a CPU, likewise
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


class SquaredGradients:
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
        self.totals = zeros_like(parameters, taps_first=self.way == "layers")

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
        return check_logits(self.logits(batch))

    def choose(self, batch: Any, way: Way) -> Way:
        """Whether layers account for all parameters, by a trial on two samples against the loop."""
        if way in ("loop", "vmap"):
            return way
        if (size := self.size(batch)) == 1:  # which tells nothing, and is the same
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
            raise ValueError(f"no known layer accounts for {some(missing)}; take way='loop'")
        if next(iter(self.parameters.values())).device.type != "cpu":
            with contextlib.suppress(RuntimeError):  # torch.func knows not everything
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


def zeros_like(parameters: Parameters, taps_first: bool = False) -> dict[str, Tensor]:
    """Where sums of squares are collected; for convolutions tap by tap, with each tap's numbers side by side."""
    zeros = {}
    for name, p in parameters.items():
        order = [2, 3, 0, 1] if taps_first and p.dim() == 4 else list(range(p.dim()))
        zeros[name] = torch.zeros([p.shape[d] for d in order], dtype=wide_dtype(p.dtype), device=p.device).permute(
            order
        )
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
def evaluating(module: nn.Module) -> Iterator[None]:
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
    """Refuse what are no logits `(batch, classes)`, or hang on no trained parameter."""
    if not isinstance(z, Tensor) or z.dim() != 2 or z.shape[1] < 2:
        found = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"expected logits of shape (batch, classes) with 2 classes or more, received {found}")
    if not z.requires_grad:
        raise ValueError(
            "the logits depend on no trained parameter; is there a no_grad or a detach on the way to them?"
        )
    return z
