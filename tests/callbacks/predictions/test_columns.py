"""Batches of predictions as words, numbers and pictures."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image

from callbacks.predictions.columns import columns, grey_png, save_masks


def test_columns_are_words_and_numbers() -> None:
    prediction = {
        "index": torch.tensor([4, 5]),
        "label": torch.tensor([[True, False, True], [False, False, False]]),
        "label_2": torch.tensor([2, 0]),
        "probability": torch.tensor([0.123456789, 1.0]),
        "p": torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]),
    }
    found = columns(prediction, ["a", "b", "c"])
    assert list(found) == ["label", "label_2", "probability", "p(a)", "p(b)", "p(c)"]
    assert found["label"] == ["a|c", ""] and found["label_2"] == ["c", "a"]
    assert found["probability"] == [0.123457, 1.0] and found["p(c)"] == [0.7, 0.4]


def test_of_several_tasks_headings_begin_with_their_names() -> None:
    found = columns({"label": torch.tensor([1, 0]), "probability": torch.tensor([0.5, 1.0])}, ["a", "b"], "breed")
    assert found == {"breed": ["b", "a"], "breed_probability": [0.5, 1.0]}
    assert columns({"number": torch.tensor([1.5])}, None, "age") == {"age": [1.5]}
    assert list(columns({"p": torch.rand(1, 2)}, ["x", "y"], "tags")) == ["tags_p(x)", "tags_p(y)"]


def test_masks_are_grey_pictures_that_others_read(tmp_path: Path) -> None:
    masks = torch.randint(0, 255, (2, 5, 7), dtype=torch.uint8)
    paths = save_masks(masks, tmp_path / "out.csv.masks" / "outline", [3, 12])
    assert paths == ["out.csv.masks/outline/000003.png", "out.csv.masks/outline/000012.png"]
    for mask, path in zip(masks, paths, strict=True):
        with Image.open(tmp_path / path) as opened:
            assert opened.mode == "L" and opened.size == (7, 5)
            assert opened.tobytes() == mask.numpy().tobytes()
    strided = masks[0].t()
    with Image.open(io.BytesIO(grey_png(strided))) as opened:
        assert opened.tobytes() == strided.contiguous().numpy().tobytes()
