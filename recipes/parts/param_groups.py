"""Named parameter groups: a block's learning rate, and what is decayed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from .spelling import did_you_mean, some

ParamGroup: TypeAlias = dict[str, Any]
Role: TypeAlias = Literal["weight", "vector", "table"]
NORM = re.compile(r"Norm(\dd)?$")  # LayerNorm, BatchNorm2d, LlamaRMSNorm, ...: every library names them so
EMBEDDING = re.compile(r"Embed(ding)?s?$|PosEmb")  # QuantEmbedding, PosEmbedRel, ViTEmbeddings, ...
TABLE = re.compile(r"token|pos|emb|bias|rel_|_rel|latent|prompt|_log$")  # reg_token, relative_position_bias_table, ...
LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention, ParametrizationList)


def role(holder: nn.Module, name: str, parameter: nn.Parameter) -> Role:
    """What a parameter is for, by the type of the module that holds it, its name and its shape.

    Args:
        holder: Module of which `parameter` is an attribute.
        name: The attribute's name, without the path to the module.
        parameter: Only its shape counts, never its values.

    Returns:
        `table`: embeddings, and tokens, position tables and the like, which a composite module holds itself;
        `vector`: norms, biases, scales and whatever else has but one dimension longer than 1; `weight`: all the rest.
    """
    kinds = [kind.__name__ for kind in type(holder).__mro__]
    if isinstance(holder, (nn.Embedding, nn.EmbeddingBag)):
        return "table"
    if parameter.ndim < 2 or any(map(NORM.search, kinds)):
        return "vector"
    if isinstance(holder, LAYERS):
        return "vector" if name.startswith("bias") else "weight"
    if TABLE.search(name) or any(map(EMBEDDING.search, kinds)):
        return "table"
    long = sum(size > 1 for size in parameter.shape)
    if next(holder.children(), None) is not None:
        return "weight" if long > 2 else "table"  # XLNet's maps to heads, stacked experts
    return "weight" if long > 1 else "vector"  # a layer's scale, (96, 1, 1)


def param_groups(
    module: nn.Module,
    layer_groups: Mapping[str, Sequence[str]],
    *,
    weight_decay: float | None,
    layer_decay: float = 1.0,
    lr_multipliers: Mapping[str, float] | None = None,
    decay_norms_and_biases: bool = False,
) -> list[ParamGroup]:
    """Sorts all parameters of a module into named groups, from input to output.

    A tied parameter is counted once, in the first layer group that holds it, under its name there. Embeddings,
    tokens and position tables are never decayed. Groups left empty are dropped but keep their place when
    `layer_decay` counts.

    Args:
        module: The network.
        layer_groups: Ordered from input to output, the head last: name of a layer group to dotted paths of
            submodules or parameters in `module`; the path `""` is all of it.
        weight_decay: Of weights; None leaves it to the optimiser's own.
        layer_decay: A group's learning rate is scaled by `layer_decay ** distance from the last group`, above 0.0.
        lr_multipliers: Ordered patterns, looked for anywhere in the dotted name of a parameter, and what to
            multiply its learning rate by, above 0.0; the first match wins.
        decay_norms_and_biases: Decay norms, biases and other parameters of one dimension, too.

    Returns:
        Arguments of an optimiser, to be passed through `build_optimizer`. Each has `params`, `name`, such as
        `layer3`, `layer3/no_decay` or, where multipliers divide a layer, `layer3/x10`; `lr_scale`;
        `weight_decay` unless it is the optimiser's own; and `kinds`, for each parameter `matrix` (hidden weight
        of two dimensions), `sparse` (embedding with sparse gradients) or `other`.

    Raises:
        ValueError: A path that is not in the module, a parameter in no layer group or in two, a pattern that
            decides on no parameter, a factor that is not above 0.
    """
    places = list(_places(module))
    homes = _homes(module, layer_groups, places)
    scales = _multipliers(homes, lr_multipliers or {})
    if layer_decay <= 0:
        raise ValueError(
            f"layer_decay must be above 0; received {layer_decay:g}; 1.0 is one learning rate for all layers"
        )
    roles: dict[nn.Parameter, set[Role]] = {}
    sparse = set()
    for path, holder, parameter in places:
        roles.setdefault(parameter, set()).add(role(holder, path.rpartition(".")[2], parameter))
        if getattr(holder, "sparse", False) and isinstance(holder, (nn.Embedding, nn.EmbeddingBag)):
            sparse.add(parameter)

    last = len(layer_groups) - 1
    members: dict[tuple[int, bool, float], list[nn.Parameter]] = {}
    for parameter, (layer, _) in homes.items():
        free = "table" in roles[parameter] or ("vector" in roles[parameter] and not decay_norms_and_biases)
        members.setdefault((layer, free, scales[parameter]), []).append(parameter)

    groups: list[ParamGroup] = []
    names = list(layer_groups)
    for (layer, free, scale), params in sorted(members.items(), key=lambda item: item[0][:2]):
        divided = len({other for index, _, other in members if index == layer}) > 1
        suffix = f"/x{scale:g}" if divided and scale != 1.0 else ""
        matrices = {p for p in params if layer != last and p.ndim == 2 and roles[p] == {"weight"}}
        group: ParamGroup = {
            "params": params,
            "name": names[layer] + suffix + ("/no_decay" if free else ""),
            "lr_scale": layer_decay ** (last - layer) * scale,
            "kinds": ["sparse" if p in sparse else "matrix" if p in matrices else "other" for p in params],
        }
        if free or weight_decay is not None:
            group["weight_decay"] = 0.0 if free else weight_decay
        groups.append(group)
    return groups


class GroupRow(NamedTuple):
    """One parameter group; counts of tensors and of numbers, learning rates as they are now."""

    name: str
    tensors: int
    parameters: int
    trainable: int  # numbers in tensors that are not frozen
    lr: float
    weight_decay: float


def describe(optimizer: Optimizer) -> list[GroupRow]:
    """A row per parameter group, in order."""
    return [
        GroupRow(
            name=group.get("name", f"group {index}"),
            tensors=len(group["params"]),
            parameters=sum(p.numel() for p in group["params"]),
            trainable=sum(p.numel() for p in group["params"] if p.requires_grad),
            lr=float(group["lr"]),
            weight_decay=group.get("weight_decay", 0.0),
        )
        for index, group in enumerate(optimizer.param_groups)
    ]


def table(rows: Sequence[GroupRow]) -> str:
    """The rows as aligned text."""
    cells = [("group", "tensors", "parameters", "lr", "weight decay")]
    for row in rows:
        rate = f"{row.lr:.3g}" if row.trainable else "frozen"
        cells.append((row.name, f"{row.tensors}", f"{row.parameters:,}", rate, f"{row.weight_decay:g}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[f"{words[0]:{widths[0]}}", *map(str.rjust, words[1:], widths[1:])] for words in cells]
    return "\n".join("  ".join(line) for line in lines)


def _places(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Dotted name, holder and parameter, once for each place a parameter is at."""
    for path, holder in module.named_modules(remove_duplicate=False):
        for name, parameter in holder.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{path}.{name}" if path else name, holder, parameter


