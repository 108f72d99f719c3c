"""Weights that become zero while a net is fine-tuned, and stay zero.

Trainer(callbacks=[Prune(0.8)])                      # 80 % of all weights, in ever smaller bites over half of the run
Trainer(callbacks=[Prune(n_of_m=(2, 4), end=0.0)])   # two of every four, before the first step

The functions serve without a Trainer, too:

    masks = magnitude_masks({"a": net.a.weight, "b": net.b.weight}, 0.8)
    net.a.weight.data.mul_(masks["a"])
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

log = logging.getLogger(__name__)


def cubic_sparsity(step: int, begin: int, end: int, final: float) -> float:
    """The share of zeros after a step: 0 up to `begin`, then fast at first and slow at last, `final` from `end` on.

    Source: Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878, formula 1.
    """
    if step >= end:
        return final
    left = 1.0 - max(0, step - begin) / (end - begin)
    return final * (1.0 - left**3)


@torch.no_grad()
def magnitude_masks(weights: Mapping[str, Tensor], sparsity: float, *, by_layer: bool = False) -> dict[str, Tensor]:
    """Which weights stay, all but the smallest; exactly `round(sparsity * n)` of n go, zeros first.

    Args:
        weights: By name.
        sparsity: Share that goes.
        by_layer: Whether each tensor loses the same share; else all are ranked together.

    Returns:
        Truth values of the weights' shapes.
    """
    if by_layer:
        return {name: magnitude_masks({name: weight}, sparsity)[name] for name, weight in weights.items()}
    sizes = torch.cat([weight.detach().abs().flatten().float() for weight in weights.values()])
    stays = torch.ones(len(sizes), dtype=torch.bool, device=sizes.device)
    stays[sizes.argsort(stable=True)[: round(sparsity * len(sizes))]] = False
    parts = torch.split(stays, [weight.numel() for weight in weights.values()])
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)}


@torch.no_grad()
def n_of_m_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Which weights stay: the n largest of every m inputs of an output, as sparse kernels want it.

    Source: Mishra et al. 2021, Accelerating sparse deep neural networks, https://arxiv.org/abs/2104.08378.

    Args:
        weight: `(out, in, ...)`; the inputs are grouped, at each place of a kernel.
        n: How many stay.
        m: Of how many.

    Raises:
        ValueError: The inputs can't be divided into groups of m.
    """
    if weight.shape[1] % m:
        raise ValueError(f"{weight.shape[1]} inputs can't be divided into groups of {m}")
    last = weight.detach().abs().movedim(1, -1)
    groups = last.reshape(*last.shape[:-1], -1, m)
    chosen = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, chosen, True)
    return mask.view_as(last).movedim(-1, 1)


