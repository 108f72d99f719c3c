"""Texts with masked words, for masked-language pre-training on any text data set."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .labels.values import IGNORED
from .sampling.draws import Batch, Draw
from .sampling.seeds import counter_uniform
from .texts.base import TextDataModule
from .texts.cache import MANY, cached_map
from .texts.tokens import Texts, TokenBatches, Tokens

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class MaskedTexts(TextDataModule):
    """The texts of another data module, cut into pieces, with whole words masked.

    Contents, licence, source: those of `texts`; its labels are not used. Splits: its `train` and, where it has one,
    `val`; else `val_share` is held out. Nothing of its test split is seen.

    Of each piece `mask_share` of the words are chosen, one at least, by (seed, epoch, piece) alone: other words in each
    epoch, the same after a resume. Of the chosen, 80 % are masked, 10 % are other tokens, 10 % stay. In validation the
    words are always the same.

    Batches: `input_ids` and `attention_mask` as those of other texts, and `labels`, int64 `(batch, length)`: the token
    where a word was chosen, -100 elsewhere.

    Args:
        texts: The data module that reads the texts.
        mask_share: Part of the words to choose (15 % in BERT; up to 40 % is better for large encoders, Wettig et al.
            2023, https://arxiv.org/abs/2202.08005).
        vocabulary: Train a WordPiece tokenizer of so many tokens on the training texts, instead of taking the
            encoder's: for an encoder that is made from scratch.
        **kwargs: Those of `TextDataModule`.
    """

    def __init__(
        self, texts: TextDataModule, mask_share: float = 0.15, vocabulary: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < mask_share < 1:
            raise ValueError(f"data.mask_share must lie between 0 and 1, not {mask_share}")
        self.texts, self.mask_share, self.vocabulary = texts, mask_share, vocabulary
        if hasattr(texts, "label_column"):
            texts.label_column = None  # texts without labels will do

    @property
    def class_names(self) -> list[str]:
        return []

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @cached_property
    def tokenizer(self) -> Any:
        """The encoder's own, or one trained on the training texts."""
        if self.vocabulary is None:
            return super().tokenizer
        import datasets
        from transformers import AutoTokenizer

        self.texts.setup("fit")
        train = self.texts.splits["train"]
        rows = b"" if train.rows is None else train.rows.numpy().tobytes()
        key = self.digest(self.vocabulary, self.max_length, train.table._fingerprint, rows)
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "tokenizers" / key
        if not folder.exists():  # it is kept: trained once more on the same texts it would be another
            beside = folder.with_name(f"{key}.{os.getpid()}")
            train_tokenizer(self.training_texts(train), self.vocabulary, self.max_length).save_pretrained(beside)
            with contextlib.suppress(OSError):  # another process was first
                beside.rename(folder)
        return AutoTokenizer.from_pretrained(folder)

    def training_texts(self, train: Texts) -> Iterator[str]:
        for column in {"text", "pair"} & set(train.table.column_names):
            for start in range(0, len(train), MANY):
                rows = range(start, min(start + MANY, len(train)))
                yield from train.table.select([train.row(index) for index in rows])[column]

    def read_splits(self) -> dict[str, Texts]:
        return {split: texts for split, texts in self.texts.read_splits().items() if split in ("train", "val")}

    def setup(self, stage: str | None = None) -> None:
        """Split the texts, then take the pieces of each."""
        if self.splits:
            return
        super().setup(stage)
        for split, texts in self.splits.items():
            pieces = self.tokens(texts.table)
            rows = np.arange(len(pieces.lengths))
            if texts.rows is not None:
                rows = rows[np.isin(pieces.text_rows, texts.rows.numpy())]
            self.splits[split] = Texts(texts.table, torch.zeros(len(rows)), torch.from_numpy(rows))

    def tokens(self, table: Any) -> Pieces:
        """The pieces of a table of texts, from the cache or made now."""
        import datasets

        tokenizer = self.tokenizer
        columns = {
            "input_ids": datasets.List(datasets.Value("int32")),
            "words": datasets.List(datasets.Value("int32")),
            "text_row": datasets.Value("int64"),
            "truncated": datasets.Value("bool"),
        }

        def tokenise(batch: dict[str, list[str]], rows: list[int]) -> dict[str, list[Any]]:
            found: dict[str, list[Any]] = {name: [] for name in columns}
            for column in ("text", "pair"):
                if column not in batch:
                    continue
                cut = tokenizer(batch[column], truncation=True, max_length=self.max_length, verbose=False)
                for row, encoding in zip(rows, cut.encodings, strict=True):
                    for piece in (encoding, *encoding.overflowing):
                        found["input_ids"].append(piece.ids)
                        found["words"].append([-1 if word is None else word for word in piece.word_ids])
                        found["text_row"].append(row)
                        found["truncated"].append(False)
            return found

        key = self.digest("pieces", self.tokenizer_facts, table._fingerprint)
        return Pieces(cached_map(table, tokenise, datasets.Features(columns), key, with_indices=True))

    def describe(self, split: str, texts: Texts, tokens: Tokens) -> None:
        super().describe(split, Texts(texts.table, texts.labels, skipped=texts.skipped), tokens)

    def inspect(self) -> dict[str, Any]:
        """The texts', in tokens of this tokenizer, before they are cut into pieces."""
        self.texts.tokenizer = self.tokenizer
        self.texts.setup("fit")
        return self.texts.inspect()

    def _dataset(self, split: str) -> MaskedBatches:
        texts, tokenizer = self.splits[split], self.tokenizer
        return MaskedBatches(
            *(texts, self.tokens(texts.table), tokenizer.pad_token_id, self.max_length),
            mask=tokenizer.mask_token_id,
            vocab_size=len(tokenizer),
            share=self.mask_share,
            seed=self.seed,
            train=split == "train",
        )


class Pieces(Tokens):
    """Token numbers and word numbers of pieces of texts, and the text that each belongs to."""

    def __init__(self, table: Any) -> None:
        super().__init__(table, beside="words")
        self.text_rows = table.data.table["text_row"].to_numpy()


class MaskedBatches(TokenBatches):
    """Whole batches of tokens with masked words; while training other words in each epoch."""

    def __init__(self, *args: Any, mask: int, vocab_size: int, share: float, seed: int, train: bool) -> None:
        super().__init__(*args)
        self.mask, self.vocab_size, self.share, self.seed, self.train = mask, vocab_size, share, seed, train

    def __getitems__(self, draws: list[Draw]) -> Batch:
        batch = super().__getitems__(draws)
        ids, words = batch["input_ids"].numpy(), batch.pop("token_type_ids").numpy()
        words[batch["attention_mask"].numpy() == 0] = -1
        epoch = draws[0].epoch if self.train else 0
        uniform = counter_uniform(self.seed, epoch, batch["index"].numpy(), 3 * self.max_length).numpy()
        uniform = uniform.reshape(len(ids), 3, self.max_length)
        masked, labels = mask_words(ids, words, uniform, self.share, self.mask, self.vocab_size)
        labels[[draw.is_padding for draw in draws]] = IGNORED
        del batch["label"]
        return {**batch, "input_ids": torch.from_numpy(masked), "labels": torch.from_numpy(labels)}


def mask_words(
    ids: npt.NDArray[Any], words: npt.NDArray[Any], uniform: npt.NDArray[Any], share: float, mask: int, vocab_size: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Choose whole words and mask them.

    Args:
        ids: Tokens, `(batch, length)`.
        words: Number of the word that each token belongs to, -1 for special tokens and padding, `(batch, length)`.
        uniform: Random numbers in [0, 1), `(batch, 3, length or more)`.
        share: Part of the words to choose; each text has one at least, if it has words.
        mask: Number of the masking token.
        vocab_size: Tokens that may stand in for others.

    Returns:
        Tokens with the chosen words masked (80 %), exchanged (10 %) or kept (10 %), and the chosen words' own tokens,
        -100 elsewhere; both `(batch, length)`.
    """
    real = words >= 0
    first = np.where(real, words, words.max(1, keepdims=True)).min(1, keepdims=True)  # 0, but in later pieces
    place = np.where(real, words - first, 0).clip(max=uniform.shape[2] - 1)
    of_word = np.where(real, np.take_along_axis(uniform[:, 0], place, 1), np.inf)
    chosen = real & (of_word <= np.maximum(share, of_word.min(1, keepdims=True)))
    kind = np.take_along_axis(uniform[:, 1], place, 1)
    others = (uniform[:, 2, : ids.shape[1]] * vocab_size).astype(ids.dtype)
    hidden = np.where(kind < 0.8, mask, np.where(kind < 0.9, others, ids))
    return np.where(chosen, hidden, ids), np.where(chosen, ids, IGNORED)


def train_tokenizer(texts: Iterator[str], vocabulary: int, max_length: int) -> Any:
    """A WordPiece tokenizer as BERT's, lower-cased, by the `tokenizers` library."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    trained = tokenizers.BertWordPieceTokenizer()
    trained.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False)
    ends = [(name, trained.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    trained.post_processor = tokenizers.processors.BertProcessing(*ends)
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    kind: Any = PreTrainedTokenizerFast
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return kind(tokenizer_object=trained._tokenizer, model_max_length=max_length, model_input_names=inputs, **names)
