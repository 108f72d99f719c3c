"""Pre-train a text encoder on texts of your domain: masked-language modelling with whole words masked.

    python -m recipes.mlm fit --config mlm/csv_bert --data.texts.train_file my.csv

The run's folder `hf` is then the encoder for a classifier: `python -m recipes.text fit --model.encoder runs/.../hf`.
"""

from __future__ import annotations

import sys

from .cli import early

if __name__ == "__main__":
    early.start("mlm", sys.argv[1:])  # tells a slip in a name before the imports below take seconds

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from .cli.command import RecipeCLI
from .parts.checkpoints import with_weights_of
from .parts.encoders import build_masked_lm, encoder_blocks, encoder_path, fill_in, max_tokens, quietly
from .parts.losses import IGNORED
from .parts.peft import Peft, is_mergeable, merge
from .parts.schedules import Linear
from .training.base import RecipeModule

log = logging.getLogger(__name__)

Batch = dict[str, Any]


class MaskedLanguageModel(RecipeModule):
    """An encoder that learns to fill in words.

    Gururangan et al. 2020, Don't Stop Pretraining, https://arxiv.org/abs/2004.10964: some epochs on the texts of a
    domain, without labels, help the classifier that is fine-tuned afterwards, the more the further the domain lies
    from what the encoder has read.

    Args:
        vocab_size: Tokens that the tokenizer knows; the data's.
        encoder: Name on the hub or folder of the encoder to go on from, with its head if it has one.
        architecture: Of an encoder from scratch instead: `model_type` and the attributes of its configuration.
        pretrained: Whether to load the encoder's weights.
        optimizer: Called with the parameter groups.
        schedule: Called with the optimiser and the total number of optimiser steps.
        layer_decay: Factor on the learning rate from each block to the one before it; 1 for one learning rate.
        lr_multipliers: Ordered pattern -> factor on the learning rate.
        lr_factor: On all learning rates: what a strategy brings where another suits it than the config's; one for
            `vision` and one for `text`, or one for both.
        lr_limit: The highest learning rate that comes of the factor, likewise; None for no limit.
        peft: Freeze the encoder and train LoRA, DoRA or IA3 in it, as of `recipes.parts.peft.Peft`. What the run writes
            in the end are plain weights, with what was learnt.
        save_base: Whether checkpoints hold frozen weights that can be loaded again from `encoder`; if not given, unless
            `peft` freezes them.
    """

    recipe = "mlm"
    monitor = ("val/loss", "min")
    per_class = None

    def __init__(
        self,
        vocab_size: int,
        encoder: str | None = None,
        architecture: dict[str, Any] | None = None,
        pretrained: bool = True,
        optimizer: Callable[[Iterable[Any]], Optimizer] = torch.optim.AdamW,
        schedule: Callable[[Optimizer, int], LRScheduler] = Linear,
        layer_decay: float = 1.0,
        lr_multipliers: dict[str, float] | None = None,
        lr_factor: float | dict[str, float] = 1.0,
        lr_limit: float | dict[str, float] | None = None,
        peft: Peft | None = None,
        save_base: bool | None = None,
    ) -> None:
        super().__init__(
            vocab_size, None, optimizer, schedule, layer_decay, lr_multipliers, lr_factor, lr_limit, save_base
        )
        self.save_hyperparameters()
        self.filled_in = MeanMetric()
        self.net = build_masked_lm(encoder, architecture, vocab_size, pretrained)
        tokens = {name: torch.ones(1, 2, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        source = encoder if pretrained else None
        self.tune("net", peft, encoder_blocks(self.net), lambda: self.net(**tokens), source, self.net.new_weights)
        if not is_mergeable(self.net):
            raise ValueError(
                "what recipes.mlm writes is an encoder of plain weights: peft.method must be lora, dora or ia3"
            )

    def layer_groups(self) -> dict[str, list[str]]:
        """Ordered blocks, input to output: name -> dotted paths of modules."""
        return {name: [f"net.{path}" for path in paths] for name, paths in encoder_blocks(self.net).items()}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, chosen: Tensor) -> Tensor:
        """Logits of the chosen tokens alone, `(chosen, vocab_size)`: of all they would not fit into memory.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`.
            chosen: Which tokens to fill in, `(batch, length)`.
        """
        hidden = self.net.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return fill_in(self.net, hidden[chosen])

    def count(self, batch: Batch) -> Tensor:
        """The chosen tokens."""
        return (batch["labels"] != IGNORED).sum()  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, correct, count = self._loss(batch)
        self.update_train_metrics(loss, correct, count)
        return self.in_step(loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss, correct, count = self._loss(batch)
        self.log_loss("val", loss, count)
        self.filled_in.update(correct / max(count, 1), count)
        self.log("val/accuracy", self.filled_in, prog_bar=True, batch_size=1)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Mean loss of the chosen tokens, how many are filled in right, and how many there are."""
        labels = batch["labels"]
        chosen = labels != IGNORED
        logits, target = self(batch["input_ids"], batch["attention_mask"], chosen).float(), labels[chosen]
        loss = F.cross_entropy(logits, target, reduction="sum") / max(len(target), 1)
        return loss, (logits.argmax(1) == target).sum(), len(target)

    def facts(self) -> dict[str, Any]:
        """The encoder's configuration."""
        return {"encoder": self.net.config.to_dict()}


class MaskedLanguageCLI(RecipeCLI):
    """The command line of this recipe: data and model agree on the tokenizer; the result is a folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data's tokenizer says how many tokens there are."""
        parser.link_arguments("data", "model.vocab_size", compute_fn=self._vocab_size, apply_on="instantiate")

    def _vocab_size(self, data: Any) -> int:
        encoder = self.config[self.subcommand].model.encoder
        if data.tokenizer_name is None and encoder is not None:
            data.tokenizer_name = encoder_path(encoder)
        try:
            return int(data.vocab_size)
        except (ValueError, OSError) as error:
            if self.plan and isinstance(error, FileNotFoundError):
                return 1000
            early.stop(str(error))

    def instantiate_classes(self) -> None:
        """Refuse texts that are longer than the encoder takes."""
        super().instantiate_classes()
        most = max_tokens(self.model.net)
        if most is not None and self.datamodule.max_length > most:
            early.stop(f"data.max_length is {self.datamodule.max_length}, and the encoder takes {most} at most")

    def after_fit(self) -> None:
        """Write the best checkpoint as a folder that plain transformers, and `recipes.text`, open."""
        best = self.finished.best
        if best and self.trainer.is_global_zero:
            net = with_weights_of(self.model, best)
            merge(net)
            with quietly():
                net.save_pretrained(self.folder / "hf")
            self.datamodule.tokenizer.save_pretrained(self.folder / "hf")
            self.next_command = (
                f"python -m recipes.text fit --config text/csv_minilm --model.encoder {self.folder / 'hf'}"
            )
        super().after_fit()


def main(args: ArgsType = None, *, plan: bool = False) -> MaskedLanguageCLI:
    """Run the command line, or only build it to `plan`; returns it with its `trainer`, `model` and `datamodule`."""
    return MaskedLanguageCLI(MaskedLanguageModel, args, plan=plan)


if __name__ == "__main__":
    main()
