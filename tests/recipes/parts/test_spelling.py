"""The nearest known name is offered, and none where nothing is near."""

from __future__ import annotations

import pytest

from recipes.parts.spelling import did_you_mean, nearest_name, some


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("Cosin", "; did you mean 'Cosine'?"),
        ("quickstart", "; did you mean 'vision/quickstart' or 'text/quickstart'?"),  # of that name in any folder
        ("elsewhere/Linear", "; did you mean 'Linear'?"),
        ("zebra", ""),
    ],
)
def test_a_hint_is_a_clause_or_nothing(word: str, hint: str) -> None:
    assert did_you_mean(word, ["Cosine", "Linear", "vision/quickstart", "text/quickstart"]) == hint


def test_of_names_as_near_the_first_is_meant() -> None:
    assert nearest_name("resnet5", ["resnet50", "resnet56"]) == "resnet50"
    assert nearest_name("RESNET18", ["resnet18", "resnet50"]) == "resnet18"
    assert nearest_name("alexandria", ["resnet18"]) is None
    assert nearest_name("anything", []) is None


def test_of_many_names_five_are_listed() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(list("abcdefg")) == "a, b, c, d, e and 2 more"
