"""Lightning callbacks for fine-tuning; each file stands alone."""

from .predictions import PredictionWriter

__all__ = ["PredictionWriter"]
