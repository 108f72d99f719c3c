"""What the page says, and what its figures hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import Report
from callbacks.report.evaluation import evaluation
from callbacks.report.page import render, verdict
from tests.callbacks.report.conftest import check_page, some, with_scores
from tests.callbacks.report.test_figures import RUNS
from tests.nets import Net, data, quiet


def answers(right: int, size: int, base: int) -> Any:
    """Two classes, the first of them `base` times."""
    labels = (torch.arange(size) >= base).long()
    said = torch.where(torch.arange(size) < right, labels, 1 - labels)
    return evaluation(5.0 * torch.nn.functional.one_hot(said, 2), labels)


@pytest.mark.parametrize(
    "right, words",
    [(30, "is reliably worse than the largest class"), (62, "not reliably more than the largest"), (90, "reach")],
)
def test_an_interval_beside_the_baseline_is_said_for_what_it_is(right: int, words: str) -> None:
    found = verdict(some(2, evaluation=answers(right, 100, 60)))
    assert words in found
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


def test_scores_are_held_against_the_mean(own_folder: Path) -> None:
    report = RUNS["scores"]()
    assert "always predicting 0.500, the mean of the training scores" in verdict(report)
    assert "Spearman's rank correlation is 1.000" in verdict(report) and "reliably" not in verdict(report)
    assert "reliably worse than the mean" in verdict(with_scores(report, scale=-3.0))
    (own_folder / "report.html").write_text(render(report))
    content = check_page(own_folder)
    assert "a &lt; b" in content and "Largest errors" in content and content.count("mean squared error") == 1


@pytest.mark.slow
def test_several_labels_are_held_against_always_the_same(own_folder: Path) -> None:
    report = RUNS["labels"]()
    content = verdict(report)
    assert "F1 over all labels is" in content and "always predicting" in content and "every label right" in content
    (own_folder / "report.html").write_text(render(report))
    assert check_page(own_folder).count("&lt;class&gt; number 3") >= 1
    assert "F1 of each label" in render(report) and "the 8 worst labels" in render(RUNS["120 labels"]())


def test_the_second_image_of_a_pair_is_explained() -> None:
    sample = {"name": "a", "label": 0, "predicted": 1, "probability": 0.5, "picture": "data:image/jpeg;base64,"}
    with_both = some(2, mistakes=[sample | {"saliency": "data:image/jpeg;base64,"}])
    assert "brighter where the prediction depends on it" in render(with_both)
    assert "brighter" not in render(some(2, mistakes=[sample]))


def test_tensorboard_has_the_matrix_and_the_classes(own_folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(own_folder, name="board", version="0")
    trainer = quiet(callbacks=[Report()], logger=logger)
    trainer.test(Net(), data(8), verbose=False)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload().Tags()
    assert "test/confusion" in events["images"] and "test/classes/text_summary" in events["tensors"]
    assert (Path(logger.log_dir) / "report.html").is_file()


@pytest.mark.parametrize("classes", [2, 25, 120])
def test_few_and_many_classes(classes: int, own_folder: Path) -> None:
    (own_folder / "report.html").write_text(render(some(classes)))
    content = check_page(own_folder)
    found = some(classes)["evaluation"]
    below = found["accuracy"]["interval"][1] < found["majority"]["accuracy"]
    assert f"That is {'reliably worse' if below else 'not reliably more'} than the largest class" in content
    assert content.count("class 7") >= (1 if classes > 2 else 0)


def test_what_comes_from_outside_is_escaped(own_folder: Path) -> None:
    evil = '<script>alert("1")</script>'
    sample = {"name": evil, "label": 0, "predicted": 1, "probability": 0.5, "pieces": [[evil, 0.5]]}
    report = some(2, class_names=[evil, "$x_1$ & \\frac"], title=evil, config=evil, mistakes=[sample])
    report["facts"] = {"model": evil, "doctor": [evil], "commands": {evil: evil}}
    report["data"]["skipped"] = [evil]
    (own_folder / "report.html").write_text(render(report))
    assert "alert" in check_page(own_folder)
