"""From what a label column holds to class numbers: a label is a name, compared by its value and not by its spelling.

A number in a file is a name, too: `3` is the class called 3, never the fourth of a list, unless the list was given by
the user, for labels that count in it. Only a Hugging Face ClassLabel's integer is a position, and it always is.

`where(row)` names the place of a sample in an error, `class_names` stand in the order of the class numbers.
"""

from __future__ import annotations

import ast
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeAlias

import torch
from torch import Tensor

log = logging.getLogger(__name__)
Where: TypeAlias = Callable[[int], str]

IGNORED = -100  # the label of a sample that fills up a rank's last batch; torch's losses ignore it by default
NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.[0-9]+)?")  # 007 is no number: its zeros are part of a name
MISSING = {"nan", "NaN", "null", "NULL", "<NA>"}  # what programs write where there is no label
LONG = 28  # characters; a longer number is a name like a word, which arithmetic would cut
TRUTH = {"false": "0", "true": "1"}
LISTED = re.compile(r"[\[({'\"]")  # how a text begins that may write a list down
NO_LIST = re.compile(r"\[|(array|frozenset|set)\(")  # ... and one that does so in a way that cannot be read
SEPARATORS = "|;,/"  # that labels of one text are often joined with


def label_problem(value: Any) -> str:
    """Why a value cannot be one label, or nothing."""
    if isinstance(value, (list, tuple, dict, set)):
        kind = type(value).__name__
        return f"the label is a {kind}: several labels need data.problem_type multi_label_classification"
    if value is None or spelling(value) == "":
        return "there is no label"
    return f"there is no label, found {spelling(value)!r}" if spelling(value) in MISSING else ""


def check_each(values: Sequence[Any], where: Where) -> None:
    """Refuse values that cannot be one label each, with a ValueError that names the first."""
    for row, value in enumerate(values):
        if value.__class__ is not int and (problem := label_problem(value)):
            raise ValueError(f"{where(row)}: {problem}")


