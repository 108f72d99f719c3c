"""The quadratic penalty, its gradient, its proximal step and the merging of tasks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from callbacks.ewc.penalty import add_penalty_gradient_, merge, penalty, proximal_step_


def quadratic() -> tuple[dict[str, nn.Parameter], dict[str, Tensor], dict[str, Tensor]]:
    parameters = {
        "a": nn.Parameter(torch.randn(5, 3)),
        "b": nn.Parameter(torch.randn(4)),
        "free": nn.Parameter(torch.ones(2)),
    }
    anchor = {"a": torch.randn(5, 3), "b": torch.randn(4)}
    fisher = {"a": torch.rand(5, 3), "b": torch.rand(4)}
    return parameters, anchor, fisher


def test_penalty_has_its_half_and_its_gradient_is_autograds() -> None:
    parameters, anchor, fisher = quadratic()
    value = penalty(parameters, anchor, fisher, 3.0)
    by_hand = sum(float((fisher[n] * (parameters[n].detach() - anchor[n]).square()).sum()) for n in fisher)
    assert value.item() == pytest.approx(1.5 * by_hand)
    expected = torch.autograd.grad(value, [parameters["a"], parameters["b"]])
    parameters["a"].grad = torch.ones(5, 3)
    add_penalty_gradient_(parameters, anchor, fisher, 3.0)
    assert parameters["b"].grad is not None and parameters["free"].grad is None
    torch.testing.assert_close(parameters["a"].grad, 1 + expected[0])
    torch.testing.assert_close(parameters["b"].grad, expected[1])


def test_large_and_channels_last_tensors_too() -> None:
    big = nn.Parameter(torch.randn(600, 1000))  # more than a block
    last = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    parameters = {"big": big, "last": last}
    anchor, fisher = (
        {name: make(p).contiguous() for name, p in parameters.items()} for make in (torch.zeros_like, torch.rand_like)
    )
    add_penalty_gradient_(parameters, anchor, fisher, 2.0)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    proximal_step_(parameters, anchor, fisher, {"big": 0.5, "last": torch.tensor(2.0)})
    for name, c in (("big", 0.5), ("last", 2.0)):
        torch.testing.assert_close(parameters[name].grad, 2 * fisher[name] * before[name])
        torch.testing.assert_close(parameters[name].detach(), before[name] / (1 + c * fisher[name]))


def test_proximal_step_is_the_implicit_one_at_any_coefficient() -> None:
    parameters, anchor, fisher = quadratic()
    fisher["a"][0] = 0
    before = {name: p.detach().clone() for name, p in parameters.items()}
    proximal_step_(parameters, anchor, fisher, {"a": 0.7, "b": 1e30, "free": 1.0})
    expected = (before["a"] + 0.7 * fisher["a"] * anchor["a"]) / (1 + 0.7 * fisher["a"])
    torch.testing.assert_close(parameters["a"].detach(), expected)
    assert torch.equal(parameters["a"][0], before["a"][0])  # no Fisher, no hold
    torch.testing.assert_close(parameters["b"].detach(), anchor["b"])
    assert torch.equal(parameters["free"], before["free"])
    after = parameters["a"].detach().clone()
    proximal_step_(parameters, anchor, fisher, {"a": 0.0})
    assert torch.equal(parameters["a"], after)


def test_frozen_parameters_are_left_alone() -> None:
    parameters, anchor, fisher = quadratic()
    parameters["a"].requires_grad_(False)
    before = parameters["a"].clone()
    add_penalty_gradient_(parameters, anchor, fisher, 1.0)
    proximal_step_(parameters, anchor, fisher, {"a": 1.0, "b": 1.0})
    assert parameters["a"].grad is None and torch.equal(parameters["a"], before)


def test_a_sparse_gradient_is_refused() -> None:
    words = nn.Embedding(5, 2, sparse=True)
    words(torch.tensor([1])).sum().backward()
    table = {"weight": torch.ones(5, 2)}
    with pytest.raises(RuntimeError, match="weight has a sparse gradient.*mode proximal"):
        add_penalty_gradient_({"weight": words.weight}, table, table, 1.0)


def test_merged_tasks_are_the_sum_of_their_penalties() -> None:
    parameters, anchor, fisher = quadratic()
    _, anchor2, fisher2 = quadratic()
    fisher["a"][0], fisher2["a"][0] = 0, 0
    del fisher2["b"], anchor2["b"]
    merged, centre, constant = merge((fisher, anchor), (fisher2, anchor2))
    expected = penalty(parameters, anchor, fisher, 2.0) + penalty(parameters, anchor2, fisher2, 2.0)
    torch.testing.assert_close(penalty(parameters, centre, merged, 2.0) + constant, expected)
    online, newest, constant = merge((fisher, anchor), (fisher2, anchor2), decay=0.5)
    torch.testing.assert_close(online["a"], 0.5 * fisher["a"] + fisher2["a"])
    torch.testing.assert_close(online["b"], 0.5 * fisher["b"])
    assert torch.equal(newest["a"], anchor2["a"]) and torch.equal(newest["b"], anchor["b"]) and constant == 0
