"""Metrics are scikit-learn's, whatever range the logits have."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics as sklearn

from recipes.parts.metrics import answers, metrics_of

RANGES = {"in [0, 1]": (0.05, 0.95), "below": (-3.0, -1.0), "around": (-2.0, 2.0), "large": (0.0, 50.0)}


@pytest.mark.parametrize("reach", RANGES.values(), ids=RANGES)
def test_several_labels(reach: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    found = metrics_of("multi_label_classification", 4, "val/")
    every, labels = [], []
    for _ in range(5):  # each batch was judged by itself
        logits = torch.rand(8, 4, generator=generator) * (reach[1] - reach[0]) + reach[0]
        target = (torch.rand(8, 4, generator=generator) < 0.6).long()
        found.update(answers("multi_label_classification", logits), target)
        every.append(logits > 0)
        labels.append(target)
    truth, predicted = torch.cat(labels).numpy(), torch.cat(every).numpy()
    expected = {
        "val/f1": sklearn.f1_score(truth, predicted, average="micro", zero_division=0),
        "val/f1_macro": sklearn.f1_score(truth, predicted, average="macro", zero_division=0),
        "val/accuracy": sklearn.accuracy_score(truth, predicted),
    }
    assert {name: float(value) for name, value in found.compute().items()} == pytest.approx(expected)


@pytest.mark.parametrize("reach", RANGES.values(), ids=RANGES)
def test_one_label(reach: tuple[float, float]) -> None:
    logits = torch.rand(40, 12) * (reach[1] - reach[0]) + reach[0]
    labels = torch.arange(40) % 12
    found = metrics_of("single_label_classification", 12, "val/")
    for part in range(0, 40, 8):
        found.update(answers("single_label_classification", logits[part : part + 8]), labels[part : part + 8])
    expected = {
        "val/accuracy": sklearn.accuracy_score(labels, logits.argmax(1)),
        "val/f1": sklearn.f1_score(labels, logits.argmax(1), average="macro", zero_division=0),
        "val/top5": sklearn.top_k_accuracy_score(labels, logits.double().softmax(1), k=5),
    }
    assert {name: float(value) for name, value in found.compute().items()} == pytest.approx(expected)


def test_scores() -> None:
    scores, truth = torch.rand(30, 1), torch.rand(30)
    found = metrics_of("regression", 1, "val/")
    for part in range(0, 30, 7):
        found.update(answers("regression", scores[part : part + 7]), truth[part : part + 7])
    one, other = scores.squeeze(1).numpy(), truth.numpy()
    expected = {
        "val/pearson": pearsonr(one, other)[0],
        "val/spearman": spearmanr(one, other)[0],
        "val/mse": sklearn.mean_squared_error(other, one),
    }
    assert {name: float(value) for name, value in found.compute().items()} == pytest.approx(expected, rel=1e-4)
