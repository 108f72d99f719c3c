"""Heads for tasks: which there are, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recipes.parts.decoder import Decoder
from recipes.parts.task_heads import Head, build_task_head, chosen_heads, map_blocks

TASKS = {"breed": {"kind": "classification"}, "age": {"kind": "regression"}, "outline": {"kind": "segmentation"}}
SHAPES = {"one": (1, 8, 16, 16), "two": (1, 16, 8, 8)}


def test_all_tasks_or_those_that_are_named_in_the_datas_order() -> None:
    assert list(chosen_heads(None, TASKS)) == list(TASKS)
    found = chosen_heads({"age": {"weight": 2.0}, "breed": Head(kind="classification")}, TASKS)
    assert list(found) == ["breed", "age"] and found["age"].weight == 2
    with pytest.raises(ValueError, match="model.heads.colour: the data have no such task; there are breed, age, outl"):
        chosen_heads({"colour": Head()}, TASKS)
    with pytest.raises(ValueError, match="model.heads.age.kind is classification, and the data's is regression"):
        chosen_heads({"age": Head(kind="classification")}, TASKS)


def test_a_mask_is_decoded_from_blocks_with_places() -> None:
    assert map_blocks("outline", Head(), SHAPES, 32) == ["one", "two"]
    assert map_blocks("outline", Head(blocks=["two"]), SHAPES, 32) == ["two"]
    with pytest.raises(ValueError, match="model.heads.outline.blocks: 'three' is no block with places; there are one"):
        map_blocks("outline", Head(blocks=["two", "three"]), SHAPES, 32)
    with pytest.raises(ValueError, match="this trunk has no places"):
        map_blocks("outline", Head(), {}, 32)


def test_a_head_is_made_of_what_it_sees() -> None:
    head = build_task_head(Head(head="mlp", hidden=7), 5, 3)
    assert head(torch.rand(4, 5)).shape == (4, 3)
    assert isinstance(head, nn.Sequential) and head[0].out_features == 7
    decoder = build_task_head(Head(hidden=16), [8, 16], 3)
    assert isinstance(decoder, Decoder) and decoder.classify.out_channels == 3
