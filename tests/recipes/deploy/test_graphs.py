"""A graph holds all that prediction does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.deploy.restored import restore
from recipes.export import export
from tests.recipes.deploy.exports import NETS, fit_pictures


@pytest.mark.slow
def test_predictions_with_mirror_images_are_exported_as_such(own_folder: Path) -> None:
    checkpoint = fit_pictures(own_folder, *NETS["resnet8"], "--model.mirror_at_test=true")
    images = torch.rand(3, 3, 32, 32)
    mirrored = restore(checkpoint).logits(images)
    torch.testing.assert_close(mirrored, restore(checkpoint).logits(images.flip(3)))
    for form in ("torch", "safetensors"):
        export(checkpoint, form)  # or else the check would refuse it
