"""Cells of a table as labels of tasks."""

from __future__ import annotations

import pytest
import torch

from datamodules.labels.columns import check_kinds, is_empty, labels_of, tasks_of
from datamodules.labels.tasks import Task


def where(row: int) -> str:
    return f"t.csv, line {row + 2}"


def test_an_empty_cell_is_not_known_and_an_empty_list_is() -> None:
    assert all(is_empty(cell) for cell in (None, "", "  ", "NaN", float("nan")))
    assert not any(is_empty(cell) for cell in (0, "0", "no", [], "[]"))
    tags = Task("multi_label", ("calm", "long hair"))
    found = labels_of(tags, ["calm,long hair", "", "[]", '["long hair"]'], where, given=False, separator=",")
    assert found[0].tolist() == [1, 1] and found[1].isnan().all()
    assert found[2].tolist() == [0, 0] and found[3].tolist() == [0, 1]
    breed = Task("classification", ("collie", "pug"))
    assert labels_of(breed, ["pug", None, "collie"], where, given=False, separator=",").tolist() == [1, -100, 0]
    numbers = labels_of(Task("regression"), ["1.5", "", -2], where, given=False, separator=",")
    assert numbers[[0, 2]].tolist() == [1.5, -2] and numbers[1].isnan()


def test_classes_are_learnt_from_training_cells_or_given() -> None:
    cells = {"breed": ["pug", "", "collie"], "tags": ["b,a", "[]", "c"], "age": ["1", "2", ""]}
    kinds = {"breed": "classification", "tags": "multi_label", "age": "regression"}
    found = tasks_of(kinds, cells.__getitem__, {}, ",")  # type: ignore[arg-type]
    assert found == {
        "breed": Task("classification", ("collie", "pug")),
        "tags": Task("multi_label", ("a", "b", "c")),
        "age": Task("regression"),
    }
    given = tasks_of({"m": "segmentation"}, cells.__getitem__, {"m": ["ground", "dog"]}, ",")
    assert given == {"m": Task("segmentation", ("ground", "dog"))}


def test_what_cannot_be_is_said_with_its_place() -> None:
    with pytest.raises(ValueError, match="data.labels is empty: name the columns and what they are"):
        check_kinds({})
    with pytest.raises(ValueError, match="data.labels.age: 'number' is not known; expected classification, multi_lab"):
        check_kinds({"age": "number"})
    with pytest.raises(ValueError, match="data.class_names.m is needed: what the values 0, 1, ... of its masks mean"):
        tasks_of({"m": "segmentation"}, lambda name: [], {}, ",")
    with pytest.raises(ValueError, match="data.class_names.age: no column of classes; there are breed"):
        tasks_of({"age": "regression", "breed": "classification"}, lambda name: [], {"age": ["x"]}, ",")
    with pytest.raises(ValueError, match=r"column 'breed' has the classes \['pug'\]: there is nothing to tell apart"):
        tasks_of({"breed": "classification"}, lambda name: ["pug", ""], {}, ",")
    with pytest.raises(ValueError, match="t.csv, line 4: expected a number, found 'two'"):
        labels_of(Task("regression"), ["1", "", "two"], where, given=False, separator=",")
    with pytest.raises(ValueError, match="t.csv, line 3: label 'cat' is not among the classes of the training data"):
        labels_of(Task("classification", ("pug", "collie")), ["pug", "cat"], where, given=False, separator=",")
    with pytest.raises(ValueError, match="t.csv, line 4: label 'x' is not among the classes"):
        labels_of(Task("multi_label", ("a",)), ["a", "", "a,x"], where, given=False, separator=",")
    whole = labels_of(Task("classification", ("a", "b")), ["1", "0"], where, given=True, separator=",")
    assert torch.equal(whole, torch.tensor([1, 0])), "numbers count in names that were given"
