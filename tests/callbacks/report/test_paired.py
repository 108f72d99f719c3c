"""Two nets on the same samples: p-values and paired intervals are SciPy's, figures scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics
from torch import Tensor

from callbacks.report.outputs import Predictions
from callbacks.report.paired import mcnemar, paired


def predictions(logits: Tensor, labels: Tensor) -> Predictions:
    return Predictions(logits, labels, torch.arange(len(labels)), [])


def answering(right: Tensor) -> Predictions:
    """Of two classes, right where it is said to be."""
    labels = torch.arange(len(right)) % 2
    return predictions(torch.nn.functional.one_hot(torch.where(right, labels, 1 - labels), 2).float(), labels)


@pytest.mark.parametrize("skill", [0.3, 0.6])
def test_comparisons_are_scipys(skill: float) -> None:
    generator = torch.Generator().manual_seed(3)
    first = torch.rand(300, generator=generator) < 0.6
    second = torch.where(torch.rand(300, generator=generator) < skill, True, first)
    only = int((first & ~second).sum()), int((second & ~first).sum())
    assert mcnemar(first, second) == pytest.approx(stats.binomtest(only[0], sum(only), 0.5).pvalue, rel=1e-9)
    assert mcnemar(second, first) == mcnemar(first, second)
    gain = second.double().numpy() - first.double().numpy()
    rng = np.random.default_rng(0)
    expected = stats.bootstrap((gain,), np.mean, method="percentile", n_resamples=4000, rng=rng).confidence_interval
    found = paired(answering(first), answering(second), draws=4000)[0]
    assert found["name"] == "accuracy" and found["interval"] == pytest.approx(tuple(expected), abs=0.008)


def test_runs_that_agree_cannot_be_told_apart() -> None:
    right = torch.tensor([True, False, True])
    assert mcnemar(right, right) == 1
    for figure in paired(answering(right), answering(right)):
        assert figure["interval"] == (0, 0) and figure["gain"] == 0
    assert mcnemar(torch.ones(5000, dtype=torch.bool), torch.zeros(5000, dtype=torch.bool)) < 1e-300


def noisy(kind: str, noise: float, seed: int) -> Predictions:
    """Answers that are off by so much, of labels that do not depend on the seed."""
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    if kind == "scores":
        labels = torch.randn(120, generator=common)
        return predictions(labels[:, None] + noise * torch.randn(120, 1, generator=own), labels)
    if kind == "labels":
        labels = (torch.rand(120, 4, generator=common) < 0.4).float()
        return predictions(2 * labels - 1 + noise * torch.randn(120, 4, generator=own), labels)
    classes = torch.randint(4, (120,), generator=common)
    one_hot = torch.nn.functional.one_hot(classes, 4).float()
    return predictions(one_hot + noise * torch.randn(120, 4, generator=own), classes)


def figure_of(name: str, found: Predictions, some: np.ndarray) -> float:
    """As scikit-learn and SciPy have it."""
    logits, labels = found.logits.double().numpy()[some], found.labels.numpy()[some]
    if found.kind == "scores":
        if name == "Spearman":
            return float(stats.spearmanr(logits[:, 0], labels).statistic)
        measure = metrics.mean_absolute_error if "absolute" in name else metrics.mean_squared_error
        return float(measure(labels, logits[:, 0]))
    said = logits > 0 if found.kind == "labels" else logits.argmax(1)
    if name == "loss":
        if found.kind == "classes":
            p = torch.from_numpy(logits).softmax(1).numpy()
            return float(metrics.log_loss(labels, p, labels=range(4)))
        p = 1 / (1 + np.exp(-logits))
        return float(-(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean())
    if "F1" in name:
        average = "micro" if "all" in name else "macro"
        return float(metrics.f1_score(labels, said, average=average, zero_division=0))
    return float(metrics.accuracy_score(labels, said))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, names",
    [
        ("classes", ["accuracy", "macro F1", "loss"]),
        ("labels", ["F1, all labels", "macro F1", "every label right", "loss"]),
        ("scores", ["Spearman", "mean absolute error", "mean squared error"]),
    ],
)
def test_every_figure_is_compared_by_a_paired_bootstrap(kind: str, names: list[str]) -> None:
    first, other = noisy(kind, 1.0, 1), noisy(kind, 0.5, 2)
    found, everything = paired(first, other, draws=4000), np.arange(120)
    assert [figure["name"] for figure in found] == names
    rng = np.random.default_rng(0)
    drawn = [rng.integers(120, size=120) for _ in range(200)]
    for figure in found:
        name = figure["name"]
        assert figure["first"] == pytest.approx(figure_of(name, first, everything), rel=1e-5)
        assert figure["other"] == pytest.approx(figure_of(name, other, everything), rel=1e-5)
        gains = [figure_of(name, other, some) - figure_of(name, first, some) for some in drawn]
        low, high = np.quantile(gains, [0.025, 0.975])
        assert figure["interval"] == pytest.approx((low, high), abs=0.25 * (high - low)), name
        assert figure["rises"] == (figure["gain"] > 0), "less noise is better"


def test_undefined_figures_are_omitted() -> None:
    constant = predictions(torch.ones(9, 1), torch.arange(9.0))
    assert [figure["name"] for figure in paired(constant, constant)] == ["mean absolute error", "mean squared error"]
