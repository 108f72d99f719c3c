"""What is cached is made once, and again where it depends on something else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Features, Value

from datamodules import TextFiles
from datamodules.texts.cache import cached_table
from tests.datamodules.conftest import text_module


def texts(folder: Path) -> list[str]:
    return [line.rsplit('"', 1)[0][1:] for line in (folder / "train.csv").read_text().splitlines()[1:]]


def test_tokens_are_made_once(own_folder: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = text_module(own_folder, words)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tokenised again")

    data = TextFiles(str(own_folder / "train.csv"), tokenizer=words, batch_size=8, max_length=32)
    monkeypatch.setattr(type(data.tokenizer), "__call__", refuse)
    data.prepare_data()
    data.setup("fit")
    one, two = next(iter(first.train_dataloader())), next(iter(data.train_dataloader()))
    assert torch.equal(one["input_ids"], two["input_ids"])
    longer = TextFiles(str(own_folder / "train.csv"), tokenizer=words, max_length=16)
    with pytest.raises(AssertionError, match="tokenised again"):
        longer.prepare_data()


def test_what_is_cached_is_not_read_again() -> None:
    features, calls = Features({"text": Value("string"), "number": Value("int64")}), []

    def read(rows: int = 2500) -> Iterator[dict[str, Any]]:
        calls.append(rows)
        yield from ({"text": f"text {number}", "number": number} for number in range(rows))

    table = cached_table("key", features, read)
    assert table["number"][:] == list(range(2500))
    assert cached_table("key", features, read)._fingerprint == table._fingerprint
    assert len(calls) == 1
    assert cached_table("other", features, read)._fingerprint != table._fingerprint

    def fails() -> Iterator[dict[str, Any]]:
        yield {"text": "", "number": 0}
        raise FileNotFoundError("gone meanwhile")

    with pytest.raises(FileNotFoundError, match="gone meanwhile"):
        cached_table("failing", features, fails)
    assert len(cached_table("failing", features, lambda: read(3))) == 3, "nothing of the failure was kept"
