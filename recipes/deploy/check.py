"""Whether what was written answers as the checkpoint does."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..parts.encoders import quietly
from .restored import Restored
from .samples import pixels
from .snippets import IMAGES

TOLERANCE = 1e-4  # of the largest logit: fp32 sums in another order differ by a hundredth of it ...
SMALLEST = 1e-2  # ... or of this, where all are about zero, as those of a net that learnt nothing


def check(restored: Restored, samples: Any, lines: str, folder: Path) -> dict[str, float]:
    """Run the lines of the README, and compare their logits with the checkpoint's.

    Returns:
        Of all outputs the largest difference, and the share of samples with the same answer: the most probable class,
        or each label's yes or no. Answers between which the checkpoint itself wavers by less than the tolerance are
        ignored.

    Raises:
        ValueError: It does not run; another answer, or a difference above the tolerance.
    """
    expected = restored.outputs(samples)
    if restored.reads == "vision":
        check_reading(folder, restored.image_size)
    given = {"images": samples.numpy()} if restored.reads == "vision" else {"texts": samples}
    found = {"folder": str(folder), **given}
    try:
        with torch.no_grad(), quietly():
            exec(compile(lines, "README.md", "exec"), found)
    except Exception as error:  # of whichever library it is
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"what was written cannot be loaded by other programs, so it is gone again: {reason}"
        ) from error
    told = found["outputs"] if restored.tasks else found
    each = [
        compare(by_pixel(expected[name]), by_pixel(torch.as_tensor(told[name])), problem)
        for name, problem in problems_of(restored).items()
    ]
    most = {key: max(one[key] for one in each) for key in ("largest_difference", "tolerance")}
    return {**most, "agreement": min(one["agreement"] for one in each)}


def problems_of(restored: Restored) -> dict[str, str]:
    """Each output's problem, in transformers' words."""
    kinds = {"multi_label": "multi_label_classification", "regression": "regression"}
    several = {name: kinds.get(task["kind"], "single_label_classification") for name, task in restored.tasks.items()}
    return several or {"logits": restored.problem_type}


def by_pixel(logits: Tensor) -> Tensor:
    """Logits `(n, classes)`; of a mask, `(n, classes, height, width)`, each pixel is a sample."""
    return logits.movedim(1, -1).flatten(0, -2) if logits.ndim == 4 else logits


def check_reading(folder: Path, size: int) -> None:
    """Read files of many kinds by the lines of the README, and compare with what evaluation sees of them.

    Raises:
        ValueError: They cannot be read by these lines, or look otherwise.
    """
    with tempfile.TemporaryDirectory() as other:
        files = write_odd_images(Path(other), size)
        found: dict[str, Any] = {"folder": str(folder), "files": files}
        try:
            exec(compile(IMAGES, "README.md", "exec"), found)
        except Exception as error:
            raise ValueError(f"the lines that read images don't run: {error}") from error
        for file, image in zip(files, found["images"], strict=True):
            if not np.array_equal(image, pixels(file, file, size).numpy().astype(np.float32) / 255):
                raise ValueError(f"the lines that read images see another {Path(file).name} than evaluation does")


def write_odd_images(folder: Path, size: int) -> list[str]:
    """Small files of the kinds that programs read otherwise: 16 and 32 bits, transparent, a palette, turned, CMYK."""
    steps = np.linspace(0, 65535, (size + 9) * (size + 5)).astype(np.uint16).reshape(size + 9, size + 5)
    grey = Image.fromarray((steps // 257).astype(np.uint8))
    clear = Image.merge("RGBA", (grey, grey.rotate(90, expand=False), grey.rotate(180), grey.rotate(270)))
    exif = Image.Exif()
    exif[0x0112] = 6
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "16_bits.png": (Image.fromarray(steps), {}),
        "16_bits.tif": (Image.fromarray(steps), {}),
        "0_is_white.tif": (Image.fromarray(steps), {"tiffinfo": {262: 0}}),
        "32_bits.tif": (Image.fromarray(steps.astype(np.int32)), {}),
        "32_bits_to_255.tif": (Image.fromarray((steps // 257).astype(np.int32)), {}),
        "transparent.png": (clear, {}),
        "grey_transparent.png": (clear.convert("LA"), {}),
        "palette.png": (grey.quantize(16), {"transparency": 3}),
        "turned.jpg": (clear.convert("RGB"), {"exif": exif}),
        "cmyk.jpg": (clear.convert("RGB").convert("CMYK"), {}),
    }
    for name, (image, options) in made.items():
        image.save(folder / name, **options)
    return [str(folder / name) for name in made]


def compare(expected: Tensor, logits: Tensor, problem_type: str) -> dict[str, float]:
    """How far logits `(n, classes)` are from those expected, and how many answers are the same; see `check`."""
    difference = float((expected - logits).abs().max())
    tolerance = TOLERANCE * max(SMALLEST, float(expected.abs().max()))
    if problem_type == "single_label_classification" and expected.shape[1] > 1:
        first, second = expected.topk(2).values.T
        same, sure = expected.argmax(1) == logits.argmax(1), first - second > 2 * tolerance
    else:
        same, sure = (expected > 0) == (logits > 0), expected.abs() > tolerance
    if problem_type == "regression":
        sure = torch.zeros_like(sure)  # a score is no answer of yes or no
    agreement = float(same[sure].float().mean()) if sure.any() else 1.0
    if not difference <= tolerance or agreement < 1:  # NaN is not within it, either
        raise ValueError(
            f"the export is not the checkpoint: outputs differ by up to {difference:.2g}, {tolerance:.2g} is allowed, "
            f"and {100 * agreement:.1f} % of the answers are the same; nothing was written"
        )
    return {"largest_difference": difference, "tolerance": tolerance, "agreement": agreement}


def sentence(check: dict[str, Any]) -> str:
    """What the check found."""
    return (
        f"on {check['samples']} samples {check['where']}, logits differ from the checkpoint's by "
        f"{check['largest_difference']:.1e} at most, and {100 * check['agreement']:.0f} % of the answers are the same"
    )
