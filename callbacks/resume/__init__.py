"""Runs that go on bit for bit after an interruption; this folder can be copied whole into any project."""

from .atomic import AtomicCheckpointIO, save_atomically
from .callback import ExactResume
from .seeds import counter_seed, reseed

__all__ = ["AtomicCheckpointIO", "ExactResume", "counter_seed", "reseed", "save_atomically"]
