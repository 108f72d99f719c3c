"""Optimisers with layer-wise rates and the right weight decay, for any network and any torch optimiser.

    groups = param_groups(net, net.layer_groups(), weight_decay=0.05, layer_decay=0.8, lr_multipliers={"^head": 10})
    optimizer = build_optimizer(partial(torch.optim.AdamW, lr=1e-3), groups)

Every parameter is in a named group from the start, frozen ones too, and each group's rate is real: `lr` and
`initial_lr` carry the layer's scale, so that any schedule keeps the ratios.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import LBFGS, SGD, Adagrad, AdamW, Muon, Optimizer, RMSprop, SparseAdam

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
        layer_decay: A group's rate is scaled by `layer_decay ** distance from the last group`, above 0.0.
        lr_multipliers: Ordered patterns, looked for anywhere in the dotted name of a parameter, and what to
            multiply its rate by, above 0.0; the first match wins.
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
        raise ValueError(f"layer_decay must be above 0; received {layer_decay:g}; 1.0 is one rate for all layers")
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


def build_optimizer(
    optimizer: Callable[[Iterable[Any]], Optimizer], groups: Sequence[ParamGroup], *, fused: bool | None = None
) -> Optimizer:
    """Builds an optimiser whose groups carry their real rates: the base rate of `optimizer` times `lr_scale`.

    `optimizer` is called twice, at first with a throw-away parameter, to see what it builds. L-BFGS knows but one
    group and gets one. Rprop heeds its rate in the first step alone.

    A fused optimiser would unscale float16 gradients by itself, after all hooks that read or clip them. That is
    switched off: `GradScaler` unscales before the hooks, as for any other optimiser.

    Args:
        optimizer: Such as `partial(AdamW, lr=1e-3)`, or what jsonargparse makes of `class_path` and `init_args`.
        groups: From `param_groups`.
        fused: One kernel for all tensors of a group, a fraction of the default's time. None: where `optimizer`
            does not say and the kernel is right, which is not so for SGD with momentum: it fails on a tensor that
            joins its group late, as under gradual unfreezing.

    Raises:
        ValueError: The optimiser cannot do what `groups` or `fused` ask for.
    """
    probe = optimizer([nn.Parameter(torch.zeros(1, 1))])
    kind = type(probe).__name__
    decays = "weight_decay" in probe.defaults
    if not decays and any(group.get("weight_decay") for group in groups):
        raise ValueError(f"{kind} has no weight decay; leave weight_decay unset or take another optimiser")
    if isinstance(probe, LBFGS):
        groups = [_one_group(groups)]
    if isinstance(probe, Muon) and any(p.ndim != 2 for group in groups for p in group["params"]):
        raise ValueError(
            "torch.optim.Muon updates matrices only, and this network has parameters of other shapes; take "
            f"{MuonWithAdamW.__module__}.MuonWithAdamW, which gives those to AdamW"
        )
    if isinstance(probe, SparseAdam):
        _refuse_dense(groups)

    built = optimizer([dict(group) for group in groups])
    for group in built.param_groups:
        lr = group["lr"] * group.pop("lr_scale", 1.0)
        group["lr"], group["initial_lr"] = lr, copy.deepcopy(lr)  # a copy of a tensor would share its memory
        if not decays:
            group.pop("weight_decay", None)
        fusible = "sparse" not in group.pop("kinds", []) and _can_fuse(built, group)
        if fused and not fusible and not group.get("muon"):
            raise ValueError(f"{kind} has no fused kernel that is right for {group['name']}; leave fused unset")
        if fusible and (fused or group["fused"] is None):
            group["fused"] = True
        if "fused" in group and fused is False:
            group["fused"] = False
    built._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    built.register_step_pre_hook(_align)
    return built


def snapshot(optimizer: Optimizer) -> list[ParamGroup]:
    """Hyper-parameters of every group, as they are now, without the parameters."""
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def reassert(optimizer: Optimizer, configured: Sequence[ParamGroup], scheduled: Sequence[str] = ("lr",)) -> list[str]:
    """Puts configured hyper-parameters back after a checkpoint has brought its own.

    Args:
        optimizer: Just restored.
        configured: `snapshot` of it, taken before.
        scheduled: Keys that a schedule writes (the `writes` of ours) and that are left to it; `()` if none does.

    Returns:
        One line per difference: `weight_decay of layer3: 0.01 (checkpoint) -> 0.05 (configured)`.

    Raises:
        ValueError: The checkpoint's groups are other ones, or an option is on now that needs state from the
            first step.
    """
    lines, changed = [], set()
    for index, (group, wanted) in enumerate(zip(optimizer.param_groups, configured, strict=True)):
        name = str(wanted.get("name", f"group {index}"))
        if str(group.get("name", name)).split("/")[0] != name.split("/")[0]:
            raise ValueError(
                f"the checkpoint's group {index} is {group['name']} where {name} is configured; its state belongs to "
                "other layers: resume with the layer groups it was written with, or load its weights alone"
            )
        for key, new in wanted.items():
            old = group.get(key, "absent")
            if old == new or key in scheduled or (key == "initial_lr" and "lr" in scheduled):
                continue
            late = key in ("amsgrad", "centered") or (key == "momentum" and isinstance(optimizer, RMSprop))
            if late and new and not old:
                raise ValueError(
                    f"{key} of {name} is {new} as configured and {old} in the checkpoint, which lacks the state for "
                    f"it; set it to {old}, or load the weights alone"
                )
            group[key] = copy.deepcopy(new)
            changed.add(key)
            if key != "initial_lr":
                lines.append(f"{key} of {name}: {old} (checkpoint) -> {new} (configured)")
    if changed & {"fused", "capturable"}:
        optimizer.load_state_dict(optimizer.state_dict())  # moves the step counts to the device these need
    return lines


class GroupRow(NamedTuple):
    """One parameter group; counts of tensors and of numbers, rates as they are now."""

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


class MuonWithAdamW(Optimizer):
    """Muon for the hidden layers' matrices and AdamW for all the rest, in one optimiser.

    Groups that hold both are divided: `layer3` keeps the matrices, `layer3/adamw` has the rest. Convolutions count
    as the rest. Muon's steps are scaled to the size of AdamW's, so that one rate and weight decay serve both:
    Liu et al. 2025, https://arxiv.org/abs/2502.16982

    Args:
        params: From `param_groups`, which tells hidden matrices from embeddings and the head; or parameters, of
            which all of two dimensions then count as matrices.
        lr: Rate of both.
        weight_decay: Decoupled, of both.
        momentum: Of Muon, with Nesterov's correction.
        betas: Of AdamW.
        eps: Of AdamW.

    Raises:
        ValueError: There is no hidden matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        given = list(params)
        groups = given if isinstance(given[0], dict) else [{"params": given}]
        for_muon = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
        for_adamw = {"betas": betas, "eps": eps}
        divided = []
        for group in groups:
            kinds = group.get("kinds") or ["matrix" if p.ndim == 2 else "other" for p in group["params"]]
            for muon in (True, False):
                chosen = [i for i, kind in enumerate(kinds) if (kind == "matrix") is muon]
                if not chosen:
                    continue
                part = {**group, "muon": muon, "params": [group["params"][i] for i in chosen]}
                if "name" in group and not muon and len(chosen) < len(kinds):
                    part["name"] = f"{group['name']}/adamw"
                divided.append((for_muon if muon else for_adamw) | part)
        if not any(group["muon"] for group in divided):
            raise ValueError(
                "Muon found no hidden matrix, but only convolutions, vectors, embeddings or a head; take AdamW"
            )
        super().__init__(divided, {"lr": lr, "weight_decay": weight_decay})
        self._bind()

    def _bind(self) -> None:
        """Two optimisers that work on this one's groups and state."""
        self._parts: list[Optimizer] = []
        for cls, muon in ((Muon, True), (AdamW, False)):
            groups = [group for group in self.param_groups if group["muon"] is muon]
            if groups:
                self._parts.append(cls(groups))
                self._parts[-1].state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind()  # a restored checkpoint, and a pickle, bring new groups and new state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both; with a closure, after calling it once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


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
                    + _did_you_mean(path, known)
                )
            for name, _, _ in places:
                inside = path in ("", name) or name.startswith(f"{path}.")
                if inside and index_of.setdefault(name, index) != index:
                    twice.append(name)
    if twice:
        raise ValueError(f"parameters in two layer groups: {_some(twice)}; make the groups' paths disjoint")
    homes: dict[nn.Parameter, tuple[int, str]] = {}
    for name, _, parameter in places:
        if name in index_of and (parameter not in homes or index_of[name] < homes[parameter][0]):
            homes[parameter] = index_of[name], name
    lost = [name for name, _, parameter in places if parameter not in homes]
    if lost:
        raise ValueError(f"parameters in no layer group: {_some(lost)}; add their paths to a layer group")
    return homes


