"""One page that says how good a model is and how it came about; this folder can be copied whole into any project."""

from .callback import Report
from .outputs import Outputs, Predictions, load_predictions, save_predictions

__all__ = ["Outputs", "Predictions", "Report", "load_predictions", "save_predictions"]