def pack(mask: Tensor) -> Tensor:
    """Truth values as bits, eight in a byte: uint8, one dimension."""
    bits = nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Truth values of a shape, from `pack`."""
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten()[: math.prod(shape)].view(*shape).bool()


class Prune(Callback):
    """Sets the smallest weights to zero while a net trains, more and more of them, and keeps them there.

    What is zero stays zero: after each update, whatever weight decay, momentum or a penalty did; in validation and in
    checkpoints also where EMA keeps averages of earlier weights. Gradients of what is zero count for no clipping.
    Weights that are frozen are left alone until they are opened. When the last weight has gone, the best checkpoint so
    far, which is of a net with more weights, is forgotten and removed, and so is the patience of an early stop.

    Runs on: on_train_start; before the optimiser's step and after it, behind all other callbacks' hooks; batch end;
    validation start; checkpoints. Touches: weights and gradients; checkpoint callbacks' best; its place in
    `trainer.callbacks`.

    Args:
        sparsity: Share of the chosen weights that is zero in the end, above 0 and below 1.
        begin: Optimiser step, or share of the run if below 1, up to which no weight goes.
        end: Step or share from which on the sparsity is reached; 0, before the first step.
        every_n_steps: Optimiser steps from one bite to the next.
        by_layer: Whether every layer loses the same share; else all weights are ranked together.
        n_of_m: (2, 4) for two of every four inputs in place of a sparsity: at once, at `end`.
        pattern: Regular expression searched for in the names of the weights of linear layers and convolutions.
        exclude: The same, of weights that keep all they have.

    Raises:
        ValueError: A value out of range; nothing matches; an end after the run's; a strategy that divides weights;
            inputs that can't be grouped.

    Source: Zhu & Gupta 2017, To prune, or not to prune, https://arxiv.org/abs/1710.01878

    Example:
        >>> Trainer(callbacks=[Prune(0.8, end=0.6, exclude="^head")]).fit(model, data)
    """

    def __init__(
        self,
        sparsity: float | None = None,
        begin: float = 0.0,
        end: float = 0.5,
        every_n_steps: int = 10,
        by_layer: bool = False,
        n_of_m: tuple[int, int] | None = None,
        pattern: str = "",
        exclude: str | None = None,
    ) -> None:
        if (sparsity is None) == (n_of_m is None):
            raise ValueError("Prune needs a sparsity, as in 0.8, or n_of_m, as in (2, 4), and not both")
        if sparsity is not None and not 0.0 < sparsity < 1.0:
            raise ValueError(f"sparsity must be above 0 and below 1; received {sparsity:g}")
        if n_of_m is not None and not 0 < n_of_m[0] < n_of_m[1]:
            raise ValueError(f"n_of_m must be two numbers, the first the smaller; received {tuple(n_of_m)}")
        if begin < 0 or end < 0 or every_n_steps < 1:
            raise ValueError(
                f"begin and end must be 0 or more, every_n_steps 1 or more; received {begin:g}, {end:g} and "
                f"{every_n_steps}"
            )
        self.sparsity, self.begin, self.end, self.every_n_steps = sparsity, begin, end, every_n_steps
        self.by_layer, self.n_of_m, self.pattern, self.exclude = by_layer, n_of_m, pattern, exclude
        self.hooks: list[Any] = []
        self._reset()

    def _reset(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self.packed: dict[str, Tensor] | None = None
        self.last = 0  # optimiser step of the last look
        self.fitting = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the weights; move behind all others but checkpoints; a new list, since this one is being iterated."""
        self._reset()
        self.fitting = stage == "fit"
        if not self.fitting:
            return
        if _is(trainer.strategy, "FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
            name = type(trainer.strategy).__name__
            raise ValueError(f"Prune ranks whole weights, and {name} divides them among ranks: train with DDP")
        owners = (m for m in pl_module.modules() if isinstance(m, (nn.Linear, _ConvNd)))
        weights = {id(owner.weight) for owner in owners}
        self.weights = {
            name: parameter
            for name, parameter in pl_module.named_parameters()
            if id(parameter) in weights and re.search(self.pattern, name)
            if self.exclude is None or not re.search(self.exclude, name)
        }
        if not self.weights:
            raise ValueError(f"no weight of a linear layer or convolution matches {self.pattern!r} and is not excluded")
        others = [other for other in trainer.callbacks if other is not self]  # type: ignore[attr-defined]
        last = [other for other in others if _is(other, "Checkpoint")]
        trainer.callbacks = [*(o for o in others if o not in last), self, *last]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the masks of a checkpoint; or begin, where that is before the first step."""
        total = trainer.estimated_stepping_batches
        self.first, self.until = (int(x * total) if x < 1 else int(x) for x in (self.begin, self.end))
        if self.first > self.until or self.until > total:
            raise ValueError(
                f"Prune goes from step {self.first} to step {self.until}, and the run has {total:g}: they must follow "
                "each other"
            )
        if self.packed is not None:
            unknown = self.packed.keys() - self.weights.keys()
            if unknown:
                raise ValueError(f"the checkpoint's masks are of another module: it has no {sorted(unknown)[0]!r}")
            self.masks = {
                name: unpack(bits.to(self.weights[name].device), self.weights[name].shape)
                for name, bits in self.packed.items()
            }
            self.packed = None
        elif self.until == 0:
            self.look(trainer, 0)
        self.hooks += [optimizer.register_step_post_hook(lambda *_: self.apply()) for optimizer in trainer.optimizers]
        self.apply()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """No gradient for what is zero."""
        for name, mask in self.masks.items():
            gradient = self.weights[name].grad
            if gradient is not None:
                gradient.mul_(mask)

    @torch.no_grad()
    def apply(self) -> None:
        """Set to zero what was chosen."""
        for name, mask in self.masks.items():
            self.weights[name].mul_(mask)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """After some steps, take another bite; in the end one of each weight that is opened late."""
        step, before = trainer.global_step, self.last
        self.last = step
        if step == before:  # amid the batches of a step
            return
        bites = [(at - self.first) // self.every_n_steps for at in (before, step)]
        if before >= self.until:
            due = any(weight.requires_grad and name not in self.masks for name, weight in self.weights.items())
        else:
            due = step >= self.until or (step > self.first and bites[1] > bites[0])
        if due:
            self.look(trainer, step)

    def look(self, trainer: Trainer, step: int) -> None:
        """Choose the weights that are zero after a step."""
        open_weights = {name: weight for name, weight in self.weights.items() if weight.requires_grad}
        if self.n_of_m is None:
            assert self.sparsity is not None
            share = cubic_sparsity(step, self.first, self.until, self.sparsity)
            self.masks |= magnitude_masks(open_weights, share, by_layer=self.by_layer) if open_weights else {}
        elif step >= self.until:
            try:
                self.masks |= {name: n_of_m_mask(weight, *self.n_of_m) for name, weight in open_weights.items()}
            except ValueError as error:
                wrong = next(name for name, weight in open_weights.items() if weight.shape[1] % self.n_of_m[1])
                raise ValueError(f"{wrong}: {error}; leave it out with exclude") from error
        self.apply()
        zeros, count = self.counted()
        for logger in trainer.loggers:
            logger.log_metrics({"sparsity": zeros / count}, step=step)
        if step >= self.until:
            if trainer.is_global_zero:
                log.info("prune: %s of %s weights are zero from step %d on", f"{zeros:,}", f"{count:,}", step)
            if step:
                _forget_best(trainer)

    def counted(self) -> tuple[int, int]:
        """How many of the chosen weights are zero, and how many there are."""
        zeros = sum(int((weight == 0).sum()) for weight in self.weights.values())
        return zeros, sum(weight.numel() for weight in self.weights.values())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same zeros in averaged weights, if these are in the module now."""
        if self.fitting:
            self.apply()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same; leave the optimisers."""
        self.apply()
        self._leave()
        if self.last < self.until:
            zeros, count = self.counted()
            rank_zero_warn(
                f"Prune: the run ended at step {self.last}, before step {self.until}: {zeros / count:.3f} of the "
                "weights are zero"
            )

    def on_exception(self, *_: Any) -> None:
        """Leave the optimisers."""
        self._leave()

    def _leave(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        """Masks as bits, and how far it got."""
        return {"masks": {name: pack(mask) for name, mask in self.masks.items()}, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Wait until the module is in place; a test needs nothing of it."""
        if self.fitting:
            self.packed, self.last = state_dict["masks"], state_dict["last"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The same zeros in averaged weights, under every name that a tied weight has."""
        by_weight = {id(self.weights[name]): mask for name, mask in self.masks.items()}
        for name, parameter in pl_module.named_parameters(remove_duplicate=False):
            if id(parameter) in by_weight and name in checkpoint["state_dict"]:
                checkpoint["state_dict"][name] = checkpoint["state_dict"][name] * by_weight[id(parameter)]


def _forget_best(trainer: Trainer) -> None:
    """What was best with more weights is no measure any more."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if _is(callback, "ModelCheckpoint") and callback.monitor:
            for path in list(callback.best_k_models):
                trainer.strategy.remove_checkpoint(path)
            callback.best_k_models, callback.best_model_path, callback.kth_best_model_path = {}, "", ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
        elif _is(callback, "EarlyStopping"):
            callback.wait_count = 0
            callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)


def _is(thing: Any, *names: str) -> bool:
    """Whether it is of one of these classes or derived from one, in lightning or in pytorch_lightning."""
    return any(kind.__name__ in names for kind in thing.__class__.__mro__)
