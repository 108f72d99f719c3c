"""Nets that turn images into features: by name, with their ordered blocks, facts and pretrained weights."""

from .backbone import Backbone, BackboneFacts
from .build import backbone_facts, build_backbone
from .weights import load_weights

__all__ = ["Backbone", "BackboneFacts", "backbone_facts", "build_backbone", "load_weights"]
