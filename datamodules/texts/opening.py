"""Opening files of text: their encoding, and whether the columns that are asked for are there."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

MARKS = {  # bytes at the beginning of a file that tell its encoding; UTF-32's begin with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def opened(file: Path, encoding: str) -> Any:
    """A file of text; what is not in the encoding is kept as lone surrogates, so that an error can name its line.

    Raises:
        ValueError: No such encoding, or zero bytes in a file of one that has none.
    """
    try:
        name = codecs.lookup(encoding).name
    except LookupError:
        raise ValueError(f"data.encoding: {encoding!r} is not known; expected utf-8, latin-1, cp1252 ...") from None
    with file.open("rb") as raw:
        head = raw.read(4096)
    name = next((marked for mark, marked in MARKS.items() if head.startswith(mark)), name)
    wide = name.startswith(("utf-16", "utf-32"))
    if not wide and b"\0" in head:
        raise ValueError(f"{file} has zero bytes: is it UTF-16? Then data.encoding must be utf-16-le or utf-16-be")
    return file.open(encoding=name, errors="surrogatepass" if wide else "surrogateescape", newline="")


def decoded(file: Path, lines: Iterable[str]) -> Iterator[str]:
    """The lines of a file; bytes that no error handler can take are an error that names it."""
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in the encoding that data.encoding names ({error.reason})") from error


def is_text(text: str) -> bool:
    """Whether all of it could be decoded: what could not is there as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_columns(file: Path, columns: Sequence[str], known: Sequence[str], separator: str | None = None) -> None:
    """Refuse a file without a column that is needed; `separator` is what the header was split at."""
    for name in columns:
        if list(known).count(name) > 1:
            raise ValueError(f"{file} has several columns {name!r}: give them different names")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            header = (separator or "").join(known)
            for other in "\t;,|".replace(separator, "") if separator else "":
                if name in [column.strip('" ') for column in header.split(other)]:
                    hint = f": set data.separator to {other!r}, which is between its fields"
            raise ValueError(f"{file} has no column {name!r}, but {', '.join(map(repr, known))}{hint}")
