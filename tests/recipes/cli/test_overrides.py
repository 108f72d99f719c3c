"""What a checkpoint brings to a command line, and what beats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from recipes.cli.overrides import take_class_names
from recipes.parts.checkpoints import glance, load_checkpoint
from recipes.vision import main
from tests.recipes.cli.quick import QUICK


@pytest.mark.slow
def test_a_finished_run_is_not_gone_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    folder = main([*QUICK, "--trainer.max_epochs=1"]).folder

    def record() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = record()
    for more, words in (
        ([], "finished, after 1 epoch and 17 steps; to go on, set --trainer.max_epochs above 1"),
        (["--trainer.max_epochs=9", "--trainer.max_steps=17"], "to go on, set --trainer.max_steps above 17"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["fit", f"--ckpt_path={folder}/checkpoints/last.ckpt", *more])
        assert stop.value.code == 0 and words in capsys.readouterr().out
        assert record() == before
    with pytest.warns(UserWarning, match="resumed, but not as if never stopped"):
        cli = main(["fit", f"--ckpt_path={folder}/checkpoints/last.ckpt", "--trainer.max_epochs=2"])
    assert cli.trainer.global_step == 34 and cli.folder == folder


def test_a_checkpoint_is_opened_once_and_not_read_whole_to_ask_its_name(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"recipe": {"name": "vision"}, "state_dict": {"w": torch.arange(5)}}
    torch.save(content, "new.ckpt")
    torch.save(content, "old.ckpt", _use_new_zipfile_serialization=False)
    asked: list[bool] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (asked.append(k["mmap"]), load(*a, **k))[1])
    for name in ("new.ckpt", "new.ckpt", "old.ckpt"):
        assert glance(name)["state_dict"]["w"].tolist() == list(range(5))
    assert asked == [True, False]
    assert load_checkpoint("new.ckpt")["state_dict"]["w"].tolist() == list(range(5)) and asked[-1] is False
    torch.save({**content, "recipe": {"name": "text"}}, "new.ckpt")
    assert glance("new.ckpt")["recipe"]["name"] == "text", "another file of that name"


def test_class_names_come_from_the_checkpoint_where_the_data_name_none(own_folder: Path) -> None:
    torch.save({"MyData": {"class_names": ["b", "a"]}}, "it.ckpt")

    def config(path: str | None, **given: Any) -> Namespace:
        return Namespace(ckpt_path=path, data=Namespace(init_args=Namespace(**given)))

    asked = config("it.ckpt", class_names=None)
    assert take_class_names(asked) and asked.data.init_args.class_names == ["b", "a"]
    for other in (config(None, class_names=None), config("it.ckpt", class_names=["x"]), config("it.ckpt")):
        before = other.clone()
        assert not take_class_names(other) and other == before
