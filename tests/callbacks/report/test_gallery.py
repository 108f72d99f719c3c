"""What a report shows of samples, and looks at before the fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks import Report
from callbacks.report.gallery import furthest, section
from callbacks.report.outputs import Predictions
from datamodules import Digits
from recipes.text import main as text
from recipes.vision import VisionClassifier
from recipes.vision import main as vision
from tests.callbacks.report.conftest import QUICK, check_page, read
from tests.nets import Net, quiet


@pytest.mark.slow
def test_texts_are_shown_with_what_the_prediction_depends_on(own_folder: Path) -> None:
    rows = "".join(f"{word} number {n},{word}\n" for n in range(20) for word in ("cat", "dog", "emu"))
    (own_folder / "t.csv").write_text(f"text,label\n{rows}")
    options = ["--data.train_file=t.csv", "--model.encoder=docstrings_bert", "--trainer.max_epochs=1"]
    cli = text(["fit", "--config", "text/csv_minilm", *options, "--trainer.enable_progress_bar=false"])
    found = read(cli.folder)
    shown = found["mistakes"] + found["uncertain"]
    assert shown and all(item["pieces"] for item in shown)
    for item in shown:
        written = "".join(piece for piece, _ in item["pieces"]).split()
        assert "".join(written) == item["name"].replace(" ", ""), "special tokens are omitted"
        assert max(weight for _, weight in item["pieces"]) <= 1
    check_page(cli.folder)


@pytest.mark.slow
def test_a_saliency_that_fails_costs_the_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("of memory")

    monkeypatch.setattr("recipes.vision.grad_cam", fail)
    found = read(vision([*QUICK, "--test", "--trainer.max_epochs=1"]).folder)
    assert found["uncertain"] and "picture" not in found["uncertain"][0]


@pytest.mark.slow
def test_evaluating_the_start_changes_no_training() -> None:
    class Draws(VisionClassifier):
        def embed(self, batch: Any) -> Tensor:
            torch.rand(3)  # as a net does that is random in evaluation, too
            return super().embed(batch)

    nets = []
    for callbacks in ([], [Report("page")]):
        torch.manual_seed(0)
        net = Draws(10, backbone="resnet8", image_size=8, head_dropout=0.5)
        quiet(callbacks=callbacks, max_epochs=3).fit(net, Digits(image_size=8, batch_size=64))
        nets.append(net)
    assert callbacks[0].progress["start"]
    assert all(torch.equal(*pair) for pair in zip(*(net.state_dict().values() for net in nets), strict=True))


def test_the_furthest_scores_have_short_names() -> None:
    labels, scores = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, -2.0, 3.0])
    found = Predictions(scores[:, None], labels, torch.arange(3), ["/data/a.csv", "/data/" + 600 * "b", "/data/c.csv"])
    first, second = furthest(found, scores, 2)
    assert first == {"name": 500 * "b", "label": 2.0, "predicted": -2.0}
    assert second == {"name": "a.csv", "label": 1.0, "predicted": 1.5}


def test_of_nothing_there_is_nothing_to_say() -> None:
    empty = Predictions(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), [])
    for found in (None, empty):
        said = section(quiet(), Net(), "val", found, 5)
        assert said["evaluation"] is said["labels"] is said["scores"] is None and not said["mistakes"]
