"""Lightning callbacks for fine-tuning; each file stands alone, but for report.py and its five siblings."""

from .averaging import EMA, Interpolation
from .clipping import AGC, AutoClip
from .constraints import Constrain, RateBounds
from .ewc.callback import EWC
from .nonfinite import PhaseAwareEarlyStopping, StopOnNonFinite
from .penalties import L1, L2, L2SP
from .predictions import PredictionWriter
from .report.callback import Report
from .resume.callback import AtomicCheckpointIO, ExactResume
from .unfreezing.gradual import Freeze, GradualUnfreezing, layerwise_param_groups
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
    "RateBounds",
    "Report",
    "StopOnNonFinite",
    "layerwise_param_groups",
]
