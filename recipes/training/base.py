"""What every recipe's module does around its step: the optimiser, sums over an epoch, the plateau's metric."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from .. import __version__
from ..parts.losses import weights_by_count
from ..parts.optim import build_optimizer, reassert, snapshot
from ..parts.param_groups import describe as describe_groups
from ..parts.param_groups import param_groups, table
from ..parts.peft import Peft, adapt, describe
from ..parts.pruning import Numbers, reshape, unpack_zeros
from ..parts.schedules import Plateau, Schedule
from .base_weights import Base
from .lesson import Lesson

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger(__name__)


class RecipeModule(LightningModule):
    """Base of the recipes' modules; a subclass has a name, a net, `layer_groups` and the steps.

    Args:
        num_classes: Classes.
        class_weights: One weight per class; `balanced`, inverse to the training counts; or `effective`, less extreme.
        optimizer: Called with the parameter groups.
        schedule: Called with the optimiser and the total number of optimiser steps.
        layer_decay: Factor on the learning rate from each block to the one before it.
        lr_multipliers: Ordered pattern -> factor on the learning rate.
        lr_factor: On all learning rates: what a strategy brings where another suits it than the config's; by recipe,
            `vision` or `text`, or one for both.
        lr_limit: The highest learning rate that comes of the factor, likewise; None for no limit.
        save_base: Whether checkpoints hold frozen weights that can be loaded again; None: unless peft freezes them.
        reads: `vision` or `text`, if the recipe's name does not say it.
    """

    recipe: ClassVar[str]  # name of the command
    known: ClassVar[dict[str, type[RecipeModule]]] = {}  # those that are imported, by name
    class_weights: Tensor | None
    still: set[nn.Module] = set()
    epoch_sums: Tensor
    per_class: Any

    def __init__(
        self,
        num_classes: int,
        class_weights: list[float] | str | None,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        schedule: Callable[[Optimizer, int], LRScheduler],
        layer_decay: float,
        lr_multipliers: dict[str, float] | None,
        lr_factor: float | dict[str, float] = 1.0,
        lr_limit: float | dict[str, float] | None = None,
        save_base: bool | None = None,
        reads: str | None = None,
    ) -> None:
        super().__init__()
        self.lesson: Lesson | None = None  # from a teacher; no module, so that no checkpoint holds it
        self.projections = nn.ModuleDict()  # student's block -> map to the features of the teacher's
        self.optimizer, self.schedule = optimizer, schedule
        self.layer_decay, self.lr_multipliers = layer_decay, lr_multipliers
        reads = reads or self.recipe
        self.lr_factor = by_recipe(lr_factor, reads, "lr_factor")
        self.lr_limit = None if lr_limit is None else by_recipe(lr_limit, reads, "lr_limit")
        self.save_base = save_base
        self.base: Base | None = None  # weights that a checkpoint may leave out
        self.peft: Peft | None = None
        self.sizes: Numbers = {}  # that are others than the architecture's: channels were cut
        self.untuned: set[nn.Parameter] = set()  # frozen, for it is their adapters that train
        self.still = set()  # with their statistics
        self.weight_kind: Any = class_weights if isinstance(class_weights, str) else None
        fixed = None if class_weights is None or self.weight_kind else torch.as_tensor(class_weights, dtype=torch.float)
        if fixed is not None and len(fixed) != num_classes:
            raise ValueError(f"model.class_weights needs {num_classes} numbers, one per class, not {len(fixed)}")
        self.register_buffer("class_weights", fixed, persistent=False)
        # NaN stays NaN; torchmetrics' "disable" would forget the weights, its default leave the NaN out
        self.losses = nn.ModuleDict({split: MeanMetric(nan_strategy=float("nan")) for split in ("val", "test")})
        self.register_buffer("epoch_sums", torch.zeros(3), persistent=False)  # loss, correct, samples; always fp32
        self.step_counts: Tensor | None = None  # samples of the coming step: its first batches' mean, all so far
        self.share: Tensor | None = None  # of a batch's loss in its step; None where it is 1

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "recipe" in vars(cls):
            RecipeModule.known[cls.recipe] = cls

    def save_hyperparameters(self, *args: Any, frame: Any = None, **options: Any) -> None:
        """As Lightning's, without an optimiser or a schedule that only a pickle could hold.

        From the command line these are plain values.
        """
        super().save_hyperparameters(*args, frame=frame or inspect.currentframe().f_back, **options)  # type: ignore[union-attr]
        for name in ("optimizer", "schedule"):
            if callable(self.hparams.get(name)):
                del self.hparams[name]
        if isinstance(self.hparams.get("peft"), Peft):
            self.hparams["peft"] = asdict(self.hparams["peft"])

    def layer_groups(self) -> dict[str, list[str]]:
        """Ordered blocks, input to output: name -> dotted paths of modules or parameters."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says, beside arguments and weights, to be used without the code that trained it."""
        raise NotImplementedError

    def tune(
        self,
        path: str,
        how: Peft | dict[str, Any] | None,
        blocks: Mapping[str, Sequence[str]],
        run: Callable[[], Any],
        source: str | None,
        new: Iterable[str] = (),
    ) -> None:
        """Note where a net's weights come from; freeze it and give it adapters.

        Args:
            path: Where the net is in this module.
            how: The adapters; None to train all of it.
            blocks: Of the net.
            run: Runs it once.
            source: Where its weights come from; None where they can't be loaded again.
            new: Names of its parameters that no weights were loaded for.
        """
        if source is None and self.save_base is False:
            raise ValueError("model.save_base false needs pretrained weights, which can be loaded again")
        if how is None and self.save_base is not False:
            return
        net = self.get_submodule(path)
        self.base = Base(net, path, source, (*new, *blocks.get("head", ())))
        if how is not None:
            self.peft = how = Peft(**how) if isinstance(how, dict) else how
            adapt(net, how, blocks, run, new)
            log.info("%s", describe(net, how))
            self.untuned = {p for p in net.parameters() if not p.requires_grad}
            norms = [m for m in net.modules() if getattr(m, "running_mean", None) is not None]
            self.still = {m for m in norms if not any(p.requires_grad for p in m.parameters())}

    def taught(self, loss: Tensor, logits: Tensor, batch: Any) -> Tensor:
        """A batch's loss on its labels, with what a teacher says to it."""
        if self.lesson is None:
            return loss
        losses = self.lesson.losses(self, logits, batch)
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for name, value in losses.items():
                self.log(f"train/{name}", value.detach(), batch_size=len(logits))
        return self.lesson.whole(loss, losses)

    def with_projections(self, groups: dict[str, list[str]]) -> dict[str, list[str]]:
        """Blocks whose last holds the projections, too, if there are any."""
        if len(self.projections):
            groups[next(reversed(groups))].append("projections")
        return groups

    def on_fit_start(self) -> None:
        if self.lesson is not None:
            self.lesson.begin(self.trainer, self.device)

    def train(self, mode: bool = True) -> Self:
        """As torch's; statistics that go with frozen weights stand still."""
        super().train(mode)
        for module in self.still:
            module.training = False
        return self

    def param_groups(self) -> list[dict[str, Any]]:
        """The blocks' parameters, each with its learning rate's scale, norms and biases without weight decay."""
        groups = param_groups(
            self,
            self.layer_groups(),
            weight_decay=None,  # the optimiser's own
            layer_decay=self.layer_decay,
            lr_multipliers=self.lr_multipliers,
        )
        limit = {} if self.lr_limit is None else {"lr_limit": self.lr_limit}
        return [group | limit | {"lr_scale": group["lr_scale"] * self.lr_factor} for group in groups]

    def configure_optimizers(self) -> Any:
        """Every parameter in one named group, a schedule per optimiser step."""
        optimizer = build_optimizer(self.optimizer, self.param_groups())
        if isinstance(optimizer, LBFGS) and self.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                "L-BFGS evaluates its closure several times a step: it needs trainer.accumulate_grad_batches=1"
            )
        log.info("%s", table(describe_groups(optimizer)))
        schedule = self.schedule(optimizer, self.trainer.estimated_stepping_batches)  # type: ignore[arg-type]
        self._configured = snapshot(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def setup(self, stage: str) -> None:
        """Class weights by count need the training counts of the data module."""
        if self.weight_kind and stage == "fit":
            counts = self.trainer.datamodule.class_counts  # type: ignore[attr-defined]
            self.class_weights = weights_by_count(counts, self.weight_kind).to(self.device)

    def on_train_start(self) -> None:
        """After a resume, what is configured now counts, not what the checkpoint had."""
        self.share = None
        if all(p.grad is None for p in self.parameters()):  # else those of a step's first batches, restored
            self.step_counts = None
        optimizer, schedule = self.trainer.optimizers[0], self.lr_schedulers()
        scheduled = getattr(schedule, "writes", ("lr",))
        for difference in reassert(optimizer, self._configured, scheduled):
            log.warning("resume: %s", difference)
        from callbacks.warmup import steps_of_run  # not before the command line has seen whose callbacks these are

        total = steps_of_run(self.trainer)
        if isinstance(schedule, Schedule) and math.isfinite(total) and schedule.total_steps != total:
            # resumed with other batches or devices
            anew: Any = self.schedule(optimizer, int(total))
            anew.load_state_dict(schedule.state_dict())
            self.trainer.lr_scheduler_configs[0].scheduler = anew

    def on_train_epoch_start(self) -> None:
        self.epoch_sums = torch.zeros(3, device=self.device)

    def count(self, batch: Any) -> Tensor:
        """What the training loss of a batch is the mean over: its samples, tokens or class weights; a scalar."""
        raise NotImplementedError

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Find the batch's share in its optimiser step, in which each sample counts once, whatever its batch and rank.

        Lightning's gradient is the mean over batches and ranks of their means, and it divides by as many batches in an
        epoch's last, shorter step. So `in_step` scales a loss by its count, relative to the mean of the step's first
        batches, and the sum of gradients is scaled by the whole count, once it is known: after the backward pass of
        the step's last batch, which is before any penalty is added, any norm is clipped.
        """
        for module in self.still:  # not before the fit, which would warn of modules in evaluation mode
            module.training = False
        ranks, batches = self.trainer.world_size, self.trainer.accumulate_grad_batches
        if ranks * batches == 1:
            return
        count = self.count(batch)
        total = count.to(torch.float32, copy=True)
        if ranks > 1:
            torch.distributed.all_reduce(total)
        if self.step_counts is None or batch_idx % batches == 0:
            self.step_counts = torch.stack([torch.where(total > 0, total, 1.0) / ranks, torch.zeros_like(total)])
        self.step_counts[1] += total
        self.share = count / self.step_counts[0]

    def in_step(self, loss: Tensor) -> Tensor:
        """A batch's mean loss as it enters into the step's."""
        return loss if self.share is None else loss * self.share

    def on_after_backward(self) -> None:
        """Gradients of several batches become those of the mean over all their samples."""
        batches = self.trainer.accumulate_grad_batches
        if self.step_counts is None or self.trainer.fit_loop._should_accumulate():
            return
        (first, total), self.step_counts = self.step_counts, None
        if batches > 1:
            scale = torch.where(total > 0, batches * self.trainer.world_size * first / total, 1.0)
            torch._foreach_mul_([p.grad for p in self.parameters() if p.grad is not None], scale)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name, facts and versions; during a step, what its batches so far count. Frozen weights may be left out."""
        versions = {"finetuning-recipes": __version__, "torch": str(torch.__version__)}
        checkpoint["recipe"] = {"name": self.recipe, **self.facts(), "versions": versions}
        checkpoint["step_counts"] = self.step_counts
        if (base := self.base) is not None and base.source is not None and not self.save_base:
            from callbacks import Freeze

            held = [c for c in self.trainer.callbacks if isinstance(c, Freeze)]  # type: ignore[attr-defined]
            frozen, still = (
                self.untuned.union(*(c.frozen for c in held)),
                self.still.union(*(c.eval_modules for c in held)),
            )
            checkpoint["state_dict"] = base.leave_out(checkpoint["state_dict"], frozen, still)
            checkpoint["recipe"]["base"] = {"source": base.source, "digest": base.digest}
        if self.sizes:
            checkpoint["recipe"]["sizes"] = self.sizes
        state = checkpoint["state_dict"]  # a student needs its projections to go on, and not to be used
        checkpoint["projections"] = {name: state.pop(name) for name in list(state) if name.startswith("projections.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] |= unpack_zeros(checkpoint.pop("packed", {}))
        self.sizes = checkpoint.get("recipe", {}).get("sizes", {})
        reshape(self, self.sizes, checkpoint["state_dict"])
        if len(self.projections):
            checkpoint["state_dict"] |= checkpoint["projections"]
        if self.base is not None:
            self.base.complete(checkpoint, self)
        counts = checkpoint.get("step_counts")
        self.step_counts = None if counts is None else counts.to(self.device)

    def update_train_metrics(self, loss: Tensor, correct: Tensor, samples: int) -> None:
        """Count a training batch; `self.log` in every step would cost much of a small step."""
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/loss", loss.detach(), prog_bar=True, batch_size=samples)
        self.epoch_sums += torch.stack([loss.detach() * samples, correct, correct.new_tensor(samples)])

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means."""
        loss, correct, samples = self.trainer.strategy.reduce(self.epoch_sums.clone(), reduce_op="sum")
        self.log_dict({"train/loss_epoch": loss / samples, "train/accuracy": correct / samples}, sync_dist=True)

    def log_loss(self, split: str, loss: Tensor, samples: int) -> None:
        """Log the mean over all samples of all ranks; `self.log` alone would round the mean batch size down."""
        self.losses[split].update(loss, samples)  # type: ignore[operator]
        self.log(f"{split}/loss", self.losses[split], on_epoch=True, batch_size=1)  # type: ignore[arg-type]

    def on_validation_end(self) -> None:
        """A plateau schedule hears of its metric, equal on all ranks, once per validation."""
        schedule = self.lr_schedulers() if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking else None
        if isinstance(schedule, Plateau):
            if schedule.monitor not in self.trainer.callback_metrics:
                known = ", ".join(sorted(self.trainer.callback_metrics))
                raise ValueError(f"schedule.monitor {schedule.monitor!r} is not logged; there are {known}")
            schedule.observe(self.trainer.callback_metrics[schedule.monitor])

    def on_test_epoch_end(self) -> None:
        """Log the accuracy of each class by its name."""
        if self.per_class is None:
            return
        class_names = getattr(self.trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
        for label, (right, _, _, _, samples) in enumerate(self.per_class.compute().tolist()):
            if samples:
                name = class_names[label] if class_names else label
                self.log(f"test/accuracy_of/{name}", right / samples, sync_dist=True)
        self.per_class.reset()


def by_recipe(values: float | dict[str, float], recipe: str, name: str) -> float:
    """A value of a strategy's: what suits encoders of texts is another than what suits nets of images.

    Raises:
        ValueError: It is not above 0, or there is none for this recipe.
    """
    kind = "vision" if recipe == "vision" else "text"
    if isinstance(values, dict) and kind not in values:
        raise ValueError(f"model.{name} has no value for {kind}; it has some for {', '.join(values)}")
    found = values[kind] if isinstance(values, dict) else values
    if found <= 0:
        raise ValueError(f"model.{name} must be above 0; received {found:g}")
    return found
