"""Elastic weight consolidation; this folder can be copied whole into any project."""

from .callback import EWC
from .fisher import Estimator, choose_estimator, fisher_diagonal
from .memory import Memory, load_memory, save_memory
from .penalty import add_penalty_gradient_, merge, penalty, proximal_step_

__all__ = [
    "EWC",
    "Estimator",
    "Memory",
    "add_penalty_gradient_",
    "choose_estimator",
    "fisher_diagonal",
    "load_memory",
    "merge",
    "penalty",
    "proximal_step_",
    "save_memory",
]
