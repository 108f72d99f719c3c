"""LightningDataModules for fine-tuning: one data set a file."""

from .cifar10 import CIFAR10
from .digits import Digits
from .folder import ImageFolder
from .huggingface import HuggingFaceImages

__all__ = ["CIFAR10", "Digits", "HuggingFaceImages", "ImageFolder"]
