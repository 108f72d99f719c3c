"""Scores, intervals and p-values: those of scikit-learn and SciPy."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize_scalar
from sklearn import metrics
from sklearn.calibration import calibration_curve

from callbacks.report.evaluation import (
    calibration,
    class_centres,
    class_scores,
    confusion_matrix,
    evaluation,
    f1_interval,
    fit_temperature,
    in_order,
    label_evaluation,
    nearest_centre,
    score_evaluation,
    spearman,
    worst_pairs,
)
from callbacks.report.intervals import bca, bootstrap, wilson


def made(samples: int = 400, classes: int = 7, skill: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are too sure of themselves, and labels; the last class never comes up and is never said."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes - 1, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator)
    logits[torch.arange(samples), labels] += skill
    logits[:, -1] -= 20
    return 3 * logits, labels


@pytest.mark.parametrize("classes", [2, 7, 121])
def test_scores_are_scikit_learns(classes: int) -> None:
    logits, labels = made(classes=classes + 1)
    found, said = evaluation(logits, labels), logits.argmax(1)
    assert np.array_equal(found["confusion"], metrics.confusion_matrix(labels, said, labels=range(classes + 1)))
    scores = metrics.precision_recall_fscore_support(labels, said, labels=range(classes + 1), zero_division=0)
    for name, expected in zip(("precision", "recall", "f1", "support"), scores, strict=True):
        assert np.allclose(found["classes"][name], expected, atol=1e-12), name
    assert found["accuracy"]["value"] == metrics.accuracy_score(labels, said)
    assert found["f1"]["value"] == pytest.approx(metrics.f1_score(labels, said, average="macro"), abs=1e-12)
    p = logits.double().softmax(1)
    assert found["loss"] == pytest.approx(metrics.log_loss(labels, p, labels=range(classes + 1)), rel=1e-6)
    assert found["majority"]["accuracy"] == max(np.bincount(labels)) / len(labels)
    worst = found["worst_pairs"]
    assert worst == sorted(worst, key=lambda pair: -pair[2])
    assert sum(count for *_, count in worst_pairs(torch.tensor(found["confusion"]), 10**6)) == int(
        (said != labels).sum()
    )


def test_the_calibration_error_is_that_of_scikit_learns_curve() -> None:
    logits, labels = made(2000)
    p = logits.double().softmax(1)
    sure, said = p.max(1)
    right = (said == labels).numpy()
    for bins in (10, 15):
        found = calibration(p, labels, bins)
        accuracy, confidence = calibration_curve(right, sure.numpy(), n_bins=bins)
        counts = np.array([n for n in found.counts if n])
        assert np.allclose([a for a, n in zip(found.accuracy, found.counts, strict=True) if n], accuracy)
        assert np.allclose([c for c, n in zip(found.confidence, found.counts, strict=True) if n], confidence)
        assert found.error == pytest.approx((np.abs(accuracy - confidence) * counts).sum() / len(labels))
    assert calibration(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])).error == 0


def test_the_temperature_is_the_likeliest() -> None:
    logits, labels = made(2000)
    p = logits.double()

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(p / math.exp(log_temperature), labels))

    expected = math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-8}).x)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(expected, rel=1e-4) and found > 1.9, "these logits are too large"
    whole = evaluation(logits, labels, held_out=(logits, labels))["calibration"]
    assert whole["error_with_temperature"] < whole["error"] / 2
    surely = 100 * torch.nn.functional.one_hot(labels, 7).float()
    assert fit_temperature(surely, labels) == pytest.approx(0.05), "without a mistake there is no best one"
    assert fit_temperature(-surely, labels) == pytest.approx(20)


def test_intervals_are_scipys() -> None:
    for right, size in ((7, 30), (176, 179), (1990, 2000), (1, 2)):
        expected = stats.binomtest(right, size).proportion_ci(0.95, method="wilson")
        assert wilson(right, size) == pytest.approx(tuple(expected), abs=1e-12)
    logits, labels = made()
    both = (labels.numpy(), logits.argmax(1).numpy())

    def f1(truth: np.ndarray, answers: np.ndarray) -> float:  # the seventh class is not there
        sizes = np.bincount(truth, minlength=7)[:6] + np.bincount(answers, minlength=7)[:6]
        return float((2 * np.bincount(truth[truth == answers], minlength=7)[:6] / sizes).mean())

    rng = np.random.default_rng(0)
    options = {"paired": True, "vectorized": False, "method": "BCa", "n_resamples": 4000, "rng": rng}
    expected = stats.bootstrap(both, f1, **options).confidence_interval
    assert f1_interval(labels, logits.argmax(1), 7, draws=4000) == pytest.approx(tuple(expected), abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("size, share", [(30, 0.9), (200, 0.9), (200, 0.99), (2000, 0.99)])
def test_the_interval_of_macro_f1_covers_what_it_says(size: int, share: float) -> None:
    classes, generator = 3, torch.Generator().manual_seed(0)
    truth, held, tried = torch.arange(size) % classes, 0, 0
    for _ in range(300):  # classes of one size that err alike: macro F1 is the share that is right
        labels = truth[torch.randint(size, (size,), generator=generator)]
        slip = torch.rand(size, generator=generator) > share
        said = (labels + slip * torch.randint(1, classes, (size,), generator=generator)) % classes
        found = f1_interval(labels, said, classes, draws=200)
        if found is not None:  # else there is no mistake, and the page says so
            tried, held = tried + 1, held + (found[0] <= share <= found[1])
    assert tried > 200 and 0.92 <= held / tried <= 0.985, held / tried


@pytest.mark.parametrize("mistakes", [1, 2, 3])
def test_a_few_mistakes_do_not_reach_up_to_one(mistakes: int) -> None:
    labels = torch.arange(179) % 5
    truth = torch.nn.functional.one_hot(labels, 5).float()
    logits = 5 * truth
    logits[:mistakes] = logits[:mistakes].roll(1, 1)
    found, several = evaluation(logits, labels), label_evaluation(2 * logits - 5, truth)
    expected = stats.binomtest(179 - mistakes, 179).proportion_ci(0.95, method="wilson")
    assert found["accuracy"]["interval"] == pytest.approx(tuple(expected))
    for one in (found["f1"], several["f1"], several["f1_macro"]):
        low, high = one["interval"]
        assert 0.93 < low < one["value"] < high < 1
        if mistakes < 3:  # classes of one size: as the share that is right
            assert high == pytest.approx(expected.high, abs=1e-3)
    wrong = evaluation(-logits[:60].roll(1, 1), labels[:60])
    assert wrong["f1"]["value"] == 0 or wrong["f1"]["interval"][0] > 0


def test_one_sample_and_a_class_that_is_only_said() -> None:
    found = evaluation(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([0]))
    assert found["accuracy"] == {"value": 0, "interval": (0, pytest.approx(0.975))} and found["f1"]["value"] == 0
    scores = class_scores(confusion_matrix(torch.tensor([0]), torch.tensor([1]), 3))
    assert not torch.stack(scores[:3]).any() and scores.support.tolist() == [1, 0, 0]


def test_all_right_is_not_surely_all_right() -> None:
    logits = torch.eye(2).repeat(5, 1)
    found = evaluation(logits, logits.argmax(1))
    low, high = stats.binomtest(10, 10).proportion_ci(0.95)  # two-sided; ours has all of the 5 % below
    assert found["accuracy"]["interval"] == (pytest.approx(low, abs=1e-3), high) and found["f1"]["interval"] is None


def test_a_temperature_without_a_best_value_is_omitted() -> None:
    logits, labels = made()
    surely = 100 * torch.nn.functional.one_hot(labels, 7).float()
    nothing = logits[:0], labels[:0]
    for held_out in (None, nothing, (surely, labels)):
        assert "temperature" not in evaluation(logits, labels, held_out=held_out)["calibration"]


def test_the_nearest_centre_goes_by_direction() -> None:
    features = torch.tensor([[1.0, 0.1], [9.0, 0.0], [0.1, 2.0], [0.0, 0.1]])
    centres = class_centres(features, torch.tensor([0, 0, 2, 2]), 3)
    assert nearest_centre(torch.tensor([[5.0, 1.0], [0.2, 0.9]]), centres).tolist() == [0, 2]
    assert not centres[1].any()


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    evaluation(*made())
    assert torch.equal(before, torch.get_rng_state())


def scores(samples: int = 300, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randn(samples, generator=generator)
    predicted = labels + 0.5 * torch.randn(samples, generator=generator)
    return predicted, (2 * labels).round().clamp(-2, 2) if ties else labels


@pytest.mark.parametrize("ties", [False, True])
def test_scores_of_scores_are_scipys(ties: bool) -> None:
    predicted, labels = scores(ties=ties)
    found = score_evaluation(predicted, labels, mean=0.25)
    assert found["spearman"]["value"] == pytest.approx(stats.spearmanr(predicted, labels).statistic, abs=1e-12)
    assert found["mae"]["value"] == pytest.approx(metrics.mean_absolute_error(labels, predicted), rel=1e-6)
    assert found["mse"]["value"] == pytest.approx(metrics.mean_squared_error(labels, predicted), rel=1e-6)
    assert found["constant"]["mse"] == pytest.approx(float(((labels.double() - 0.25) ** 2).mean()))
    off = (predicted - labels).abs().double().numpy()
    options = {"method": "BCa", "n_resamples": 4000, "rng": np.random.default_rng(0)}
    expected = stats.bootstrap((off,), np.mean, **options).confidence_interval
    assert found["mae"]["interval"] == pytest.approx(tuple(expected), abs=0.006)
    assert sorted(found["points"]) == sorted(zip(labels.tolist(), predicted.tolist(), strict=True))


def test_the_interval_of_a_high_rank_correlation_covers_what_it_says() -> None:
    generator, held = torch.Generator().manual_seed(0), 0
    true = 6 / math.pi * math.asin(0.99 / 2)  # of a normal pair with correlation 0.99
    for _ in range(200):
        first, other = torch.randn(2, 100, generator=generator, dtype=torch.double)
        second = 0.99 * first + math.sqrt(1 - 0.99**2) * other
        codes = in_order(first), in_order(second)
        value = float(spearman(codes, torch.arange(100)[None]))
        low, high = bca(bootstrap(lambda rows, c=codes: spearman(c, rows), 100, draws=300), value, None) or (0, 0)
        held += low <= true <= high < 1
    assert 0.92 <= held / 200 <= 0.98, held / 200


def test_a_constant_score_has_no_rank_correlation() -> None:
    found = score_evaluation(torch.ones(9), torch.arange(9.0))
    assert found["spearman"] is None and found["constant"]["of"] == "these" and found["mae"]["value"] > 0
    assert score_evaluation(torch.ones(1), torch.ones(1))["mae"] == {"value": 0, "interval": None}


def test_scores_of_several_labels_are_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(4)
    labels = (torch.rand(200, 5, generator=generator) < torch.tensor([0.7, 0.4, 0.2, 0.05, 0.0])).float()
    logits = 2 * labels - 1 + torch.randn(200, 5, generator=generator)
    logits[:, 4] = -9.0  # never there, never said
    found, said = label_evaluation(logits, labels), (logits > 0).numpy()
    expected = metrics.precision_recall_fscore_support(labels, said, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert np.allclose(found["labels"][name], values), name
    assert found["f1"]["value"] == pytest.approx(metrics.f1_score(labels, said, average="micro"))
    four = metrics.f1_score(labels[:, :4], said[:, :4], average="macro")
    assert found["f1_macro"]["value"] == pytest.approx(four), "a label that is neither there nor said counts nothing"
    assert found["all_right"]["value"] == metrics.accuracy_score(labels, said)
    for name in ("f1", "f1_macro", "all_right"):
        low, high = found[name]["interval"]
        assert low < found[name]["value"] < high
    p = logits.sigmoid().numpy()
    for at, row in zip(found["thresholds"], np.array(found["curves"]).T, strict=True):
        assert np.allclose(row, metrics.f1_score(labels, p > at, average=None, zero_division=0))
    constants = [np.isin(range(5), some).astype(float) for k in range(1, 6) for some in combinations(range(5), k)]
    best = max(metrics.f1_score(labels, np.tile(c, (200, 1)), average="micro", zero_division=0) for c in constants)
    assert found["constant"]["f1"] == pytest.approx(best)
    assert found["labels"]["f1_at_threshold"] == pytest.approx(np.array(found["curves"]).max(1))
    other = label_evaluation(logits, labels, held_out=(logits - 2, labels))
    lowered = zip(other["labels"]["threshold"][:4], found["labels"]["threshold"][:4], strict=True)
    assert all(first < second for first, second in lowered) and other["threshold_from"] == "validation"
    assert other["labels"]["threshold"][4] == 0.5, "where there is nothing to find one on"


def test_the_interval_of_several_labels_f1_is_scipys() -> None:
    generator = torch.Generator().manual_seed(5)
    labels = (torch.rand(150, 3, generator=generator) < 0.3).float()
    logits = 3 * labels - 1.5 + torch.randn(150, 3, generator=generator)
    found, rows = label_evaluation(logits, labels), np.arange(150)
    for name, average in (("f1", "micro"), ("f1_macro", "macro")):

        def f1(some: np.ndarray, average: str = average) -> float:
            truth, said = labels.numpy()[some] > 0, logits.numpy()[some] > 0
            right, size = (truth & said).sum(0), truth.sum(0) + said.sum(0)
            return float(2 * right.sum() / size.sum() if average == "micro" else (2 * right / size).mean())

        options = {"vectorized": False, "method": "BCa", "n_resamples": 2000, "rng": np.random.default_rng(0)}
        expected = stats.bootstrap((rows,), f1, **options).confidence_interval
        assert found[name]["interval"] == pytest.approx(tuple(expected), abs=0.015), name
