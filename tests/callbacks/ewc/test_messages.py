"""Log lines of EWC, and names in them."""

from __future__ import annotations

import logging

import pytest

from callbacks.ewc.messages import did_you_mean, say, some


def test_five_names_are_listed_and_the_others_counted() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_the_nearest_name_is_suggested_whatever_marks_a_pattern_has() -> None:
    assert did_you_mean("^haed$", ["body", "head"]) == "; did you mean 'head'?"
    assert did_you_mean("zzz", ["body", "head"]) == ""


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_a_line_is_logged_once_whether_or_not_this_logger_shows_it(
    level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(level, "callbacks.ewc")
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    say("EWC: %d tensors", 3)
    assert caplog.text.count("EWC: 3 tensors") == 1
