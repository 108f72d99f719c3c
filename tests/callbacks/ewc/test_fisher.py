"""The diagonal Fisher information, held against closed forms and autograd."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from callbacks.ewc.fisher import fisher_diagonal, score_vectors
from tests.callbacks.ewc.conftest import largest_difference, regression


@pytest.mark.parametrize("way", ["layers", "loop", "vmap"])
@pytest.mark.parametrize("classes", [2, 4, 10])
def test_fisher_is_the_analytic_one_of_a_softmax_regression(way: Any, classes: int) -> None:
    model, x, expected = regression(classes)
    found, count = fisher_diagonal(model, x.split(16), dict(model.named_parameters()), module=model, way=way)
    assert count == 64
    assert largest_difference(found, expected) < 1e-5


@pytest.mark.parametrize("sure", [0.0, 60.0])
def test_vectors_of_exact_have_the_scores_covariance_also_where_the_model_is_sure(sure: float) -> None:
    z = torch.randn(5, 7, dtype=torch.float64)
    z[:, 2] += sure
    p = z.softmax(1)
    v = torch.stack(list(score_vectors(z, "exact")))
    assert len(v) == 6  # one backward pass fewer than classes
    others = torch.stack([p[:, torch.arange(7) != k].sum(1) for k in range(7)], 1)  # 1 - p would round to 0
    expected = -p.unsqueeze(2) * p.unsqueeze(1)
    expected.diagonal(dim1=1, dim2=2).copy_(p * others)
    torch.testing.assert_close(torch.einsum("sbi,sbj->bij", v, v), expected, rtol=1e-9, atol=1e-40)


@pytest.mark.parametrize("estimator", ["exact", "signs"])
def test_fisher_does_not_depend_on_the_batch_size(estimator: Any) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5))
    model[1].running_mean.normal_()
    x = torch.randn(64, 2, 6, 6)
    found = [
        fisher_diagonal(
            model, x.split(size), dict(model.named_parameters()), module=model, estimator=estimator, draws=2
        )[0]
        for size in (1, 8, 64, 24)
    ]
    assert all(largest_difference(other, found[0]) < 1e-5 for other in found[1:])
    batch_gradient = torch.autograd.grad(model(x).log_softmax(1)[:, 0].mean(), model[0].weight)[0].square()
    assert batch_gradient.sum() < 0.5 * found[0]["0.weight"].sum()  # what squaring a batch's gradient would give


@pytest.mark.parametrize("estimator", ["exact", "signs"])
def test_classes_that_are_masked_out_do_no_harm(estimator: Any) -> None:
    z = torch.randn(4, 6)
    few = torch.stack(list(score_vectors(z[:, 1:4], estimator, positions=range(4))))
    z[:, [0, 4, 5]] = -math.inf
    v = torch.stack(list(score_vectors(z, estimator, positions=range(4))))
    assert v[:, :, [0, 4, 5]].eq(0).all() and torch.isfinite(v).all()
    if estimator == "exact":
        spread, expected = (torch.einsum("sbi,sbj->bij", t, t) for t in (v[:, :, 1:4], few))
        torch.testing.assert_close(spread, expected)


@pytest.mark.slow
def test_draws_are_unbiased_and_seeded() -> None:
    model, x, expected = regression()

    def run(seed: int) -> dict[str, Tensor]:
        return fisher_diagonal(
            model, [x], dict(model.named_parameters()), module=model, estimator="signs", seed=seed, way="layers"
        )[0]

    many = torch.stack([run(seed)["weight"] for seed in range(300)])
    error = (many.mean(0) - expected["weight"]) / (many.std(0) / math.sqrt(300))
    assert error.abs().max() < 4.5  # standard errors, 24 numbers
    assert (many.mean(0) / expected["weight"] - 1).abs().max() < 0.1
    assert torch.equal(run(7)["weight"], run(7)["weight"])
    assert not torch.equal(run(7)["weight"], run(8)["weight"])


def test_draws_follow_the_position_of_a_sample_not_its_batch_or_rank() -> None:
    model, x, _ = regression()
    named = dict(model.named_parameters())
    whole, _ = fisher_diagonal(model, [x], named, module=model, estimator="signs", positions=range(64))
    parts = [
        fisher_diagonal(model, x[r::2].split(8), named, module=model, estimator="signs", positions=range(r, 64, 2))[0]
        for r in range(2)
    ]
    joined = {name: (parts[0][name] + parts[1][name]) / 2 for name in whole}
    assert largest_difference(joined, whole) < 1e-5


def test_more_draws_come_nearer_on_a_model_that_is_sure() -> None:
    model, x, _ = regression(10, 20)
    with torch.no_grad():
        model.weight *= 8
    named = dict(model.named_parameters())
    exact = fisher_diagonal(model, [x], named, module=model)[0]["weight"]

    def error(draws: int) -> float:
        runs = [
            fisher_diagonal(model, [x], named, module=model, estimator="signs", draws=draws, seed=seed, way="layers")[0]
            for seed in range(10)
        ]
        return sum(float((run["weight"] - exact).norm()) for run in runs)

    assert error(8) < 0.6 * error(1)


def test_many_classes_are_not_expanded_one_by_one() -> None:
    model, x, _ = regression(11)
    named = dict(model.named_parameters())
    auto, signs = (
        fisher_diagonal(model, [x], named, module=model, estimator=estimator)[0]["weight"]  # type: ignore[arg-type]
        for estimator in ("auto", "signs")
    )
    assert torch.equal(auto, signs)


def test_empirical_only_by_choice() -> None:
    model, x, _ = regression()
    named = dict(model.named_parameters())
    y = model(x).argmax(1)

    def run(estimator: Any, labels: Tensor) -> Tensor:
        return fisher_diagonal(
            lambda b: model(b[0]), [(x, labels)], named, module=model, labels=lambda b: b[1], estimator=estimator
        )[0]["weight"]

    assert torch.equal(run("auto", y), run("auto", y.flip(0)))
    scores = F.one_hot(y, 4) - model(x).detach().softmax(1)
    torch.testing.assert_close(run("empirical", y), scores.square().T @ x.square() / 64)
    with pytest.raises(ValueError, match="the empirical Fisher needs true labels"):
        fisher_diagonal(model, [x], named, module=model, estimator="empirical")


@pytest.mark.parametrize("way", ["layers", "loop", "vmap"])
def test_padding_does_not_count(way: Any) -> None:
    model, x, _ = regression()
    named = dict(model.named_parameters())
    y = torch.zeros(64, dtype=torch.long)
    y[40:] = -100
    run = lambda *batch: fisher_diagonal(  # noqa: E731
        lambda b: model(b[0]), [batch], named, module=model, labels=lambda b: b[1], way=way
    )
    padded, count = run(x, y)
    assert count == 40
    assert largest_difference(padded, run(x[:40], y[:40])[0]) < 1e-6
    nothing, count = run(x, torch.full((64,), -100))
    assert count == 0 and all(t.eq(0).all() for t in nothing.values())


def test_evaluation_mode_float32_and_no_trace() -> None:
    seen: list[tuple[bool, bool, torch.dtype]] = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            seen.append((self.training, torch.is_autocast_enabled("cpu"), out.dtype))
            return out

    net = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.9), Spy(6, 3)).train()
    net[0].eval()
    before = copy.deepcopy(net.state_dict())
    net[2].weight.grad = torch.ones(3, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, _ = fisher_diagonal(net, [torch.randn(8, 6)], dict(net.named_parameters()), module=net)
    assert set(seen) == {(False, False, torch.float32)}
    assert [part.training for part in net] == [False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net[2].weight.grad.eq(1).all() and net[2].bias.grad is None
    assert found["2.weight"].gt(0).all()


def test_sixteen_bit_weights_are_widened_during_it() -> None:
    model, x, _ = regression()
    expected = fisher_diagonal(model, [x], dict(model.named_parameters()), module=model)[0]
    model.bfloat16()
    before = copy.deepcopy(model.state_dict())
    found = fisher_diagonal(model, [x], dict(model.named_parameters()), module=model)[0]
    assert found["weight"].dtype == torch.float32
    assert largest_difference(found, expected) < 0.05
    assert all(
        value.dtype == torch.bfloat16 and torch.equal(value, before[n]) for n, value in model.state_dict().items()
    )


def test_what_is_no_classifier_is_refused() -> None:
    model = nn.Linear(3, 1)
    named = dict(model.named_parameters())
    with pytest.raises(
        ValueError, match=r"expected logits of shape \(batch, classes\) with 2 classes or more.*\(2, 1\)"
    ):
        fisher_diagonal(model, [torch.randn(4, 3)], named, module=model)
    with pytest.raises(ValueError, match="received dict"):
        fisher_diagonal(lambda b: {}, [torch.randn(4, 3)], named, module=model)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="no tensor of the batch, a SimpleNamespace, has its samples in the first"):
        fisher_diagonal(lambda b: torch.zeros(4, 2), [SimpleNamespace()], named, module=model)
