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


@torch.no_grad()
def add_l2_(parameters: list[Tensor], strength: float, anchors: list[Tensor] | None = None) -> None:
    """Adds to each `.grad` the gradient of strength / 2 * sum (theta - anchor)^2; the anchor is 0 if not given."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_add_(gradients, parameters, alpha=strength)
    if gradients and anchors is not None:  # taken off apart: a copy of all differences costs more than both
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
        pull: Rate times strength, 0.0 or more.
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
        threshold: Rate times strength, 0.0 or more.
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


class L2(Callback):
    """Adds `strength * theta` to the gradient of weights, once per optimiser step.

    This is coupled L2: it passes through momentum and Adam's scaling, so that weights with large gradients shrink
    less. AdamW's `weight_decay` is decoupled from both and usually the better choice; with plain SGD they are the
    same. Norms and biases (fewer than two dimensions) are left out unless asked for. Log steps log `l2/penalty`,
    strength / 2 * sum theta^2, and `l2/ratio` of it to the last batch's loss.

    Runs on: on_before_optimizer_step, before clipping. Touches: gradients.

    Args:
        strength: 0.0 or more.
        patterns: Regular expressions looked for in a parameter's dotted name; one that is found will do.
        exclude: The same, of parameters to leave out.
        norms_and_biases: Penalise parameters of fewer than two dimensions, too.

    Raises:
        ValueError: A pattern matches nothing, or L-BFGS searches along a line.

    Source: Loshchilov & Hutter 2019, on coupled and decoupled: https://arxiv.org/abs/1711.05101

    Example:
        >>> Trainer(callbacks=[L2(1e-4, exclude=["embedding"])])  # doctest: +SKIP
    """

    def __init__(
        self,
        strength: float,
        patterns: Sequence[str] = (".",),
        exclude: Sequence[str] = (),
        norms_and_biases: bool = False,
    ) -> None:
        _check(strength=strength)
        self.strength = strength
        self.patterns, self.exclude, self.norms_and_biases = patterns, exclude, norms_and_biases

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the parameters."""
        _prepare(trainer, "gradient")
        chosen = _select(pl_module, self.patterns, self.exclude, self.norms_and_biases)
        self.chosen: dict[Tensor, None] = dict.fromkeys(chosen.values())
        self.value: Tensor | float | None = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = _live(optimizer.param_groups, self.chosen)
        if _logs_now(trainer):
            self.value = self.strength * half_squares(parameters)
        add_l2_(parameters, self.strength)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _log(trainer, pl_module, "l2", self.value, outputs)
        self.value = None


