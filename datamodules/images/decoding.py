"""How a file becomes pixels: by Pillow, upright, RGB, on white; and which part of them a model sees.

Needs Pillow and numpy alone, for an export carries these lines along: it reads as evaluation does.
"""

from __future__ import annotations

import contextlib
import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RULES = 2  # raised whenever the pixels of some file change: what was computed of them is stale then
EXCLUDED = {"EPS", "WMF"} | {"BUFR", "GRIB", "HDF5", "MPEG", "IPTC"}  # drawings for other programs; containers
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION, PHOTOMETRIC, BITS = 0x0112, 0x0106, 0x0102  # tags of TIFF and EXIF
PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
LONG = 8  # times the size that a model sees: what is longer once resized is cut before


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of what is read, the usual ones first."""
    Image.init()
    usual = ("JPEG", "PNG", "GIF", "BMP", "PPM")  # whose plugins Pillow loads at once
    return (*usual, *(name for name in Image.ID if name not in EXCLUDED and name not in usual))


@functools.cache
def readable_endings() -> tuple[str, ...]:
    """Endings of the files that are read, in lower case, sorted."""
    formats = {*readable_formats(), "MPO"}  # a JPEG with more than one image
    return tuple(sorted(ending for ending, name in Image.registered_extensions().items() if name in formats))


def read_rgb(file: Any) -> Image.Image:
    """The first image of a file, upright and in RGB, whatever its mode; metadata that are damaged don't matter.

    Transparent parts are white. 16 bits are brought to 8; integers of 32 bits count as 8 bits where none is above 255,
    else as 16. The file is a path or open; where it can't be read, Pillow raises exceptions of any kind.
    """
    try:
        return _read_rgb(file)
    except Exception:
        bare = without_metadata(file)
        if bare is None:
            raise
        return _read_rgb(io.BytesIO(bare))


def _read_rgb(file: Any) -> Image.Image:
    with Image.open(file, formats=readable_formats()) as opened:
        if opened.format == "TIFF":
            turn = orientation(opened)  # later, its file may be closed
            tags: Any = opened.tag_v2  # type: ignore[attr-defined]
            inverted = tags.get(PHOTOMETRIC) == 0
            bits = 12 if tags.get(BITS) == (12,) else None if opened.mode == "I" else 16
            opened.load_end = lambda: None  # type: ignore[method-assign]  # it reads all tags, and turns
            opened.load()
            image = opened.copy()  # which has the size of its pixels, where the file's may be that of the turned ones
        else:
            opened.load()
            turn, inverted, image = orientation(opened), False, opened
            # of PNG and PPM Pillow brings whatever has more than 8 bits to 16
            bits = None if opened.mode == "I" and opened.format not in ("PNG", "PPM") else 16
        image = rgb(image, bits, inverted)
        return image.transpose(TURNS[turn]) if turn in TURNS else image


def orientation(image: Image.Image) -> int:
    """EXIF's number for how an image is to be turned; 1, as it is, where that can't be read."""
    with contextlib.suppress(Exception):
        return int(image.getexif().get(ORIENTATION, 1))
    return 1


def rgb(image: Image.Image, bits: int | None = 16, inverted: bool = False) -> Image.Image:
    """An image of any mode in RGB.

    Whole numbers fill so many bits, where they need more than 8; `None`: 8 where none is above 255, else 16. `inverted`
    says that 0 is white in these; in 8 bits Pillow sees to it. Floats and more than 16 bits are a ValueError.
    """
    if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its values need more than 16 bits; convert it to 8 or 16 bits")
        most = 2 ** (bits or (8 if values.max() <= 255 else 16)) - 1
        if "transparency" in image.info:
            values = np.where(values == image.info["transparency"], most, values)
        grey = (values.astype(np.uint32).clip(max=most) * 255 // most).astype(np.uint8)
        return Image.fromarray(255 - grey if inverted else grey).convert("RGB")
    if image.mode == "F":
        raise ValueError("its values are floating point, of unknown range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def without_metadata(file: Any) -> bytes | None:
    """A PNG with nothing but its pixels' chunks, as Pillow refuses it for a wrong checksum in any; `None` of others."""
    try:
        content = Path(file).read_bytes() if isinstance(file, (str, Path)) else file.seek(0) or file.read()
    except (OSError, ValueError):
        return None
    if not content.startswith(PNG):
        return None
    kept, place = bytearray(PNG), len(PNG)
    while place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] in PNG_PIXELS:
            kept += content[place:end]
        place = end
    return bytes(kept)


def evaluation_crop(image: Image.Image, size: int, method: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
    """The middle of an image, `(size, size)`; the same whether images lie in memory or are decoded.

    A large image's shorter side is brought to size x 8/7 first, as is usual for ImageNet's weights. One that has
    to be enlarged, and any for a size of at most 96 px, has no border to spare: its shorter side becomes the size.
    """
    if image.size == (size, size):
        return image
    shorter = min(image.size)
    side = round(size * 8 / 7) if size > 96 and shorter > size else size
    width, height = (int(side * pixels / shorter) for pixels in image.size)
    left, top = (round((pixels - size) / 2) for pixels in (width, height))
    if max(width, height) <= LONG * size:
        whole = image.resize((width, height), method)
        return whole.crop((left, top, left + size, top + size))
    across, down = image.width / width, image.height / height  # a strip would become enormous
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return image.resize((size, size), method, box=box)
