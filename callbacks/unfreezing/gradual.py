"""Freeze parts of any network, and open them again block by block while it trains.

    Trainer(callbacks=[Freeze(train_last_blocks=1)])            # feature extraction: the head alone
    Trainer(callbacks=[GradualUnfreezing(every_epochs=1)])      # the head first, then a block more every epoch

A block is a named group of parameters, ordered from input to output. Blocks come from the module's own
`layer_groups()`, from patterns, or are inferred from the module tree.
"""

from __future__ import annotations

import difflib
import gc
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

log = logging.getLogger(__name__)

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

    A tied parameter belongs to the first block that holds it. Parameters that are frozen already are left out,
    and so are blocks without any other.

    Args:
        module: Any network.
        patterns: One per block, input to output: regular expressions looked for in a parameter's dotted name; the
            first that is found counts. None: the module's `layer_groups()`, or else `infer_blocks`.

    Raises:
        ValueError: A pattern or path that decides on no parameter, or a parameter in no block.
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
            hint = _did_you_mean(block, names)
            raise ValueError(f"block {block!r} holds no parameter, or none that an earlier block leaves to it{hint}")
    lost = [name for name, parameter in names.items() if parameter not in home]
    if lost:
        raise ValueError(f"parameters in no block: {_some(lost)}; a last pattern '.' takes all the rest")
    blocks: Blocks = {block: {} for block in tests}
    for name, parameter in names.items():
        if parameter.requires_grad:
            blocks[home[parameter]][name] = parameter
    return {block: members for block, members in blocks.items() if members}


