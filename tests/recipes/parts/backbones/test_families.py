"""The table of backbones is complete, and says what the published weights say."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from torchvision import models

from recipes.parts.backbones import backbone_facts, families
from recipes.parts.backbones.families import FAMILIES
from tests.recipes.parts.backbones.test_build import NAMES, TORCHVISION


def test_every_torchvision_classifier_is_there_once() -> None:
    own = ["resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56"]
    assert sorted(NAMES) == sorted(TORCHVISION + own)


def test_names_can_be_read_from_the_syntax_tree() -> None:
    tree = ast.parse(Path(families.__file__).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    tuples = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "names"]
    assert [ast.literal_eval(node) for node in tuples] == [family.names for family in FAMILIES]


@pytest.mark.parametrize("name", TORCHVISION)
def test_facts_are_those_of_the_published_weights(name: str) -> None:
    weights = models.get_model_weights(name)
    preset = weights["DEFAULT"].transforms()
    facts = backbone_facts(name)
    assert [facts.input_size] == preset.crop_size
    assert (facts.mean, facts.std) == (tuple(preset.mean), tuple(preset.std))
    swag = ["SWAG" in entry.meta.get("license", "") for entry in weights]
    assert facts.licence.startswith("CC-BY-NC-4.0") == all(swag)
    assert ("CC-BY-NC-4.0" in facts.licence) == any(swag)
    assert facts.source.startswith("https://arxiv.org/abs/")
