"""Downloads that break off, and archives that would do harm or cannot be read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from datamodules import StanfordDogs
from datamodules.files.archives import download, unpack
from tests.datamodules.conftest import dogs


def test_a_page_that_asks_to_log_in_is_not_taken_for_the_rest(server: Any, tmp_path: Path, official: Path) -> None:
    server.cut, root = 10_000, tmp_path / "dogs"
    with pytest.raises(ConnectionError):
        dogs(server, root).prepare_data()
    content = (official / "images.tar").read_bytes()
    (official / "images.tar").write_bytes(b"<html>Please log in</html>")
    server.cut, server.ranges = None, False
    with pytest.raises(ConnectionError, match=r"the answer has 26 bytes: it is another file, or a page"):
        dogs(server, root).prepare_data()
    (official / "images.tar").write_bytes(content)
    server.ranges = True
    dogs(server, root).prepare_data()
    assert "images.tar bytes=10000-" in server.asked, "what had come was kept"


def test_an_interrupted_download_goes_on(server: Any, tmp_path: Path, official: Path) -> None:
    size = (official / "images.tar").stat().st_size
    server.cut = 10_000
    root = tmp_path / "dogs"
    with pytest.raises(ConnectionError, match=rf"10,000 of {size:,} bytes"):
        dogs(server, root).prepare_data()
    assert not (root / "images.tar").exists()
    assert not (root / "Images").exists()
    server.cut = None
    dogs(server, root).prepare_data()
    assert "images.tar bytes=10000-" in server.asked
    assert (root / "images.tar").read_bytes() == (official / "images.tar").read_bytes()


def test_a_server_that_cannot_go_on_starts_again(server: Any, tmp_path: Path, official: Path) -> None:
    server.cut, root = 10_000, tmp_path / "dogs"
    with pytest.raises(ConnectionError):
        dogs(server, root).prepare_data()
    server.cut, server.ranges = None, False
    dogs(server, root).prepare_data()
    assert (root / "images.tar").read_bytes() == (official / "images.tar").read_bytes()


def hostile(kind: str, outside: Path) -> tarfile.TarInfo:
    info = tarfile.TarInfo({"absolute": str(outside), "upward": "Images/../../stolen"}.get(kind, "Images/x"))
    if kind == "link":
        info.type, info.linkname = tarfile.SYMTYPE, str(outside)
    if kind == "hard link":
        info.type, info.linkname = tarfile.LNKTYPE, "/etc/passwd"
    if kind == "device":
        info.type = tarfile.CHRTYPE
    if kind == "pipe":
        info.type = tarfile.FIFOTYPE
    return info


@pytest.mark.parametrize("kind", ["absolute", "upward", "link", "hard link", "device", "pipe"])
def test_an_archive_that_would_do_harm_is_not_unpacked(kind: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        good = tarfile.TarInfo("Images/good.jpg")
        tar.addfile(good, io.BytesIO())
        tar.addfile(hostile(kind, outside), io.BytesIO())
    with pytest.raises(ValueError, match=r"(points out of the folder|neither file nor folder); nothing was unpacked"):
        unpack(tmp_path / "bad.tar", tmp_path / "to", "Images")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tar"]


def test_rights_in_an_archive_do_not_count(tmp_path: Path) -> None:
    info = tarfile.TarInfo("run.sh")
    info.mode = 0o4777
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(info, io.BytesIO())
    unpack(tmp_path / "a.tar", tmp_path / "to")
    assert not (tmp_path / "to" / "run.sh").stat().st_mode & 0o4111


@pytest.mark.parametrize("content", [b"no archive at all", None])
def test_an_archive_that_cannot_be_read(content: bytes | None, tmp_path: Path, official: Path) -> None:
    (tmp_path / "a.tar").write_bytes((official / "images.tar").read_bytes()[:20_000] if content is None else content)
    with pytest.raises(ValueError, match=r"a.tar cannot be unpacked: .*remove it, and it is fetched again"):
        unpack(tmp_path / "a.tar", tmp_path / "to")
    assert not (tmp_path / "to").exists()
    assert not (tmp_path / "to.part").exists()


def test_a_file_that_is_whole_needs_only_its_name(server: Any, tmp_path: Path) -> None:
    """All bytes came and the program was killed before the file had its name."""
    size, sha256 = StanfordDogs.expected_archives["lists.tar"]
    part = tmp_path / "lists.tar.part"
    part.write_bytes((tmp_path / "official" / "lists.tar").read_bytes())
    download(f"{server.address}/lists.tar", tmp_path / "lists.tar", size, sha256)
    assert not server.asked
    assert not part.exists()
