"""What the page says, and what its pictures hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import callbacks.report.page as page_module
from callbacks.report.comparison import main
from callbacks.report.evaluation import evaluation, label_evaluation, score_evaluation
from callbacks.report.facts import runnable_commands, shortened
from callbacks.report.figures import (
    DEEPEST,
    confusion_figure,
    curves,
    inked,
    reliability_figure,
    residual_figure,
    scatter_figure,
    svg,
    threshold_figure,
)
from callbacks.report.outputs import Predictions, load_predictions, save_predictions
from callbacks.report.page import render, verdict, write_page
from tests.callbacks.test_report import check_page, some


def run(steps: int, rates: Any, validations: int = 1, **changes: Any) -> dict[str, Any]:
    """A report of a fit of so many steps; `rates` gives those of both groups at a step."""
    every = max(1, steps // 100)
    found = some(changes.pop("classes", 3), **changes)
    marks = range(0, steps, every)
    found["curves"] = {
        "points": [{"step": step, "loss": 1 / (1 + step)} for step in marks],
        "rates": [{"step": step, "lr": dict(zip(("$body$", "head_1"), rates(step), strict=True))} for step in marks],
        "groups": ["$body$", "head_1"],
        "validations": [
            {"step": steps * (n + 1) // validations, "epoch": n, "metrics": {"val/loss": 0.5, "val/accuracy": 0.99994}}
            for n in range(validations)
        ],
    }
    last = found["curves"]["validations"][-1]
    found["best"] = {"monitor": "val/accuracy", "mode": "max", "score": 0.5, **last}
    found["phases"] = [{"step": 0, "open": ["head_1"]}, {"step": steps // 2, "open": ["$body$", "head_1"]}]
    return found


def with_scores(report: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
    labels = torch.randn(200, generator=torch.Generator().manual_seed(0))
    found = score_evaluation(scale * labels + 0.1, labels, mean=0.5)
    furthest = [{"name": "a < b", "label": 1.0, "predicted": -3.0}]
    return report | {"evaluation": None, "scores": found, "class_names": [], "furthest": furthest}


def with_labels(report: dict[str, Any], names: list[str]) -> dict[str, Any]:
    labels = (torch.rand(200, len(names), generator=torch.Generator().manual_seed(0)) < 0.3).float()
    noise = torch.randn(200, len(names), generator=torch.Generator().manual_seed(1))
    return report | {
        "evaluation": None, "labels": label_evaluation(2 * labels - 1 + noise, labels), "class_names": names
    }  # fmt: skip


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


def pictures(report: dict[str, Any]) -> dict[str, Any]:
    found = {title: made for title, made, _ in curves([report])}
    if report["evaluation"]:
        found |= {"confusion": confusion_figure(report), "reliability": reliability_figure(report)}
    if report.get("scores"):
        found |= {"scatter": scatter_figure(report), "residuals": residual_figure(report)}
    if report.get("labels"):
        found |= {"thresholds": threshold_figure(report)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_no_picture_shows_the_source_of_what_it_means(name: str, own_folder: Path) -> None:
    from matplotlib.text import Text

    report = RUNS[name]()
    own = [*report["class_names"], "$body$", "head_1"]
    for title, made in pictures(report).items():
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
    for title, made in pictures(RUNS[name]()).items():
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


def answers(right: int, size: int, base: int) -> Any:
    """Two classes, the first of them `base` times."""
    labels = (torch.arange(size) >= base).long()
    said = torch.where(torch.arange(size) < right, labels, 1 - labels)
    return evaluation(5.0 * torch.nn.functional.one_hot(said, 2), labels)


@pytest.mark.parametrize(
    "right, words",
    [(30, "is reliably worse than the largest class"), (62, "not reliably more than the largest"), (90, "found.")],
)
def test_an_interval_beside_the_baseline_is_said_for_what_it_is(right: int, words: str) -> None:
    found = verdict(some(2, evaluation=answers(right, 100, 60)))
    assert words.removeprefix("found.") in found
    assert ("reliably" in found) == (right < 90)


def test_a_fit_that_lost_what_its_features_knew_is_said_to() -> None:
    start = {"accuracy": 0.95, "samples": 100}
    assert "reliably worse than the features" in verdict(some(2, evaluation=answers(75, 100, 60), start=start))
    start["accuracy"] = 0.78
    assert "lies within the interval" in verdict(some(2, evaluation=answers(75, 100, 60), start=start))


@pytest.mark.slow
def test_a_temperature_that_makes_it_worse_is_not_recommended() -> None:
    report = some(3)
    report["evaluation"]["calibration"] |= {"error": 0.123, "temperature": 1.4, "error_with_temperature": 0.189}
    content = " ".join(render(report).split())
    assert "would bring that to" not in content and "at temperature" not in content
    assert "No temperature helps: the one found on the validation samples, 1.40, would make it 0.189" in content
    report["evaluation"]["calibration"]["error_with_temperature"] = 0.05
    assert "would bring that to 0.050" in render(report) and "No temperature" not in render(report)


def test_captions_say_first_to_last() -> None:
    report = run(50, lambda step: (min(step, 49 - step) / 1e3, 1e-3))
    words = {title: words for title, _, words in curves([report])}
    assert (
        words["learning rate of each group"]
        == "$body$ from 0 to 0, at most 0.024; head_1 from 0.001 to 0.001, at most 0.001"
    )


def test_scores_are_held_against_the_mean(own_folder: Path) -> None:
    report = RUNS["scores"]()
    assert "always saying 0.500, the mean of the training scores" in verdict(report)
    assert "Spearman's rank correlation is 1.000" in verdict(report) and "reliably" not in verdict(report)
    assert "reliably worse than the mean" in verdict(with_scores(report, scale=-3.0))
    (own_folder / "report.html").write_text(render(report))
    content = check_page(own_folder)
    assert "a &lt; b" in content and "Furthest off" in content and content.count("mean squared error") == 1


@pytest.mark.slow
def test_several_labels_are_held_against_always_the_same(own_folder: Path) -> None:
    report = RUNS["labels"]()
    content = verdict(report)
    assert "F1 over all labels is" in content and "always saying" in content and "every label right" in content
    (own_folder / "report.html").write_text(render(report))
    assert check_page(own_folder).count("&lt;class&gt; number 3") >= 1
    assert "F1 of each label" in render(report) and "the 8 worst labels" in render(RUNS["120 labels"]())


def test_names_lose_the_folder_that_all_lie_in() -> None:
    assert shortened(["/a/b/cat/1.jpg", "/a/b/dog/1.jpg"]) == ["cat/1.jpg", "dog/1.jpg"]
    assert shortened(["/a/b/cat/1.jpg"]) == ["1.jpg"] and shortened([]) == []
    assert shortened(["/s is a closing tag", "a text"]) == ["/s is a closing tag", "a text"]
    assert shortened(["a.jpg", "b/c.jpg"]) == ["a.jpg", "b/c.jpg"]


def test_a_checkpoint_that_is_not_there_is_not_named(own_folder: Path) -> None:
    (own_folder / "last.ckpt").touch()
    commands = {"go on": "x fit --ckpt_path last.ckpt", "use": "x predict --ckpt_path best.ckpt", "again": "x fit"}
    assert list(runnable_commands(commands)) == ["go on", "again"]


def test_the_second_picture_of_a_pair_is_explained() -> None:
    sample = {"name": "a", "label": 0, "predicted": 1, "probability": 0.5, "picture": "data:image/jpeg;base64,"}
    with_both = some(2, mistakes=[sample | {"saliency": "data:image/jpeg;base64,"}])
    assert "the brighter the more the answer hangs on it" in render(with_both)
    assert "the brighter" not in render(some(2, mistakes=[sample]))


def finished(
    folder: Path, report: dict[str, Any], logits: torch.Tensor, labels: torch.Tensor, names: list[str]
) -> Path:
    """A run's folder, as far as a comparison reads it."""
    found = Predictions(logits, labels, torch.arange(len(labels)), names)
    write_page(report, folder)
    save_predictions(folder / "predictions" / "test.safetensors", found, None)
    return folder