def infer_blocks(module: nn.Module) -> dict[str, list[str]]:
    """Ordered blocks of a module tree: what repeats becomes one block each, the rest one block per part.

    The layers of a transformer, the stages of a ResNet or the items of a long `Sequential` are blocks; what lies
    around them (embeddings, stem, pooler, head) are others. Norm layers join the block before, tokens and other
    parameters of a container's own the block after. Order is that of registration, usually input to output.

    Returns:
        Path of the block's first part -> paths of all its parts.
    """
    pieces = list(_pieces(module))
    while sum(not _is_slight(part) for _, part in pieces) < 3:  # nothing repeats, as in Inception: split the largest
        split = {path: part for path, part in pieces if part is not None and _children(part)}
        if not split:
            break
        largest = max(split, key=lambda path: _count(split[path].parameters()))
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
    """A module taken apart as far as something repeats inside, but no further."""
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
    """Whether it is too little to be a block."""
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
        lr: Rate of the last block, the head.
        layer_decay: Factor on the rate from each block to the one before it.
        weight_decay: Of matrices, kernels; what has another `role` has none: norms, biases, embeddings, tokens.
        patterns: As in `find_blocks`.
    """
    places = [(m, name, p) for m in module.modules() for name, p in m.named_parameters(recurse=False)]
    spared = {p for holder, name, p in places if role(holder, name, p) != "weight"}
    blocks, groups = find_blocks(module, patterns), []
    for place, (block, members) in enumerate(blocks.items(), 1):
        rate = lr * layer_decay ** (len(blocks) - place)
        free = spared & set(members.values())
        for name, decay, params in (
            (block, weight_decay, [p for p in members.values() if p not in free]),
            (f"{block}/no_decay", 0.0, [p for p in members.values() if p in free]),
        ):
            if params:
                groups.append({"params": params, "name": name, "lr": rate, "weight_decay": decay})
    return groups


class _Freezing(Callback):
    """Holds parameters frozen and modules in evaluation mode, until the fit is over."""

    def __init__(self, frozen_dropout: bool) -> None:
        self.frozen_dropout = frozen_dropout
        self.frozen: set[nn.Parameter] = set()
        self.eval: set[nn.Module] = set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Frozen modules stay in evaluation mode, whoever called `train()`."""
        for module in self.eval:
            module.training = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module back as it was."""
        if stage == "fit":
            self.hand_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As after a fit."""
        self.hand_back()

    def hand_back(self) -> None:
        """Let everything train again that this callback has frozen."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        for module in self.eval:
            module.training = True
        self.frozen, self.eval = set(), set()


class Freeze(_Freezing):
    """Keeps parts of the network frozen for the whole fit: feature extraction, partial fine-tuning, BitFit.

    Frozen means frozen: no gradient, no weight decay, no momentum, and modules all of whose parameters are frozen
    are in evaluation mode, so that BatchNorm keeps its statistics and dropout is off. After the fit the module is
    trainable as it was before.

    Runs on: setup, fit start, every training batch (modes only). Touches: `requires_grad`, `training`.

    Args:
        train_last_blocks: How many of the last blocks train; 1 is the head alone.
        patterns: Ordered, regular expression -> whether it trains; the first that is found in a parameter's name
            decides, before `train_last_blocks`.
        train_norms: Parameters of norm layers train all the same.
        train_biases: Biases train all the same. BitFit: Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199
        frozen_dropout: Leave dropout on in frozen blocks; BatchNorm's statistics stay as they are.

    Raises:
        ValueError: Nothing is asked for, a pattern decides on no parameter, or nothing would train; another Freeze or
            a finetuning callback of Lightning's.

    Example:
        >>> Trainer(callbacks=[Freeze(train_last_blocks=1, train_norms=True)])  # doctest: +SKIP
    """

    def __init__(
        self,
        train_last_blocks: int | None = None,
        patterns: Mapping[str, bool] | None = None,
        train_norms: bool = False,
        train_biases: bool = False,
        frozen_dropout: bool = False,
    ) -> None:
        if train_last_blocks is None and not patterns:
            raise ValueError("Freeze needs train_last_blocks (1 for the head alone) or patterns")
        super().__init__(frozen_dropout)
        self.train_last_blocks, self.patterns = train_last_blocks, dict(patterns or {})
        self.train_norms, self.train_biases = train_norms, train_biases
        self.frozen_parameters = 0  # how many numbers are frozen

    def chosen(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Names and parameters to freeze, out of those that are not frozen already."""
        blocks = find_blocks(module)
        last = len(blocks) if self.train_last_blocks is None else self.train_last_blocks
        if not 0 <= last <= len(blocks):
            raise ValueError(f"train_last_blocks must be 0 to {len(blocks)}, not {last}; blocks: {', '.join(blocks)}")
        norms = {
            parameter
            for part in module.modules()
            if any(NORM.search(kind.__name__) for kind in type(part).__mro__)
            for parameter in part.parameters(recurse=False)
        }
        trains: dict[str, bool] = {}
        unused = set(self.patterns)
        for position, members in enumerate(blocks.values()):
            for name, parameter in members.items():
                match = next((pattern for pattern in self.patterns if re.search(pattern, name)), None)
                if match is not None:
                    unused.discard(match)
                    trains[name] = self.patterns[match]
                else:
                    trains[name] = (
                        position >= len(blocks) - last
                        or (self.train_norms and parameter in norms)
                        or (self.train_biases and name.endswith("bias"))
                    )
        known = dict(module.named_parameters())
        if unused:
            pattern = min(unused)
            raise ValueError(f"Freeze: pattern {pattern!r} decides on no parameter{_did_you_mean(pattern, known)}")
        if not any(trains.values()):
            raise ValueError("Freeze leaves nothing to train: raise train_last_blocks or let a pattern train")
        return {name: known[name] for name in trains if not trains[name]}

    def freeze(self, module: nn.Module) -> None:
        """Freeze what is chosen; does nothing where that has been done."""
        if not self.frozen:
            self.frozen = close(self.chosen(module).values())
            self.frozen_parameters = _count(self.frozen)
            trains = _count(p for p in module.parameters() if p.requires_grad)
            _say(f"freeze: {_counted(self.frozen)} frozen, {trains:,} parameters train")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze before the strategy wraps the module, so that DDP never sees frozen parameters."""
        if stage == "fit":
            _check_alone(trainer, self)
            if not self.frozen <= set(pl_module.parameters()):  # else it was frozen before the fit
                self.hand_back()
            if any(True for _ in pl_module.parameters()):
                self.freeze(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze what was built late, in `configure_model` or the module's own `setup`."""
        if not self.frozen:
            self.freeze(pl_module)
            rewrap(trainer, pl_module)
        self.eval = frozen_modules(pl_module, self.frozen, dropout=self.frozen_dropout)


