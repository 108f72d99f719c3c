"""Lightning callbacks for fine-tuning: one technique is one file, or one folder that is copied whole."""

import sys

from .averaging import EMA, Interpolation
from .clipping import AGC, AutoClip
from .constraints import Constrain, RateBounds
from .early_stopping import PhaseAwareEarlyStopping
from .ewc import EWC
from .nonfinite import StopOnNonFinite
from .penalties import L1, L2, L2SP
from .predictions import PredictionWriter
from .pruning import Prune
from .report import Report
from .resume import AtomicCheckpointIO, ExactResume
from .unfreezing import Freeze, GradualUnfreezing, layerwise_param_groups
from .warmup import LRWarmup

__all__ = [
    "AGC",
    "EMA",
    "EWC",
    "L1",
    "L2",
    "L2SP",
    "AtomicCheckpointIO",
    "AutoClip",
    "Constrain",
    "ExactResume",
    "Freeze",
    "GradualUnfreezing",
    "Interpolation",
    "LRWarmup",
    "PhaseAwareEarlyStopping",
    "PredictionWriter",
    "Prune",
    "RateBounds",
    "Report",
    "StopOnNonFinite",
    "layerwise_param_groups",
]

sys.modules[f"{__name__}.guards"] = sys.modules[__name__]  # older configs and checkpoints name classes by this path
