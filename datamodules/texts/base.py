"""What every text data set here shares: splits, tokens in a memory-mapped cache, batches of like length.

A data set's own file says only where its texts and labels are (`read_splits`). This file turns them into batches:

    {"input_ids": int64, (batch, length), padded to the batch's longest text, to a multiple of 8,
     "attention_mask": int64, (batch, length), 0 for padding,
     "token_type_ids": int64, (batch, length), for pairs of texts, where the encoder tells first from second,
     "label": int64, (batch,); float, (batch, classes) for several labels and (batch,) for scores;
              -100, or NaN, marks a sample that only fills up a rank's last batch,
     "index": int64, (batch,), position in the split: `datamodule.sample_names(split)[index]` is its text}

Texts are tokenised once, before training, into the `datasets` library's Arrow cache, in a file that is named by a hash
of the tokenizer, the length and the content.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from ..sampling.draws import Batch, Draw, collate_whole
from ..sampling.samplers import EpochSampler, LengthSampler, ranks_of
from ..sampling.splits import check_state, split_state, split_train
from .cache import cached_map
from .inspection import inspect_texts
from .tokens import Texts, TokenBatches, Tokens, WholeBatches, histogram, surface_form

log = logging.getLogger(__name__)
ProblemType: TypeAlias = Literal["single_label_classification", "multi_label_classification", "regression"]
NEEDED = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class TextDataModule(LightningDataModule):
    """Base of the text data modules; a subclass gives `class_names` and `read_splits`.

    Args:
        tokenizer: Name on the hub or folder; `None`: a recipe's CLI fills in the encoder's.
        max_length: Tokens that are kept of a text, or of both of a pair, special ones included.
        batch_size: Texts per training batch and rank.
        tokens_per_batch: Limits the training batch to so many tokens, padding included, besides `batch_size`.
        eval_batch_size: Texts per batch of validation, test and prediction; twice `batch_size` if not given.
        problem_type: `single_label_classification`; `multi_label_classification`, any number of labels each; or
            `regression`, a score.
        val_share: Part of the training texts held out for validation where no split for it is given.
        fold: Hold out fold k of n for validation, as [k, n] with k from 0, in place of `val_share`: n runs validate on
            every training sample once, and another seed gives other folds. The rows are in each checkpoint.
        limit_per_class: At most so many training texts of each class, for few-text experiments.
        balance: Draw as many texts of each class in every epoch, rare ones several times (see `balanced_rows`); an
            alternative to class weights in the loss.
        seed: Decides the split and the order.
    """

    sample_kind = "text"  # what `sample_names` gives
    names_learnt = False  # whether given class names are what an earlier fit learnt: labels never count in these
    predict_from = 0  # batches of each rank that are predicted already, and not given again

    def __init__(
        self,
        tokenizer: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        tokens_per_batch: int | None = None,
        eval_batch_size: int | None = None,
        problem_type: ProblemType = "single_label_classification",
        val_share: float = 0.1,
        fold: tuple[int, int] | None = None,
        limit_per_class: int | None = None,
        balance: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, not {batch_size}")
        for name, wanted in (("limit_per_class", limit_per_class is not None), ("balance", balance)):
            if wanted and problem_type != "single_label_classification":
                raise ValueError(f"data.{name} needs one label per text, and data.problem_type is {problem_type}")
        self.tokenizer_name, self.max_length = tokenizer, max_length
        self.batch_size, self.tokens_per_batch = batch_size, tokens_per_batch
        self.eval_batch_size = eval_batch_size or 2 * batch_size
        self.problem_type, self.val_share, self.fold = problem_type, val_share, fold
        self.limit_per_class, self.balance, self.seed = limit_per_class, balance, seed
        self.splits: dict[str, Texts] = {}
        self.cut_rows: dict[str, list[int]] = {}

    @property
    def class_names(self) -> list[str]:
        """Names in the order of the labels; known before `setup`."""
        raise NotImplementedError

    def read_splits(self) -> dict[str, Texts]:
        """The data set's texts: `train` and whichever of `val`, `test` and `predict` exist."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        return 1 if self.problem_type == "regression" else len(self.class_names)

    @property
    def class_counts(self) -> list[int]:
        labels = self.splits["train"].labels
        if self.problem_type == "single_label_classification":
            return torch.bincount(labels, minlength=self.num_classes).tolist()
        return labels.sum(0, dtype=torch.long).tolist() if labels.dim() == 2 else [len(labels)]

    @cached_property
    def tokenizer(self) -> Any:
        """The encoder's own, by transformers."""
        from transformers import AutoTokenizer  # slow to import: only where it is used

        if self.tokenizer_name is None:
            raise ValueError("data.tokenizer is not set: give the encoder's name or folder")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"no tokenizer {self.tokenizer_name!r}: expected a folder that holds one, or a name on the hub that "
                f"can be reached ({str(error).splitlines()[0]})"
            ) from error
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer of {self.tokenizer_name!r} has no fast version; convert it first")
        if tokenizer.pad_token_id is None:  # what stands in padding is masked
            if tokenizer.eos_token is None:
                raise ValueError(
                    f"the tokenizer of {self.tokenizer_name!r} has no padding token, nor an end-of-text token to use "
                    "instead: set its pad_token and save it again"
                )
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def tokenizer_facts(self) -> tuple[Any, ...]:
        """All that decides on the tokens of a text: under other facts they are made anew."""
        import tokenizers

        told = self.tokenizer
        kept = (told.truncation_side, told.split_special_tokens, tuple(told.model_input_names))
        return (tokenizers.__version__, self.tokenizer_state, *kept, self.max_length)

    @cached_property
    def tokenizer_state(self) -> str:
        tokenizer = self.tokenizer.backend_tokenizer
        tokenizer.no_truncation()  # a call would write it in
        tokenizer.no_padding()
        return str(tokenizer.to_str())

    @cached_property
    def tokenizer_files(self) -> dict[str, str]:
        """Name -> content of what a folder needs to be opened as this tokenizer."""
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.json"))}

    @staticmethod
    def digest(*facts: Any) -> str:
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]

    def sample_names(self, split: str) -> Callable[[int], str]:
        return self.splits[split].text

    def prepare_data(self) -> None:
        """Read and tokenise, once on a machine; the other processes find the cache."""
        doing = self.trainer.state.fn if self.trainer else None
        wanted = NEEDED.get(doing.value) if doing else None
        for split, texts in self.read_splits().items():
            if wanted is None or split in wanted:
                self.describe(split, texts, self.tokens(texts.table))

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        splits = self.read_splits()
        if self.balance and not self.class_names:
            raise ValueError("data.balance needs classes, and these texts have none: remove it")
        if "train" in splits:
            labels, has_val = splits["train"].labels, "val" in splits
            single = self.problem_type == "single_label_classification"
            split_train(splits, labels if single else torch.zeros(len(labels), dtype=torch.long), Texts.part, self)
            splits["val"].skipped *= has_val  # what the training file lacks is counted once
        if "predict" not in splits:
            splits["predict"] = splits.get("test") or splits["val"]
        self.splits = splits
        self.cut_rows = {name: texts.rows.tolist() for name, texts in splits.items() if texts.rows is not None}
        counts = ", ".join(f"{len(texts):,} {name}" for name, texts in splits.items() if name != "predict")
        log.info("data: %s texts", counts or f"{len(splits['predict']):,}")

    def tokens(self, table: Any) -> Tokens:
        """The tokens of a table of texts, from the cache or made now."""
        tokenizer, pairs = self.tokenizer, "pair" in table.column_names
        types = pairs and "token_type_ids" in tokenizer.model_input_names
        import datasets
        import pyarrow

        columns = {"input_ids": datasets.List(datasets.Value("int32")), "truncated": datasets.Value("bool")}
        if types:
            columns["token_type_ids"] = datasets.List(datasets.Value("int8"))
        features = datasets.Features(columns)

        def tokenise(batch: Any) -> Any:
            found = tokenizer(
                *(batch[name].to_pylist() for name in ("text", "pair") if name in batch.column_names),
                truncation=True,
                max_length=self.max_length,
                return_attention_mask=False,
                return_token_type_ids=types,
                verbose=False,
            )
            truncated = [bool(encoding.overflowing) for encoding in found.encodings]
            return pyarrow.table({**found, "truncated": truncated}, schema=features.arrow_schema)

        key = self.digest(self.tokenizer_facts, table._fingerprint)
        return Tokens(cached_map(table.with_format("arrow"), tokenise, features, key))

    def describe(self, split: str, texts: Texts, tokens: Tokens) -> None:
        """Log how long the texts are, and how many were cut or skipped."""
        lengths, truncated = tokens.of(texts)
        skipped = f"; {texts.skipped:,} row{'s' * (texts.skipped > 1)} skipped" if texts.skipped else ""
        facts = histogram(lengths), 100 * truncated.mean(), self.max_length, skipped
        log.info("%s: %s; %.1f %% cut at %d tokens%s", split, *facts)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled, in batches of like length."""
        return self._loader("train", train=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The longest first; every text counts once, also over several ranks."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """As validation. Without a test split this is the validation split, and a warning says so."""
        if "test" not in self.splits:
            log.warning("no test split: testing on the validation texts, which chose the checkpoint")
            return self._loader("val")
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """In the order of the file, so that predictions can be saved as they come; from batch `predict_from` on."""
        for name in ("test", "val"):
            if self.splits.get(name) is self.splits["predict"]:
                log.warning("data.predict_file is not set: predicting the %s texts", name)
        loader = self._in_order("predict")
        loader.sampler.start = self.predict_from * self.eval_batch_size  # type: ignore[attr-defined]
        return loader

    def fingerprint(self, split: str) -> str:
        """Changes with the texts of a split and with the tokenizer."""
        texts = self.splits[split]
        rows = None if texts.rows is None else hashlib.sha256(texts.rows.numpy().tobytes()).hexdigest()
        return self.digest(texts.table._fingerprint, rows, self.tokenizer_facts)

    def fisher_dataloader(self) -> DataLoader[Batch]:
        """The training texts one by one, for a callback that takes stock of the finished fit."""
        return self._in_order("train", world=1, rank=0)

    def batch(self, split: str, rows: Sequence[int]) -> Batch:
        return self._dataset(split).__getitems__([Draw(0, row) for row in rows])

    def pieces(self, batch: Batch) -> list[list[str]]:
        """The tokens of a batch as words and parts of words; empty for those that stand for no text."""
        out, special = [], set(self.tokenizer.all_special_tokens)
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            tokens = self.tokenizer.convert_ids_to_tokens(ids[mask > 0].tolist())
            out.append(["" if token in special else surface_form(token) for token in tokens])
        return out

    def inspect(self) -> dict[str, Any]:
        """What `recipes doctor` says: see `inspection.inspect_texts`; to be called after `setup`."""
        splits = {name: part for name, part in self.splits.items() if name != "predict"}
        lengths, cut = {}, {}
        for name, part in splits.items():
            lengths[name], truncated = self.tokens(part.table).of(part)
            cut[name] = float(truncated.mean())
        return inspect_texts(splits, self.class_names, lengths, cut)

    def planned_steps(self, texts: int, world_size: int) -> int:
        """Batches of an epoch per rank; where tokens limit them, this takes the texts and the tokenizer."""
        if self.tokens_per_batch is None or "train" not in self.splits:
            return -(-texts // (self.batch_size * world_size))
        return len(self._sampler("train", train=True, world=world_size, rank=0))

    def _dataset(self, split: str) -> TokenBatches:
        texts, tokenizer = self.splits[split], self.tokenizer
        return TokenBatches(texts, self.tokens(texts.table), tokenizer.pad_token_id, self.max_length)

    def _sampler(self, split: str, *, train: bool, world: int, rank: int) -> LengthSampler:
        return LengthSampler(
            self._dataset(split).padded_lengths(),
            batch_size=self.batch_size if train else self.eval_batch_size,
            tokens=self.tokens_per_batch if train else None,
            shuffle=train,
            seed=self.seed,
            num_replicas=world,
            rank=rank,
            balance=self.splits[split].labels.numpy() if train and self.balance else None,
        )

    def _loader(self, split: str, *, train: bool = False) -> DataLoader[Batch]:
        world, rank = ranks_of(self.trainer)
        sampler = self._sampler(split, train=train, world=world, rank=rank)
        whole = WholeBatches(self._dataset(split))
        return DataLoader(whole, sampler=sampler, batch_size=None, pin_memory=torch.cuda.is_available())

    def _in_order(self, split: str, world: int | None = None, rank: int = 0) -> DataLoader[Batch]:
        if world is None:
            world, rank = ranks_of(self.trainer)
        sampler = EpochSampler(len(self.splits[split]), shuffle=False, num_replicas=world, rank=rank)
        return DataLoader(
            self._dataset(split), batch_size=self.eval_batch_size, sampler=sampler, collate_fn=collate_whole
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint should tell about the data: class names, the whole tokenizer, the split."""
        return {
            **split_state(self),
            "problem_type": self.problem_type,
            "tokenizer": self.tokenizer_name,
            "tokenizer_digest": self.digest(self.tokenizer_state),
            "truncation_side": self.tokenizer.truncation_side,
            "tokenizer_files": self.tokenizer_files,  # enough to predict from the checkpoint alone
            "pairs": any("pair" in texts.table.column_names for texts in self.splits.values()),
            "max_length": self.max_length,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, self)
        side = self.tokenizer.truncation_side
        if self.digest(self.tokenizer_state) != state_dict["tokenizer_digest"] or side != state_dict.get(
            "truncation_side", side
        ):
            raise ValueError(
                f"the tokenizer {self.tokenizer_name!r} is not the checkpoint's: its tokens would be read as others"
            )
