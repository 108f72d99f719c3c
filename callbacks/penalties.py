"""Penalties on weights, each added to the gradient by hand or applied as a proximal step after the update.

    Trainer(callbacks=[L2SP(0.01, exclude=["^head"], head_strength=0.01)])   # stay near the pretrained weights
    Trainer(callbacks=[L1(1e-4)])                                            # weights that are exactly zero

Autograd never sees them: a penalty costs a few passes over the weights, once per optimiser step. What has no
gradient in a step, because it is frozen or unused, is left alone.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

log = logging.getLogger(__name__)

Mode: TypeAlias = Literal["proximal", "gradient"]
Groups: TypeAlias = Sequence[Mapping[str, Any]]  # of an optimiser
ADAPTER = re.compile(r"[.](lora_[AB]|adapter_down|adapter_up)[.]")  # names of their matrices


@torch.no_grad()
def add_l2_(parameters: list[Tensor], strength: float, anchors: list[Tensor] | None = None) -> None:
    """Adds to each `.grad` the gradient of strength / 2 * sum (theta - anchor)^2; the anchor is 0 if not given."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_add_(gradients, parameters, alpha=strength)
    if gradients and anchors is not None:  # subtracted apart: a copy of all differences costs more than both
        torch._foreach_sub_(gradients, anchors, alpha=strength)


@torch.no_grad()
def add_l1_(parameters: list[Tensor], strength: float) -> None:
    """Adds to each `.grad` the sub-gradient of strength * sum |theta|, which is 0 where theta is."""
    for p in parameters:
        if p.grad is not None:
            p.grad.add_(p.sign(), alpha=strength)


@torch.no_grad()
def pull_(parameters: list[Tensor], pull: float, anchors: list[Tensor] | None = None) -> None:
    """The implicit step of an L2 penalty, which cannot overshoot: theta <- (theta + pull * anchor) / (1 + pull).

    Args:
        parameters: Changed in place.
        pull: Learning rate times strength, 0.0 or more.
        anchors: Of the same shapes; 0 if not given.
    """
    if parameters and anchors is None:
        torch._foreach_mul_(parameters, 1.0 / (1.0 + pull))
    elif parameters and anchors is not None:
        torch._foreach_lerp_(parameters, anchors, pull / (1.0 + pull))


@torch.no_grad()
def shrink_(parameters: list[Tensor], threshold: float) -> None:
    """The proximal step of an L1 penalty, with true zeros: theta <- sign(theta) * max(|theta| - threshold, 0).

    Args:
        parameters: Changed in place.
        threshold: Learning rate times strength, 0.0 or more.
    """
    for p in parameters:  # in place, where torch._foreach would need a copy of all weights
        nn.functional.softshrink(p, threshold, out=p)  # type: ignore[call-arg]


@torch.no_grad()
def half_squares(parameters: list[Tensor], anchors: list[Tensor] | None = None) -> Tensor | float:
    """Half the sum over all tensors of (theta - anchor)^2; the anchor is 0 if not given."""
    if not parameters:
        return 0.0
    away = parameters if anchors is None else list(torch._foreach_sub(parameters, anchors))
    return torch.stack(torch._foreach_norm(away)).square().sum() / 2


