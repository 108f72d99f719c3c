"""Encoders of the true architectures, made tiny from their configuration classes, with a tokenizer, in a folder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from datamodules.masked_texts import train_tokenizer

GOOD = ["a fine and warm film", "what a great story", "good acting, good script", "brilliant, moving work"]
BAD = ["a dull and cold film", "what a poor story", "bad acting, bad script", "boring, hollow work"]
WORDS = [
    "the",
    "plot",
    "and",
    "people",
    "of",
    "this",
    "long",
    "drama",
    "about",
    "family",
    "city",
    "night",
    "music",
    "love",
    "war",
]

SIZES: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
    "electra": {"embedding_size": 16},
    "modernbert": {"global_attn_every_n_layers": 2, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3},
    "roberta": {"pad_token_id": 0},
}
KINDS = ["albert", "bert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta"]


def sentence(label: int, number: int, words: int = 3) -> str:
    """A sentence with an opinion, of any length."""
    start = (BAD, GOOD)[label][number % 4]
    return " ".join([start, *(WORDS[(number + 5 * place) % len(WORDS)] for place in range(words))])


@functools.cache  # trained once more it would be another
def tokenizer() -> Any:
    """A WordPiece tokenizer of 120 tokens."""
    texts = [sentence(label, number, 12) for label in (0, 1) for number in range(20)]
    return train_tokenizer(iter(texts), 120, 64)


def tiny_encoder(folder: Path, kind: str = "bert", **changes: Any) -> Path:
    """Write one with 2 layers of width 32."""
    words = tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    limits = {"vocab_size": len(words), "max_position_embeddings": 66}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**sizes, **limits, **SIZES.get(kind, {}), **changes})
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_text_parquet(path: Path, rows: int, column: str) -> Path:
    """Sentences with a ClassLabel, in the layout of the hub's data sets."""
    import datasets

    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({column: datasets.Value("string"), "label": label})
    texts = [sentence(row % 2, row // 2, row // 2 % 9) for row in range(rows)]
    table = datasets.Dataset.from_dict({column: texts, "label": [row % 2 for row in range(rows)]}, features=features)
    table.to_parquet(str(path))
    return path


def write_csv(path: Path, rows: int, *, longest: int = 20) -> Path:
    """Sentences of two classes, of all lengths."""
    words = [row // 2 % longest for row in range(rows)]  # as many for the good as for the bad
    lines = [f'"{sentence(row % 2, row // 2, words[row])}",{("bad", "good")[row % 2]}' for row in range(rows)]
    path.write_text("\n".join(["text,label", *lines, ""]), encoding="utf-8")
    return path