def spelling(value: Any) -> str:
    """A label as a file of text has it."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace").strip()
    if isinstance(value, Decimal):
        return format(value, "f")
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def label_name(value: Any) -> str:
    """What the class of a label is called: words as they are, a number the same whether it is 1, 1.0 or +1."""
    name = spelling(value)
    if NUMBER.fullmatch(name) and len(name) < LONG:
        number = Decimal(name)
        return str(int(number)) if number == int(number) else str(number.normalize())
    return name


def value_of(name: str) -> str:
    """What two names of one class share: truth values are the numbers 0 and 1."""
    return TRUTH.get(name.lower(), name)


def learn_classes(labels: Iterable[Any]) -> list[str]:
    """The classes of training labels: numbers in numerical order, then words in alphabetical.

    Labels of one value are one class, `1` and `1.0`, `true` and `1`; a log line says which were joined.
    """
    names: dict[str, list[str]] = {}
    for name in sorted({label_name(label) for label in labels}, key=rank):
        names.setdefault(value_of(name), []).append(name)
    joined = [" and ".join(alike) for alike in names.values() if len(alike) > 1]
    if joined:
        log.warning("labels of equal value are one class: %s", "; ".join(joined[:5]))
    return [alike[0] for alike in names.values()]


def rank(name: str) -> tuple[bool, Decimal, str]:
    """Sorts numbers as numbers, those that begin with zeros among them, before words."""
    number = len(name) < LONG and re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", name)
    return not number, Decimal(name) if number else Decimal(0), name


def label_numbers(labels: Sequence[Any], class_names: Sequence[str], where: Where, *, given: bool = False) -> Tensor:
    """Class number of each label, a name or a value that stands for one, `(n,)`.

    With `given` the user wrote the names, so that a whole number counts in them; where one of the names is a number or
    a truth value itself, it does not.

    Raises:
        ValueError: A label is not among the classes, or two classes have one name; says where.
    """
    key = label_name if given else lambda label: value_of(label_name(label))
    number = {key(name): label for label, name in enumerate(class_names)}
    if len(number) < len(class_names):
        raise ValueError(f"data.class_names must differ from each other; received {some(class_names)}")
    if given and not any(map(is_number, class_names)):
        number |= {str(label): label for label in range(len(class_names))}
    found = {label: number.get(key(label), -1) for label in dict.fromkeys(labels)}
    numbers = torch.tensor([found[label] for label in labels], dtype=torch.long)
    for row in (numbers < 0).nonzero().flatten()[:1].tolist():
        label = spelling(labels[row])
        raise ValueError(
            f"{where(row)}: label {label!r} is not among the classes of the training data, {some(class_names)}"
        )
    for label, at in found.items():
        if spelling(label) not in (class_names[at], str(at)):
            log.info("labels are matched by value, such as %s to class %s", label, class_names[at])
            break
    return numbers


def is_number(name: str) -> bool:
    """Whether a name could be taken for a number: 1, 01, `1.`, 1e3, true."""
    try:
        return math.isfinite(float(value_of(name.strip())))
    except ValueError:
        return False


def positions(labels: Sequence[Any], names: Sequence[str], class_names: Sequence[str], where: Where) -> Tensor:
    """Class number of each integer of a ClassLabel, `(n,)`: a position in its names, whatever these look like.

    The names are those of this column's ClassLabel; another split's may stand in another order.

    Raises:
        ValueError: One is missing, or out of range, or its name is not among the classes; says where.
    """
    number = {name: label for label, name in enumerate(class_names)}
    classes = [number.get(name, -1) for name in names]
    found = {}
    for label in dict.fromkeys(labels):
        found[label] = classes[label] if label is not None and 0 <= label < len(names) else -1
        if found[label] < 0:
            row = where(labels.index(label))
            if label is None:
                raise ValueError(f"{row}: there is no label")
            name = f" {names[label]!r}" if 0 <= label < len(names) else ""
            raise ValueError(f"{row}: label '{label}'{name} is not among the classes {some(class_names)}")
    return torch.tensor([found[label] for label in labels], dtype=torch.long)


def class_numbers(
    labels: Sequence[Any], names: Sequence[str] | None, class_names: Sequence[str], where: Where
) -> Tensor:
    """By `positions` where the labels are a ClassLabel's of these names, else by `label_numbers`."""
    if names is None:
        return label_numbers(labels, class_names, where)
    return positions(labels, names, class_names, where)


def learn_multi_label_classes(rows: Sequence[Sequence[Any]], separator: str = "") -> list[str]:
    """The classes of training samples with several labels each, which were split at the separator, if any."""
    if width := width_of_indicators(rows):
        return [str(label) for label in range(width)]
    if separator:
        check_separator(rows, separator)
    return learn_classes(label for labels in rows for label in labels)


def several_labels(value: Any, separator: str) -> tuple[list[Any], str]:
    """The labels of one sample, and what is wrong with them, or nothing.

    A list is taken as it is; a word may be a list as Python or JSON writes one, or labels with a separator between.
    An empty word or list means that none applies; a missing value does not.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return [], "there are no labels; where none applies, the list must be empty"
    if isinstance(value, str) and LISTED.match(value.strip()):
        value = written_list(value.strip())
    if isinstance(value, dict) or (isinstance(value, str) and NO_LIST.match(value)):
        return [], f"the labels look like a list, but cannot be read as one: {str(value)[:60]}"
    found = list(value) if isinstance(value, (list, tuple, set)) else str(value).split(separator)
    found = [label.strip() if isinstance(label, str) else label for label in found]
    if isinstance(value, str):
        found = [label for label in found if label]
    problem = next(filter(None, map(label_problem, found)), "")
    return ([], f"among the labels: {problem}") if problem else (found, "")


def written_list(text: str) -> Any:
    """The list that a text writes down, in JSON or in Python, or a dictionary; the text, where it is none."""
    if re.search(r"""['"]\s+['"]""", text):  # as numpy prints words, which Python would join
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, (list, tuple, set, dict)):
            return sorted(found, key=str) if isinstance(found, set) else found
    return text