class _Penalty(Callback):
    """What all penalties share: when they act, by gradient or by proximal step, and what is logged."""

    def __init__(
        self, mode: Mode, strength: float, patterns: Sequence[str], exclude: Sequence[str], norms_and_biases: bool
    ) -> None:
        _check_strength("strength", strength)
        if mode not in ("proximal", "gradient"):
            raise ValueError(f"expected mode 'proximal' or 'gradient', received {mode!r}")
        self.mode, self.strength = mode, strength
        self.patterns, self.exclude, self.norms_and_biases = patterns, exclude, norms_and_biases
        self.hooks: list[Any] = []

    def choose(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select the parameters to penalise."""
        chosen = _select(pl_module, self.patterns, self.exclude, self.norms_and_biases)
        self.chosen: dict[Tensor, None] = dict.fromkeys(chosen.values())

    def metrics(self, groups: Groups) -> dict[str, Any]:
        """What a log step logs; `penalty` is its value."""
        raise NotImplementedError

    def add_gradient(self, groups: Groups) -> None:
        """Add the penalty's gradient to that of the loss."""

    def proximal_step(self, group: Mapping[str, Any], lr: float) -> None:
        """Apply the penalty to a group's parameters after their update."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what would go wrong; choose the parameters, hook the optimisers."""
        if _is(trainer.strategy, "FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
            name = type(trainer.strategy).__name__
            raise ValueError(f"penalties need whole parameters, received {name}, which divides them; train with DDP")
        for optimizer in trainer.optimizers:
            searches = any(group.get("line_search_fn") for group in optimizer.param_groups)
            if isinstance(optimizer, LBFGS) and (self.mode == "proximal" or searches):
                raise ValueError(
                    "L-BFGS has no learning rate per step for a proximal step, and its line search compares losses "
                    "without the penalty; use mode='gradient' and no line search, or another optimiser"
                )
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # else a fused one's are scaled
        self.found: dict[str, Any] = {}
        self.choose(trainer, pl_module)
        if self.mode == "proximal":
            self.hooks += _after_updates(trainer.optimizers, self.proximal_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Value in log steps; gradient in the mode of that name."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0:
            self.found = self.metrics(optimizer.param_groups)
        if self.mode == "gradient":
            self.add_gradient(optimizer.param_groups)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Log, with the ratio to the loss, which Lightning has divided by the number of batches in a step."""
        found, self.found = self.found, {}
        if found and isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            found["ratio"] = found["penalty"] / (outputs["loss"] * trainer.accumulate_grad_batches)
        for name, value in found.items():
            pl_module.log(f"{type(self).__name__.lower()}/{name}", value)

    def on_train_end(self, *_: Any) -> None:
        """Leave the optimisers."""
        while self.hooks:
            self.hooks.pop().remove()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()


class L2(_Penalty):
    """Adds `strength * theta` to the gradient of weights, once per optimiser step.

    This is coupled L2: it passes through momentum and Adam's scaling, so that weights with large gradients shrink
    less. AdamW's `weight_decay` is decoupled from both and usually the better choice; with plain SGD they are the
    same. Log steps log `l2/penalty`, strength / 2 * sum theta^2, and `l2/ratio` of it to the last batch's loss.

    Runs on: on_before_optimizer_step, before clipping. Touches: gradients.

    Args:
        strength: 0.0 or more.
        patterns: Regular expressions searched for in a parameter's dotted name; one match is enough.
        exclude: The same, of parameters to exclude.
        norms_and_biases: Penalise parameters of fewer than two dimensions, too.

    Raises:
        ValueError: A pattern matches nothing, or L-BFGS with a line search.

    Source: Loshchilov & Hutter 2019, on coupled and decoupled: https://arxiv.org/abs/1711.05101

    Example:
        >>> Trainer(callbacks=[L2(1e-4, exclude=["embedding"])]).fit(model, data)
    """

    def __init__(
        self,
        strength: float,
        patterns: Sequence[str] = (".",),
        exclude: Sequence[str] = (),
        norms_and_biases: bool = False,
    ) -> None:
        super().__init__("gradient", strength, patterns, exclude, norms_and_biases)

    def metrics(self, groups: Groups) -> dict[str, Any]:
        return {"penalty": self.strength * half_squares(_live(groups, self.chosen))}

    def add_gradient(self, groups: Groups) -> None:
        add_l2_(_live(groups, self.chosen), self.strength)


class L1(_Penalty):
    """Drives weights to zero: by soft thresholding after the update, or by a sub-gradient before it.

    The proximal step takes lr x strength off each weight's magnitude, with the learning rate of its group in that
    step, and what is smaller becomes exactly 0; under Adam it is decoupled from the gradient's scaling. The
    sub-gradient lets weights flutter around zero and never reach it. Log steps log `l1/penalty`, strength *
    sum |theta|, `l1/ratio` of it to the last batch's loss, and `l1/zeros`, the share of exact zeros.

    Runs on: the optimiser's step hooks (proximal), or on_before_optimizer_step, before clipping (gradient).
    Touches: weights (proximal) or gradients.

    Args:
        strength: 0.0 or more.
        mode: `proximal` or `gradient`.
        patterns: As of `L2`.
        exclude: As of `L2`.
        norms_and_biases: As of `L2`.

    Raises:
        ValueError: A pattern matches nothing, or the optimiser is L-BFGS in proximal mode.

    Source: Parikh & Boyd 2014, Proximal algorithms, 6.5.2, https://web.stanford.edu/~boyd/papers/prox_algs.html

    Example:
        >>> Trainer(callbacks=[L1(1e-3, patterns=["^head"])]).fit(model, data)
    """

    def __init__(
        self,
        strength: float,
        mode: Mode = "proximal",
        patterns: Sequence[str] = (".",),
        exclude: Sequence[str] = (),
        norms_and_biases: bool = False,
    ) -> None:
        super().__init__(mode, strength, patterns, exclude, norms_and_biases)

    def metrics(self, groups: Groups) -> dict[str, Any]:
        if not (parameters := _live(groups, self.chosen)):
            return {}
        zeros = 1.0 - sum(p.count_nonzero() for p in parameters) / sum(p.numel() for p in parameters)
        return {"penalty": self.strength * torch.stack(torch._foreach_norm(parameters, 1)).sum(), "zeros": zeros}

    def add_gradient(self, groups: Groups) -> None:
        add_l1_(_live(groups, self.chosen), self.strength)

    def proximal_step(self, group: Mapping[str, Any], lr: float) -> None:
        shrink_(_live([group], self.chosen), lr * self.strength)


class L2SP(_Penalty):
    """Pulls weights back to where the fit began: strength / 2 * sum (theta - theta_start)^2.

    The start is taken once, before the first step, of frozen parameters too, since they may open later; those in a set
    `untuned` of the module never do. What adapters add starts from zero, and so do their matrices. Checkpoints keep the
    start: a resumed run is pulled to that of the first run, not to the weights it resumed from. The proximal
    step is theta <- (theta + c theta_start) / (1 + c) with c = lr x strength, with the learning rate of the
    parameter's group in that step: it cannot diverge, and under Adam it is decoupled from the gradient's scaling. The
    gradient is that of the paper. Log steps log `l2sp/penalty` and `l2sp/ratio` of it to the last batch's loss.

    Runs on: on_train_start; the optimiser's step hooks (proximal), or on_before_optimizer_step, before clipping
    (gradient). Touches: weights (proximal) or gradients; keeps a copy of what it anchors.

    Args:
        strength: Alpha of the paper, 0.0 or more.
        exclude: Regular expressions searched for in the dotted names of parameters whose start is not worth keeping:
            the new head.
        head_strength: Beta of the paper: plain L2 on what is excluded; 0.0 leaves it free.
        mode: `proximal` or `gradient`.

    Raises:
        ValueError: A pattern matches nothing; `head_strength` without `exclude`; a checkpoint's start that does not
            fit; L-BFGS in proximal mode.

    Source: Li et al. 2018, https://arxiv.org/abs/1802.01483

    Example:
        >>> Trainer(callbacks=[L2SP(0.01, exclude=["^head"], head_strength=0.01)]).fit(model, data)
    """

    def __init__(
        self, strength: float, exclude: Sequence[str] = (), head_strength: float = 0.0, mode: Mode = "proximal"
    ) -> None:
        super().__init__(mode, strength, (".",), exclude, norms_and_biases=True)
        _check_strength("head_strength", head_strength)
        self.head_strength = head_strength
        if head_strength and not exclude:
            raise ValueError(
                f"head_strength={head_strength:g} acts on what is excluded, which is nothing; name the new head, such "
                "as exclude=['^head']"
            )
        self.start: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the previous fit."""
        if stage == "fit":
            self.start = {}

    def choose(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the start, unless a checkpoint has brought it."""
        untuned: set[nn.Parameter] = getattr(pl_module, "untuned", set())
        selected, start = _select(pl_module, self.patterns, self.exclude), self.start
        anchored = {name: p for name, p in selected.items() if p not in untuned}
        if not anchored:
            raise ValueError("L2SP holds nothing: all that trains is excluded; exclude less, or leave L2SP out")
        misfits = [n for n, p in anchored.items() if start and (n not in start or start[n].shape != p.shape)]
        if misfits:
            raise ValueError(
                f"the checkpoint has no start, or one of another shape, for {', '.join(misfits[:5])}; resume with the "
                "same network and the same `exclude`"
            )
        if trainer.is_global_zero and not start:
            size = sum(p.numel() for p in anchored.values())
            _say(f"L2SP starts from step {trainer.global_step}: {len(anchored)} tensors, {size:,} parameters")
        begin = {n: torch.zeros_like(p) if ADAPTER.search(n) else p for n, p in anchored.items()}
        self.start = {name: start.get(name, p).detach().to(p, copy=True) for name, p in begin.items()}
        self.anchors: dict[Tensor, Tensor] = {p: self.start[name] for name, p in anchored.items()}
        free = [p for p in pl_module.parameters() if p not in self.anchors and p not in untuned]
        self.head: dict[Tensor, None] = dict.fromkeys(free)

    def _body(self, groups: Groups) -> tuple[list[Tensor], list[Tensor]]:
        """The anchored parameters that take part in this step, and their anchors."""
        body = _live(groups, self.anchors)
        return body, [self.anchors[p] for p in body]

    def metrics(self, groups: Groups) -> dict[str, Any]:
        body, head = half_squares(*self._body(groups)), half_squares(_live(groups, self.head))
        return {"penalty": self.strength * body + self.head_strength * head}

    def add_gradient(self, groups: Groups) -> None:
        body, anchors = self._body(groups)
        add_l2_(body, self.strength, anchors)
        add_l2_(_live(groups, self.head), self.head_strength)

    def proximal_step(self, group: Mapping[str, Any], lr: float) -> None:
        body, anchors = self._body([group])
        pull_(body, lr * self.strength, anchors)
        if self.head_strength:
            pull_(_live([group], self.head), lr * self.head_strength)

    def state_dict(self) -> dict[str, Any]:
        """The start, by dotted names."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["start"]


def _is(thing: Any, *names: str) -> bool:
    """Whether it is of one of these classes or derived from one, in lightning or in pytorch_lightning."""
    return any(kind.__name__ in names for kind in thing.__class__.__mro__)


def _say(text: str, *values: Any) -> None:
    """Log information here or, where this logger shows none, once through Lightning's."""
    (log.info if log.isEnabledFor(logging.INFO) else rank_zero_info)(text, *values)


def _check_strength(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"expected {name} of 0 or more, received {value}; 0.0 is no penalty")


def _select(
    module: nn.Module, patterns: Sequence[str], exclude: Sequence[str], norms_and_biases: bool = True
) -> dict[str, nn.Parameter]:
    """Parameters, each once, under its first name, that a pattern matches and none excludes."""
    every = dict(module.named_parameters())
    for pattern in (*patterns, *exclude):
        if not any(re.search(pattern, name) for name in every):
            known = sorted({*every, *(part for name in every for part in name.split("."))})
            near = difflib.get_close_matches(re.sub(r"[\\^$]", "", pattern), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; it is searched for in dotted names"
            raise ValueError(f"pattern {pattern!r} matches no parameter{hint}")
    matched = {name: p for name, p in every.items() if any(re.search(pattern, name) for pattern in patterns)}
    kept = {name: p for name, p in matched.items() if not any(re.search(pattern, name) for pattern in exclude)}
    chosen = {name: p for name, p in kept.items() if norms_and_biases or p.ndim > 1}
    if not chosen:
        but = " but norms and biases; set norms_and_biases=True for these" if kept else "; exclude less"
        raise ValueError(f"patterns {list(patterns)} without {list(exclude)} leave no parameter{but}")
    return chosen


def _live(groups: Groups, chosen: Mapping[Tensor, Any]) -> list[Tensor]:
    """The chosen parameters of an optimiser's groups that take part in this step."""
    return [p for group in groups for p in group["params"] if p in chosen and p.requires_grad and p.grad is not None]


def _after_updates(optimizers: Sequence[Optimizer], act: Callable[[Mapping[str, Any], float], None]) -> list[Any]:
    """Hooks that call `act(group, lr)` after each update, with the learning rate that the update has used."""
    lrs: list[float] = []

    def before(optimizer: Optimizer, *_: Any) -> None:  # after the update a warm-up may have restored another
        lrs[:] = [float(group["lr"]) for group in optimizer.param_groups]

    def after(optimizer: Optimizer, *_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            act(group, lr)

    return [hook for o in optimizers for hook in (o.register_step_pre_hook(before), o.register_step_post_hook(after))]
