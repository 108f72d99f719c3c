"""Figures of runs of every length and kind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import callbacks.report.page as page_module
from callbacks.report.figures import (
    DEEPEST,
    confusion_figure,
    curves,
    inked,
    reliability_figure,
    score_figure,
    svg,
    threshold_figure,
)
from callbacks.report.page import render
from tests.callbacks.report.conftest import check_page, run, some, with_labels, with_scores

LONG = [f"<class> number {n} of $many_$ \\alpha^{{{n}}} & long_names" for n in range(120)]
RUNS: dict[str, Any] = {
    "one rate": lambda: run(2, lambda step: (0.002 * (1 - step), 0.002 * (1 - step))),
    "one step": lambda: run(1, lambda step: (0.0, 1e-3)),
    "one epoch": lambda: run(12, lambda step: (1e-4, 1e-3)),
    "100,000 steps": lambda: run(100_000, lambda step: (1e-6 * (step + 1) / 1e5, 0.1 - step / 1e6), validations=10),
    "rates of 0": lambda: run(50, lambda step: (0.0, 0.0)),
    "rates from 0": lambda: run(50, lambda step: (0.0, step / 1e4)),
    "rates alike": lambda: run(50, lambda step: (3e-5, 4e-5)),
    "two of many names": lambda: run(50, lambda step: (1e-5, 1e-3), class_names=LONG[:2], classes=2),
    "12 names": lambda: run(50, lambda step: (1e-5, 1e-3), class_names=LONG[:12], classes=12),
    "120 names": lambda: run(50, lambda step: (1e-5, 1e-3), class_names=LONG, classes=120),
    "scores": lambda: with_scores(run(50, lambda step: (1e-5, 1e-3))),
    "large scores": lambda: with_scores(run(50, lambda step: (1e-5, 1e-3)), scale=1e8),
    "labels": lambda: with_labels(run(50, lambda step: (1e-5, 1e-3)), LONG[:4]),
    "120 labels": lambda: with_labels(run(50, lambda step: (1e-5, 1e-3)), LONG),
}


def all_figures(report: dict[str, Any]) -> dict[str, Any]:
    found = {title: made for title, made, _ in curves([report])}
    if report["evaluation"]:
        found |= {"confusion": confusion_figure(report), "reliability": reliability_figure(report)}
    if report.get("scores"):
        found |= {"scatter": score_figure(report), "residuals": score_figure(report, errors=True)}
    if report.get("labels"):
        found |= {"thresholds": threshold_figure(report)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_no_figure_shows_the_markup_of_its_text(name: str, own_folder: Path) -> None:
    from matplotlib.text import Text

    report = RUNS[name]()
    own = [*report["class_names"], "$body$", "head_1"]
    for title, made in all_figures(report).items():
        drawn = svg(made)  # lays it out, as the page does
        with inked():  # ticks are made when they are asked for
            texts = made.findobj(Text)
        for text in texts:
            if not text.get_visible() or not text.get_text():
                continue
            assert not text.get_parse_math(), title
            content = text.get_text()
            assert not re.search(r"mathdefault|\\times|\de\d+$", content), (title, content)
            assert "$" not in content or any(all(part in name for part in content.split("…")) for name in own), (
                title,
                content,
            )
        assert "mathdefault" not in drawn and "<class>" not in drawn, title
        assert re.search(r">[0-9.,e-]+</text>", drawn), f"{title} has no tick"
    (own_folder / "report.html").write_text(render(report))
    check_page(own_folder)


@pytest.mark.parametrize("name", ["one step", "one rate"])
def test_a_curve_of_one_point_is_seen(name: str) -> None:
    for title, made in all_figures(RUNS[name]()).items():
        lines = [line for axes in made.axes for line in axes.lines if str(line.get_label())[0] != "_"]
        alone = [line for line in lines if sum(value == value for value in line.get_ydata()) == 1]
        assert all(line.get_marker() == "o" for line in alone), title
        assert alone or title != "learning rate of each group"


def contrast(first: list[float], second: list[float]) -> float:
    """WCAG 2: of two colours in sRGB, 0 to 1."""

    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("paper, ink", [("fdfdfb", "1d2329"), ("14181c", "e3e6e8")])
def test_every_count_of_the_matrix_can_be_read(paper: str, ink: str) -> None:
    page, letters = ([int(code[at : at + 2], 16) / 255 for at in (0, 2, 4)] for code in (paper, ink))
    assert f"#{paper}" in Path(page_module.__file__).with_name("page.css").read_text()
    cells = confusion_figure(some(3)).axes[0].images[0].get_array().reshape(-1, 4)
    for *hue, opacity in [*cells.tolist(), [0.25, 0.51, 0.78, DEEPEST], [0.82, 0.36, 0.2, DEEPEST]]:
        seen = [opacity * own + (1 - opacity) * under for own, under in zip(hue, page, strict=True)]
        assert contrast(seen, letters) >= 4.5 and opacity <= DEEPEST


def test_captions_say_first_to_last() -> None:
    report = run(50, lambda step: (min(step, 49 - step) / 1e3, 1e-3))
    words = {title: words for title, _, words in curves([report])}
    assert (
        words["learning rate of each group"]
        == "$body$ from 0 to 0, at most 0.024; head_1 from 0.001 to 0.001, at most 0.001"
    )


def test_names_that_a_figure_cannot_draw_as_they_are(own_folder: Path) -> None:
    names = ["$10_$20", "caf\udce9", "x" * 300]
    (own_folder / "report.html").write_text(render(some(3, class_names=names)), errors="backslashreplace")
    assert "$10_$20" in check_page(own_folder)
