"""Freezing, for good or until its time has come; this folder can be copied whole into any project."""

from .blocks import HasLayerGroups, find_blocks, infer_blocks, layerwise_param_groups
from .freeze import Freeze, close, frozen_modules
from .gradual import GradualUnfreezing

__all__ = [
    "Freeze",
    "GradualUnfreezing",
    "HasLayerGroups",
    "close",
    "find_blocks",
    "frozen_modules",
    "infer_blocks",
    "layerwise_param_groups",
]
