"""What tests of several commands start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.deploy.exports import NETS, fit_pictures


@pytest.fixture
def checkpoint(own_folder: Path) -> Path:
    """A small net that has seen two batches."""
    return fit_pictures(own_folder, *NETS["resnet8"])
