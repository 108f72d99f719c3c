"""Tokens and batches: what the encoder's own tokenizer gives, padded no further than needed."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from datamodules import TextFiles
from datamodules.texts.tokens import histogram
from tests.datamodules.conftest import text_module


def test_tokens_are_those_of_the_tokenizer(own_folder: Path, words: str) -> None:
    data = text_module(own_folder, words, max_length=12)
    names = data.sample_names("val")
    for batch in data.val_dataloader():
        texts = [names(index) for index in batch["index"].tolist()]
        plain = AutoTokenizer.from_pretrained(words)(texts, truncation=True, max_length=12, padding=True)
        width = len(plain["input_ids"][0])
        assert batch["input_ids"][:, :width].tolist() == plain["input_ids"]
        assert batch["attention_mask"][:, :width].tolist() == plain["attention_mask"]
        assert not batch["attention_mask"][:, width:].any()
        assert batch["input_ids"].shape[1] in (8, 12), "a multiple of 8, but not above max_length"


def test_batches_are_padded_to_their_own_longest(own_folder: Path, words: str) -> None:
    widths = set()
    for batch in text_module(own_folder, words).train_dataloader():
        longest = int(batch["attention_mask"].sum(1).max())
        assert 0 <= batch["input_ids"].shape[1] - longest < 8
        widths.add(batch["input_ids"].shape[1])
    assert len(widths) > 1


def test_labels_go_with_their_texts(own_folder: Path, words: str) -> None:
    data = text_module(own_folder, words)
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        names = data.sample_names(split)
        for batch in loader:
            for index, label in zip(batch["index"].tolist(), batch["label"].tolist(), strict=True):
                good = any(word in names(index) for word in ("fine", "great", "good", "brilliant"))
                assert label == good


def test_pairs_bring_token_types(own_folder: Path, words: str) -> None:
    (own_folder / "pairs.csv").write_text("a,b,label\n" + "fine film,poor story about war,x\ngood,bad,y\n" * 5)
    data = TextFiles("pairs.csv", text_column=["a", "b"], tokenizer=words, max_length=16)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    plain = AutoTokenizer.from_pretrained(words)("fine film", "poor story about war")
    row = batch["label"].tolist().index(0)
    assert batch["token_type_ids"][row][: len(plain["input_ids"])].tolist() == plain["token_type_ids"]
    assert batch["input_ids"][row][: len(plain["input_ids"])].tolist() == plain["input_ids"]


def test_the_histogram_fits_on_a_line() -> None:
    assert histogram([4, 4, 4, 8, 16, 32]) == "6 tokens in the median, 28 at 95 %, 32 at most, 0 ▁█▃▁▃▁▁▃ 32"
    assert histogram([]) == "no texts"
