"""Several runs on one page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.report.comparison import main
from callbacks.report.comparison import main as report_of
from callbacks.report.outputs import Predictions, load_predictions, save_predictions
from callbacks.report.page import write_page
from recipes.vision import main as vision
from tests.callbacks.report.conftest import QUICK, loaded, some, with_labels, with_scores


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


@pytest.mark.slow
def test_two_runs_are_compared_on_the_same_samples(own_folder: Path) -> None:
    runs = []
    for epochs in (1, 3):
        cli = vision([*QUICK, "--test", f"--trainer.max_epochs={epochs}", "--model.weights=null"])
        runs.append(cli.folder)
    page = report_of(runs, own_folder / "comparison.html")
    content = page.read_text()
    first, second = (loaded(run / "predictions" / "test.safetensors") for run in runs)
    right = [found.logits.argmax(1) == found.labels for found in (first, second)]
    gain = 100 * float(right[1].double().mean() - right[0].double().mean())
    assert f"{gain:+.1f} points of accuracy" in content and "McNemar" in content
    assert " of macro F1 (95% interval" in content and " of loss (95% interval" in content
    assert f"{int((right[1] & ~right[0]).sum())} that B gets right and A wrong" in content
    differences = content.split("What differs in their configs")[1].split("</pre>")[0]
    assert [line.split() for line in differences.splitlines() if "max_epochs" in line][-1] == ["+", "max_epochs:", "3"]
    other = vision([*QUICK, "--test", "--trainer.max_epochs=1", "--data.classes=[0,1,2,3,4]"])
    with pytest.raises(
        ValueError, match="evaluated on other samples .* compare runs with the same data, seed and split"
    ):
        report_of([runs[0], other.folder])
    with pytest.raises(FileNotFoundError, match="give the folder of a finished run"):
        report_of([own_folder])
