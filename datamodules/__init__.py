"""LightningDataModules for fine-tuning: one data set a file; what they share lies in folders."""

import sys

from .cifar10 import CIFAR10
from .digits import Digits
from .docstrings import Docstrings, PackageDocstrings
from .flowers102 import Flowers102
from .folder import ImageFolder
from .food101 import Food101
from .huggingface_images import HuggingFaceImages
from .huggingface_texts import HuggingFaceTexts
from .label_columns import ImageColumns, TextColumns
from .masked_texts import MaskedTexts
from .oxford_pets import OxfordPets
from .parquet_images import ParquetImages
from .shapes import Shapes
from .stanford_dogs import StanfordDogs
from .text_files import TextFiles
from .together import Together

__all__ = [
    "CIFAR10",
    "Digits",
    "Docstrings",
    "Flowers102",
    "Food101",
    "HuggingFaceImages",
    "HuggingFaceTexts",
    "ImageColumns",
    "ImageFolder",
    "MaskedTexts",
    "OxfordPets",
    "PackageDocstrings",
    "ParquetImages",
    "Shapes",
    "StanfordDogs",
    "TextColumns",
    "TextFiles",
    "Together",
]

for former in ("huggingface", "huggingface_text", "parquet"):  # older configs and checkpoints name classes by these
    sys.modules[f"{__name__}.{former}"] = sys.modules[__name__]
