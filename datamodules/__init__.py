"""LightningDataModules for fine-tuning: one data set a file."""

from .cifar10 import CIFAR10
from .digits import Digits
from .docstrings import Docstrings, PackageDocstrings
from .folder import ImageFolder
from .huggingface import HuggingFaceImages
from .huggingface_text import HuggingFaceTexts
from .masked_texts import MaskedTexts
from .text_files import TextFiles

__all__ = [
    "CIFAR10",
    "Digits",
    "Docstrings",
    "HuggingFaceImages",
    "HuggingFaceTexts",
    "ImageFolder",
    "MaskedTexts",
    "PackageDocstrings",
    "TextFiles",
]
