"""Wrong labels are doubted, and right ones are not."""

from __future__ import annotations

import numpy as np
import torch

from datamodules.labels.suspects import cross_validated_probabilities, label_suspects, neighbour_probabilities


def test_a_suspect_needs_neighbours_of_one_voice() -> None:
    torch.manual_seed(0)
    centres = torch.eye(3).repeat_interleave(30, 0) * 5
    labels = torch.arange(3).repeat_interleave(30)
    features = centres + torch.randn(90, 3) * 0.2
    assert label_suspects(neighbour_probabilities(features, labels, 3), labels) == []
    wrong = labels.clone()
    wrong[[4, 50]] = torch.tensor([2, 0])
    assert sorted(label_suspects(neighbour_probabilities(features, wrong, 3), wrong)) == [(4, 0), (50, 1)]
    assert sorted(label_suspects(cross_validated_probabilities(features.numpy(), wrong, 3), wrong)) == [(4, 0), (50, 1)]
    noise = torch.randn(90, 3)
    for told in (cross_validated_probabilities(noise.numpy(), labels, 3), neighbour_probabilities(noise, labels, 3)):
        assert len(label_suspects(told, labels)) <= 2, "where nothing can be learnt, nothing is sure"


def test_suspects_by_hand() -> None:
    """Averages of the classes: 0.7, 0.82 and, of a class that nobody has, 0."""
    probabilities = torch.tensor(
        [
            [0.95, 0.05, 0.0],
            [0.95, 0.05, 0.0],
            [0.2, 0.8, 0.0],  # as sure as usual that it is the other, and of its own less than a third of 0.7
            [0.1, 0.9, 0.0],
            [0.3, 0.7, 0.0],  # rather the first, and less sure than usual
            [0.0, 1.0, 0.0],
            [0.1, 0.9, 0.0],
            [0.4, 0.6, 0.0],
        ]
    )
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    assert torch.allclose(probabilities[:3, 0].mean(), torch.tensor(0.7))
    assert label_suspects(probabilities, labels, enough=1.0) == [], "0.8 is below 0.82"
    assert label_suspects(probabilities, labels) == [(2, 1)], "and enough at all events"
    probabilities[4] = torch.tensor([0.5, 0.5, 0.0])
    assert label_suspects(probabilities, labels, enough=1.0) == [(2, 1)], "0.8 is above 0.78"
    probabilities[0] = torch.tensor([0.05, 0.95, 0.0])
    assert label_suspects(probabilities, labels) == [(0, 1)], "0.2 is half of its class's 0.4; the clearest only"
    assert label_suspects(probabilities, labels, doubt=1.0) == [(0, 1), (2, 1)], "the clearest first"


def test_nobody_is_asked_about_itself() -> None:
    features = np.eye(20, dtype=np.float32)
    labels = torch.arange(20) % 2
    assert cross_validated_probabilities(features, labels, 2).allclose(torch.full((20, 2), 0.5), atol=0.01)
    assert neighbour_probabilities(torch.eye(2), torch.tensor([0, 1]), 2).tolist() == [[0, 1], [1, 0]]
    assert neighbour_probabilities(torch.eye(1), torch.tensor([0]), 2).tolist() == [[0, 0]]


def test_a_class_of_one_sample_is_nobodys() -> None:
    features, labels = np.eye(11, 3, dtype=np.float32), torch.tensor([0] * 5 + [1] * 5 + [2])
    told = cross_validated_probabilities(features, labels, 4)
    assert told[10, 2] == 0 and told[:, 3].sum() == 0
    assert torch.allclose(told.sum(1), torch.ones(11))
