"""Handwritten digits: 1,797 images of 8 x 8 pixels that come with scikit-learn. No download, no files."""

from __future__ import annotations

from typing import Any

import torch

from .images.base import ImageDataModule
from .images.sources import ImageArray, ImageSource, Subset
from .sampling.splits import stratified_split

TEST_SHARE, TEST_SEED = 0.2, 0  # the data set has no test split of its own: this one is the same in every run


class Digits(ImageDataModule):
    """scikit-learn's handwritten digits, a test set of the UCI Optical Recognition of Handwritten Digits.

    Contents: 1,797 grey images of 8 x 8 pixels with 17 levels, digits 0 to 9, about 180 of each; here as RGB.
    Splits: 20 % for the test, stratified, the same whatever the seed; `val_share` of the rest for validation.
    Licence: CC BY 4.0. Source: Alpaydin & Kaynak, 1998, https://doi.org/10.24432/C50P49

    Args:
        classes: The digits to use, in the order of their labels; e.g. 5 to 9 to fine-tune on what a net
            pretrained on 0 to 4 has not seen.
        **kwargs: Those of `ImageDataModule`. A mirrored digit is another sign, so nothing is mirrored.
    """

    flip = False

    def __init__(self, classes: list[int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = list(range(10)) if classes is None else classes
        if len(set(self.classes)) < len(self.classes) or not set(self.classes) <= set(range(10)):
            raise ValueError(f"data.classes must be different digits from 0 to 9, not {self.classes}")

    @property
    def class_names(self) -> list[str]:
        return [str(digit) for digit in self.classes]

    def read_splits(self) -> dict[str, ImageSource]:
        from sklearn.datasets import load_digits  # slow to import: only where it is used

        digits = load_digits()
        grey = torch.from_numpy(digits.images) * (255 / 16)
        pixels = grey.round().to(torch.uint8)[..., None].expand(-1, -1, -1, 3).contiguous()
        labels = torch.from_numpy(digits.target).long()
        images = ImageArray(pixels, labels, "digits")
        relabelled = torch.full((10,), -1).scatter(0, torch.tensor(self.classes), torch.arange(len(self.classes)))
        splits: dict[str, ImageSource] = {}
        for name, rows in zip(("train", "test"), stratified_split(labels, TEST_SHARE, TEST_SEED), strict=True):
            rows = rows[torch.isin(labels[rows], torch.tensor(self.classes))]
            splits[name] = Subset(images, rows, relabelled[labels[rows]])
        return splits