def _homes(
    module: nn.Module,
    layer_groups: Mapping[str, Sequence[str]],
    places: Sequence[tuple[str, nn.Module, nn.Parameter]],
) -> dict[nn.Parameter, tuple[int, str]]:
    """Index of the layer group of each parameter, and its name there."""
    known = {name for name, _ in module.named_modules(remove_duplicate=False)} | {name for name, _, _ in places}
    index_of: dict[str, int] = {}
    twice = []
    for index, (layer, paths) in enumerate(layer_groups.items()):
        for path in paths:
            if path not in known:
                raise ValueError(
                    f"layer group {layer!r} names {path!r}, which is not in {type(module).__name__}"
                    + did_you_mean(path, sorted(known))
                )
            for name, _, _ in places:
                inside = path in ("", name) or name.startswith(f"{path}.")
                if inside and index_of.setdefault(name, index) != index:
                    twice.append(name)
    if twice:
        raise ValueError(f"parameters in two layer groups: {some(twice)}; make the groups' paths disjoint")
    homes: dict[nn.Parameter, tuple[int, str]] = {}
    for name, _, parameter in places:
        if name in index_of and (parameter not in homes or index_of[name] < homes[parameter][0]):
            homes[parameter] = index_of[name], name
    lost = [name for name, _, parameter in places if parameter not in homes]
    if lost:
        raise ValueError(f"parameters in no layer group: {some(lost)}; add their paths to a layer group")
    return homes


def _multipliers(
    homes: Mapping[nn.Parameter, tuple[int, str]], patterns: Mapping[str, float]
) -> dict[nn.Parameter, float]:
    """What to multiply each parameter's learning rate by: the first pattern that matches says."""
    unused = set(patterns)
    scales = {}
    for parameter, (_, name) in homes.items():
        first = next((pattern for pattern in patterns if re.search(pattern, name)), None)
        unused.discard(first or "")
        scales[parameter] = 1.0 if first is None else float(patterns[first])
    names = {name for _, name in homes.values()}
    for pattern, scale in patterns.items():
        if pattern in unused:
            words = sorted(names | {part for name in names for part in name.split(".")})
            raise ValueError(
                f"lr_multipliers: {pattern!r} matches no parameter, or none that an earlier pattern leaves to it"
                + did_you_mean(re.sub(r"[\^$]", "", pattern), words)
            )
        if scale <= 0:
            raise ValueError(f"lr_multipliers: {pattern!r} must be above 0; received {scale:g}; freeze it instead")
    return scales