class L1(Callback):
    """Drives weights to zero: by soft thresholding after the update, or by a sub-gradient before it.

    The proximal step takes rate x strength off each weight's size, at the rate of its group in that very step,
    and what is smaller becomes exactly 0; under Adam it is decoupled from the gradient's scaling. The sub-gradient
    lets weights flutter around zero and never reach it. Norms and biases (fewer than two dimensions) are left out
    unless asked for. Log steps log `l1/penalty`, strength * sum |theta|, `l1/ratio` of it to the last batch's loss,
    and `l1/zeros`, the share of exact zeros.

    Runs on: the optimiser's step hooks (proximal), or on_before_optimizer_step, before clipping (gradient).
    Touches: weights (proximal) or gradients.

    Args:
        strength: 0.0 or more.
        mode: `proximal` or `gradient`.
        patterns: Regular expressions looked for in a parameter's dotted name; one that is found will do.
        exclude: The same, of parameters to leave out.
        norms_and_biases: Penalise parameters of fewer than two dimensions, too.

    Raises:
        ValueError: A pattern matches nothing, or the optimiser is L-BFGS in proximal mode.

    Source: Parikh & Boyd 2014, Proximal algorithms, 6.5.2, https://web.stanford.edu/~boyd/papers/prox_algs.html

    Example:
        >>> Trainer(callbacks=[L1(1e-3, patterns=["^head"])])  # doctest: +SKIP
    """

    def __init__(
        self,
        strength: float,
        mode: Mode = "proximal",
        patterns: Sequence[str] = (".",),
        exclude: Sequence[str] = (),
        norms_and_biases: bool = False,
    ) -> None:
        _check(mode, strength=strength)
        self.strength, self.mode = strength, mode
        self.patterns, self.exclude, self.norms_and_biases = patterns, exclude, norms_and_biases
        self.hooks: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the parameters, hook the optimisers."""
        _prepare(trainer, self.mode)
        chosen = _select(pl_module, self.patterns, self.exclude, self.norms_and_biases)
        self.chosen: dict[Tensor, None] = dict.fromkeys(chosen.values())
        self.value: Tensor | None = None
        if self.mode == "proximal":
            self.hooks += _after_updates(trainer.optimizers, self._shrink)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = _live(optimizer.param_groups, self.chosen)
        if _logs_now(trainer) and parameters:
            self.value = self.strength * torch.stack(torch._foreach_norm(parameters, 1)).sum()
            self.zeros = 1.0 - sum(p.count_nonzero() for p in parameters) / sum(p.numel() for p in parameters)
        if self.mode == "gradient":
            add_l1_(parameters, self.strength)

    def _shrink(self, group: Mapping[str, Any], rate: float) -> None:
        shrink_(_live([group], self.chosen), rate * self.strength)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.value is not None:
            _log(trainer, pl_module, "l1", self.value, outputs)
            pl_module.log("l1/zeros", self.zeros)
        self.value = None

    def on_train_end(self, *_: Any) -> None:
        """Leave the optimisers."""
        while self.hooks:
            self.hooks.pop().remove()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()


class L2SP(Callback):
    """Pulls weights back to where the fit began: strength / 2 * sum (theta - theta_start)^2.

    The start is taken once, before the first step, of frozen parameters too, since they may open later. Checkpoints
    keep it: a resumed run is pulled to the start of the first run, not to the weights it resumed from. The proximal
    step is theta <- (theta + c theta_start) / (1 + c) with c = rate x strength, at the rate of the parameter's group
    in that very step: it cannot diverge, and under Adam it is decoupled from the gradient's scaling. The gradient is
    that of the paper. Log steps log `l2sp/penalty` and `l2sp/ratio` of it to the last batch's loss.

    Runs on: on_train_start; the optimiser's step hooks (proximal), or on_before_optimizer_step, before clipping
    (gradient). Touches: weights (proximal) or gradients; keeps a copy of what it anchors.

    Args:
        strength: Alpha of the paper, 0.0 or more.
        exclude: Regular expressions looked for in the dotted names of parameters: those whose start is not worth
            keeping, which is the new head.
        head_strength: Beta of the paper: plain L2 on what is excluded; 0.0 leaves it free.
        mode: `proximal` or `gradient`.

    Raises:
        ValueError: A pattern matches nothing; `head_strength` without `exclude`; a checkpoint's start that does not
            fit; L-BFGS in proximal mode.

    Source: Li et al. 2018, https://arxiv.org/abs/1802.01483

    Example:
        >>> Trainer(callbacks=[L2SP(0.01, exclude=["^head"], head_strength=0.01)])  # doctest: +SKIP
    """

    def __init__(
        self, strength: float, exclude: Sequence[str] = (), head_strength: float = 0.0, mode: Mode = "proximal"
    ) -> None:
        _check(mode, strength=strength, head_strength=head_strength)
        self.strength, self.head_strength, self.exclude, self.mode = strength, head_strength, exclude, mode
        if head_strength and not exclude:
            raise ValueError(
                f"head_strength={head_strength:g} acts on what is excluded, which is nothing; name the new head, such "
                "as exclude=['^head']"
            )
        self.start: dict[str, Tensor] = {}
        self.hooks: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the fit before."""
        if stage == "fit":
            self.start = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the start, unless a checkpoint has brought it; hook the optimisers."""
        _prepare(trainer, self.mode)
        anchored = _select(pl_module, (".",), self.exclude)
        misfits = [
            n for n, p in anchored.items() if self.start and (n not in self.start or self.start[n].shape != p.shape)
        ]
        if misfits:
            raise ValueError(
                f"the checkpoint has no start, or one of another shape, for {', '.join(misfits[:5])}; resume with the "
                "same network and the same `exclude`"
            )
        if trainer.is_global_zero and not self.start:
            size = sum(p.numel() for p in anchored.values())
            _say(f"L2SP starts from step {trainer.global_step}: {len(anchored)} tensors, {size:,} parameters")
        self.start = {name: self.start.get(name, p).detach().to(p, copy=True) for name, p in anchored.items()}
        self.anchors: dict[Tensor, Tensor] = {p: self.start[name] for name, p in anchored.items()}
        self.head: dict[Tensor, None] = {p: None for p in pl_module.parameters() if p not in self.anchors}
        self.value: Tensor | float | None = None
        if self.mode == "proximal":
            self.hooks += _after_updates(trainer.optimizers, self._pull)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        body, head = _live(optimizer.param_groups, self.anchors), _live(optimizer.param_groups, self.head)
        anchors = [self.anchors[p] for p in body]
        if _logs_now(trainer):
            self.value = self.strength * half_squares(body, anchors) + self.head_strength * half_squares(head)
        if self.mode == "gradient":
            add_l2_(body, self.strength, anchors)
            add_l2_(head, self.head_strength)

    def _pull(self, group: Mapping[str, Any], rate: float) -> None:
        body = _live([group], self.anchors)
        pull_(body, rate * self.strength, [self.anchors[p] for p in body])
        if self.head_strength:
            pull_(_live([group], self.head), rate * self.head_strength)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _log(trainer, pl_module, "l2sp", self.value, outputs)
        self.value = None

    def on_train_end(self, *_: Any) -> None:
        """Leave the optimisers."""
        while self.hooks:
            self.hooks.pop().remove()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    def state_dict(self) -> dict[str, Any]:
        """The start, by dotted names."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["start"]


