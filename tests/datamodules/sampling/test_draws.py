"""What a sampler asks for, and the labels of what only fills up a batch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from datamodules.images.batches import Decoding, InMemory, Precomputed
from datamodules.sampling.draws import Draw, collate_whole, drawn_labels
from datamodules.sampling.seeds import counter_uniform, hash_seed
from datamodules.texts.tokens import TokenBatches


def test_a_repeated_sample_is_augmented_anew() -> None:
    once, twice = Draw(0, 7), Draw(0, 7, repeat=1)
    assert once.counter == 7
    assert not torch.equal(*(counter_uniform(0, 0, [draw.counter], 4) for draw in (once, twice)))
    assert hash_seed(0, 0, once.counter) != hash_seed(0, 0, twice.counter)


def test_what_only_fills_up_a_batch_has_no_label() -> None:
    draws = [Draw(0, 2), Draw(0, 0), Draw(0, 2, is_padding=True)]
    index, labels = drawn_labels(draws, torch.tensor([5, 6, 7]))
    assert index.tolist() == [2, 0, 2] and labels.tolist() == [7, 5, -100]
    _, scores = drawn_labels(draws, torch.tensor([0.5, 0.25, 1.0]))
    assert scores[:2].tolist() == [1.0, 0.5] and scores[2].isnan()
    _, several = drawn_labels(draws, torch.eye(3))
    assert several[:2].tolist() == [[0, 0, 1], [1, 0, 0]] and several[2].isnan().all()


def test_a_whole_batch_is_collated_as_it_is() -> None:
    batch = {"index": torch.arange(3)}
    assert collate_whole(batch) is batch


@pytest.mark.parametrize("kind", [InMemory, Decoding, Precomputed, TokenBatches])
def test_a_data_set_of_whole_batches_knows_no_single_samples(kind: type) -> None:
    """Whoever takes samples of any data set sees by this how to ask: EWC does."""
    assert kind.__getitem__ is Dataset.__getitem__  # type: ignore[attr-defined]
    assert callable(kind.__getitems__)  # type: ignore[attr-defined]
