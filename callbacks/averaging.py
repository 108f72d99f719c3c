"""Averaged weights that are validated, saved as best and tested, while training goes on with the raw ones.

Two kinds: the exponential moving average of the run, and the interpolation with the weights that it began with. Both
work without a Trainer, too:

    average = [p.detach().clone() for p in net.parameters()]
    ...                                                  # after each optimiser step
    ema_(average, list(net.parameters()), decay=0.999)   # one call, in place
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


@torch.no_grad()
def ema_(average: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """In place: average <- decay * average + (1 - decay) * weights; equal ones do not change."""
    same = [w if w.dtype == a.dtype else w.to(a.dtype) for a, w in zip(average, weights, strict=True)]
    torch._foreach_lerp_(list(average), same, 1.0 - decay)


def warmed_up(decay: float, updates: int) -> float:
    """A decay that is low at first, so that the average soon forgets its start: 0.1, 0.18, 0.25, ... `decay`."""
    return min(decay, (1 + updates) / (10 + updates))


@torch.no_grad()
def interpolate(new: Sequence[Tensor], old: Sequence[Tensor], share: float) -> list[Tensor]:
    """New tensors, of the old ones' types: share * new + (1 - share) * old."""
    same = [n if n.dtype == o.dtype else n.to(o.dtype) for n, o in zip(new, old, strict=True)]
    return list(torch._foreach_lerp(list(old), same, share))


