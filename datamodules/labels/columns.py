"""Label columns of a table, one for each task: from cells to tensors, with a mark where a cell is empty."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from .tasks import Task, TaskKind
from .values import IGNORED, MISSING, label_numbers, learn_classes, multi_hot, several_labels, some, spelling

Where = Callable[[int], str]


def is_empty(cell: Any) -> bool:
    """Whether a cell says nothing: missing, blank, or a word that programs write where there is no label."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return True
    return not isinstance(cell, (list, tuple, dict, set)) and (spelling(cell) == "" or spelling(cell) in MISSING)


def check_kinds(kinds: Mapping[str, str]) -> None:
    """Refuse, with a ValueError, no task at all, or a kind that is not known."""
    if not kinds:
        raise ValueError("data.labels is empty: name the columns and what they are, such as {breed: classification}")
    for name, kind in kinds.items():
        if kind not in get_args(TaskKind):
            raise ValueError(f"data.labels.{name}: {kind!r} is not known; expected {', '.join(get_args(TaskKind))}")


def tasks_of(
    kinds: Mapping[str, TaskKind],
    cells: Callable[[str], Sequence[Any]],
    class_names: Mapping[str, Sequence[str]],
    separator: str,
) -> dict[str, Task]:
    """The tasks of columns; classes that are not given are learnt from the training cells.

    Args:
        kinds: Column -> what it is.
        cells: Gives a column's training cells.
        class_names: Column -> names in the order of the labels; a mask's must be given.
        separator: Between several labels in a cell.

    Raises:
        ValueError: Names of a column that is none of these, or has no classes; too few classes.
    """
    for name in class_names:
        if kinds.get(name, "regression") == "regression":
            classes = [column for column, kind in kinds.items() if kind != "regression"]
            raise ValueError(f"data.class_names.{name}: no column of classes; there are {some(classes) or 'none'}")
    found = {}
    for name, kind in kinds.items():
        if kind == "regression":
            found[name] = Task(kind)
            continue
        names = list(class_names.get(name, ()))
        if not names and kind == "segmentation":
            raise ValueError(f"data.class_names.{name} is needed: what the values 0, 1, ... of its masks mean")
        if not names:
            told = [cell for cell in cells(name) if not is_empty(cell)]
            if kind == "multi_label":
                told = [label for cell in told for label in several_labels(cell, separator)[0]]
            names = learn_classes(told)
        if len(names) < (1 if kind == "multi_label" else 2):
            raise ValueError(f"the column {name!r} has the classes {names}: there is nothing to tell apart")
        found[name] = Task(kind, tuple(names))
    return found


def labels_of(task: Task, cells: Sequence[Any], where: Where, *, given: bool, separator: str) -> Tensor:
    """A column's cells as labels of a task that is no mask; empty ones as not known.

    Args:
        task: What they are.
        cells: `(n,)`.
        where: Place of a cell, for an error.
        given: Whether the user wrote the classes' names, so that whole numbers count in them.
        separator: Between several labels in a cell; none apply where a cell is an empty list, `[]`.

    Raises:
        ValueError: A cell that cannot be a label; says where.
    """
    told = [row for row, cell in enumerate(cells) if not is_empty(cell)]
    some_cells = [cells[row] for row in told]

    def at(place: int) -> str:
        return where(told[place])

    rows = torch.tensor(told, dtype=torch.long)
    if task.kind == "classification":
        found = torch.full((len(cells),), IGNORED)
        found[rows] = label_numbers(some_cells, task.class_names, at, given=given)
        return found
    if task.kind == "regression":
        numbers = torch.full((len(cells),), math.nan)
        numbers[rows] = torch.tensor([number(cell, at(place)) for place, cell in enumerate(some_cells)])
        return numbers
    lists = []
    for place, cell in enumerate(some_cells):
        labels, problem = several_labels(cell, separator)
        if problem:
            raise ValueError(f"{at(place)}: {problem}")
        lists.append(labels)
    hot = torch.full((len(cells), task.outputs), math.nan)
    hot[rows] = multi_hot(
        lists, task.outputs, at, lambda flat, there: label_numbers(flat, task.class_names, there, given=given)
    )
    return hot


def number(cell: Any, where: str) -> float:
    """A cell's number; a ValueError says where there is none, or one beyond float32."""
    try:
        found = float(cell)
    except (TypeError, ValueError):
        found = math.nan
    if "_" in str(cell) or not abs(found) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{where}: expected a number, found {cell!r}")
    return found
