"""What answers otherwise than the checkpoint is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.deploy import formats
from recipes.deploy.check import compare
from recipes.deploy.graphs import ImageGraph
from recipes.deploy.snippets import PIXELS
from recipes.export import export, main


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["0 is white", "16 bits", "transparent", "turned", "broken"])
def test_lines_that_read_otherwise_are_refused(checkpoint: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = {
        "0 is white": ("255 - grey if inverted else grey", "grey"),
        "16 bits": ("* 255 // most", ""),
        "transparent": ("image.has_transparency_data", "False"),
        "turned": ("if turn in TURNS", "if False"),
        "broken": ("import numpy as np", "import numpi as np"),
    }[fault]
    assert old in PIXELS
    monkeypatch.setattr(formats, "PIXELS", PIXELS.replace(old, new))
    with pytest.raises(ValueError, match="the lines that read images"):
        export(checkpoint, "safetensors")  # these lines are the same in every form, and this one is written at once
    assert not list(checkpoint.parents[1].glob("*_safetensors"))


class Wrong(ImageGraph):
    """A graph that forgets the normalisation."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().forward(images * self.std + self.mean)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_what_answers_otherwise_is_refused_and_nothing_is_left(
    checkpoint: Path, own_folder: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(formats, "ImageGraph", Wrong)
    with pytest.raises(SystemExit) as ended:
        main([str(checkpoint), "--format", form, "--out", "made"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the export is not the checkpoint: outputs differ by up to")
    assert not [path for path in own_folder.iterdir() if "made" in path.name]


def test_ties_are_no_disagreement_and_other_answers_are() -> None:
    expected = torch.tensor([[1.0, 1.0 + 1e-6], [3.0, 0.0]])
    other = torch.tensor([[1.0 + 1e-6, 1.0], [3.0, 0.0]])
    found = compare(expected, other, "single_label_classification")
    assert found["agreement"] == 1 and found["largest_difference"] == pytest.approx(1e-6, rel=0.2)
    for wrong in (expected.flip(1), expected + torch.nan, expected + 1e-2):
        with pytest.raises(ValueError, match="nothing was written"):
            compare(expected, wrong, "single_label_classification")
    with pytest.raises(ValueError, match="50.0 % of the answers"):
        compare(torch.tensor([[9.0, -9.0]]), torch.tensor([[9.0, 9.0]]), "multi_label_classification")
    assert compare(torch.tensor([[0.0]]), torch.tensor([[1e-7]]), "regression")["agreement"] == 1
