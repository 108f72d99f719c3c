"""Fine-tune an image classifier.

    python -m recipes.vision fit --test --config vision/quickstart

The model, the loss, the step and the optimiser, top to bottom. The data module delivers images in [0, 1];
the model normalises them for its backbone, so the two can't disagree.
"""

from __future__ import annotations

import sys

from .cli import early

if __name__ == "__main__":
    early.start("vision", sys.argv[1:])  # tells a slip in a name before the imports below take seconds

import functools
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .cli.command import RecipeCLI
from .cli.defaults import fill_in_image_size
from .cli.overrides import take_class_names
from .parts.backbones import build_backbone, load_weights
from .parts.heads import HeadInit, HeadKind, build_head
from .parts.losses import LossKind, WeightKind, classification_loss, mass
from .parts.metrics import classification_metrics, per_class_counts
from .parts.peft import Peft, channels_last
from .parts.saliency import grad_cam
from .parts.schedules import Cosine
from .training.base import RecipeModule
from .training.precompute import precompute

log = logging.getLogger(__name__)

Batch = dict[str, Any]


class VisionClassifier(RecipeModule):
    """A pretrained backbone with a new head.

    Args:
        num_classes: Classes.
        backbone: Its name; `python -m recipes ls backbones` lists them, `timm/<name>` takes any of timm's.
        weights: Where the backbone's weights come from: a name of torchvision's such as `IMAGENET1K_V2` or
            `DEFAULT` (downloaded once), a `.safetensors` or `.pt` file, a file shipped with this package, or
            nothing.
        image_size: Side in pixels of the images; the backbone's own if not given.
        small_stem: For ResNets on images of 64 px and less: a 3 x 3 stem without max-pooling.
        fuse_blocks: Blocks whose outputs, averaged over places, the head sees beside the features.
        head: `linear`, `mlp` or `cosine`.
        head_hidden: Width of the hidden layer of `mlp`.
        head_dropout: Probability of dropping a feature before each linear layer of the head.
        head_init: How the head starts: default, kaiming, xavier, normal or zeros.
        reinit_blocks: How many of the backbone's last blocks start from fresh weights (Zhang et al. 2021,
            https://arxiv.org/abs/2006.05987).
        loss: `cross_entropy` or `focal`.
        label_smoothing: Probability spread evenly over the classes.
        class_weights: One weight per class; `balanced`, inverse to the training counts; or `effective`, less extreme.
        focal_gamma: Exponent of the focal loss.
        aux_weight: Weight of the loss at the auxiliary heads of Inception v3 and GoogLeNet, 0.4 and 0.3 in their
            papers; 0 leaves them out.
        optimizer: Called with the parameter groups, e.g. `functools.partial(torch.optim.AdamW, lr=1e-3)`.
        schedule: Called with the optimiser and the total number of optimiser steps.
        layer_decay: Factor on the learning rate from each block to the one before it; 1 for one learning rate.
        lr_multipliers: Ordered pattern -> factor on the learning rate; the first that is found in a
            parameter's name counts.
        lr_factor: On all learning rates: what a strategy brings where another suits it than the config's; one for
            `vision` and one for `text`, or one for both.
        lr_limit: The highest learning rate that comes of the factor, likewise; None for no limit.
        peft: Freeze the backbone and train adapters in it: method, rank, targets and more, as of
            `recipes.parts.peft.Peft`; the head trains as ever.
        save_base: Whether checkpoints hold frozen weights that can be loaded again from `weights`; if not given, unless
            `peft` freezes them. Such a checkpoint is small, and needs the same weights to be used.
        teacher: A checkpoint of this recipe, a folder of runs, or an export's with its program, that knows these
            classes: its answers are learnt, too (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).
        teacher_weight: Of the teacher's answers in the loss; the labels have the rest.
        temperature: At which answers are compared; the higher, the more the less probable classes count.
        match_blocks: Blocks of this net, and of the teacher's, whose features are to be alike, after a learnt map.
        match_weight: Of the features' loss, which is added.
        mirror_at_test: Whether `test` and `predict` give the mean probabilities of an image and its mirror image.
        top_k: How many of the most probable classes `predict` gives.
        compile_backbone: Whether to torch.compile the backbone.
    """

    mean: Tensor
    std: Tensor
    recipe = "vision"
    monitor = ("val/accuracy", "max")  # what the best checkpoint is best in

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        weights: str | None = None,
        image_size: int | None = None,
        small_stem: bool = False,
        fuse_blocks: list[str] | None = None,
        head: HeadKind = "linear",
        head_hidden: int = 512,
        head_dropout: float = 0.0,
        head_init: HeadInit = "default",
        reinit_blocks: int = 0,
        loss: LossKind = "cross_entropy",
        label_smoothing: float = 0.0,
        class_weights: list[float] | WeightKind | None = None,
        focal_gamma: float = 2.0,
        aux_weight: float = 0.0,
        optimizer: Callable[[Iterable[Any]], Optimizer] = torch.optim.AdamW,
        schedule: Callable[[Optimizer, int], LRScheduler] = Cosine,
        layer_decay: float = 1.0,
        lr_multipliers: dict[str, float] | None = None,
        lr_factor: float | dict[str, float] = 1.0,
        lr_limit: float | dict[str, float] | None = None,
        peft: Peft | None = None,
        save_base: bool | None = None,
        teacher: str | None = None,
        teacher_weight: float = 0.5,
        temperature: float = 2.0,
        match_blocks: dict[str, str] | None = None,
        match_weight: float = 1.0,
        mirror_at_test: bool = False,
        top_k: int = 1,
        compile_backbone: bool = False,
    ) -> None:
        super().__init__(
            num_classes, class_weights, optimizer, schedule, layer_decay, lr_multipliers, lr_factor, lr_limit, save_base
        )
        self.save_hyperparameters()
        build = functools.partial(
            build_backbone, backbone, image_size=image_size, small_stem=small_stem, aux=aux_weight > 0
        )
        self.backbone = build()
        new: list[str] = []
        if weights is not None:
            log.info("%s", report := load_weights(self.backbone, weights))
            new += [f"net.{name}" for name in report.missing]
        if reinit_blocks:
            new += self._reinitialise(build(), reinit_blocks)
        image = torch.zeros(1, 3, self.backbone.input_size, self.backbone.input_size)
        self.tune("backbone", peft, self.backbone.blocks, lambda: self.backbone(image), weights, new)
        if fuse_blocks:
            self.backbone.fuse(fuse_blocks)
        new_head = functools.partial(
            build_head, head, hidden=head_hidden, dropout=head_dropout, init=head_init, num_classes=num_classes
        )
        self.head = new_head(width=self.backbone.width)
        self.aux_heads = nn.ModuleList(new_head(width=width) for width in self.backbone.aux_widths)
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(3, 1, 1), persistent=False)
        self.loss = functools.partial(
            classification_loss, kind=loss, label_smoothing=label_smoothing, gamma=focal_gamma
        )
        if not 0 < top_k <= num_classes:
            raise ValueError(f"model.top_k must be 1 to {num_classes}, the number of classes, not {top_k}")
        self.aux_weight, self.mirror_at_test, self.top_k = aux_weight, mirror_at_test, top_k
        self.metrics = nn.ModuleDict(
            {split: classification_metrics(num_classes, f"{split}/") for split in ("val", "test")}
        )
        self.per_class = per_class_counts(num_classes)
        channels_last(self)
        if teacher is not None:
            from .deploy.teacher import lesson_from

            how = {"weight": teacher_weight, "temperature": temperature, "match_weight": match_weight}
            self.lesson = lesson_from(teacher, self, {"image": image}, match=match_blocks, **how)
        if compile_backbone:
            self.backbone.compile()

    def layer_groups(self) -> dict[str, list[str]]:
        """Ordered blocks, input to output: name -> dotted paths of modules or parameters."""
        groups = {name: [f"backbone.{path}" for path in paths] for name, paths in self.backbone.blocks.items()}
        return self.with_projections(groups | {"head": ["head", *(["aux_heads"] if len(self.aux_heads) else [])]})

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], `(batch, 3, height, width)`, to logits `(batch, num_classes)`."""
        return self.head(self.backbone(self.normalise(images)))  # type: ignore[no-any-return]

    def normalise(self, images: Tensor) -> Tensor:
        """Subtract the backbone's mean and divide by its standard deviation; channels last."""
        normal = (images.to(self.mean.dtype) - self.mean) / self.std
        return normal.contiguous(memory_format=torch.channels_last)

    def logits(self, batch: Batch) -> Tensor:
        """Logits of a batch of images, or of features that the backbone gave before."""
        if "features" in batch:
            return self.head(batch["features"])  # type: ignore[no-any-return]
        return self(batch["image"])  # type: ignore[no-any-return]

    def final_logits(self, batch: Batch) -> Tensor:
        """Logits of `test` and `predict`: with `mirror_at_test` the log of two views' mean probabilities."""
        logits = self.logits(batch)
        if not self.mirror_at_test or "features" in batch:
            return logits
        views = logits.float(), self(batch["image"].flip(3)).float()
        return torch.logaddexp(*(view.log_softmax(1) for view in views)) - math.log(2)

    def embed(self, batch: Batch) -> Tensor:
        """The backbone's features, `(batch, width)`."""
        return self.backbone(self.normalise(batch["image"]))  # type: ignore[no-any-return]

    def saliency(self, batch: Batch, classes: Tensor) -> Tensor:
        """Where in each image a class is seen, `(batch, height, width)` in [0, 1]."""
        return grad_cam(self.backbone, self.head, self.normalise(batch["image"]), classes)

    def count(self, batch: Batch) -> Tensor:
        """The images with a label, or their class weights."""
        return mass(batch["target"] if "target" in batch else batch["label"], self.class_weights)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        target = batch["target"] if "target" in batch else batch["label"]
        if len(self.aux_heads) and "features" not in batch:
            features, aux = self.backbone.forward_aux(self.normalise(batch["image"]))
            logits = self.head(features)
            extra = [head(f) for head, f in zip(self.aux_heads, aux, strict=True)]
        else:
            logits, extra = self.logits(batch), []
        loss = self.loss(logits, target, weight=self.class_weights)
        for aux_logits in extra:
            loss = loss + self.aux_weight * self.loss(aux_logits, target, weight=self.class_weights)
        loss = self.taught(loss, logits, batch)
        correct = (logits.detach().argmax(1) == batch["label"]).sum()
        self.update_train_metrics(loss, correct, len(logits))
        return self.in_step(loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Logits, labels and indices, for whoever looks on."""
        return {"logits": self._evaluate(batch, "val"), "label": batch["label"], "index": batch["index"]}

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As validation."""
        logits = self._evaluate(batch, "test")
        self.per_class.update(logits, batch["label"])
        return {"logits": logits, "label": batch["label"], "index": batch["index"]}

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Index, most probable class and its probability of each image, each `(batch,)`; `label_2` and on follow."""
        top = self.final_logits(batch).float().softmax(1).topk(self.top_k)
        found = {"index": batch["index"]}
        for place in range(self.top_k):
            nth = f"_{place + 1}" if place else ""
            found |= {f"label{nth}": top.indices[:, place], f"probability{nth}": top.values[:, place]}
        return found

    def _evaluate(self, batch: Batch, split: str) -> Tensor:
        logits = self.final_logits(batch) if split == "test" else self.logits(batch)
        kept = int((batch["label"] >= 0).sum())
        self.log_loss(split, self.loss(logits, batch["label"]), kept)  # without class weights: as the data are
        metrics = self.metrics[split]
        metrics.update(logits, batch["label"])  # type: ignore[operator]
        self.log_dict(metrics, prog_bar=split == "val", batch_size=max(kept, 1))  # type: ignore[arg-type]
        return logits

    def facts(self) -> dict[str, Any]:
        """Mean and standard deviation that images are normalised with."""
        return {"mean": list(self.backbone.mean), "std": list(self.backbone.std)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Images are normalised as in training, whatever the backbone's table says by now."""
        super().on_load_checkpoint(checkpoint)
        for name, values in checkpoint.get("recipe", {}).items():
            if name in ("mean", "std"):
                getattr(self, name).copy_(torch.tensor(values).view(3, 1, 1))

    def _reinitialise(self, fresh: nn.Module, last: int) -> list[str]:
        blocks = list(self.backbone.blocks.values())
        if not 0 < last <= len(blocks):
            raise ValueError(f"model.reinit_blocks must be 0 to {len(blocks)} for this backbone, not {last}")
        prefixes = tuple(f"{path}" for paths in blocks[-last:] for path in paths)
        start = fresh.state_dict()
        chosen = {k: v for k, v in start.items() if any(k == p or k.startswith(p + ".") for p in prefixes)}
        self.backbone.load_state_dict(chosen, strict=False)
        return list(chosen)


class VisionCLI(RecipeCLI):
    """The command line of this recipe: images get the backbone's size; a frozen backbone's features, a file."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As in all recipes, and `--feature_views`."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--feature_views",
            type=int,
            default=0,
            help="With a frozen backbone, compute its features once, of so many augmented views, and train on them.",
        )

    def before_instantiate_classes(self) -> None:
        """Fill in the image's size where neither the data nor the model says one; a checkpoint brings class names."""
        super().before_instantiate_classes()
        config = self.config[self.subcommand]
        if self.subcommand == "predict" and config.data.init_args.get("predict_root"):
            take_class_names(config)
        fill_in_image_size(config)

    def before_fit(self) -> None:
        """Compute the features of a frozen backbone, if asked to."""
        config = self.config[self.subcommand]
        if config.feature_views:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if hasattr(callback, "freeze"):  # before the fit would do it
                    callback.freeze(self.model)
            folder = Path(config.trainer.default_root_dir or ".") / "runs" / "features"
            precompute(self.model, self.datamodule, config.feature_views, folder)  # type: ignore[arg-type]


def main(args: ArgsType = None, *, plan: bool = False) -> VisionCLI:
    """Run the command line, or only build it to `plan`; returns it with its `trainer`, `model` and `datamodule`."""
    return VisionCLI(VisionClassifier, args, plan=plan)


if __name__ == "__main__":
    main()