def _is(thing: Any, *names: str) -> bool:
    """Whether it is of one of these classes or derived from one, in lightning or in pytorch_lightning."""
    return any(kind.__name__ in names for kind in thing.__class__.__mro__)


def _say(text: str, *values: Any) -> None:
    """To this project's log or, where that shows no information, to where Lightning says things, once."""
    (log.info if log.isEnabledFor(logging.INFO) else rank_zero_info)(text, *values)


def _select(
    module: nn.Module, patterns: Sequence[str], exclude: Sequence[str], norms_and_biases: bool = True
) -> dict[str, nn.Parameter]:
    """Parameters, each once, under its first name, that a pattern matches and none excludes."""
    every = dict(module.named_parameters())
    for pattern in (*patterns, *exclude):
        if not any(re.search(pattern, name) for name in every):
            known = sorted({*every, *(part for name in every for part in name.split("."))})
            near = difflib.get_close_matches(re.sub(r"[\\^$]", "", pattern), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; it is looked for in dotted names"
            raise ValueError(f"pattern {pattern!r} matches no parameter{hint}")
    matched = {name: p for name, p in every.items() if any(re.search(pattern, name) for pattern in patterns)}
    kept = {name: p for name, p in matched.items() if not any(re.search(pattern, name) for pattern in exclude)}
    chosen = {name: p for name, p in kept.items() if norms_and_biases or p.ndim > 1}
    if not chosen:
        but = " but norms and biases; set norms_and_biases=True for these" if kept else "; exclude less"
        raise ValueError(f"patterns {list(patterns)} without {list(exclude)} leave no parameter{but}")
    return chosen


def _live(groups: Sequence[Mapping[str, Any]], chosen: Mapping[Tensor, Any]) -> list[Tensor]:
    """The chosen parameters of an optimiser's groups that take part in this step."""
    return [p for group in groups for p in group["params"] if p in chosen and p.requires_grad and p.grad is not None]


def _after_updates(optimizers: Sequence[Optimizer], act: Callable[[Mapping[str, Any], float], None]) -> list[Any]:
    """Hooks that call `act(group, rate)` after each update, with the rate that the update has used."""
    rates: list[float] = []

    def before(optimizer: Optimizer, *_: Any) -> None:  # after the update a warm-up may have put another rate back
        rates[:] = [float(group["lr"]) for group in optimizer.param_groups]

    def after(optimizer: Optimizer, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            act(group, rate)

    return [hook for o in optimizers for hook in (o.register_step_pre_hook(before), o.register_step_post_hook(after))]


def _prepare(trainer: Trainer, mode: Mode) -> None:
    """Refuses what would go wrong; makes a float16 scaler unscale before the hooks, for fused optimisers too."""
    if _is(trainer.strategy, "FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
        name = type(trainer.strategy).__name__
        raise ValueError(f"penalties need whole parameters, received {name}, which divides them; train with DDP")
    for optimizer in trainer.optimizers:
        searches = any(group.get("line_search_fn") for group in optimizer.param_groups)
        if isinstance(optimizer, LBFGS) and (mode == "proximal" or searches):
            raise ValueError(
                "L-BFGS has no rate per step for a proximal step, and its line search compares losses without the "
                "penalty; take mode='gradient' and no line search, or another optimiser"
            )
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def _logs_now(trainer: Trainer) -> bool:
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and (trainer.global_step + 1) % every == 0


def _log(trainer: Trainer, pl_module: LightningModule, name: str, value: Tensor | float | None, outputs: Any) -> None:
    """Logs a penalty and its ratio to the loss, which Lightning has divided by the number of batches in a step."""
    if value is not None:
        pl_module.log(f"{name}/penalty", value)
        if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            pl_module.log(f"{name}/ratio", value / (outputs["loss"] * trainer.accumulate_grad_batches))


def _check(mode: Mode = "gradient", **strengths: float) -> None:
    for name, value in strengths.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"expected {name} of 0 or more, received {value}; 0.0 is no penalty")
    if mode not in ("proximal", "gradient"):
        raise ValueError(f"expected mode 'proximal' or 'gradient', received {mode!r}")
