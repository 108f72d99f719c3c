"""Lightning callbacks for fine-tuning; each file stands alone."""

from .predictions import PredictionWriter
from .unfreezing import Freeze, GradualUnfreezing, layerwise_param_groups
from .warmup import LRWarmup

__all__ = ["Freeze", "GradualUnfreezing", "LRWarmup", "PredictionWriter", "layerwise_param_groups"]
