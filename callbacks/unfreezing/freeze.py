"""Parameters that stay frozen: no gradient, no decay, no drift of statistics."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from .blocks import NORM, find_blocks
from .messages import count, counted, did_you_mean, say
from .ranks import is_kind, rewrap


class _Freezing(Callback):
    """Keeps parameters frozen and their modules in evaluation mode until the fit is over."""

    def __init__(self, frozen_dropout: bool) -> None:
        self.frozen_dropout = frozen_dropout
        self.frozen: set[nn.Parameter] = set()
        self.eval_modules: set[nn.Module] = set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Frozen modules stay in evaluation mode, whoever called `train()`."""
        for module in self.eval_modules:
            module.training = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module."""
        if stage == "fit":
            self.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As after a fit."""
        self.release()

    def release(self) -> None:
        """Unfreeze what this callback has frozen."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        for module in self.eval_modules:
            module.training = True
        self.frozen, self.eval_modules = set(), set()


class Freeze(_Freezing):
    """Keeps parts of the network frozen for the whole fit: feature extraction, partial fine-tuning, BitFit.

    Frozen means frozen: no gradient, no weight decay, no momentum, and modules all of whose parameters are frozen are
    in evaluation mode, so that BatchNorm keeps its statistics and dropout is off. After the fit the module is
    trainable as before.

    Runs on: setup, fit start, every training batch (modes only). Touches: `requires_grad`, `training`.

    Args:
        train_last_blocks: How many of the last blocks train; 1 is the head alone.
        patterns: Ordered, regular expression -> whether it trains; the first that matches a parameter's name decides,
            before `train_last_blocks`.
        train_norms: Parameters of norm layers train anyway.
        train_biases: Biases train anyway. BitFit: Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199
        frozen_dropout: Leave dropout on in frozen blocks; BatchNorm's statistics stay as they are.

    Raises:
        ValueError: Nothing is asked for, a pattern matches nothing new, there are no norms or biases, or nothing would
            train; another Freeze or a finetuning callback of Lightning's.

    Example:
        >>> Trainer(callbacks=[Freeze(train_last_blocks=1, train_norms=True)]).fit(model, data)
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

    def chosen(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Names and parameters to freeze, of those that are not frozen already."""
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
        exempt = 0
        unused = set(self.patterns)
        for position, members in enumerate(blocks.values(), 1):
            for name, parameter in members.items():
                match = next((pattern for pattern in self.patterns if re.search(pattern, name)), None)
                unused.discard(match or "")
                by_kind = (self.train_norms and parameter in norms) or (self.train_biases and name.endswith("bias"))
                by_place = position > len(blocks) - last
                trains[name] = by_kind or by_place if match is None else self.patterns[match]
                exempt += by_kind and not by_place
        known = dict(module.named_parameters())
        if unused:
            pattern = min(unused)
            raise ValueError(f"Freeze: pattern {pattern!r} decides on no parameter{did_you_mean(pattern, known)}")
        if (self.train_norms or self.train_biases) and not exempt:
            kinds = " or ".join(["norms"] * self.train_norms + ["biases"] * self.train_biases)
            raise ValueError(f"Freeze: the blocks that it freezes have no {kinds} to train; leave the option out")
        if not any(trains.values()):
            raise ValueError("Freeze leaves nothing to train: raise train_last_blocks or let a pattern train")
        return {name: known[name] for name in trains if not trains[name]}

    def freeze(self, module: nn.Module) -> None:
        """Freeze what is chosen, once."""
        if not self.frozen:
            self.frozen = close(self.chosen(module).values())
            trains = count(p for p in module.parameters() if p.requires_grad)
            say(f"freeze: {counted(self.frozen)} frozen, {trains:,} parameters train")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze before the strategy wraps the module, so that DDP never sees frozen parameters."""
        if stage == "fit":
            check_alone(trainer, self)
            if not self.frozen <= set(pl_module.parameters()):  # else it was frozen before the fit
                self.release()
            if any(True for _ in pl_module.parameters()):
                self.freeze(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze what was built late, in `configure_model` or the module's own `setup`."""
        if not self.frozen:
            self.freeze(pl_module)
            rewrap(trainer, pl_module)
        self.eval_modules = frozen_modules(pl_module, self.frozen, dropout=self.frozen_dropout)


def close(parameters: Iterable[nn.Parameter]) -> set[nn.Parameter]:
    """Freeze parameters and drop their gradients, which an optimiser would use; returns them."""
    closed = set(parameters)
    for parameter in closed:
        parameter.requires_grad_(False)
        parameter.grad = None
    return closed


def frozen_modules(root: nn.Module, frozen: set[nn.Parameter], *, dropout: bool = False) -> set[nn.Module]:
    """Modules all of whose parameters are frozen, with what lies inside them, of those in training mode.

    Parameters that never train, as those of a net with adapters, don't keep a module open; modules with no others are
    left as they are.

    Args:
        root: The network.
        frozen: Its frozen parameters.
        dropout: Return only modules with running statistics, so that dropout inside frozen ones stays on.
    """
    found: set[nn.Module] = set()
    for module in root.modules():
        own = set(module.parameters())
        if own & frozen and all(p in frozen or not p.requires_grad for p in own):
            found |= set(module.modules())
    return {m for m in found if m.training and (not dropout or getattr(m, "running_mean", None) is not None)}


def is_compiled(module: nn.Module) -> bool:
    """Whether it or a part of it went through torch.compile."""
    return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in module.modules())


def check_alone(trainer: Trainer, callback: Callback) -> None:
    """Refuse a second callback that freezes the same parameters; Freeze and GradualUnfreezing go together."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is not callback and (isinstance(other, type(callback)) or is_kind(other, "BaseFinetuning")):
            own, its = type(callback).__name__, type(other).__name__
            both = f"two {own}" if own == its else f"{own} and {its}"
            raise ValueError(f"{both} would each unfreeze what the other keeps frozen; give one of them")
