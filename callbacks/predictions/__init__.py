"""Predictions written as they are made; this folder can be copied whole into any project."""

from .callback import PredictionWriter

__all__ = ["PredictionWriter"]
