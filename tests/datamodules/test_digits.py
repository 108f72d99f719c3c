"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

import pytest

from datamodules import Digits


def test_limit_per_class_leaves_validation_whole() -> None:
    data = Digits(image_size=8, limit_per_class=5)
    data.setup("fit")
    assert data.class_counts == [5] * 10
    whole = Digits(image_size=8)
    whole.setup("fit")
    assert len(data.splits["val"].labels) == len(whole.splits["val"].labels)


def test_digits_keep_their_test_set_whatever_the_seed() -> None:
    first, second = Digits(seed=0), Digits(seed=1)
    for data in (first, second):
        data.setup()
    names = [[d.sample_names("test")(i) for i in range(len(d.splits["test"].labels))] for d in (first, second)]
    assert names[0] == names[1]
    assert first.cut_rows != second.cut_rows


def test_digits_of_some_classes_are_relabelled() -> None:
    data = Digits(classes=[7, 5], image_size=8)
    data.setup()
    assert data.class_names == ["7", "5"] and set(data.splits["train"].labels.tolist()) == {0, 1}
    with pytest.raises(ValueError, match="different digits from 0 to 9"):
        Digits(classes=[5, 10])
