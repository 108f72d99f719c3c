"""Fine-tune a text classifier: BERT, RoBERTa, ALBERT, DistilBERT and their family.

    python -m recipes.text fit --test --config text/quickstart

The model, the loss, the step and the optimiser, top to bottom. The data module delivers tokens in batches of like
length; its tokenizer is the encoder's, so the two can't disagree.
"""

from __future__ import annotations

import sys

from .cli import early

if __name__ == "__main__":
    early.start("text", sys.argv[1:])  # tells a slip in a name before the imports below take seconds

import functools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .cli.command import RecipeCLI
from .cli.defaults import fill_in_tokenizer
from .cli.overrides import take_class_names
from .parts.blocks import Fusion
from .parts.checkpoints import encoder_of, glance, is_whole, save_for_transformers
from .parts.encoders import Pooling, build_encoder, encoder_blocks, encoder_path, pool
from .parts.heads import HeadInit, HeadKind, build_head
from .parts.losses import LOSSES, LossKind, WeightKind, labelled, mass, score_scale
from .parts.metrics import answers, metrics_of, per_class_counts
from .parts.peft import Peft
from .parts.saliency import token_saliency
from .parts.schedules import Linear
from .training.base import RecipeModule

log = logging.getLogger(__name__)

Batch = dict[str, Any]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MONITORS = {
    "single_label_classification": ("val/accuracy", "max"),
    "multi_label_classification": ("val/f1", "max"),
    "regression": ("val/spearman", "max"),
}


