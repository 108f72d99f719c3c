"""Files of every kind against another reading of them: whole, odd and damaged ones."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageOps, features
from torchvision.transforms.v2 import functional as VF

from datamodules.images.batches import sample_transform
from datamodules.images.decoding import evaluation_crop, readable_endings
from datamodules.images.sources import decode
from tests.conftest import picture

Array = npt.NDArray[np.uint8]
RAMP = np.arange(0, 65536, 1024).astype(np.uint16).reshape(8, 8)


def on_white(image: Image.Image) -> Array:
    """Composited by hand, in floats; a level off where halves are rounded another way."""
    rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return np.floor(rgba[..., :3] * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)


def grey(values: npt.ArrayLike) -> Array:
    return np.repeat(np.asarray(values).astype(np.uint8)[..., None], 3, 2)


def faded(seed: int = 0) -> Image.Image:
    image = picture(seed, 20, 14).convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(280).reshape(14, 20).astype(np.uint8)))
    return image


def tiff(values: npt.NDArray[Any], **tags: Any) -> bytes:
    """A TIFF of one grey strip, written by hand: Pillow writes no 0 as white in 16 bits, and no 32 unsigned ones."""
    facts = {256: values.shape[1], 257: values.shape[0], 258: 8 * values.itemsize, 259: 1, 262: 1}
    facts |= {273: 8, 277: 1, 278: values.shape[0], 279: values.nbytes, 339: 2 if values.dtype.kind == "i" else 1}
    facts |= {int(key[1:]): value for key, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(facts.items()))
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(facts)) + entries + bytes(4)


def twelve_bits(values: npt.NDArray[Any]) -> bytes:
    """A TIFF with two values in three bytes."""
    digits = "".join(f"{value:03x}" for value in values.flatten().tolist())
    packed = np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(len(values), -1)
    return tiff(packed, t256=values.shape[1], t258=12)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(number: int, form: str) -> tuple[bytes, Array]:
    exif = Image.Exif()
    exif[0x0112] = number
    content = saved(picture(3, 21, 14), form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    return content, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))


def palette() -> tuple[bytes, Array]:
    image = picture(0, 20, 14).quantize(8)
    content = saved(image, "PNG", transparency=bytes([0, 128, 255, 255, 255, 255, 255, 255]))
    return content, on_white(Image.open(io.BytesIO(content)))


def two_frames(form: str) -> tuple[bytes, Array]:
    first, second = picture(0, 20, 14), picture(1, 20, 14)
    content = saved(first, form, save_all=True, append_images=[second])
    return content, np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def plain(image: Image.Image, form: str, **options: Any) -> tuple[bytes, Array]:
    content = saved(image, form, **options)
    return content, np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


KINDS: dict[str, Callable[[], tuple[bytes, Array]]] = {
    **{f"EXIF {n}, {form}": lambda n=n, form=form: turned(n, form) for n in range(1, 9) for form in ("JPEG", "PNG")},
    **{f"EXIF {n}, TIFF": lambda n=n: turned(n, "TIFF") for n in range(1, 9)},
    **{f"EXIF {n}, WEBP": lambda n=n: turned(n, "WEBP") for n in (1, 5, 6)},
    "CMYK, JPEG": lambda: plain(picture(0).convert("CMYK"), "JPEG"),
    "CMYK, TIFF": lambda: plain(picture(0).convert("CMYK"), "TIFF"),
    "grey, JPEG": lambda: plain(picture(0).convert("L"), "JPEG"),
    "black and white, PNG": lambda: plain(picture(0).convert("1"), "PNG"),
    "black and white, TIFF": lambda: plain(picture(0).convert("1"), "TIFF", compression="group4"),
    "compressed, TIFF": lambda: plain(picture(0), "TIFF", compression="tiff_lzw"),
    "palette": lambda: plain(picture(0).quantize(8), "PNG"),
    "palette with transparency": palette,
    "RGBA, PNG": lambda: (saved(faded(), "PNG"), on_white(faded())),
    "RGBA, TIFF": lambda: (saved(faded(), "TIFF"), on_white(faded())),
    "RGBA, WEBP": lambda: (saved(faded(), "WEBP", lossless=True, exact=True), on_white(faded())),
    "grey with alpha": lambda: (saved(faded().convert("LA"), "PNG"), on_white(faded().convert("LA"))),
    "one transparent colour": lambda: (
        saved(Image.fromarray(grey(RAMP // 257)), "PNG", transparency=(3, 3, 3)),
        grey(np.where(RAMP // 257 == 3, 255, RAMP // 257)),
    ),
    "16 bits, PNG": lambda: (saved(Image.fromarray(RAMP), "PNG"), grey(RAMP // 257)),
    "16 bits, TIFF": lambda: (saved(Image.fromarray(RAMP), "TIFF"), grey(RAMP // 257)),
    "16 bits, compressed TIFF": lambda: (
        saved(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
        grey(RAMP // 257),
    ),
    "16 bits, 0 is white": lambda: (tiff(RAMP, t262=0), grey((65535 - RAMP.astype(int) + 256) // 257)),
    "8 bits, 0 is white": lambda: (tiff((RAMP // 257).astype(np.uint8), t262=0), grey(255 - RAMP // 257)),
    "16 bits, turned": lambda: (tiff(RAMP, t274=6), grey(np.rot90(RAMP // 257, -1))),
    "16 bits, PGM": lambda: (b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes(), grey(RAMP // 257)),
    "int32 with values to 255": lambda: (tiff((RAMP // 257).astype(np.int32)), grey(RAMP // 257)),
    "int32 with values to 65535": lambda: (tiff(RAMP.astype(np.int32)), grey(RAMP // 257)),
    "uint32 with values to 255": lambda: (tiff((RAMP // 257).astype(np.uint32)), grey(RAMP // 257)),
    "12 bits": lambda: (twelve_bits(RAMP // 16), grey((RAMP // 16).astype(int) * 255 // 4095)),
    "animated GIF": lambda: two_frames("GIF"),
    "animated WebP": lambda: two_frames("WEBP"),
    "two pages": lambda: two_frames("TIFF"),
    "two in one JPEG": lambda: two_frames("MPO"),
    "BMP": lambda: plain(picture(0), "BMP"),
    "TGA": lambda: plain(picture(0), "TGA"),
    "JPEG 2000": lambda: plain(picture(0), "JPEG2000"),
    "ICO": lambda: plain(picture(0, 32, 32), "ICO", sizes=[(32, 32)]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", [".png", ""], ids=["as a PNG", "without ending"])  # most are misnamed so
def test_every_kind_as_another_reading_sees_it(tmp_path: Path, kind: str, ending: str) -> None:
    content, expected = KINDS[kind]()
    (tmp_path / f"it{ending}").write_bytes(content)
    for file in (str(tmp_path / f"it{ending}"), io.BytesIO(content)):
        read = decode(file, "it")
        assert read.mode == "RGB" and read.size == expected.shape[1::-1]
        assert np.abs(np.asarray(read).astype(int) - expected).max() <= int(
            "alpha" in kind or "RGBA" in kind or "with tr" in kind
        )


@pytest.mark.parametrize(
    "kind", ["truncated", "empty", "text", "a folder's database", "float", "int32 beyond 16 bits", "gone"]
)
def test_what_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    whole = saved(picture(0), "JPEG")
    content = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"no image",
        "a folder's database": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(1000),
        "float": saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        "int32 beyond 16 bits": tiff(RAMP.astype(np.int32) * 2),
    }
    if kind in content:
        (tmp_path / "it.jpg").write_bytes(content[kind])
    with pytest.raises(ValueError, match=r"cannot read the image the one: .*data\.on_error to skip"):
        decode(str(tmp_path / "it.jpg"), "the one")


def test_a_drawing_that_another_program_would_be_run_for_is_no_image(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "it.eps")
    with pytest.raises(ValueError, match="cannot identify"):
        decode(str(tmp_path / "it.eps"), "it")
    assert not {".eps", ".ps", ".wmf", ".pdf", ".mpg", ".h5"} & set(readable_endings())
    assert {".jfif", ".jpe", ".pgm", ".jpg", ".tif", ".webp", ".mpo"} < set(readable_endings())


# ---- metadata


RATIONAL_FOR_STRING = struct.pack("<2sHIH", b"II", 42, 8, 2) + b"".join(
    [
        struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0),
        struct.pack("<HHII", 0x010F, 5, 1, 38),
        bytes(4),
        struct.pack("<II", 1, 3),
    ]
)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_odd_tag_leaves_the_image_and_its_turn_as_they_are(form: str) -> None:
    image = picture(0, 30, 20)
    content = saved(
        image, form, exif=b"Exif\0\0" + RATIONAL_FOR_STRING, **({"lossless": True} if form == "WEBP" else {})
    )
    bare = np.asarray(Image.open(io.BytesIO(saved(image, form, **({"lossless": True} if form == "WEBP" else {})))))
    assert np.array_equal(np.asarray(decode(io.BytesIO(content), "it")), np.rot90(bare, -1))


def test_an_odd_tag_in_a_tiff(tmp_path: Path) -> None:
    content = bytearray(tiff(RAMP, t274=6, t271=0))
    place = content.rindex(struct.pack("<HHII", 271, 4, 1, 0))
    content[place : place + 12] = struct.pack("<HHII", 271, 5, 1, 8)  # maker: a rational, somewhere in the pixels
    assert np.array_equal(np.asarray(decode(io.BytesIO(bytes(content)), "it")), grey(np.rot90(RAMP // 257, -1)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of EXIF
def test_damaged_exif_leaves_the_pixels_whole(form: str) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0131], exif[0x011A] = "maker", "a program", 72.0
    image = picture(0, 24, 16)
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    content = saved(image, form, exif=exif, **options)
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    start = content.index(block)
    expected = np.asarray(Image.open(io.BytesIO(saved(image, form, **options))).convert("RGB"))
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(content)
        for place in rng.integers(start, start + len(block), 3):
            damaged[place] = rng.integers(256)
        read = np.asarray(decode(io.BytesIO(bytes(damaged)), "it"))
        assert any(np.array_equal(read, turned_array) for turned_array in every_turn(expected))


def every_turn(values: Array) -> list[Array]:
    """A damaged orientation is still one of eight."""
    return [np.rot90(side, k) for side in (values, values[:, ::-1]) for k in range(4)]


# ---- damaged files


def samples() -> dict[str, list[bytes]]:
    """Small whole files of each format, with EXIF where it has any."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    image, few = picture(5, 24, 16), picture(5, 24, 16).quantize(16)
    found = {
        "JPEG": [
            saved(image, "JPEG", exif=exif),
            saved(image, "JPEG", progressive=True),
            saved(image.convert("CMYK"), "JPEG"),
        ],
        "PNG": [
            saved(image, "PNG", exif=exif),
            saved(faded(), "PNG"),
            saved(few, "PNG"),
            saved(Image.fromarray(RAMP), "PNG"),
        ],
        "WEBP": [saved(image, "WEBP", exif=exif), saved(faded(), "WEBP", lossless=True), two_frames("WEBP")[0]],
        "TIFF": [
            saved(image, "TIFF", exif=exif),
            saved(image, "TIFF", compression="tiff_lzw", exif=exif),
            saved(Image.fromarray(RAMP), "TIFF"),
            tiff(RAMP, t262=0),
            saved(few, "TIFF"),
        ],
        "GIF": [saved(few, "GIF"), saved(few, "GIF", transparency=3), two_frames("GIF")[0]],
        "BMP": [saved(image, "BMP"), saved(few, "BMP"), saved(faded(), "BMP")],
        "PPM": [saved(image, "PPM"), saved(image.convert("L"), "PPM"), b"P2 2 2 9\n1 2 3 9\n"],
    }
    if features.check("avif"):
        found["AVIF"] = [saved(image, "AVIF", exif=exif), saved(faded(), "AVIF")]
    return found


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, half of the time in the header; or cut short, or with a piece missing or twice."""
    out = bytearray(content)
    reach = min(len(out), 200) if rng.random() < 0.5 else len(out)
    kind = rng.random()
    if kind < 0.75:
        for place in rng.integers(0, reach, rng.integers(1, 6)):
            out[place] = rng.integers(256) if rng.random() < 0.5 else out[place] ^ (1 << rng.integers(8))
    elif kind < 0.85:
        del out[rng.integers(1, len(out)) :]
    else:
        start, length = int(rng.integers(0, reach)), int(rng.integers(1, 20))
        out[start : start + length] = out[start : start + length] * 2 if kind < 0.93 else b""
    return bytes(out)


def another_reading(content: bytes) -> Array | None:
    """The first image by Pillow's own turn, or numpy's where that fails; `None` where there are no pixels."""
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except Exception:
        return (
            another_reading(bare) if content[:4] == b"\x89PNG" and (bare := pixel_chunks(content)) != content else None
        )
    if image.format == "TIFF":
        inverted = image.tag_v2.get(262) == 0  # type: ignore[attr-defined]
    else:
        inverted = False
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:
            turn = dict(image.getexif()).get(0x0112, 1)
            turns: dict[Any, Any] = {
                6: Image.Transpose.ROTATE_270,
                8: Image.Transpose.ROTATE_90,
                3: Image.Transpose.ROTATE_180,
            }
            image = image.transpose(turns[turn]) if turn in turns else image
    if image.mode[0] == "I":
        values = np.asarray(image).astype(np.int64)
        if "transparency" in image.info:
            values[values == image.info["transparency"]] = 65535
        wide = image.format in ("PNG", "PPM") or image.mode != "I" or values.max() > 255
        values = values // 257 if wide else values
        return grey(255 - values if inverted else values)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return on_white(image)
    return np.asarray(image.convert("RGB"))


def pixel_chunks(content: bytes) -> bytes:
    """A PNG's chunks that hold pixels."""
    out, rest = content[:8], content[8:]
    while len(rest) >= 12:
        (length,) = struct.unpack(">I", rest[:4])
        if rest[4:8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            out += rest[: 12 + length]
        rest = rest[12 + length :]
    return out


def fuzz(form: str, count: int) -> tuple[int, int]:
    """How many damaged files were read as they should be, and how many were refused.

    Raises:
        AssertionError: One was read otherwise, or another error than a `ValueError` with its name came.
    """
    rng, whole = np.random.default_rng(zlib.crc32(form.encode())), samples()[form]
    read = refused = 0
    for number in range(count):
        content = damage(whole[number % len(whole)], rng)
        try:
            found = np.asarray(decode(io.BytesIO(content), "the one"))
        except ValueError as error:
            assert "cannot read the image the one: " in str(error)
            refused += 1
            continue
        expected = another_reading(content)
        assert expected is not None, f"{form} {number}: only we read it"
        assert found.shape == expected.shape, f"{form} {number}: {found.shape}, expected {expected.shape}"
        assert np.abs(found.astype(int) - expected).max() <= 1, f"{form} {number}: other pixels"
        read += 1
    return read, refused


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # Pillow's, of EXIF and of bombs
@pytest.mark.parametrize("form", samples())
def test_a_damaged_file_is_refused_or_read_as_others_do(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # a damaged size may ask for gigabytes
    read, refused = fuzz(form, 200)
    assert read + refused == 200 and read >= 5 and refused >= 5


# ---- strips


@pytest.mark.parametrize("size", [(2_000, 1), (1, 2_000), (4_000, 3)])
@pytest.mark.parametrize("side", [32, 128])
def test_a_strip_is_cut_where_torchvision_cuts_the_whole(size: tuple[int, int], side: int) -> None:
    rng = np.random.default_rng(0)
    strip = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    whole = VF.center_crop(VF.resize(strip, [side]), [side])
    assert np.abs(np.asarray(evaluation_crop(strip, side)).astype(int) - np.asarray(whole)).max() <= 1


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (20_000, 1)])
@pytest.mark.parametrize("strength", ["none", "light", "standard", "strong"])
def test_a_strip_takes_little_memory(size: tuple[int, int], strength: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    transform, asked = sample_transform(strength, 224, train=True), []
    real = Image.Image.resize

    def watched(self: Image.Image, size: Any, *args: Any, **options: Any) -> Image.Image:
        asked.append(size[0] * size[1])
        return real(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    made = transform(Image.new("RGB", size, (10, 20, 30)))
    assert made.shape == (3, 224, 224) and made.dtype == torch.uint8
    assert max(asked, default=0) <= 10 * 224 * 224


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_images_of_every_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png")
    image = Image.new("I;16", (9, 7), 3000) if mode == "I;16" else picture(0, 9, 7).convert(mode)
    image.save(path)
    read = decode(str(path), "a")
    assert read.mode == "RGB" and read.size == (9, 7)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    picture(0, 40, 20).save(tmp_path / "a.jpg", exif=exif)
    assert decode(str(tmp_path / "a.jpg"), "a").size == (20, 40)


def test_sixteen_bits_are_scaled_and_floats_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    read = np.asarray(decode(str(tmp_path / "a.png"), "a"))[..., 0]
    assert read[0, 0] == 0 and read[-1, -1] == 255 and len(np.unique(read)) > 200
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(ValueError, match="floating point"):
        decode(str(tmp_path / "b.tif"), "b")
