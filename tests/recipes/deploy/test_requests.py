"""From the bytes of a request to a sample, or to a status and a sentence."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import resource
from typing import Any

import pytest
from PIL import Image

from recipes.deploy.requests import RequestError, file_of_form, image_of, limited, sample_of
from tests.conftest import picture


def encoded(number: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(number, 40 + number % 50, 60).save(buffer, format)
    return buffer.getvalue()


def form(content: bytes) -> tuple[bytes, str]:
    head = b'--xyz\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n'
    head += b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    return head + content + b"\r\n--xyz--\r\n", "multipart/form-data; boundary=xyz"


@pytest.mark.parametrize("size", [(20_000, 1), (60_000, 1), (1, 60_000)])
def test_a_strip_is_answered_in_little_memory(size: tuple[int, int]) -> None:
    body = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(body, "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = image_of(body.getvalue(), 224)
    assert made.shape == (3, 224, 224) and made[:, 5, 7].tolist() == [10, 200, 30]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError, MemoryError, AttributeError])
def test_whatever_a_decoder_raises_is_no_picture(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the header as in the pixels."""
    body = encoded(1)

    def fail(*_: Any, **__: Any) -> Any:
        raise kind("odd")

    for method in ("open", "Image.load"):
        with monkeypatch.context() as patch:
            patch.setattr(f"PIL.Image.{method}", fail)
            with pytest.raises(RequestError, match="the body is no image that can be read"):
                image_of(body, 32)


def test_the_limit_holds_to_the_byte() -> None:
    held: list[int] = []

    async def pieces(sizes: list[int]) -> Any:
        for size in sizes:
            held.append(size)
            yield bytes(size)

    assert len(asyncio.run(limited(pieces([4, 6]), None, 10))) == 10
    for declared, sizes in ((None, [4, 7, 5]), ("11", [1]), ("3", [11])):
        held.clear()
        with pytest.raises(RequestError, match="longer than") as refused:
            asyncio.run(limited(pieces(sizes), declared, 10))
        assert refused.value.status == 413 and sum(held) <= 11, "what comes after is not asked for"


def test_samples_from_bodies() -> None:
    content = bytes(range(256)) * 3 + b"\r\n--xy\r\n\r\n--"
    body, kind = form(content)
    assert file_of_form(body, kind) == content
    assert sample_of(content, "image/png", "vision") == content
    url = json.dumps({"image": "data:image/png;base64," + base64.b64encode(content).decode()}).encode()
    assert sample_of(url, "application/json; charset=utf-8", "vision") == content
    assert sample_of(b'{"text": "a", "pair": "b"}', "", "text", pairs=True) == ("a", "b")
    with pytest.raises(RequestError, match="pair"):
        sample_of(b'{"text": "a"}', "", "text", pairs=True)


@pytest.mark.parametrize("lines", ["\n", "\r\n"])
def test_base64_may_have_line_ends(lines: str) -> None:
    content = encoded(1)
    body = json.dumps({"image": lines.join(base64.encodebytes(content).decode().split("\n"))}).encode()
    assert sample_of(body, "application/json", "vision") == content


def test_a_form_may_name_its_file_by_the_newer_rule() -> None:
    head = b"--xyz\r\nContent-Disposition: form-data; name=\"f\"; filename*=UTF-8''caf%C3%A9.jpg\r\n\r\n"
    assert file_of_form(head + b"pixels\r\n--xyz--", "multipart/form-data; boundary=xyz") == b"pixels"
