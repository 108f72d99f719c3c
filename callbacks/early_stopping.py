"""Early stopping that knows the phases of gradual unfreezing."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from torch import Tensor


@runtime_checkable
class Phased(Protocol):
    """What a callback offers that opens a network in phases, such as GradualUnfreezing."""

    all_open: bool
    """Whether the last phase has begun."""


class PhaseAwareEarlyStopping(EarlyStopping):
    """Lightning's EarlyStopping, which cannot fire before the last phase has begun.

    While any callback of the Trainer has an `all_open` that is False, nothing stops the run, neither patience nor a
    threshold nor a non-finite metric, and no patience is used up; the best score is followed. The phase of the last
    trained batch counts, so that a phase that opens on the same metric starts with all its patience. Without such a
    callback it acts as its parent.

    Runs on: as its parent, and start of batches. Touches: `trainer.should_stop`.

    Args: as those of EarlyStopping.

    Example:
        >>> Trainer(callbacks=[PhaseAwareEarlyStopping("val/loss", patience=3)]).fit(model, data)
    """

    waits_for_phases: ClassVar[bool] = True
    """Tells GradualUnfreezing that this one waits for its phases."""

    waiting = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the previous fit, which the parent does not."""
        if stage == "fit":
            self._check_on_train_epoch_end = vars(self).setdefault("_asked", self._check_on_train_epoch_end)
            self.waiting, self.wait_count, self.stopped_epoch = False, 0, 0
            self.best_score = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
            self.stopping_reason, self.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the callbacks that open in phases."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self.phased = [callback for callback in callbacks if isinstance(callback, Phased)]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note whether this batch is trained before the last phase."""
        self.waiting = not all(callback.all_open for callback in self.phased)

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        stops, reason = super()._evaluate_stopping_criteria(current)
        if not self.waiting:
            return stops, reason
        self.wait_count = 0
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        return False, None if stops else reason
