"""Masked texts: whole words, as many as asked, by (seed, epoch, piece) alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import MaskedTexts, TextFiles
from datamodules.masked_texts import mask_words
from tests.tiny_encoders import write_csv


def masked(folder: Path, words: str, **options: Any) -> MaskedTexts:
    texts = TextFiles(str(write_csv(folder / "train.csv", 40)))
    data = MaskedTexts(texts, tokenizer=words, max_length=16, batch_size=8, val_share=0.25, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def epoch(data: MaskedTexts, number: int) -> list[dict[str, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return sorted(loader, key=lambda batch: int(batch["index"].min()))


def test_words_are_masked_exchanged_or_kept_as_a_whole() -> None:
    words = np.array([[-1, 0, 0, 1, -1]])
    ids = np.array([[2, 10, 11, 12, 3]])
    for kind, tokens in ((0.5, [4, 4]), (0.85, [25, 25]), (0.95, [10, 11])):
        uniform = np.stack([[[0.1, 0.9, 0, 0, 0], [kind] * 5, [0.5] * 5]])
        found, labels = mask_words(ids, words, uniform, 0.15, mask=4, vocab_size=50)
        assert found[0, 1:3].tolist() == tokens and found[0, [0, 3, 4]].tolist() == [2, 12, 3]
        assert labels.tolist() == [[-100, 10, 11, -100, -100]]


def test_batches_hold_the_chosen_tokens_as_labels(own_folder: Path, words: str) -> None:
    data = masked(own_folder, words, mask_share=0.4)
    for batch in epoch(data, 0):
        chosen = batch["labels"] != -100
        assert chosen.any(1).all() and not (chosen & (batch["attention_mask"] == 0)).any()
        hidden = batch["input_ids"] == data.tokenizer.mask_token_id
        assert hidden.any() and not (hidden & ~chosen).any()
        assert "label" not in batch


def test_another_epoch_masks_other_words_and_the_same_epoch_the_same(own_folder: Path, words: str) -> None:
    data = masked(own_folder, words)
    one, again, other = (
        {
            int(i): row.tolist()
            for batch in epoch(data, number)
            for i, row in zip(batch["index"], batch["labels"], strict=True)
        }
        for number in (3, 3, 4)
    )
    assert one == again
    assert sum(one[index][: len(other[index])] != other[index][: len(one[index])] for index in one) > len(one) / 2


@pytest.mark.parametrize("share", [0, 1])
def test_a_share_out_of_range_is_refused(share: float, own_folder: Path) -> None:
    with pytest.raises(ValueError, match=f"data.mask_share must lie between 0 and 1, not {share}"):
        MaskedTexts(TextFiles(str(write_csv(own_folder / "t.csv", 8))), mask_share=share)