class TextClassifier(RecipeModule):
    """A pretrained encoder with a new head.

    Args:
        num_classes: Classes; 1 for a score.
        encoder: Name on the hub, folder, or name of an encoder that ships with this package. Weights are read from
            safetensors only, and no code from the hub is run.
        pretrained: Whether to load its weights; without, only its architecture is taken.
        architecture: Attributes of its configuration to change: `num_hidden_layers` keeps the first layers; another
            `hidden_size` takes `pretrained` false, for a small net with a large one's tokenizer.
        problem_type: `single_label_classification`, `multi_label_classification` or `regression`; the data's.
        pooling: What the head sees. `model`: transformers' own classifier for this encoder, with its pooler; the
            result opens in plain transformers. `cls`: the first token. `mean`: the mean over real tokens.
        fuse_blocks: Blocks, `layer3` for one, whose outputs the head sees beside the last, with pooling cls or mean.
        head: `linear`, `mlp` or `cosine`; other than linear with pooling cls or mean.
        head_hidden: Width of the hidden layer of `mlp`.
        head_dropout: Probability of dropping a feature before the head; the encoder's own if not given.
        head_init: How the head starts, with pooling cls or mean: default, kaiming, xavier, normal or zeros.
        dropout: Of the encoder's layers and attention; its own if not given.
        reinit_layers: How many of the last layers, and the pooler, start from fresh weights (Zhang et al. 2021,
            https://arxiv.org/abs/2006.05987: 1 to 3 help with few thousand texts).
        loss: `cross_entropy` or `focal`; for several labels binary cross-entropy, for scores squared error: they are
            learnt with a mean of about 0 and a spread of about 1, by the training texts, and told on their own scale.
        label_smoothing: Probability spread evenly over the classes.
        class_weights: One weight per class; `balanced`, inverse to the training counts; or `effective`, less extreme.
        focal_gamma: Exponent of the focal loss.
        optimizer: Called with the parameter groups, e.g. `functools.partial(torch.optim.AdamW, lr=2e-5)`.
        schedule: Called with the optimiser and the total number of optimiser steps.
        layer_decay: Factor on the learning rate from each block to the one before it (Howard & Ruder 2018,
            https://arxiv.org/abs/1801.06146); 1 for one learning rate.
        lr_multipliers: Ordered pattern -> factor on the learning rate; the first that is found in a parameter's name
            counts.
        lr_factor: On all learning rates: what a strategy brings where another suits it than the config's; one for
            `vision` and one for `text`, or one for both.
        lr_limit: The highest learning rate that comes of the factor, likewise; None for no limit.
        peft: Freeze the encoder and train adapters in it: method, rank, targets and more, as of
            `recipes.parts.peft.Peft`; the head trains as ever.
        save_base: Whether checkpoints hold frozen weights that can be loaded again from `encoder`; if not given, unless
            `peft` freezes them. Such a checkpoint is small, and needs the same encoder to be used.
        teacher: A checkpoint of this recipe, a folder of runs, or an export's with its program, that knows these
            classes and has this tokenizer: its answers are learnt, too (Hinton et al. 2015,
            https://arxiv.org/abs/1503.02531).
        teacher_weight: Of the teacher's answers in the loss; the labels have the rest.
        temperature: At which answers are compared; the higher, the more the less probable classes count.
        match_blocks: Blocks of this net, and of the teacher's, whose features are to be alike, after a learnt map.
        match_weight: Of the features' loss, which is added.
        gradient_checkpointing: Whether to compute activations twice and keep few of them: less memory, a third more
            time.
    """

    scale: Tensor
    recipe = "text"

    def __init__(
        self,
        num_classes: int,
        encoder: str = "google-bert/bert-base-uncased",
        pretrained: bool = True,
        architecture: dict[str, Any] | None = None,
        problem_type: ProblemType = "single_label_classification",
        pooling: Pooling = "model",
        fuse_blocks: list[str] | None = None,
        head: HeadKind = "linear",
        head_hidden: int = 512,
        head_dropout: float | None = None,
        head_init: HeadInit = "default",
        dropout: float | None = None,
        reinit_layers: int = 0,
        loss: LossKind = "cross_entropy",
        label_smoothing: float = 0.0,
        class_weights: list[float] | WeightKind | None = None,
        focal_gamma: float = 2.0,
        optimizer: Callable[[Iterable[Any]], Optimizer] = torch.optim.AdamW,
        schedule: Callable[[Optimizer, int], LRScheduler] = Linear,
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
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            num_classes, class_weights, optimizer, schedule, layer_decay, lr_multipliers, lr_factor, lr_limit, save_base
        )
        self.save_hyperparameters()
        single = problem_type == "single_label_classification"
        if not single and (class_weights or label_smoothing or loss != "cross_entropy"):
            raise ValueError(f"class_weights, label_smoothing and the focal loss are for one label, not {problem_type}")
        if pooling == "model" and head != "linear":
            raise ValueError(f"pooling model brings transformers' own head; for head {head} take pooling cls or mean")
        if pooling == "model" and fuse_blocks:
            raise ValueError("pooling model brings transformers' own head; for fuse_blocks take pooling cls or mean")
        if problem_type == "regression" and head == "cosine":
            raise ValueError("a cosine head tells classes apart and gives no score: take model.head linear or mlp")
        self.pooling, self.problem_type, self.monitor = pooling, problem_type, MONITORS[problem_type]
        self.register_buffer("scale", torch.tensor([0.0, 1.0]), persistent=False)  # of scores: their mean and spread
        build = functools.partial(
            build_encoder,
            encoder,
            pretrained=pretrained,
            dropout=dropout,
            reinit_layers=reinit_layers,
            changes=architecture,
        )
        tokens = {name: torch.ones(1, 2, dtype=torch.long) for name in INPUTS[:2]}
        self.fusion: Fusion | None = None
        if pooling == "model":
            self.net = build(num_classes=num_classes, problem_type=problem_type, head_dropout=head_dropout)
        else:
            self.net = build()
            width, dropped = self.net.config.hidden_size, 0.1 if head_dropout is None else head_dropout
            if fuse_blocks:
                self.fusion = Fusion(self.net, encoder_blocks(self.net), fuse_blocks, lambda: self.net(**tokens))
                width += self.fusion.width
            self.head = build_head(head, width, num_classes, hidden=head_hidden, dropout=dropped, init=head_init)
        source = encoder if pretrained else None
        self.tune("net", peft, encoder_blocks(self.net), lambda: self.net(**tokens), source, self.net.new_weights)
        if gradient_checkpointing:
            enable = getattr(self.net, "activation_checkpointing_enable", None)  # its name since transformers 5.2x
            (enable or self.net.gradient_checkpointing_enable)()
        options = {"kind": loss, "label_smoothing": label_smoothing, "gamma": focal_gamma} if single else {}
        self.loss = functools.partial(LOSSES[problem_type], **options)  # type: ignore[arg-type]
        self.metrics = nn.ModuleDict(
            {split: metrics_of(problem_type, num_classes, f"{split}/") for split in ("val", "test")}
        )
        self.per_class = per_class_counts(num_classes) if single else None
        if teacher is not None:
            from .deploy.teacher import lesson_from

            how = {"weight": teacher_weight, "temperature": temperature, "match_weight": match_weight}
            self.lesson = lesson_from(teacher, self, tokens, match=match_blocks, **how)

    def layer_groups(self) -> dict[str, list[str]]:
        """Ordered blocks, input to output: name -> dotted paths of modules."""
        groups = {name: [f"net.{path}" for path in paths] for name, paths in encoder_blocks(self.net).items()}
        return self.with_projections(groups if self.pooling == "model" else groups | {"head": ["head"]})

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Tokens, their mask and types, `(batch, length)`, to logits `(batch, num_classes)` or scores `(batch, 1)`."""
        return self.on_own_scale(self.outputs(input_ids, attention_mask, token_type_ids))

    def on_own_scale(self, outputs: Tensor) -> Tensor:
        """Scores as they are told, in float32; all else as it is."""
        return outputs.float() * self.scale[1] + self.scale[0] if self.problem_type == "regression" else outputs

    def outputs(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """The same, with scores as they are learnt: their mean about 0 and their spread about 1."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        out = self.net(input_ids=input_ids, attention_mask=attention_mask, **types)
        if self.pooling == "model":
            return out.logits  # type: ignore[no-any-return]
        return self.head(pool(out.last_hidden_state, attention_mask, self.pooling, self.fusion))  # type: ignore[no-any-return]

    def logits(self, batch: Batch) -> Tensor:
        """Logits of a batch."""
        return self(**inputs(batch))  # type: ignore[no-any-return]

    def standard(self, scores: Tensor) -> Tensor:
        """Scores as they are learnt, their mean about 0 and their spread about 1; all else as it is."""
        return (scores - self.scale[0]) / self.scale[1] if self.problem_type == "regression" else scores

    def setup(self, stage: str) -> None:
        """The training texts say how scores are spread; with loaders alone, scores are learnt as they are."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and self.problem_type == "regression" and data is not None:
            self.scale = torch.tensor(score_scale(data.splits["train"].labels), device=self.device)

    def embed(self, batch: Batch) -> Tensor:
        """The mean of the encoder's last vectors over each text's tokens, `(batch, width)`."""
        encoder = self.net.base_model if self.pooling == "model" else self.net
        out = encoder(**inputs(batch))
        mask = batch["attention_mask"]
        return pool(out.last_hidden_state[:, -mask.shape[1] :], mask, "mean")  # without a prompt in front

    def saliency(self, batch: Batch, classes: Tensor) -> Tensor:
        """How much each token speaks for or against a class, `(batch, length)` in [0, 1]."""
        embeddings = self.net.get_input_embeddings()
        return token_saliency(embeddings, lambda: self.logits(batch).float(), batch["attention_mask"], classes)

    def count(self, batch: Batch) -> Tensor:
        """The texts with a label, or their class weights."""
        return mass(batch["label"], self.class_weights)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.outputs(**inputs(batch))
        weight = {} if self.class_weights is None else {"weight": self.class_weights}
        loss = self.loss(logits, self.standard(batch["label"]), **weight)
        loss = self.taught(loss, logits, batch)
        self.update_train_metrics(loss, self.correct_count(logits.detach(), batch["label"]), len(logits))
        return self.in_step(loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Logits, labels and indices, for whoever looks on."""
        return {"logits": self._evaluate(batch, "val"), "label": batch["label"], "index": batch["index"]}

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As validation."""
        logits = self._evaluate(batch, "test")
        if self.per_class is not None:
            self.per_class.update(logits, batch["label"])
        return {"logits": logits, "label": batch["label"], "index": batch["index"]}

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Index, label and probabilities of each text, or its score."""
        logits = self.logits(batch).float()
        if self.problem_type == "regression":
            return {"index": batch["index"], "score": logits.squeeze(1)}
        if self.problem_type == "multi_label_classification":
            p = logits.sigmoid()
            return {"index": batch["index"], "label": p > 0.5, "p": p}
        p = logits.softmax(1)
        probability, label = p.max(1)
        return {"index": batch["index"], "label": label, "probability": probability, "p": p}

    def correct_count(self, logits: Tensor, label: Tensor) -> Tensor:
        """How many texts have all that is right; none where a score is learnt."""
        if self.problem_type == "regression":
            return label.new_zeros(())
        if label.ndim == 2:
            return ((logits > 0) == label.bool()).all(1).sum()
        return (logits.argmax(1) == label).sum()

    def _evaluate(self, batch: Batch, split: str) -> Tensor:
        outputs, label = self.outputs(**inputs(batch)).float(), batch["label"]
        logits = self.on_own_scale(outputs)
        kept = labelled(label)
        loss = self.loss(outputs, self.standard(label))
        self.log_loss(split, loss, int(kept.sum()))  # without class weights: as the data are
        metrics, known = self.metrics[split], logits[kept]
        if len(known):
            target = label[kept].long() if label.ndim == 2 else label[kept]
            metrics.update(answers(self.problem_type, known), target)  # type: ignore[operator]
        self.log_dict(metrics, prog_bar=split == "val", batch_size=1)  # type: ignore[arg-type]
        return logits

    def facts(self) -> dict[str, Any]:
        """The encoder's configuration; of scores their mean and spread."""
        scale = {"scale": self.scale.tolist()} if self.problem_type == "regression" else {}
        return {"encoder": self.net.config.to_dict(), **scale}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Scores are on the scale of the run; an encoder of which hidden units were cut knows how many are left."""
        super().on_load_checkpoint(checkpoint)
        facts = checkpoint.get("recipe", {})
        self.scale = torch.tensor(facts.get("scale", [0.0, 1.0]), device=self.device)  # none in older ones
        told = checkpoint.get("recipe", {}).get("encoder", {}) if self.sizes else {}
        for name in {"intermediate_size", "hidden_dim"} & told.keys():
            setattr(self.net.config, name, told[name])


def inputs(batch: Batch) -> dict[str, Tensor]:
    """What the net is given of a batch."""
    return {name: batch[name] for name in INPUTS if name in batch}


class TextCLI(RecipeCLI):
    """The command line of this recipe: data and model agree on tokenizer and problem; the result, for transformers."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As in all recipes; what kind of label there is, the data says."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments(
            "data", "model.problem_type", compute_fn=lambda data: data.problem_type, apply_on="instantiate"
        )

    def before_instantiate_classes(self) -> None:
        """A checkpoint brings the names of its classes, and its encoder's architecture and tokenizer."""
        super().before_instantiate_classes()
        config = self.config[self.subcommand]
        self.names_learnt = self.subcommand != "fit" and take_class_names(config)  # also those of another data module
        moved = config.ckpt_path and not Path(encoder_path(config.model.encoder)).is_dir()
        if self.subcommand == "predict" and moved and is_whole(glance(config.ckpt_path)):
            config.model.encoder = str(encoder_of(glance(config.ckpt_path)) or config.model.encoder)
            log.info("encoder: %s", config.model.encoder)

    def instantiate_classes(self) -> None:
        """The tokenizer is the encoder's unless the data names one."""
        super().instantiate_classes()
        data: Any = self.datamodule
        data.names_learnt = self.names_learnt
        fill_in_tokenizer(self.model, self.model.net, data)

    def after_fit(self) -> None:
        """As in all recipes; and the best checkpoint as a folder that plain transformers opens."""
        best = self.finished.best
        if best and self.trainer.is_global_zero:
            folder = self.folder / "hf"
            try:
                save_for_transformers(self.model, best, self.datamodule, folder)
            except ValueError as error:
                log.info("no folder for transformers: %s", error)
            kind = "AutoPeftModel" if (folder / "adapter_config.json").is_file() else "AutoModel"
            if folder.is_dir():
                log.info("for transformers: %sForSequenceClassification.from_pretrained(%r)", kind, str(folder))
        super().after_fit()


def main(args: ArgsType = None, *, plan: bool = False) -> TextCLI:
    """Run the command line, or only build it to `plan`; returns it with its `trainer`, `model` and `datamodule`."""
    return TextCLI(TextClassifier, args, plan=plan)


if __name__ == "__main__":
    main()