class _Averaging(Callback):
    """What both kinds share: which tensors, when they are swapped, and what goes into a checkpoint."""

    fitting = False

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.kept: dict[str, Tensor] = {}  # by name: the moving average, or the starting point
        self.raw: dict[str, Tensor] | None = None  # set while the module holds the averaged weights
        self.updates = 0
        self.restored: dict[str, Any] | None = None

    def averaged(self, weights: list[Tensor]) -> list[Tensor]:
        """What replaces the weights, in the order of `kept`."""
        raise NotImplementedError

    def has_average(self) -> bool:
        """Whether there is anything to replace the weights with."""
        return bool(self.kept)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would silently go wrong; come first, so that others find the weights they expect."""
        self.fitting = stage == "fit"
        if not self.fitting:
            return
        name = type(self).__name__
        if _is(trainer.strategy, "FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
            raise ValueError(
                f"{name} averages whole tensors; {type(trainer.strategy).__name__} divides them among ranks: "
                "use DDP or one device"
            )
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        for other in others:
            if isinstance(other, _Averaging) or _is(other, "WeightAveraging", "StochasticWeightAveraging"):
                raise ValueError(f"{name} and {type(other).__name__} would both replace the weights; use one of them")
            if getattr(other, "save_weights_only", False):
                raise ValueError(
                    "with save_weights_only=True callbacks cannot change a checkpoint, and it would hold the raw "
                    f"weights in place of {name}'s; leave it off: `state_dict` then holds the averaged ones"
                )
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]
        self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights, or with what the checkpoint holds."""
        self.places = _places(pl_module)
        if self.restored is None:
            if trainer.ckpt_path:
                rank_zero_warn(f"the checkpoint holds nothing of {type(self).__name__}: it begins with its weights")
            self._begin(name for name, (store, key) in self.places.items() if _moves(store[key]))
            return
        unknown = self.restored["kept"].keys() - self.places.keys()
        if unknown:
            raise ValueError(
                f"{type(self).__name__} of the checkpoint holds {sorted(unknown)[0]!r}, which the module lacks "
                f"({len(unknown)} such in all); resume with the same module"
            )
        weights = {name: self._weight(name) for name in self.restored["kept"]}
        self.kept = {name: kept.to(weights[name].device) for name, kept in self.restored["kept"].items()}
        self.updates = self.restored["updates"]
        self._write(self.restored["raw"])
        self.restored = None

    def _weight(self, name: str) -> Tensor:
        store, key = self.places[name]
        weight: Tensor = store[key]
        return weight.detach()

    def _weights(self) -> list[Tensor]:
        return [self._weight(name) for name in self.kept]

    def _write(self, values: dict[str, Tensor]) -> None:
        """In place: DDP, a compiled graph and tied weights go on with the same tensors."""
        torch._foreach_copy_([self._weight(name) for name in values], list(values.values()))

    def _begin(self, names: Any) -> None:
        for name in names:
            weight = self._weight(name)
            half = weight.dtype in (torch.float16, torch.bfloat16)  # in which small changes would be rounded away
            self.kept[name] = weight.float() if half else weight.clone()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin with weights that were frozen so far: they have not moved yet."""
        if len(self.kept) < len(self.places):
            self._begin(n for n, (store, key) in self.places.items() if n not in self.kept and _moves(store[key]))

    @torch.no_grad()
    def swap_in(self) -> None:
        """Put the averaged weights into the module, unless they are there."""
        if self.raw is None and self.has_average():
            weights = self._weights()
            averaged = self.averaged(weights)
            self.raw = {name: weight.clone() for name, weight in zip(self.kept, weights, strict=True)}
            self._write(dict(zip(self.kept, averaged, strict=True)))

    @torch.no_grad()
    def swap_out(self) -> None:
        """Restore the raw weights, bitwise."""
        if self.raw is not None:
            self._write(self.raw)
            self.raw = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averaged weights in."""
        if self.fitting:
            self.swap_in()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raw weights back."""
        if self.fitting:
            self.swap_out()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averaged weights in, for good."""
        self.swap_in()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same where a resumed run was already over."""
        self.swap_in()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Raw weights back, also for a checkpoint that is saved now."""
        if self.fitting:
            self.swap_out()

    def state_dict(self) -> dict[str, Any]:
        """Raw weights and what is kept; the averaged ones are in the checkpoint's `state_dict`."""
        if not self.kept:
            return {}
        raw = self.raw or dict(zip(self.kept, self._weights(), strict=True))
        return {"raw": raw, "kept": self.kept, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Wait until the module is in place; a test needs nothing of it."""
        self._reset()
        if self.fitting:
            self.restored = state_dict

    @torch.no_grad()
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Averaged weights in place of the raw ones, under every name that a tied weight has."""
        if self.raw is not None or not self.has_average():
            return
        weights = self._weights()
        averaged = [a.to(w.dtype) for a, w in zip(self.averaged(weights), weights, strict=True)]
        by_tensor = {id(self.places[n][0][self.places[n][1]]): a for n, a in zip(self.kept, averaged, strict=True)}
        every: Any = (pl_module.named_parameters, pl_module.named_buffers)
        for name, tensor in chain(*(named(remove_duplicate=False) for named in every)):
            if name in checkpoint["state_dict"] and id(tensor) in by_tensor:
                checkpoint["state_dict"][name] = by_tensor[id(tensor)]


def _is(thing: Any, *names: str) -> bool:
    """Whether it is of one of these classes or derived from one, in lightning or in pytorch_lightning."""
    return any(kind.__name__ in names for kind in thing.__class__.__mro__)


def _places(module: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each floating-point parameter and saved buffer is stored, tied ones once: a buffer may be replaced."""
    found: dict[str, tuple[dict[str, Any], str]] = {}
    seen: set[int] = set()
    stores = (
        (path, owner, store) for path, owner in module.named_modules() for store in (owner._parameters, owner._buffers)
    )
    for path, owner, store in stores:
        for key, tensor in store.items():
            saved = tensor is not None and key not in owner._non_persistent_buffers_set
            if saved and tensor.is_floating_point() and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{path}.{key}" if path else key] = store, key
    return found


def _moves(tensor: Tensor) -> bool:
    return tensor.requires_grad or not isinstance(tensor, nn.Parameter)


class EMA(_Averaging):
    """Validates, saves and tests an exponential moving average of the weights; training goes on with the raw ones.

    After each optimiser step that was made (not one that an fp16 scaler skipped), average <- d * average +
    (1 - d) * weights, in one call. `d` is low at first: min(decay, (1 + t) / (10 + t)) at update t. A checkpoint's
    `state_dict` holds the averaged weights, so the best one is the best average, and any tool that loads it gets that;
    the raw ones are among the callbacks' states, from where a resumed fit restores them bitwise. After the fit the
    module holds the averaged weights, after an exception the raw ones.

    BatchNorm's statistics and other saved floating-point buffers are averaged, too; integers stay as they are. Frozen
    parameters take no memory and stay exact; one that is opened begins its average then. Half-precision weights are
    averaged in float32. It costs one copy of what is trained, and another one during validation.
    `trainer.save_checkpoint(weights_only=True)` ignores callbacks: during training it saves raw weights.

    Runs on: fit start, optimiser step, batch end, validation start and end, train end, exceptions, checkpoints.
    Touches: the weights during validation and after the fit; `state_dict` in checkpoints; its place in
    `trainer.callbacks`, which is the first.

    Args:
        decay: Share of the average that an update keeps, at least 0 and below 1. 0.999 remembers some 1,000 updates.
        every_n_steps: Optimiser steps from one update to the next.
        warmup: Whether the decay is low at first. Without, the start weighs `decay ** updates` in the end.

    Raises:
        ValueError: A value out of range; another callback that replaces the weights; `save_weights_only=True`; a
            strategy that divides the weights among ranks; a checkpoint's average of another module.

    Source: Polyak & Juditsky 1992, https://doi.org/10.1137/0330046; for deep nets Tarvainen & Valpola 2017,
    https://arxiv.org/abs/1703.01780

    Example:
        >>> trainer = Trainer(callbacks=[EMA(0.999), ModelCheckpoint(monitor="val/loss")])
        >>> trainer.fit(model, data)
        >>> scores = trainer.test(model, data, ckpt_path="best", verbose=False)  # of the best average
    """

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be at least 0 and below 1; received {decay:g}; 0.999 is usual")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be 1 or more; received {every_n_steps}")
        super().__init__()
        self.decay, self.every_n_steps, self.warmup = decay, every_n_steps, warmup
        self.handles: list[RemovableHandle] = []

    def averaged(self, weights: list[Tensor]) -> list[Tensor]:
        """The moving average."""
        return list(self.kept.values())

    def has_average(self) -> bool:
        """Not before the first update: until then the start is kept."""
        return self.updates > 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the steps that are really made."""
        self.stepped = False
        self.handles = [optimizer.register_step_post_hook(self._note_step) for optimizer in trainer.optimizers]

    def _note_step(self, *args: Any) -> None:
        self.stepped = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Update, once per optimiser step, after all else that the step has done to the weights."""
        stepped, self.stepped = self.stepped, False
        if stepped and trainer.global_step % self.every_n_steps == 0:
            decay = warmed_up(self.decay, self.updates) if self.warmup else self.decay
            ema_(list(self.kept.values()), self._weights(), decay)
            self.updates += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averaged weights in, for good."""
        self._remove_hooks()
        if not self.updates:
            rank_zero_warn(
                f"EMA never averaged: the run ended at step {trainer.global_step}, before the first update at step "
                f"{self.every_n_steps}; the weights stay the raw ones: lower every_n_steps or train longer"
            )
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Raw weights back, also for a checkpoint that is saved now."""
        self._remove_hooks()
        super().on_exception(trainer, pl_module, exception)

    def _remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


class Interpolation(_Averaging):
    """Validates, saves and tests share * weights + (1 - share) * start: between the fine-tuned and the pretrained net.

    Such a net often keeps more of what the pretrained one could do, at little cost or none on the new task. The
    interpolation is computed for each validation and checkpoint, and training goes on with the raw weights.
    Checkpoints, resuming, frozen parameters, buffers and costs are as with `EMA`; a checkpoint holds the start, too.
    BatchNorm's statistics are interpolated as well, which is not what the interpolated net would measure: where that
    matters, measure them on training data (`torch.optim.swa_utils.update_bn`).

    Runs on: fit start, optimiser step (parameters opened by then), validation start and end, train end, exceptions,
    checkpoints. Touches: as `EMA`.

    Args:
        share: Of the fine-tuned weights, 0 to 1. 1 changes nothing; 0 is the net that the fit began with.

    Raises:
        ValueError: As `EMA`.

    Source: WiSE-FT, Wortsman et al. 2022, https://arxiv.org/abs/2109.01903

    Example:
        >>> Trainer(callbacks=[Interpolation(share=0.5)]).fit(model, data)
    """

    def __init__(self, share: float = 0.5) -> None:
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share must be from 0 (where the fit began) to 1 (fine-tuned); received {share:g}")
        super().__init__()
        self.share = share

    def averaged(self, weights: list[Tensor]) -> list[Tensor]:
        """Between the start and the weights."""
        return interpolate(weights, list(self.kept.values()), self.share)