def _multipliers(
    homes: Mapping[nn.Parameter, tuple[int, str]], patterns: Mapping[str, float]
) -> dict[nn.Parameter, float]:
    """What to multiply each parameter's rate by: the first pattern that matches says."""
    unused = set(patterns)
    scales = {}
    for parameter, (_, name) in homes.items():
        first = next((pattern for pattern in patterns if re.search(pattern, name)), None)
        unused.discard(first or "")
        scales[parameter] = 1.0 if first is None else float(patterns[first])
    names = {name for _, name in homes.values()}
    for pattern, scale in patterns.items():
        if pattern in unused:
            raise ValueError(
                f"lr_multipliers: {pattern!r} matches no parameter, or none that an earlier pattern leaves to it"
                + _did_you_mean(pattern, names | {part for name in names for part in name.split(".")})
            )
        if scale <= 0:
            raise ValueError(f"lr_multipliers: {pattern!r} must be above 0; received {scale:g}; freeze it instead")
    return scales


def _one_group(groups: Sequence[ParamGroup]) -> ParamGroup:
    """All parameters in a single group, for L-BFGS."""
    if any(group.get("lr_scale", 1.0) != 1.0 for group in groups):
        raise ValueError(
            "L-BFGS has one rate for all parameters; set layer_decay to 1 and lr_multipliers to none, "
            "or take another optimiser"
        )
    return {"params": [p for group in groups for p in group["params"]], "name": "all"}


