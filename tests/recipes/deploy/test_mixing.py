"""Nets that can be mixed, and the checkpoint that a mixture becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.deploy.mixing import End, mixable, norms_differ, write_run
from recipes.deploy.restored import restore
from recipes.parts.checkpoints import is_whole, load_checkpoint
from recipes.parts.soups import mean_of
from tests.recipes.deploy.exports import NEW, fit_digits

A = {"trunk.w": torch.zeros(2, 2), "trunk.running_mean": torch.zeros(2), "head.w": torch.zeros(3, 2)}


def test_what_two_nets_share() -> None:
    names = ("a", "b")
    other = A | {"head.w": torch.zeros(5, 2)}
    assert mixable(A, other, ["head"], names) == ["trunk.w", "trunk.running_mean"]
    assert mixable(A, A, [], names) == list(A)
    pretrained = {"trunk.w": A["trunk.w"]}
    assert mixable(pretrained, A, ["head"], names, whole=False) == ["trunk.w"]
    for start, words in (
        (other, r"a and b are different nets, .*head\.w is \(5, 2\) in one and \(3, 2\) in the other"),
        (pretrained, r"head\.w is not there in one"),
        (A | {"more.w": torch.zeros(1)}, r"more\.w is \(1,\) in one and not there in the other"),
    ):
        with pytest.raises(ValueError, match=words):
            mixable(start, A, [], names)
    with pytest.raises(ValueError, match="no weight in common"):
        mixable({}, A, [], names, whole=False)


def test_statistics_that_differ_are_seen() -> None:
    assert not norms_differ([A, A | {"trunk.w": torch.ones(2, 2)}])
    assert norms_differ([A, A, A | {"trunk.running_mean": torch.ones(2)}])


@pytest.mark.slow
def test_a_slim_checkpoint_becomes_a_whole_one(own_folder: Path) -> None:
    run = fit_digits(*NEW[:-1], "--config=strategy/probe", "--model.save_base=false", "--trainer.max_epochs=1")
    end = End(run)
    assert not is_whole(load_checkpoint(end.path))
    weights = {name: tensor + 1 for name, tensor in end.weights().items()}
    written = write_run(end, weights, own_folder / "mixed")
    content = load_checkpoint(written)
    assert is_whole(content) and content["state_dict"].keys() == weights.keys()
    assert torch.equal(restore(written).model.state_dict()["head.bias"], weights["head.bias"])
    assert "save_base: null" in (own_folder / "mixed" / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory as Linux tells it")
def test_a_soup_of_many_needs_memory_for_few(tmp_path: Path) -> None:
    """Eight files of 40 MB: what is not in a file stays below three of them."""
    for number in range(8):
        weights = {f"w{n}": torch.full((1_000_000,), float(number)) for n in range(10)}
        torch.save({"hyper_parameters": {}, "recipe": {}, "state_dict": weights}, tmp_path / f"{number}.ckpt")
    del weights
    ends = [End(path) for path in sorted(tmp_path.glob("*.ckpt"))]

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before, highest, total = anonymous(), 0, 0.0
    for _, tensor in mean_of([end.weights() for end in ends]):
        highest, total = max(highest, anonymous() - before), total + float(tensor[0])
    assert total == 10 * 3.5
    assert highest < 120e6
