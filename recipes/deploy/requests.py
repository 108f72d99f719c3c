"""From the bytes of a request to an image or a text, and the status of one that cannot be answered."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import AsyncIterable
from email.message import Message
from typing import Any

from fastapi import HTTPException, Request
from PIL import Image
from starlette.requests import ClientDisconnect
from torch import Tensor

from .restored import Restored
from .samples import pixels

MEGABYTE = 2**20
MOST_PIXELS = 50_000_000  # of an image: decoded they take 150 MB
DECODERS = 4  # images that are decoded at a time


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        status: Of HTTP.
        sentence: Expected, received, what to do.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


async def limited(pieces: AsyncIterable[bytes], declared: str | None, limit: int) -> bytes:
    """A body as long as it stays within the limit; what is more is never held.

    Args:
        pieces: In which it comes.
        declared: Its `Content-Length`, where there is one.
        limit: Bytes.

    Raises:
        RequestError: It is longer.
    """
    too_long = RequestError(413, f"the body is longer than {limit / MEGABYTE:g} MB: send less, or raise --limit_mb")
    if declared is not None and declared.isdecimal() and int(declared) > limit:
        raise too_long
    body = bytearray()
    async for piece in pieces:
        if len(body) + len(piece) > limit:
            raise too_long
        body += piece
    return bytes(body)


def sample_of(body: bytes, content_type: str, recipe: str, pairs: bool = False) -> Any:
    """What a request asks about: the bytes of an image, a text, or a pair of texts.

    Args:
        body: Of the request.
        content_type: Its header, which tells a form and JSON from a bare image.
        recipe: `vision` or `text`.
        pairs: Whether two texts make a sample.

    Raises:
        RequestError: It is none of these.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if recipe == "vision" and kind == "multipart/form-data":
        return file_of_form(body, content_type)
    if recipe == "vision" and kind != "application/json":
        return body
    keys = ["image"] if recipe == "vision" else ["text", "pair"] if pairs else ["text"]
    expected = f"expected {json.dumps(dict.fromkeys(keys, 'base64' if recipe == 'vision' else '...'))}"
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {expected}") from error
    values: list[Any] = [content.get(key) for key in keys] if isinstance(content, dict) else []
    if not values or not all(isinstance(value, str) and value.strip() for value in values):
        raise RequestError(422, f"{expected}, with strings that are not empty")
    try:
        if recipe == "vision":
            encoded = "".join(values[0].rpartition(",")[2].split())  # also of a data URL, and in lines of 76
            return base64.b64decode(encoded, validate=True)
        " ".join(values).encode()  # half a character, as \ud800, would fail the whole batch
    except ValueError as error:
        raise RequestError(
            422, f"{expected}, and the string is not {'base64' if recipe == 'vision' else 'text'}"
        ) from error
    return tuple(values) if pairs else values[0]


def file_of_form(body: bytes, content_type: str) -> bytes:
    """The first file of a form, after RFC 7578.

    Raises:
        RequestError: There is none.
    """
    header = Message()
    header["Content-Type"] = content_type
    for part in (b"\r\n" + body).split(b"\r\n--" + str(header.get_boundary("")).encode()):
        head, blank, content = part.partition(b"\r\n\r\n")
        if blank and re.search(rb"filename\*?=", head.lower()):  # the starred one is of RFC 5987
            return content
    raise RequestError(422, "the form holds no file: expected one with an image")


def image_of(body: bytes, size: int) -> Tensor:
    """An image as in evaluation, uint8 `(3, size, size)`.

    Raises:
        RequestError: It is none, or would take too much memory once decoded.
    """
    too_many = RequestError(413, f"the image has more than {MOST_PIXELS:,} pixels: make it smaller")
    try:
        with Image.open(io.BytesIO(body)) as image:  # the header only
            if image.width * image.height > MOST_PIXELS:
                raise too_many
        return pixels(io.BytesIO(body), "sent", size)
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise too_many from error
    except Exception as error:  # decoders raise a dozen kinds
        raise RequestError(
            422, "the body is no image that can be read: expected JPEG, PNG, WebP or the like"
        ) from error


class Intake:
    """Reads requests where they arrive, so that the process with the model gets only what it can answer.

    In a batch of LitServe's, one request that cannot be answered would fail the others.

    Args:
        restored: The model that they are for.
        limit: Bytes of a body.
    """

    def __init__(self, restored: Restored, limit: int) -> None:
        self.recipe, self.pairs, self.limit = restored.reads, restored.pairs, limit
        self.size = restored.image_size if restored.reads == "vision" else 0
        self.decoders = asyncio.Semaphore(DECODERS)

    async def read(self, request: Request) -> Any:
        """An image, uint8 `(3, size, size)`, a text, or a pair of them."""
        try:
            body = await limited(request.stream(), request.headers.get("content-length"), self.limit)
            sample = sample_of(body, request.headers.get("content-type", ""), self.recipe, self.pairs)
            if self.recipe == "text":
                return sample
            async with self.decoders:
                return (await asyncio.to_thread(image_of, sample, self.size)).numpy()
        except RequestError as refused:
            raise HTTPException(refused.status, str(refused)) from refused
        except ClientDisconnect as gone:
            raise HTTPException(400, "the connection ended before the body did") from gone
