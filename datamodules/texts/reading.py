"""Texts and labels from the rows of files, and what is wrong with those that cannot be used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..labels.values import label_problem, several_labels, spelling
from .opening import is_text
from .rows import rows_of


def read_files(
    files: Sequence[Path],
    text_columns: Sequence[str],
    label_column: str | None,
    problem_type: str,
    label_separator: str,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Rows with `text`, `pair` for two columns, `label`, `file`, `line` and, where one cannot be right, `problem`.

    Files are read one after the other; `options` are those of `rows_of`. Without a label column labels are empty.

    Raises:
        ValueError: A column that does not exist, or a file that is not of its format at all.
    """
    columns = [*text_columns, *([label_column] if label_column else [])]
    seen: set[str] = set()

    def labels_in(row: dict[str, Any]) -> list[str]:
        """Those of a row, if they can be labels."""
        label, problem = read_label(row[str(label_column)], problem_type, label_separator)
        return [] if problem else label if isinstance(label, list) else [str(label)]

    def swallows(row: dict[str, Any], inner: list[dict[str, Any]], lines: int) -> bool:
        """Whether most of a text's lines are rows: they have labels that were there before, or are there again."""
        found = [labels_in(each) for each in inner]
        again = Counter(label for labels in found for label in labels)
        rows = sum(
            bool(labels) and all(problem_type == "regression" or label in seen or again[label] > 1 for label in labels)
            for labels in found
        )
        return "\n" in row[str(label_column)] or (2 * rows > lines and (bool(seen) or rows > 2))

    line = 0
    for number, file in enumerate(files):
        for line, row, problem in rows_of(file, columns, swallows=swallows if label_column else None, **options):
            texts = [row.get(name) for name in text_columns]
            label, wrong = (
                read_label(row.get(label_column), problem_type, label_separator) if label_column else (None, "")
            )
            problem = problem or next(filter(None, map(text_problem, texts)), "") or wrong
            if not problem and label_column:
                seen.update(label if isinstance(label, list) else [str(label)])
            yield {
                **dict(zip(("text", "pair"), ["" if problem else text for text in texts], strict=False)),
                "label": label if label is not None else NO_LABEL[problem_type],
                "file": number,
                "line": line,
                "problem": problem,
            }
    if not line:
        raise ValueError(f"{', '.join(map(str, files))}: no text in it can be used")


NO_LABEL: dict[str, Any] = {"single_label_classification": "", "multi_label_classification": [], "regression": math.nan}


def text_problem(text: Any) -> str:
    """What is wrong with a text, or nothing."""
    if not isinstance(text, str):
        return f"the text is {type(text).__name__}, not a string" if text is not None else "there is no text"
    if not text.strip():
        return "the text is empty"
    return "" if is_text(text) else "the text is not in the encoding that data.encoding names"


def read_label(value: Any, problem_type: str, separator: str) -> tuple[Any, str]:
    """A label in the form of its problem type, and what is wrong with it, or nothing."""
    if problem_type == "regression":
        try:
            score = float(value)
        except (TypeError, ValueError):
            return None, f"the score is {value!r}, not a number"
        if "_" in str(value) or not abs(score) <= torch.finfo(torch.float32).max:
            return None, f"the score is {value!r}"
        return score, ""
    if problem_type == "multi_label_classification":
        labels, problem = several_labels(value, separator)
        found = [spelling(label) for label in labels]
    else:
        problem, found = label_problem(value), [spelling(value)]
    if not problem and not all(map(is_text, found)):
        problem = "the label is not in the encoding that data.encoding names"
    return (None, problem) if problem else (found if problem_type == "multi_label_classification" else found[0], "")
