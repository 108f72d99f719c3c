"""Archives from the web: downloaded so that an interruption costs little, unpacked so that nothing lands elsewhere."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from tqdm.auto import tqdm

BLOCK = 1 << 20


def download(url: str, file: Path, size: int, sha256: str) -> None:
    """Fetch a file of known size, resuming where an earlier try was cut off; it has its name only when it is whole.

    The address may begin with http, https or file; `<file>.part` beside the file holds what has come so far.

    Raises:
        ConnectionError: The address cannot be reached, or the connection broke; what came is kept.
        ValueError: What came has another SHA-256; it is removed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    have = part.stat().st_size if part.exists() else 0
    if have < size:
        try:
            fetch(url, part, have, size)
        except (OSError, http.client.HTTPException) as error:
            have = part.stat().st_size if part.exists() else 0
            raise ConnectionError(
                f"cannot download {url}: {error}; {have:,} of {size:,} bytes are in {part}, the next try resumes there"
            ) from error
    found = part.stat().st_size
    if found < size:
        raise ConnectionError(
            f"the download of {url} broke off at {found:,} of {size:,} bytes; the next try resumes it"
        )
    if digest(part) != sha256:
        part.unlink()
        raise ValueError(f"{url} does not have the expected content (SHA-256 {sha256}); the download was removed")
    part.rename(file)


def fetch(url: str, part: Path, have: int, size: int) -> None:
    """Append what is missing of a file, or take it from the start where the server can't go on in the middle."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        going_on = have > 0 and answer.status == http.client.PARTIAL_CONTENT
        length = answer.headers.get("Content-Length")
        if not going_on and length is not None and int(length) != size:
            raise OSError(f"the answer has {int(length):,} bytes: it is another file, or a page that asks to log in")
        with (
            part.open("ab" if going_on else "wb") as out,
            tqdm(desc=part.stem, initial=have if going_on else 0, total=size, unit="B", unit_scale=True) as bar,
        ):
            while (block := answer.read(BLOCK)) and out.tell() <= size:
                out.write(block)
                bar.update(len(block))


def digest(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def unpack(archive: Path, folder: Path, inside: str = ".") -> None:
    """Unpack a tar archive's folder `inside` into a folder that exists either as a whole or not at all.

    Only files and folders below it are made: no links, no devices, nothing elsewhere, nothing with rights of its own.

    Raises:
        ValueError: A member that does not belong into an archive of data, or a file that is no archive or lacks
            `inside`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        with tarfile.open(archive) as members, tqdm(desc=f"unpacking {archive.name}", unit=" files") as bar:
            for member in members:
                target = beside / member.name
                if not (member.isfile() or member.isdir()):
                    raise ValueError(f"{archive}: {member.name} is neither file nor folder; nothing was unpacked")
                if not target.resolve().is_relative_to(beside.resolve()):
                    raise ValueError(f"{archive}: {member.name} points out of the folder; nothing was unpacked")
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                source = members.extractfile(member)
                assert source is not None
                with source, target.open("xb") as out:
                    shutil.copyfileobj(source, out, BLOCK)
                bar.update()
        if not (beside / inside).is_dir():
            raise ValueError(f"{archive} has no folder {inside}")
        (beside / inside).chmod(0o755)
        try:
            (beside / inside).rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise
    except (tarfile.TarError, EOFError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise ValueError(f"{archive} cannot be unpacked: {reason}; remove it, and it is fetched again") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
