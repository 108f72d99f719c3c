"""The blocks of a net, from input to output, and parameter groups by them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .messages import count, did_you_mean, some

Role: TypeAlias = Literal["weight", "vector", "table"]
Blocks: TypeAlias = dict[str, dict[str, nn.Parameter]]  # block -> dotted name -> parameter
SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NORM = re.compile(r"Norm(\dd)?$")  # LayerNorm, BatchNorm2d, LlamaRMSNorm, ...: every library names them so
EMBEDDING = re.compile(r"Embed(ding)?s?$|PosEmb")  # QuantEmbedding, PosEmbedRel, ViTEmbeddings, ...
TABLE = re.compile(r"token|pos|emb|bias|rel_|_rel|latent|prompt|_log$")  # reg_token, relative_position_bias_table, ...
LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention, ParametrizationList)


@runtime_checkable
class HasLayerGroups(Protocol):
    """What a module may offer: ordered blocks, input to output, each with its dotted paths."""

    def layer_groups(self) -> Mapping[str, Sequence[str]]:
        """Name of the block -> paths of submodules or parameters; every parameter lies in one."""


def find_blocks(module: nn.Module, patterns: Sequence[str] | None = None) -> Blocks:
    """Sort all parameters of a module into ordered blocks, input to output.

    A tied parameter belongs to the first block that holds it. Frozen parameters are omitted, and blocks without any
    other.

    Args:
        module: Any network.
        patterns: One per block, input to output: regular expressions searched for in a parameter's dotted name; the
            first match counts. None: the module's `layer_groups()`, or else `infer_blocks`.

    Raises:
        ValueError: A pattern or path that matches nothing new, or a parameter in no block.
    """
    inferred = patterns is None and not isinstance(module, HasLayerGroups)
    if patterns is None:
        groups = module.layer_groups() if isinstance(module, HasLayerGroups) else infer_blocks(module)
        tests = {block: rf"^({'|'.join(map(re.escape, paths))})(\.|$)" for block, paths in groups.items()}
    else:
        tests = {pattern: pattern for pattern in patterns}
    names = dict(module.named_parameters())  # each parameter once, under its first name
    home: dict[nn.Parameter, str] = {}
    for block, pattern in tests.items():
        for name, parameter in module.named_parameters(remove_duplicate=patterns is not None):
            if re.search(pattern, name):
                home.setdefault(parameter, block)
        if block not in home.values() and not inferred:  # as T5's own embedding of tokens, which is a shared one
            hint = did_you_mean(block, names)
            raise ValueError(f"block {block!r} holds no parameter, or none that an earlier block leaves to it{hint}")
    lost = [name for name, parameter in names.items() if parameter not in home]
    if lost:
        raise ValueError(f"parameters in no block: {some(lost)}; a last pattern '.' takes all others")
    blocks: Blocks = {block: {} for block in tests}
    for name, parameter in names.items():
        if parameter.requires_grad:
            blocks[home[parameter]][name] = parameter
    return {block: members for block, members in blocks.items() if members}


def infer_blocks(module: nn.Module) -> dict[str, list[str]]:
    """Ordered blocks of a module tree: what repeats becomes one block each, the rest one block per part.

    The layers of a transformer, the stages of a ResNet or the items of a long `Sequential` are blocks; what surrounds
    them (embeddings, stem, pooler, head) are others. Norm layers join the block before, tokens and other parameters of
    a container's own the block after. The order is that of registration, usually input to output.

    Returns:
        Path of the block's first part -> paths of all its parts.
    """
    pieces = list(_pieces(module))
    while sum(not _is_slight(part) for _, part in pieces) < 3:  # nothing repeats, as in Inception: split the largest
        split = {path: part for path, part in pieces if part is not None and _children(part)}
        if not split:
            break
        largest = max(split, key=lambda path: count(split[path].parameters()))
        place = pieces.index((largest, split[largest]))
        pieces[place : place + 1] = _parts(split[largest], f"{largest}.")
    blocks: dict[str, list[str]] = {}
    waiting: list[str] = []  # for a block to join
    for path, part in pieces:
        if not _is_slight(part):
            blocks[path] = [*waiting, path]
            waiting = []
        elif part is not None and blocks:
            next(reversed(blocks.values())).append(path)
        else:
            waiting.append(path)
    if waiting:
        blocks.setdefault(next(reversed(blocks), waiting[0]), []).extend(waiting)
    return blocks


Piece: TypeAlias = tuple[str, nn.Module | None]  # path and module; None for a parameter of a container's own


def _pieces(module: nn.Module, prefix: str = "") -> Iterator[Piece]:
    """A module taken apart only as far as something repeats inside."""
    children = _children(module).values()
    kinds = [type(child) for child in children]
    layers = _is_chain(module) and max(map(kinds.count, kinds)) * 2 > len(kinds)  # of one kind, as in a transformer
    stages = sum(isinstance(child, SEQUENCES) for child in children) >= 3  # as in a ResNet
    for path, part in _parts(module, prefix):
        whole = layers or (stages and isinstance(part, SEQUENCES)) or _is_slight(part)
        if part is not None and not whole and any(map(_is_chain, part.modules())):
            yield from _pieces(part, f"{path}.")
        else:
            yield path, part


def _parts(module: nn.Module, prefix: str) -> list[Piece]:
    own: list[Piece] = [(prefix + name, None) for name, _ in module.named_parameters(recurse=False)]
    return own + [(prefix + name, child) for name, child in _children(module).items()]


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """Children that hold parameters."""
    return {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}


def _is_chain(module: nn.Module) -> bool:
    """Whether it is a sequence of three parts or more, or a `ModuleList` of two."""
    return isinstance(module, SEQUENCES) and len(_children(module)) >= (2 if isinstance(module, nn.ModuleList) else 3)


def _is_slight(part: nn.Module | None) -> bool:
    """Whether it is too small to be a block."""
    return part is None or all(parameter.ndim < 2 for parameter in part.parameters())


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


def layerwise_param_groups(
    module: nn.Module,
    lr: float,
    *,
    layer_decay: float = 1.0,
    weight_decay: float = 0.0,
    patterns: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Named parameter groups by block, for one line in anybody's `configure_optimizers`.

        return torch.optim.AdamW(layerwise_param_groups(self, lr=1e-4, layer_decay=0.8, weight_decay=0.01))

    Discriminative learning rates: Howard & Ruder 2018, https://arxiv.org/abs/1801.06146

    Args:
        module: Any network; its own `layer_groups()` count, else its blocks are inferred.
        lr: Learning rate of the last block, the head.
        layer_decay: Factor on the learning rate from each block to the one before it.
        weight_decay: Of matrices and kernels; what has another `role` has none: norms, biases, embeddings, tokens.
        patterns: As in `find_blocks`.
    """
    places = [(m, name, p) for m in module.modules() for name, p in m.named_parameters(recurse=False)]
    undecayed = {p for holder, name, p in places if role(holder, name, p) != "weight"}
    blocks, groups = find_blocks(module, patterns), []
    for place, (block, members) in enumerate(blocks.items(), 1):
        group = {"lr": lr * layer_decay ** (len(blocks) - place)}
        for name, decay, free in ((block, weight_decay, False), (f"{block}/no_decay", 0.0, True)):
            if params := [p for p in members.values() if (p in undecayed) == free]:
                groups.append({"params": params, "name": name, **group, "weight_decay": decay})
    return groups