class GradualUnfreezing(_Freezing):
    """Opens the network block by block: the last blocks train from the start, the others join later.

    All parameters are in the optimiser from the first step; opening only flips `requires_grad`, so schedulers,
    momentum and resuming know nothing of it. What is open is computed from the run's progress at every start of
    an epoch or step, also after a resume. A frozen block has no gradient, decay or momentum, and its modules are
    in evaluation mode: BatchNorm (SyncBatchNorm, too) keeps its statistics. Parameters that were frozen before,
    by the module itself or by `Freeze`, stay so. After the fit the module is trainable as it was before.

    Under DDP the wrapper is made anew at each change, on all ranks at the same step: frozen parameters cost no
    traffic, opened ones are reduced. Weights are compared across ranks at each change and at the end. A block that
    opens must be seen to receive a gradient in its first step. FSDP, DeepSpeed and model parallelism are refused.

    Runs on: fit start, start of epochs and batches, end of validation. Touches: `requires_grad`, `training`,
    `grad`, under DDP the strategy's wrapper, with `restore_best` weights and buffers.

    Args:
        every_epochs: Open a phase every so many epochs.
        every_steps: The same in optimiser steps.
        at: When each phase opens: below 1 a share of the run, from 1 on an optimiser step.
        over_share: Open evenly, the last phase at this share of the run; 0.5 where nothing else is given.
        monitor: Logged metric; a phase opens when it has not improved in more than `patience` validations.
        mode: Whether smaller (`min`) or larger (`max`) values of `monitor` are better.
        patience: Validations without improvement that are borne.
        min_delta: Least change of `monitor` that counts as an improvement.
        restore_best: With `monitor`: return to the phase's best weights and buffers before the next opens;
            the optimiser's momentum is kept.
        blocks_at_start: Blocks open from the first step.
        blocks_per_phase: Blocks that open together; None for all the rest at once.
        order: `top_down` from the head, `bottom_up`, or names of all blocks in the order to open.
        patterns: Blocks as regular expressions, input to output; see `find_blocks`.
        frozen_dropout: Leave dropout on in frozen blocks.

    Raises:
        ValueError: A phase that the run can't reach or that an early stop could forestall; a pattern without a
            match; a parameter in no optimiser group or in two; fewer than two blocks.
        RuntimeError: Replicas differ; an opened block receives no gradient.

    Source: Howard & Ruder 2018, https://arxiv.org/abs/1801.06146

    Example:
        >>> Trainer(callbacks=[GradualUnfreezing(every_epochs=1, blocks_per_phase=2)])  # doctest: +SKIP
    """

    def __init__(
        self,
        every_epochs: int | None = None,
        every_steps: int | None = None,
        at: Sequence[float] | None = None,
        over_share: float | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        patience: int = 1,
        min_delta: float = 0.0,
        restore_best: bool = False,
        blocks_at_start: int = 1,
        blocks_per_phase: int | None = 1,
        order: Literal["top_down", "bottom_up"] | Sequence[str] = "top_down",
        patterns: Sequence[str] | None = None,
        frozen_dropout: bool = False,
    ) -> None:
        super().__init__(frozen_dropout)
        self.every_epochs, self.every_steps, self.at, self.over_share = every_epochs, every_steps, at, over_share
        self.monitor, self.patience, self.min_delta, self.restore_best = monitor, patience, min_delta, restore_best
        self.sign = 1.0 if mode == "min" else -1.0
        self.blocks_at_start, self.blocks_per_phase = blocks_at_start, blocks_per_phase
        self.order, self.patterns = order, patterns
        ways = ("every_epochs", "every_steps", "at", "over_share", "monitor")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"GradualUnfreezing received {' and '.join(given)}; give one of them")
        if any(value is not None and value < 1 for value in (every_epochs, every_steps, blocks_per_phase)):
            raise ValueError("every_epochs, every_steps and blocks_per_phase must be at least 1")
        if blocks_at_start < 1:
            raise ValueError(f"blocks_at_start must be at least 1, or nothing trains; received {blocks_at_start}")
        if over_share is not None and not 0 < over_share < 1:
            raise ValueError(f"over_share must lie between 0 and 1; received {over_share:g}")
        if at is not None and (not at or min(at) <= 0 or list(at) != sorted(at)):
            raise ValueError(f"at must be ascending shares of the run, then steps, above 0; received {list(at)}")
        if restore_best and monitor is None:
            raise ValueError("restore_best needs monitor, to know what is best")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be min or max; received {mode!r}")
        self._reset()

    def _reset(self) -> None:
        self.blocks: list[Blocks] = []  # by phase; phase 0 is open from the start
        self.opening_steps: list[int] = []  # optimiser step at which each open phase opened
        self.due = 0  # the phase that a metric has called for
        self.best: float | None = None
        self.bad_validations = 0
        self.best_weights: dict[str, Tensor] = {}
        self._boundaries: list[tuple[str, int]] = []
        self._shown = -1  # the phase that the module has been brought to
        self._untried: Blocks = {}  # opened, but not yet seen to receive gradients

    @property
    def phases(self) -> list[list[nn.Parameter]]:
        """Parameters that open together, in the order of opening."""
        return [[p for members in part.values() for p in members.values()] for part in self.blocks]

    @property
    def all_open(self) -> bool:
        """Whether the last phase has begun."""
        return bool(self.blocks) and len(self.opening_steps) == len(self.blocks)

    def plan(self, module: nn.Module) -> list[Blocks]:
        """The blocks of each phase, in the order of opening.

        Raises:
            ValueError: There are fewer than two blocks, or `order` doesn't name them.
        """
        blocks = find_blocks(module, self.patterns)
        if len(blocks) < 2:
            kind = type(module).__name__
            raise ValueError(f"GradualUnfreezing found {len(blocks)} block in {kind}; give patterns, one per block")
        names = list(blocks if self.order in ("top_down", "bottom_up") else self.order)
        if self.order == "top_down":
            names.reverse()
        if sorted(names) != sorted(blocks):
            raise ValueError(f"order must name each block once: {', '.join(blocks)}; received {self.order}")
        first, rest = names[: self.blocks_at_start], names[self.blocks_at_start :]
        size = self.blocks_per_phase or max(len(rest), 1)
        parts = [first, *(rest[i : i + size] for i in range(0, len(rest), size))]
        if self.at is not None and len(self.at) < len(parts) - 1:
            parts[len(self.at) :] = [list(chain(*parts[len(self.at) :]))]  # the last opens all the rest
        return [{name: blocks[name] for name in part} for part in parts]

    def boundaries(self, phases: int, total_steps: float) -> list[tuple[str, int]]:
        """`("epoch" or "step", number)` at which each phase after the first opens; none with a metric."""
        count = range(1, phases)
        if self.monitor is not None:
            return []
        if self.every_epochs is not None:
            return [("epoch", self.every_epochs * n) for n in count]
        if self.every_steps is not None:
            return [("step", self.every_steps * n) for n in count]
        points = self.at or [(self.over_share or 0.5) * n / len(count) for n in count]
        if min(points, default=1) < 1 and not math.isfinite(total_steps):
            raise ValueError(
                "a share of the run needs its length: set max_epochs or max_steps, or give every_steps; for data "
                "without a length, or several optimisers, it is max_steps"
            )
        return [("step", max(math.ceil(p * total_steps - 1e-9), 1) if p < 1 else int(p)) for p in points[: len(count)]]

    def planned_steps(self, phases: int, total_steps: float, steps_per_epoch: float, begin: float = 0.0) -> list[float]:
        """Optimiser step at which each phase opens; with a metric, of the first alone.

        Args:
            phases: How many there are.
            total_steps: Of the run; infinite where that is not known.
            steps_per_epoch: Infinite where the data has no length.
            begin: Step at which the run began, or would have with as many steps in each epoch: `step_at_epoch` of 0.

        Raises:
            ValueError: The run ends before the last one.
        """
        ends = self.boundaries(phases, total_steps)
        steps = [0, *(begin + number * steps_per_epoch if unit == "epoch" else number for unit, number in ends)]
        if total_steps <= steps[-1] < math.inf:
            raise ValueError(
                f"the last blocks would open at step {steps[-1]:g}, but the run has {total_steps:g} optimiser steps: "
                "open faster, more blocks_per_phase, or train longer"
            )
        return steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        if stage == "fit":
            _check_alone(trainer, self)
            self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks and freeze all but the first phase.

        Not before: a `configure_optimizers` that leaves out what is frozen has now seen every parameter. DDP's wrapper
        is made anew when training begins.
        """
        check_strategy(trainer)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, Freeze):
                other.freeze(pl_module)
        self.blocks = self.plan(pl_module)
        _check_groups(trainer, self.blocks)
        found = "layer_groups()" if isinstance(pl_module, HasLayerGroups) else "inferred"
        order = " | ".join(", ".join(part) for part in self.blocks)
        _say(f"unfreezing: phases of blocks, {found if self.patterns is None else 'patterns'}: {order}")
        self._show(pl_module, max(len(self.opening_steps) - 1, 0))  # more than 0 after a resume

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan when phases open, now that it is known how far a resumed run has come."""
        total, per_epoch = steps_of_run(trainer), steps_per_epoch(trainer)
        self._boundaries = self.boundaries(len(self.blocks), total)
        last = self.planned_steps(len(self.blocks), total, per_epoch, step_at_epoch(trainer, 0))[-1]
        _check_early_stops(trainer, math.inf if self.monitor is not None else last)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open what is due."""
        self._advance(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open what is due, also after a resume amid an epoch."""
        self._advance(trainer, pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """In a block's first step, see that gradients arrive."""
        untried, self._untried = self._untried, {}
        for block, members in untried.items():
            missing = [name for name, parameter in members.items() if parameter.grad is None]
            if missing and (len(missing) == len(members) or _is_compiled(pl_module)):
                raise RuntimeError(
                    f"{block} opened at step {self.opening_steps[-1]}, but no gradient reaches {_some(missing)}: does "
                    "forward() use it, and not under no_grad()? If it is compiled, a graph from before may be in use"
                )
            if missing:
                log.warning(f"unfreezing: no gradient reaches {_some(missing)}: forward() does not use it")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With `monitor`: the first rank decides, for all, whether the next phase is due."""
        if self.monitor is None or trainer.state.fn != "fit" or trainer.sanity_checking or self.all_open:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ValueError(f"monitor {self.monitor!r} is not logged; there are {known}")
        value = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))
        if self.best is None or self.sign * value < self.sign * self.best - self.min_delta:
            self.best, self.bad_validations = value, 0
            if self.restore_best:
                opened = ((name, p) for name, p in pl_module.named_parameters() if p.requires_grad)
                moving = chain(opened, pl_module.named_buffers())
                self.best_weights = {name: tensor.detach().clone() for name, tensor in moving}
        elif self.bad_validations < self.patience:
            self.bad_validations += 1
        else:
            self.due, self.best, self.bad_validations = len(self.opening_steps), None, 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A last comparison of the ranks' weights."""
        compare_ranks(trainer, pl_module)
        if not self.all_open:
            never = ", ".join(chain(*self.blocks[len(self.opening_steps) :]))
            log.warning(f"unfreezing: the run ended before these opened: {never}")

    def state_dict(self) -> dict[str, Any]:
        """When phases opened, and what a metric's next decision hangs on."""
        names = ("opening_steps", "due", "best", "bad_validations", "best_weights")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the history; what is open follows from it and the progress."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the module to the phase that the progress says."""
        reached = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        due = self.due if self.monitor is not None else sum(reached[unit] >= at for unit, at in self._boundaries)
        due = min(max(due, len(self.opening_steps) - 1), len(self.blocks) - 1)
        if due == self._shown:
            return
        if due >= len(self.opening_steps):  # else a resume, for which nothing is new
            compare_ranks(trainer, pl_module)
            tensors = dict(chain(pl_module.named_parameters(), pl_module.named_buffers()))
            for name, best in self.best_weights.items():
                tensors[name].data.copy_(best)
            self.best_weights = {}
            self.opening_steps = self.opening_steps + [trainer.global_step] * (due + 1 - len(self.opening_steps))
        first, self._shown = self._shown + 1, due
        self._untried = {
            name: members for part in self.blocks[max(first, 1) : due + 1] for name, members in part.items()
        }
        self._show(pl_module, due)
        self._announce(trainer, first)
        rewrap(trainer, pl_module)

    def _show(self, pl_module: LightningModule, phase: int) -> None:
        """Let `requires_grad` and modes show that phases up to `phase` are open."""
        self.hand_back()
        self.frozen = close(chain(*self.phases[phase + 1 :]))
        self.eval = frozen_modules(pl_module, self.frozen, dropout=self.frozen_dropout)

    def _announce(self, trainer: Trainer, first: int) -> None:
        """One line, and the same to the loggers, on what is open from now on."""
        opened = set(chain(*self.phases[first : self._shown + 1]))
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates = sorted(float(group["lr"]) for group in groups if not opened.isdisjoint(group["params"]))
        lr = f"{rates[0]:.3g}" if rates[0] == rates[-1] else f"{rates[0]:.3g} to {rates[-1]:.3g}"
        names, now = ", ".join(chain(*self.blocks[first : self._shown + 1])), self.blocks[: self._shown + 1]
        _say(
            f"unfreezing: step {trainer.global_step}, epoch {trainer.current_epoch}: {names} open, {_counted(opened)} "
            f"at lr {lr}; {sum(map(len, now))} of {sum(map(len, self.blocks))} blocks"
        )
        parameters = _count(chain(*self.phases[: self._shown + 1]))
        facts = {"unfreezing/phase": float(self._shown), "unfreezing/parameters": float(parameters)}
        for logger in trainer.loggers:
            logger.log_metrics(facts, step=trainer.global_step)


def close(parameters: Iterable[nn.Parameter]) -> set[nn.Parameter]:
    """Freeze parameters: no gradient from now on, and none left over for an optimiser to use; returns them."""
    closed = set(parameters)
    for parameter in closed:
        parameter.requires_grad_(False)
        parameter.grad = None
    return closed


def frozen_modules(root: nn.Module, frozen: set[nn.Parameter], *, dropout: bool = False) -> set[nn.Module]:
    """Modules all of whose parameters are frozen and what lies inside them, as far as in training mode.

    Args:
        root: The network.
        frozen: Its frozen parameters.
        dropout: Return only modules with running statistics, so that dropout inside frozen ones stays on.
    """
    found: set[nn.Module] = set()
    for module in root.modules():
        own = set(module.parameters())
        if own and own <= frozen:
            found |= set(module.modules())
    return {m for m in found if m.training and (not dropout or getattr(m, "running_mean", None) is not None)}


def rewrap(trainer: Trainer, pl_module: LightningModule) -> None:
    """Under DDP, wrap the module anew, for its reducer serves the parameters that train at the time of wrapping.

    All ranks must call it at the same step, between an update and the next forward pass.
    """
    strategy: Any = trainer.strategy
    if _is(strategy, "DDPStrategy"):
        for parameter in pl_module.parameters():
            parameter.grad = None  # may be a view into the old reducer's buckets
        strategy.model = pl_module
        gc.collect()  # the old reducer's hooks leave the parameters only when it dies
        strategy.configure_ddp()


def compare_ranks(trainer: Trainer, pl_module: LightningModule) -> None:
    """Stop the run where weights differ between ranks.

    Raises:
        RuntimeError: They do.
    """
    if trainer.world_size > 1:
        own = int(weight_hash(pl_module.parameters()))
        if not trainer.strategy.reduce_boolean_decision(own == trainer.strategy.broadcast(own)):
            raise RuntimeError(
                f"step {trainer.global_step}: weights differ between ranks, so each trains a model of its own; was a "
                "parameter changed on one rank only, or left out of DDP's reduction?"
            )


def weight_hash(parameters: Iterable[nn.Parameter]) -> Tensor:
    """A sum over the bits of all numbers, each tensor weighted by its place; one whole number."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = [p.detach().contiguous().view(integers[p.element_size()]) for p in parameters]
    return torch.stack([place * b.sum(dtype=torch.int64) for place, b in enumerate(bits, 1)]).sum()


def steps_per_epoch(trainer: Trainer) -> float:
    """Optimiser steps in an epoch; infinite where the data has no length, or several optimisers step as they like."""
    batches = float(trainer.num_training_batches) if len(trainer.optimizers) < 2 else math.inf
    return math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else math.inf


def step_at_epoch(trainer: Trainer, epoch: float) -> float:
    """Optimiser step at which an epoch begins, if it does so after now; infinite where the data has no length.

    Counted from now: a run that is resumed with other batches, accumulation or devices has steps of two kinds.
    """
    loop, per_epoch = trainer.fit_loop, steps_per_epoch(trainer)
    if not math.isfinite(per_epoch):
        return math.inf
    epochs, batches, done = loop.epoch_progress.current, loop.epoch_loop.batch_progress, 0.0
    if vars(epochs)["started"] > trainer.current_epoch:  # amid an epoch
        last = batches.is_last_batch
        done = per_epoch if last else vars(batches.current)["processed"] // trainer.accumulate_grad_batches
    return trainer.global_step + (epoch - trainer.current_epoch) * per_epoch - done


def steps_of_run(trainer: Trainer) -> float:
    """Optimiser steps of the whole run, those done and those left; infinite where nobody knows.

    Lightning's `estimated_stepping_batches` is -1 where the data has no length, and takes what is done before a resume
    for what the same epochs would be now. With `fast_dev_run` it is long, for its steps are the first of a real run.
    """
    if getattr(trainer, "fast_dev_run", False):
        return 1e6
    epochs, steps = trainer.max_epochs, trainer.max_steps
    ends = [math.inf, step_at_epoch(trainer, math.inf if epochs in (None, -1) else epochs)]
    return min(ends if steps == -1 else [*ends, steps])


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies under which opening parameters later would go wrong.

    Raises:
        ValueError: The strategy is neither DDP nor a single device.
    """
    if not _is(trainer.strategy, "DDPStrategy", "SingleDeviceStrategy"):
        raise ValueError(
            f"GradualUnfreezing works on one device and under DDP; {type(trainer.strategy).__name__} fixes what "
            "trains when it shards the module: use ddp, or Freeze for what never trains"
        )


def _check_alone(trainer: Trainer, callback: Callback) -> None:
    """Refuse what would freeze and open the same parameters; Freeze and GradualUnfreezing go together."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is not callback and (isinstance(other, type(callback)) or _is(other, "BaseFinetuning")):
            own, its = type(callback).__name__, type(other).__name__
            both = f"two {own}" if own == its else f"{own} and {its}"
            raise ValueError(f"{both} would each open what the other keeps frozen; give one of them")


def _check_groups(trainer: Trainer, phases: Sequence[Blocks]) -> None:
    """Each parameter must be in one group of the optimisers."""
    members = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    known = set(members)
    lost = [name for part in phases for block in part.values() for name, p in block.items() if p not in known]
    fault = f"in no group of the optimiser: {_some(lost)}" if lost else "a parameter is in two groups of the optimisers"
    if lost or len(known) < len(members):
        raise ValueError(f"{fault}; give configure_optimizers every parameter once, frozen or not")


def _check_early_stops(trainer: Trainer, last_opening: float) -> None:
    """Refuse an early stop that may come before the last blocks open."""
    per_epoch, batches = steps_per_epoch(trainer), float(trainer.val_check_batch or math.inf)
    whole = batches >= trainer.num_training_batches  # its last accumulation may be a short one, and is a step, too
    steps = (per_epoch if whole else batches / trainer.accumulate_grad_batches) * (trainer.check_val_every_n_epoch or 1)
    spared = max(trainer.min_steps or 0, (trainer.min_epochs or 0) * per_epoch if trainer.min_epochs else 0.0)
    for stop in trainer.callbacks:  # type: ignore[attr-defined]
        if _is(stop, "EarlyStopping") and not getattr(stop, "waits_for_phases", False):
            earliest = (stop.patience + 1) * steps
            if max(earliest, spared) <= last_opening:
                raise ValueError(
                    f"EarlyStopping on {stop.monitor} (patience {stop.patience}) could end the run before the last "
                    "blocks open: raise its patience, set min_epochs, or use PhaseAwareEarlyStopping"
                )


def _is(thing: Any, *names: str) -> bool:
    """Whether it is of one of these classes or derived from one, in lightning or in pytorch_lightning."""
    return any(kind.__name__ in names for kind in thing.__class__.__mro__)


def _say(text: str, *values: Any) -> None:
    """To this project's log or, where that shows no information, to where Lightning says things, once."""
    (log.info if log.isEnabledFor(logging.INFO) else rank_zero_info)(text, *values)


def _is_compiled(module: nn.Module) -> bool:
    return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in module.modules())


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _counted(parameters: set[nn.Parameter]) -> str:
    return f"{len(parameters)} tensors, {_count(parameters):,} parameters"


def _did_you_mean(pattern: str, names: Iterable[str]) -> str:
    parts = {part for name in names for part in (name, *name.split("."))}
    close_ones = difflib.get_close_matches(re.sub(r"[\^$\\]", "", pattern), sorted(parts), n=1)
    return f"; did you mean {close_ones[0]!r}?" if close_ones else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
