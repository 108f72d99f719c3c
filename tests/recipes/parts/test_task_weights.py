"""Weights of tasks: each rule does to losses and gradients what its source says."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn

from recipes.parts.task_weights import WEIGHTINGS, Branch, TaskWeights, cosines, rows

NAMES = ["a", "b", "c"]


def gram_of(*vectors: list[float]) -> Tensor:
    found = torch.tensor(vectors)
    return found @ found.T


def test_a_branch_is_the_identity_and_its_gradient_is_weighted_late() -> None:
    shared, weights = torch.randn(4, 3, requires_grad=True), torch.ones(2)
    one, other = (Branch.apply(shared, weights, task) for task in range(2))
    assert torch.equal(one, shared) and torch.equal(other, shared)
    loss = one.sum() + 10 * other.sum()
    weights.copy_(torch.tensor([3.0, 0.5]))  # as `balance` does, after the forward pass
    loss.backward()
    assert shared.grad is not None
    torch.testing.assert_close(shared.grad, torch.full((4, 3), 3.0 + 5.0))


def test_rows_are_each_losss_own_gradient() -> None:
    shared, unused = nn.Linear(3, 2), nn.Parameter(torch.zeros(2))
    out = shared(torch.randn(5, 3))
    losses = [out[:, 0].sum(), out.square().sum()]
    parameters = [shared.weight, shared.bias, unused]
    for scale in (1.0, 1024.0):
        found = rows(losses, parameters, scale)
        assert found.shape == (2, 6 + 2 + 2) and not found[:, -2:].any()
        for loss, row in zip(losses, found, strict=True):
            slopes = torch.autograd.grad(loss, parameters[:2], retain_graph=True)
            torch.testing.assert_close(row[:8], torch.cat([slope.flatten() for slope in slopes]))


def test_cosines_of_gradients() -> None:
    found = cosines(gram_of([1.0, 0.0], [1.0, 1.0], [-2.0, 0.0]))
    torch.testing.assert_close(found[0], torch.tensor([1.0, math.sqrt(0.5), -1.0]))
    assert not cosines(gram_of([0.0, 0.0], [1.0, 0.0]))[0, 1]


def test_by_hand() -> None:
    weights = TaskWeights(NAMES, [False] * 3, "fixed", [1.0, 2.0, 0.5])
    losses = torch.tensor([1.0, 2.0, 4.0])
    assert weights.total(losses) == 1 + 4 + 2 and not weights.needs_gram
    assert weights.now().tolist() == [1.0, 2.0, 0.5]
    assert not list(weights.parameters()) and not weights.state_dict()


def test_uncertainty_learns_variances_at_which_losses_are_as_large_as_expected() -> None:
    weights = TaskWeights(NAMES, [True, False, False], "uncertainty")
    losses = torch.tensor([4.0, 0.5, 1.0])
    assert weights.total(losses) == 0.5 * 4 + 0.5 + 1
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        weights.total(losses).backward()
        optimizer.step()
    assert weights.log_variances is not None
    variances = weights.log_variances.exp().tolist()
    # of a squared error the variance is the error itself; d/ds (L exp(-s) + s/2) = 0 at exp(s) = 2 L for the others
    assert variances == pytest.approx([4.0, 1.0, 2.0], rel=1e-2)
    assert weights.now().tolist() == pytest.approx([0.5 / 4, 1.0, 0.5], rel=1e-2)


def test_gradnorm_makes_gradients_equally_long_and_favours_what_lags_behind() -> None:
    weights = TaskWeights(NAMES, [False] * 3, "gradnorm")
    gram = torch.diag(torch.tensor([100.0, 1.0, 0.01]))
    for _ in range(3):
        weights.start()
        weights.balance(gram, torch.tensor([1.0, 5.0, 0.2]))
    lengths = weights.now() * gram.diagonal().sqrt()
    torch.testing.assert_close(lengths, lengths.mean().expand(3))
    assert float(weights.now().sum()) == pytest.approx(3)
    weights.start()
    weights.balance(gram, torch.tensor([0.5, 5.0, 0.2]))  # the first has learnt, the others have not
    lengths = weights.now() * gram.diagonal().sqrt()
    torch.testing.assert_close(lengths[1], 2 * lengths[0])
    torch.testing.assert_close(lengths[1], lengths[2])
    again = TaskWeights(NAMES, [False] * 3, "gradnorm")
    again.load_state_dict(weights.state_dict())
    for one in (weights, again):
        one.start()
        one.balance(gram, torch.tensor([0.4, 4.0, 0.1]))
    assert torch.equal(weights.now(), again.now()), "what it goes by is in the checkpoint"


def test_gradnorm_leaves_a_task_alone_that_had_no_label_so_far() -> None:
    weights = TaskWeights(NAMES, [False] * 3, "gradnorm")
    weights.balance(torch.diag(torch.tensor([4.0, 1.0, 0.0])), torch.tensor([1.0, 1.0, 0.0]))
    assert weights.now().isfinite().all() and weights.now()[2] == 1
    weights.balance(torch.zeros(3, 3), torch.zeros(3))
    assert weights.now().isfinite().all()


@pytest.mark.parametrize("how", ["gradnorm", "upgrad"])
def test_what_overflows_is_not_remembered(how: str) -> None:
    if how == "upgrad":
        pytest.importorskip("torchjd")
    weights = TaskWeights(NAMES, [False] * 3, how)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in weights.state_dict().items()}
    for bad in (math.inf, math.nan):
        weights.start()
        weights.balance(torch.diag(torch.tensor([1.0, bad, 1.0])), torch.ones(3))
        assert weights.now().tolist() == [1, 1, 1]
    assert all(torch.equal(value, before[name]) for name, value in weights.state_dict().items())


@pytest.mark.parametrize("how", WEIGHTINGS)
def test_rules_of_torchjd_change_nothing_where_nothing_conflicts_and_little_elsewhere(how: str) -> None:
    pytest.importorskip("torchjd")
    weights = TaskWeights(NAMES, [False] * 3, how)  # type: ignore[arg-type]
    weights.balance(torch.eye(3), torch.ones(3))
    torch.testing.assert_close(weights.now(), torch.ones(3), rtol=1e-3, atol=1e-3)
    gradients = torch.tensor([[1.0, 0.2, 0.0], [-0.8, 1.0, 0.0], [0.0, 0.0, 1.0]])
    weights.start()
    weights.balance(gradients @ gradients.T, torch.ones(3))
    assert (gradients @ (weights.now() @ gradients)).min() > 0, "a step against it makes every task better"


def test_upgrad_mends_a_conflict_that_a_sum_does_not() -> None:
    pytest.importorskip("torchjd")
    gradients = torch.tensor([[10.0, 0.0], [-1.0, 0.1]])
    worse = (gradients @ gradients.sum(0)).min()
    assert worse < 0, "the second gets worse by the sum of both"
    weights = TaskWeights(["a", "b"], [False] * 2, "upgrad")
    weights.balance(gradients @ gradients.T, torch.ones(2))
    assert (gradients @ (weights.now() @ gradients)).min() > 0.02 * worse  # TorchJD's solver is not exact


def test_what_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="model.balance 'sum' is not known; expected fixed, uncertainty, gradnorm, up"):
        TaskWeights(NAMES, [False] * 3, "sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model.heads.b.weight must be above 0: leave a head out"):
        TaskWeights(NAMES, [False] * 3, "fixed", [1.0, 0.0, 1.0])
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ImportError, match=r"upgrad needs TorchJD: pip install \"finetuning-recipes\[multitask\]\""):
        TaskWeights(NAMES, [False] * 3, "upgrad")
