"""Several labels of a sample: what is known of them."""

from __future__ import annotations

import math

import pytest
import torch

from datamodules.labels.tasks import Task, hide, known_share, label_facts, spread


def test_outputs_of_a_task() -> None:
    assert Task("regression").outputs == 1
    assert Task("multi_label", ("a", "b", "c")).outputs == 3


def test_what_is_hidden_is_marked_in_its_own_way() -> None:
    labels = {"class": torch.arange(3), "size": torch.rand(3), "tags": torch.ones(3, 2)}
    hide(labels, torch.tensor([True, False, True]))
    assert labels["class"].tolist() == [-100, 1, -100]
    assert labels["size"].isnan().tolist() == [True, False, True]
    assert labels["tags"].isnan().all(1).tolist() == [True, False, True]
    assert known_share(labels["class"]) == pytest.approx(1 / 3) == known_share(labels["tags"])
    labels["tags"][0, 1] = 0.0
    assert known_share(labels["tags"]) == pytest.approx(2 / 3), "a part of a label counts as one"


def test_facts_of_labels() -> None:
    values = torch.tensor([1.0, math.nan, 3.0])
    assert spread(values) == (2.0, pytest.approx(math.sqrt(2)))
    assert spread(torch.tensor([5.0, 5.0])) == (5.0, 1.0) and spread(torch.tensor([math.nan])) == (0.0, 1.0)
    tasks = {"size": Task("regression"), "class": Task("classification", ("a", "b"))}
    found = label_facts(tasks, {"size": values, "class": torch.tensor([0, 1, 1])})
    assert found["class"] == {"known": 1.0}
    assert found["size"] == {"known": pytest.approx(2 / 3), "mean": 2.0, "spread": pytest.approx(math.sqrt(2))}
