"""Weights between nets: exact at the ends, one tensor at a time, barriers where there are some."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from recipes.parts.soups import barrier, fill, greedy, interpolate, mean_of, remeasure_norms, search_blocks


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2))
    made(torch.rand(8, 3, 6, 6))
    return made


def test_the_ends_of_a_line_are_the_nets_bit_for_bit() -> None:
    start, end = net(0).state_dict(), net(1).state_dict()
    end["0.weight"][0, 0, 0, 0] = 1e30  # beside which (end - start) + start is not end
    for a, wanted in ((0.0, start), (1.0, end)):
        found = dict(interpolate(start, end, a))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_between_and_beyond_the_ends() -> None:
    start, end = {"w": torch.tensor([0.0]), "n": torch.tensor(3)}, {"w": torch.tensor([2.0]), "n": torch.tensor(5)}
    end["new"] = torch.tensor([7.0])
    assert {a: dict(interpolate(start, end, a))["w"].item() for a in (0.25, 1.5, -0.5)} == {
        0.25: 0.5,
        1.5: 3.0,
        -0.5: -1.0,
    }
    found = dict(interpolate(start, end, 0.25))
    assert found["n"] == 5 and found["new"] == 7, "integers, and what the start lacks, are the end's"
    found = dict(interpolate(start | {"v": start["w"]}, end | {"v": end["w"]}, {"w": 0.5}))
    assert found["w"] == 1 and found["v"] == 2, "a name without a place is the end's"
    half = {name: tensor.half() for name, tensor in end.items() if name == "w"}
    assert dict(interpolate({"w": torch.tensor([0.0]).half()}, half, 0.25))["w"].dtype == torch.half


def test_a_mean_of_one_is_itself_and_of_several_their_mean() -> None:
    nets = [net(seed).state_dict() for seed in range(3)]
    alone = dict(mean_of(nets[:1]))
    assert all(torch.equal(alone[name], tensor) for name, tensor in nets[0].items())
    for name, tensor in mean_of(nets):
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.stack([one[name] for one in nets]).mean(0))
        else:
            assert torch.equal(tensor, nets[0][name])


def test_a_soup_reads_one_tensor_of_each_net_at_a_time() -> None:
    read: list[str] = []

    class Reads(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            read.append(name)
            return super().__getitem__(name)

    first, other = net(0).state_dict(), Reads(net(1).state_dict())
    mixed = mean_of([first, other])
    next(mixed)
    assert read == ["0.weight"]


def test_norms_are_those_of_the_batches_and_dropout_stays_off() -> None:
    made, batches = net(0).eval(), [torch.rand(8, 3, 6, 6) + shift for shift in (0.0, 1.0)]
    assert remeasure_norms(made, lambda: batches, made)
    seen = torch.stack([made[0](batch).mean((0, 2, 3)) for batch in batches]).mean(0)  # type: ignore[index]
    torch.testing.assert_close(made[1].running_mean, seen)  # type: ignore[index]
    norm = made[1]  # type: ignore[index]
    assert norm.momentum == 0.1 and not norm.training and not made.training
    torch.testing.assert_close(made(batches[0]), made(batches[0]))
    assert not remeasure_norms(nn.Linear(2, 2), lambda: batches, made)


def test_a_net_takes_weights_and_no_others() -> None:
    made = net(0)
    fill(made, net(1).state_dict().items())
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in net(1).state_dict().items())
    with pytest.raises(KeyError):
        fill(made, [("other", torch.zeros(1))])


def test_a_barrier_is_how_far_the_worst_place_lies_below_the_straight_line() -> None:
    assert barrier({0.0: 0.9, 0.5: 0.5, 1.0: 0.7}, rises=True) == pytest.approx(0.3)
    assert barrier({0.0: 0.9, 0.5: 0.85, 1.0: 0.7}, rises=True) == 0
    assert barrier({0.0: 0.1, 0.5: 0.5, 1.0: 0.3}, rises=False) == pytest.approx(0.3)
    assert barrier({0.0: 0.9, 1.0: 0.7, 1.5: 0.1}, rises=True) == 0, "beyond the ends is not between them"


def test_a_greedy_soup_takes_what_does_no_harm() -> None:
    worth = {"a": 0.9, "ab": 0.8, "ac": 0.9, "acd": 0.95}
    assert greedy("abcd", lambda names: worth["".join(names)]) == ("a", "c", "d")


def test_blocks_are_searched_from_the_last_and_only_for_the_better() -> None:
    wanted = {"stem": 0.0, "body": 0.5, "head": 1.0}
    tried: list[dict[str, float]] = []

    def score(at: dict[str, float]) -> float:
        tried.append(dict(at))
        return -sum(abs(at[block] - wanted[block]) for block in at)

    assert search_blocks(dict.fromkeys(wanted, 0.5), (0.0, 0.5, 1.0), score) == wanted  # type: ignore[arg-type]
    assert [next(block for block in at if at[block] != 0.5) for at in tried[1:2]] == ["head"]
    assert len(tried) <= 1 + 3 * 3