def width_of_indicators(rows: Sequence[Sequence[Any]]) -> int | None:
    """How many classes rows such as `[0, 1, 1]` tell of, one truth value for each; None, where rows list labels.

    Most rows are of one length, with nothing but 0 and 1 in them, and either all are, or one has a value twice, which a
    list of labels has not. A row that is otherwise is an error later on.
    """
    whole = [row for row in rows if len(row) > 1 and {value_of(label_name(label)) for label in row} <= {"0", "1"}]
    width, count = Counter(map(len, whole)).most_common(1)[0] if whole else (0, 0)
    twice = any(len(row) == width and len({value_of(label_name(label)) for label in row}) < width for row in whole)
    return width if count == len(rows) > 0 or (2 * count > len(rows) and twice) else None


def several_numbers(
    rows: Sequence[Sequence[Any]], class_names: Sequence[str], where: Where, *, indicators: bool, given: bool = False
) -> Tensor:
    """Several labels of each sample as 0 and 1, float, `(n, classes)`.

    A row lists labels, or with `indicators` a truth value for each class; `given` as in `label_numbers`.

    Raises:
        ValueError: A label is not among the classes, or truth values are not one for each class.
    """
    if not indicators:
        for row, labels in enumerate(rows):
            if len(set(labels)) < len(labels) and {value_of(label_name(label)) for label in labels} <= {"0", "1"}:
                twice = f"{list(labels)[:10]} has a label twice"
                raise ValueError(f"{where(row)}: {twice}: are these truth values, where the training data list labels?")
        return multi_hot(
            rows, len(class_names), where, lambda flat, at: label_numbers(flat, class_names, at, given=given)
        )
    for row, labels in enumerate(rows):
        if len(labels) != len(class_names) or {value_of(label_name(label)) for label in labels} - {"0", "1"}:
            raise ValueError(
                f"{where(row)}: expected 0 or 1 for each of {len(class_names)} classes, received {list(labels)[:10]}"
            )
    return torch.tensor([[float(value_of(label_name(label))) for label in labels] for labels in rows])


def multi_hot(
    rows: Sequence[Sequence[Any]], classes: int, where: Where, numbers: Callable[[Sequence[Any], Where], Tensor]
) -> Tensor:
    """Labels of each sample as 0 and 1, float, `(n, classes)`; `numbers` gives the classes of labels at places."""
    hot = torch.zeros(len(rows), classes)
    samples = [row for row, labels in enumerate(rows) for _ in labels]
    flat = [label for labels in rows for label in labels]
    hot[samples, numbers(flat, lambda at: where(samples[at]))] = 1
    return hot


def check_separator(rows: Iterable[Sequence[str]], separator: str) -> None:
    """Refuse labels that were joined with another separator than the one given, and would be classes of their own.

    Raises:
        ValueError: One looks as if it were several: its parts are labels, too, or no text has several labels.
    """
    rows = list(rows)
    found = {label for row in rows for label in row}
    alone = all(len(row) < 2 for row in rows)
    for other in SEPARATORS.replace(separator, ""):
        for label in sorted(name for name in found if other in name):
            parts = {part.strip() for part in label.split(other)}
            if parts <= found or (alone and (other in "|;" or found & parts)):
                raise ValueError(
                    f"label {label!r} looks like several labels joined by {other!r}: set data.label_separator to "
                    "it; if this is one label, list all in data.class_names"
                )


def some(names: Sequence[str]) -> str:
    """The first ten."""
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")


def class_labels(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Names of the classes of each column that Hugging Face's metadata call a ClassLabel, or a list of these."""
    features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    inner = {name: value.get("feature", value) for name, value in features.items() if isinstance(value, dict)}
    return {name: list(value["names"]) for name, value in inner.items() if isinstance(value, dict) and "names" in value}
