"""Learn several things at once: one net, and a head for each of classes, numbers, several labels, masks.

    python -m recipes.multitask fit --test --config multitask/quickstart

The model, the losses, the step and the optimiser, top to bottom. The data module says what there is to learn; a label
that is missing counts nothing. What the tasks share, the trunk, is an image backbone or an encoder of texts.
"""

from __future__ import annotations

import sys

from .cli import early

if __name__ == "__main__":
    early.start("multitask", sys.argv[1:])  # tells a slip in a name before the imports below take seconds

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from itertools import combinations
from typing import Any

import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from .cli.command import RecipeCLI
from .cli.defaults import fill_in_image_size, fill_in_tokenizer
from .parts.encoders import Pooling
from .parts.peft import Peft, channels_last
from .parts.schedules import Cosine
from .parts.task_heads import Head, build_task_head, chosen_heads, map_blocks
from .parts.task_weights import BalanceKind, Branch, TaskWeights, cosines, rows
from .parts.tasks import TaskKind, known, measured, score, task_loss, task_metrics
from .parts.trunks import ImageTrunk, TextTrunk
from .training.base import RecipeModule

log = logging.getLogger(__name__)

Batch = dict[str, Any]


class MultiTask(RecipeModule):
    """A pretrained trunk with a head for each task.

    A task's loss in a batch is the sum over its labelled samples, divided by as many as a batch of this size has on
    average: each label counts the same, wherever it comes, over ranks and accumulated batches, too. Numbers are learnt
    with mean 0 and spread 1, and given on their own scale. The best checkpoint is best in `val/score`, the mean over
    the tasks of accuracy of classes, micro F1 of several labels, R2 of numbers and mean IoU of masks, each at least 0.

    Args:
        tasks: Name -> kind and names of classes; the data's.
        heads: Name -> head; a task without one is not learnt. All tasks with plain heads if not given.
        balance: What evens out the tasks: `fixed` weights; `uncertainty`; `gradnorm`; or `upgrad`, `mgda`, `dual_proj`,
            `aligned_mtl` of TorchJD, where gradients conflict; see `recipes.parts.task_weights.TaskWeights`. All but
            the first two compute each task's gradient at the trunk: a backward pass and the memory of a gradient more
            for each task; of an accumulated step each batch is balanced by itself.
        watch_gradients: Whether to log, with the losses, the length of each task's gradient at the trunk and the
            cosines between them.
        backbone: Trunk for images: its name, as in `recipes.vision`.
        weights: Where the backbone's weights come from, as in `recipes.vision`.
        image_size: Side in pixels of the images; the backbone's own if not given.
        small_stem: For ResNets on images of 64 px and less.
        encoder: Trunk for texts, in place of a backbone: name on the hub, folder, or one that ships with this package.
        pretrained: Whether to load the encoder's weights.
        pooling: What heads see of a text: `cls` or `mean`.
        dropout: Of the encoder's layers and attention; its own if not given.
        optimizer: Called with the parameter groups, e.g. `functools.partial(torch.optim.AdamW, lr=1e-3)`.
        schedule: Called with the optimiser and the total number of optimiser steps.
        layer_decay: Factor on the learning rate from each block to the one before it; 1 for one learning rate.
        lr_multipliers: Ordered pattern -> factor on the learning rate; the first found in a parameter's name counts.
        lr_factor: On all learning rates: what a strategy brings where another suits it than the config's.
        lr_limit: The highest learning rate that comes of the factor; None for no limit.
        peft: Freeze the trunk and train adapters in it, as of `recipes.parts.peft.Peft`; heads train as ever.
        save_base: Whether checkpoints hold frozen weights that can be loaded again; unless `peft` freezes them if not
            given.
    """

    centre: Tensor
    spread: Tensor
    shares: Tensor
    sums: Tensor
    recipe = "multitask"
    monitor = ("val/score", "max")

    def __init__(
        self,
        tasks: dict[str, dict[str, Any]],
        heads: dict[str, Head] | None = None,
        balance: BalanceKind = "fixed",
        watch_gradients: bool = False,
        backbone: str | None = None,
        weights: str | None = None,
        image_size: int | None = None,
        small_stem: bool = False,
        encoder: str | None = None,
        pretrained: bool = True,
        pooling: Pooling = "mean",
        dropout: float | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] = torch.optim.AdamW,
        schedule: Callable[[Optimizer, int], LRScheduler] = Cosine,
        layer_decay: float = 1.0,
        lr_multipliers: dict[str, float] | None = None,
        lr_factor: float | dict[str, float] = 1.0,
        lr_limit: float | dict[str, float] | None = None,
        peft: Peft | None = None,
        save_base: bool | None = None,
    ) -> None:
        if (backbone is None) == (encoder is None):
            raise ValueError("give model.backbone, for images, or model.encoder, for texts, and not both")
        reads = "text" if encoder else "vision"
        super().__init__(
            0, None, optimizer, schedule, layer_decay, lr_multipliers, lr_factor, lr_limit, save_base, reads=reads
        )
        chosen = chosen_heads(heads, tasks)
        self.save_hyperparameters(ignore=["heads"])
        self.hparams["heads"] = {name: asdict(head) for name, head in chosen.items()}
        self.kinds: dict[str, TaskKind] = {name: tasks[name]["kind"] for name in chosen}
        self.class_names = {name: list(tasks[name].get("class_names", ())) for name in chosen}
        self.trunk: ImageTrunk | TextTrunk
        if backbone:
            self.trunk = ImageTrunk(backbone, weights, image_size, small_stem)
        else:
            self.trunk = TextTrunk(str(encoder), pretrained, pooling, dropout)
        self.tune("trunk.net", peft, self.trunk.blocks, self.trunk.run, self.trunk.source, self.trunk.new)
        masks = [name for name, kind in self.kinds.items() if kind == "segmentation"]
        shapes = self.trunk.map_shapes if masks else {}
        self.maps = {name: map_blocks(name, chosen[name], shapes, self.trunk.net.input_size) for name in masks}
        self.heads = nn.ModuleDict()
        for name, head in chosen.items():
            widths = [shapes[block][1] for block in self.maps[name]] if name in self.maps else self.trunk.width
            self.heads[name] = build_task_head(head, widths, len(self.class_names[name]) or 1)
        if isinstance(self.trunk, ImageTrunk):
            self.trunk.watch(list(dict.fromkeys(block for some in self.maps.values() for block in some)))
            channels_last(self)
        self.losses_of: dict[str, Callable[..., Tensor]] = {
            name: functools.partial(
                task_loss, kind=self.kinds[name], loss=head.loss, label_smoothing=head.label_smoothing
            )
            for name, head in chosen.items()
        }
        squared = [kind == "regression" for kind in self.kinds.values()]
        self.balance = TaskWeights(list(chosen), squared, balance, [head.weight for head in chosen.values()])
        self.watch_gradients = watch_gradients
        count = len(chosen)
        self.register_buffer("centre", torch.zeros(count))  # of numbers; kept, for answers are on their scale
        self.register_buffer("spread", torch.ones(count))
        self.register_buffer("shares", torch.ones(count), persistent=False)
        self.register_buffer("sums", torch.zeros(2, count), persistent=False)  # of an epoch: losses, labelled samples
        self.losses = nn.ModuleDict()
        self.metrics = nn.ModuleDict()
        for split in ("val", "test"):
            self.losses[split] = nn.ModuleDict({name: MeanMetric(nan_strategy=float("nan")) for name in chosen})
            self.metrics[split] = nn.ModuleDict(
                {name: task_metrics(self.kinds[name], len(self.class_names[name]) or 1) for name in chosen}
            )

    def layer_groups(self) -> dict[str, list[str]]:
        """Ordered blocks, input to output: name -> dotted paths of modules or parameters."""
        groups = {name: [f"trunk.net.{path}" for path in paths] for name, paths in self.trunk.blocks.items()}
        return groups | {"head": ["heads", *(["balance"] if self.balance.log_variances is not None else [])]}

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Task -> logits `(batch, classes)`, of masks `(batch, classes, height, width)`; of numbers `(batch, 1)`, with
        mean 0 and spread 1.
        """
        features, maps = self.trunk(batch)
        found = {}
        for place, (name, head) in enumerate(self.heads.items()):
            seen = [maps[block] for block in self.maps[name]] if name in self.maps else [features]
            if self.balance.needs_gram and torch.is_grad_enabled():
                seen = [Branch.apply(values, self.balance.branches, place) for values in seen]
            found[name] = head(seen, batch["image"].shape[2:]) if name in self.maps else head(seen[0])
        return found

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """A batch with images in [0, 1], or tokens and their mask, to `outputs`, numbers on their own scale."""
        return self.on_their_scale(self.outputs(batch))

    def on_their_scale(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Numbers times their spread, plus their mean, in float32: half precision would round years to decades."""
        scales = zip(outputs.items(), self.centre, self.spread, strict=True)
        return {
            name: values.float() * spread + centre if self.kinds[name] == "regression" else values
            for (name, values), centre, spread in scales
        }

    def setup(self, stage: str) -> None:
        """The data say how many of each label there are, and how numbers are spread."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "mixup", 0) or getattr(data, "cutmix", 0):
            raise ValueError("data.mixup and data.cutmix mix classes, and there are several tasks: leave them at 0")
        if (
            stage != "fit" or data is None
        ):  # with loaders alone, all labels are taken to be known, and numbers as they are
            return
        for place, (name, kind) in enumerate(self.kinds.items()):
            facts = data.label_facts[name]
            if not facts["known"]:
                raise ValueError(f"no training sample has a label of {name!r}: leave it out of model.heads")
            self.shares[place] = facts["known"]
            if kind == "regression":
                self.centre[place], self.spread[place] = facts["mean"], facts["spread"]

    def count(self, batch: Batch) -> Tensor:
        """The samples."""
        return torch.tensor(len(batch["index"]), device=self.device)

    def target(self, name: str, batch: Batch) -> Tensor:
        """A task's labels; numbers with mean 0 and spread 1."""
        labels: Tensor = batch["labels"][name]
        if self.kinds[name] != "regression":
            return labels
        place = list(self.kinds).index(name)
        return (labels - self.centre[place]) / self.spread[place]

    def task_losses(self, batch: Batch, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Each task's mean loss over its labelled samples, and their number, both `(tasks,)`."""
        losses, counts = [], []
        for name, values in outputs.items():
            target = self.target(name, batch)
            losses.append(self.losses_of[name](outputs=values, target=target))
            counts.append(known(self.kinds[name], target).sum())
        return torch.stack(losses), torch.stack(counts)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.balance.start()
        means, counts = self.task_losses(batch, self.outputs(batch))
        losses = means * counts / (len(batch["index"]) * self.shares)
        self.look_at_gradients(losses)
        loss = self.balance.total(losses)
        self.sums += torch.stack([means.detach() * counts, counts])
        if self.logs_now:
            self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["index"]))
            for name, value, weight in zip(self.kinds, means.detach(), self.balance.now(), strict=True):
                self.log_dict({f"train/{name}/loss": value, f"train/{name}/weight": weight}, batch_size=1)
        return self.in_step(loss)

    @property
    def logs_now(self) -> bool:
        """Whether this step's losses are logged; in every step it would cost much of a small one."""
        return (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined, no-any-return]

    def look_at_gradients(self, losses: Tensor) -> None:
        """The tasks' gradients at the trunk: balanced, if that is asked for, and logged now and then."""
        watched = self.watch_gradients and self.logs_now
        shared = [p for p in self.trunk.parameters() if p.requires_grad]
        if not shared or not (watched or self.balance.needs_gram):
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        found = rows(list(losses * self.balance.fixed), shared, 1.0 if scaler is None else scaler.get_scale())
        found, means = self.over_ranks(found), self.over_ranks(losses.detach().clone())
        gram = found @ found.T
        if self.balance.needs_gram:
            self.balance.balance(gram, means)
        if watched:
            names, angles = list(self.kinds), cosines(gram)
            for place, name in enumerate(names):
                self.log(f"train/{name}/gradient", gram[place, place].sqrt(), batch_size=1)
            for one, other in combinations(range(len(names)), 2):
                self.log(f"train/cosine/{names[one]}_{names[other]}", angles[one, other], batch_size=1)

    def over_ranks(self, values: Tensor) -> Tensor:
        """Each rank's part of a step's mean, as the whole, on all of them."""
        values = self.in_step(values)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(values)
            values /= self.trainer.world_size
        return values

    def on_train_epoch_start(self) -> None:
        self.sums = torch.zeros_like(self.sums)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's mean losses."""
        losses, counts = self.trainer.strategy.reduce(self.sums.clone(), reduce_op="sum")
        found = losses / counts.clamp(min=1)
        whole = {f"train/{name}/loss_epoch": value for name, value in zip(self.kinds, found, strict=True)}
        self.log_dict(whole | {"train/loss_epoch": (found * self.balance.fixed).sum()}, sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Outputs by task, labels and indices, for whoever looks on."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """As validation."""
        return self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, split: str) -> dict[str, Any]:
        outputs = self.outputs(batch)
        losses, counts = self.task_losses(batch, outputs)
        found = self.on_their_scale(outputs)
        for name, loss, count in zip(outputs, losses, counts, strict=True):
            given = measured(self.kinds[name], found[name], batch["labels"][name])
            if given is not None:
                self.metrics[split][name].update(*given)  # type: ignore[index, operator]
                self.losses[split][name].update(loss, count)  # type: ignore[index, operator]
        told = {name: {"logits": values, "label": batch["labels"][name]} for name, values in found.items()}
        return {"tasks": told, "index": batch["index"]}

    def _log_metrics(self, split: str) -> None:
        """Each task's metrics, and the score that is the mean of one of each."""
        scores, losses = [], []
        for place, (name, kind) in enumerate(self.kinds.items()):
            metrics, loss = self.metrics[split][name], self.losses[split][name]  # type: ignore[index]
            if self.trainer.strategy.reduce(loss.weight.clone(), reduce_op="sum"):
                found = {"loss": loss.compute(), **metrics.compute()}
                self.log_dict({f"{split}/{name}/{key}": value for key, value in found.items()}, sync_dist=True)
                scores.append(score(kind, found))
                losses.append(found["loss"] * self.balance.fixed[place])
            metrics.reset()
            loss.reset()
        if scores:
            whole = {f"{split}/score": torch.stack(scores).mean(), f"{split}/loss": torch.stack(losses).sum()}
            self.log_dict(whole, prog_bar=split == "val", sync_dist=True)  # equal on all ranks, as Lightning can't know

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Index, and of each task, by its name and what it is: `label`, `probability` and `p`; `number`; `mask`."""
        found = {"index": batch["index"]}
        for name, values in self(batch).items():
            values = values.float()
            if self.kinds[name] == "regression":
                found[f"{name}/number"] = values.squeeze(1)
            elif self.kinds[name] == "multi_label":
                found |= {f"{name}/label": values > 0, f"{name}/p": values.sigmoid()}
            elif self.kinds[name] == "segmentation":
                found[f"{name}/mask"] = values.argmax(1).to(torch.uint8)
            else:
                probability, label = values.softmax(1).max(1)
                found |= {f"{name}/label": label, f"{name}/probability": probability}
        return found

    def facts(self) -> dict[str, Any]:
        """Those of the trunk: how images are normalised; the encoder's configuration."""
        return self.trunk.facts()  # type: ignore[no-any-return]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The trunk reads as it did in training."""
        super().on_load_checkpoint(checkpoint)
        self.trunk.take_facts(checkpoint.get("recipe", {}))


class MultiTaskCLI(RecipeCLI):
    """The command line of this recipe: the data say what there is to learn; images get the backbone's size."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The model learns its tasks from the data; no config repeats them."""
        parser.link_arguments("data", "model.tasks", compute_fn=self._tasks, apply_on="instantiate")

    def _tasks(self, data: Any) -> dict[str, Any]:
        if not hasattr(data, "tasks"):
            early.stop(f"data: {type(data).__name__} has one label a sample; recipes.multitask needs data with `tasks`")
        try:
            return {name: asdict(task) for name, task in data.tasks.items()}
        except (ValueError, OSError) as error:
            early.stop(str(error))  # through the parser, it would come wrapped in a screen of text

    def before_instantiate_classes(self) -> None:
        """The image's size, where neither the data nor the model says one."""
        super().before_instantiate_classes()
        config = self.config[self.subcommand]
        if config.model.backbone:
            fill_in_image_size(config)

    def instantiate_classes(self) -> None:
        """The tokenizer is the encoder's unless the data names one."""
        super().instantiate_classes()
        if self.model.trunk.reads == "text":
            fill_in_tokenizer(self.model, self.model.trunk.net, self.datamodule)


def main(args: ArgsType = None, *, plan: bool = False) -> MultiTaskCLI:
    """Run the command line, or only build it to `plan`; returns it with its `trainer`, `model` and `datamodule`."""
    return MultiTaskCLI(MultiTask, args, plan=plan)


if __name__ == "__main__":
    main()