def _refuse_dense(groups: Sequence[ParamGroup]) -> None:
    dense = [
        group["name"]
        for group in groups
        if any(p.requires_grad and kind != "sparse" for p, kind in zip(group["params"], group["kinds"], strict=True))
    ]
    if dense:
        raise ValueError(
            f"SparseAdam takes sparse gradients only; {_some(dense)} would have dense ones: set sparse=True on the "
            "embeddings and freeze the rest, or take Adam"
        )


def _can_fuse(optimizer: Optimizer, group: ParamGroup) -> bool:
    """Whether a fused kernel exists for the group and is right whatever happens in a run."""
    devices = {"cpu"} if isinstance(optimizer, Adagrad) else {"cpu", "cuda"}
    return (
        "fused" in group
        and not (group["foreach"] or group["differentiable"])
        and not (isinstance(optimizer, SGD) and group["momentum"])
        and all(
            type(p) in (nn.Parameter, Tensor)
            and p.is_floating_point()
            and p.device.type in devices
            and p.stride() == torch.empty_like(p, device="meta").stride()  # dense
            for p in group["params"]
        )
    )


def _align(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a fused kernel runs, that is after the closure where there is one, matches all memory layouts."""
    if not any(group.get("fused") for group in optimizer.param_groups):
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimiser
    if closure is None:
        _match_layouts(optimizer)
        return None

    def closure_then_align() -> Any:
        loss = closure()
        _match_layouts(optimizer)
        return loss

    return args[:1], {**kwargs, "closure": closure_then_align}


def _match_layouts(optimizer: Optimizer) -> None:
    """Lays gradients and state out as their parameters are.

    A fused kernel walks through memory. Where a hand-made gradient, or state from a checkpoint of a run in
    another memory format, is laid out differently, it would update the wrong numbers on a CPU, without a word.
    """
    for group in optimizer.param_groups:
        for p in group["params"] if group.get("fused") else ():
            if p.grad is None:
                continue
            if not _same_layout(p, p.grad):
                p.grad = torch.empty_like(p, dtype=p.grad.dtype).copy_(p.grad)
            state = optimizer.state.get(p, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape and not _same_layout(p, value):
                    state[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def _same_layout(one: Tensor, other: Tensor) -> bool:
    if one.stride() == other.stride():
        return True
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or mine == its for size, mine, its in strides)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(re.sub(r"[\^$]", "", word), sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