def two_runs(folder: Path, report: dict[str, Any], labels: torch.Tensor, width: int, names: list[str]) -> list[Path]:
    generator = torch.Generator().manual_seed(3)
    target = labels[:, None] if labels.ndim == 1 and labels.is_floating_point() else labels
    target = torch.nn.functional.one_hot(labels, width) if not labels.is_floating_point() else target
    runs = []
    for name, noise in (("first", 3.0), ("other", 0.5)):
        logits = 2 * target - 1 + noise * torch.randn(len(labels), width, generator=generator)
        runs.append(finished(folder / name, report, logits.float(), labels, names))
    return runs


@pytest.mark.parametrize("kind", ["classes", "labels", "scores"])
def test_runs_of_every_kind_are_compared(kind: str, own_folder: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    report, width, names = some(3), 3, [f"{n}.jpg" for n in range(200)]
    labels = torch.randint(3, (200,), generator=generator)
    figures = ["accuracy", "macro F1", "loss"]
    if kind == "labels":
        report, width, labels = with_labels(some(3), ["a", "b", "c"]), 3, (torch.rand(200, 3) < 0.4).float()
        figures = ["F1, all labels", "macro F1", "every label right", "loss"]
    if kind == "scores":
        report, width, labels = with_scores(some(3)), 1, torch.randn(200, generator=generator)
        figures = ["Spearman", "mean absolute error", "mean squared error"]
    runs = two_runs(own_folder, report, labels, width, names)
    page = main(runs)
    assert page == own_folder / "comparison.html", "beside the first of them"
    content = page.read_text()
    for figure in figures:
        found = re.search(
            rf"B (is better than|is worse than|cannot be told apart from) A: ([^ ]+)[^(]* of {figure} \(", content
        )
        assert found is not None, figure
        falls = figure.startswith("mean") or figure == "loss"
        assert found[1] == "is better than" and found[2].startswith("-" if falls else "+"), figure
    assert '<div class="scroll"><table>' in content


@pytest.mark.slow
def test_runs_on_other_test_sets_are_told_so(own_folder: Path) -> None:
    labels, names = torch.arange(60) % 3, [f"{n}.jpg" for n in range(60)]
    first, other = two_runs(own_folder, some(3), labels, 3, names)
    kept = load_predictions(other / "predictions" / "test.safetensors")
    assert kept is not None

    def refused(report: dict[str, Any], predictions: Predictions, words: str) -> None:
        write_page(report, other)
        save_predictions(other / "predictions" / "test.safetensors", predictions, None)
        with pytest.raises(ValueError, match=words):
            main([first, other])

    refused(some(3), kept._replace(names=names[::-1]), "samples have other names")
    refused(some(3), kept.part(torch.arange(60) < 50), "50 and 60.*one has more samples")
    refused(some(3), kept._replace(labels=kept.labels.flip(0)), "of the labels are not the same")
    refused(some(3, class_names=["b", "a", "c"]), kept, "classes have other names or another order")
    refused(with_scores(some(3)), Predictions(torch.zeros(60, 1), torch.zeros(60), kept.rows, names), "predicts scores")
