"""The data of a run, or of a config, for a net that is back to life."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from recipes.deploy.data import data_for
from recipes.deploy.restored import restore

pytestmark = pytest.mark.slow


def test_data_are_the_runs_own_or_those_of_a_config(old_and_new: tuple[str, str]) -> None:
    old, new = old_and_new
    net = restore(Path(new, "checkpoints", "best.ckpt"))
    own, other = data_for(net), data_for(net, "vision/quickstart_pretrain")
    assert own.class_names == list("56789") and other.class_names == list("01234")
    assert own.splits["val"].labels.tolist() == data_for(net, new).splits["val"].labels.tolist(), "split as it was"
    assert data_for(net, old).image_size == net.image_size


def test_what_names_no_data_gets_a_sentence(old_and_new: tuple[str, str]) -> None:
    _, new = old_and_new
    shutil.copy(Path(new, "checkpoints", "best.ckpt"), "moved.ckpt")
    moved = restore("moved.ckpt")
    with pytest.raises(FileNotFoundError, match=r"moved away from its run's config\.yaml"):
        data_for(moved)
    with pytest.raises(FileNotFoundError, match="did you mean 'vision/quickstart'"):
        data_for(moved, "vision/quikstart")
    Path("empty.yaml").write_text("model: {}\n")
    with pytest.raises(ValueError, match=r"empty\.yaml names no data"):
        data_for(moved, "empty.yaml")
