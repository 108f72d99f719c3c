"""Stanford Dogs in its true format, over a server of our own: downloads, broken downloads, archives that do harm."""

from __future__ import annotations

import functools
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from datamodules import StanfordDogs
from datamodules.files.archives import download, unpack
from tests.official_archives import BOX, BREEDS, write_stanford_dogs


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the three archives."""
    write_stanford_dogs(tmp_path / "official", monkeypatch)
    return tmp_path / "official"


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; goes on in the middle of a file, and hangs up after `cut` bytes where that is set."""

    cut: int | None = None
    ranges = True
    asked: list[str] = []

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            return self.send_error(404, "File not found")
        begin = self.headers.get("Range")
        self.asked.append(f"{file.name} {begin}")
        start = int(begin.removeprefix("bytes=").rstrip("-")) if begin and self.ranges else 0
        content = file.read_bytes()[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.cut])
        return None


@pytest.fixture
def server(official: Path) -> Iterator[type[Server]]:
    kind = type("OneServer", (Server,), {"asked": []})
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(official)))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    kind.address = f"http://127.0.0.1:{web.server_port}"  # type: ignore[attr-defined]
    yield kind
    web.shutdown()
    web.server_close()


def dogs(server: Any, root: Path, **options: Any) -> StanfordDogs:
    return StanfordDogs(root, address=server.address, image_size=32, batch_size=4, num_workers=0, **options)


def test_it_is_downloaded_unpacked_and_read(server: Any, tmp_path: Path) -> None:
    data = dogs(server, tmp_path / "dogs", val_share=0.25)
    data.prepare_data()
    data.setup("fit")
    assert data.class_names == ["Chihuahua", "Italian greyhound", "curly-coated retriever"]
    assert {name: len(part.labels) for name, part in data.splits.items()} == {
        "train": 18, "val": 6, "test": 12, "predict": 12,
    }  # fmt: skip
    for split in ("train", "val", "test"):
        names = [data.sample_names(split)(index) for index in range(len(data.splits[split].labels))]
        assert all(BREEDS[label] in name for label, name in zip(data.splits[split].labels, names, strict=True))
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 32, 32)
    asked = len(server.asked)
    assert asked == 2, "boxes are not needed"
    dogs(server, tmp_path / "dogs").prepare_data()
    assert len(server.asked) == asked, "nothing is fetched twice"


def test_archives_on_the_disk_are_enough(official: Path) -> None:
    data = StanfordDogs(official, address="http://127.0.0.1:9", image_size=32)
    data.prepare_data()
    data.setup("fit")
    assert len(data.splits["test"].labels) == 12


def test_lists_may_lie_beside_the_pictures(official: Path, tmp_path: Path) -> None:
    with tarfile.open(official / "images.tar") as images, tarfile.open(official / "lists.tar") as lists:
        images.extractall(tmp_path / "tree", filter="data")
        lists.extractall(tmp_path / "tree", filter="data")
    data = StanfordDogs(tmp_path / "tree", address="http://127.0.0.1:9", image_size=32)
    data.prepare_data()
    data.setup("fit")
    assert len(data.splits["test"].labels) == 12


def test_pictures_are_cut_to_the_box_around_all_dogs(server: Any, tmp_path: Path) -> None:
    data = dogs(server, tmp_path / "dogs", crop_to_box=True)
    data.prepare_data()
    data.setup("fit")
    whole = dogs(server, tmp_path / "dogs")
    whole.setup("fit")
    cut, full = data.splits["test"].read(3), whole.splits["test"].read(3)
    assert cut.size == (48 - 4, 30 - 2), "no further than the image goes"
    assert cut.tobytes() == full.crop((4, 2, 48, 30)).tobytes()
    note = tmp_path / "dogs" / "Annotation" / BREEDS[0] / "n02085620_8"
    note.write_text(BOX.replace("<xmin>4<", "<xmin>70<").replace("<xmin>10<", "<xmin>70<"))
    with pytest.raises(ValueError, match=r"the box of .*n02085620_8 lies outside its image of 48 x 40 pixels"):
        data.splits["test"].read(0)
    note.write_text("<annotation>")
    with pytest.raises(ValueError, match=r"cannot read a box from .*n02085620_8"):
        data.splits["test"].read(0)


def test_boxes_change_the_fingerprint(server: Any, tmp_path: Path) -> None:
    """Features of whole images are not those of cut ones."""
    found = []
    for crop in (False, True):
        data = dogs(server, tmp_path / "dogs", crop_to_box=crop)
        data.prepare_data()
        data.setup("fit")
        found.append(data.fingerprint("train"))
    assert found[0] != found[1]
    note = tmp_path / "dogs" / "Annotation" / BREEDS[0] / "n02085620_1"
    note.write_text(note.read_text() + "\n")
    assert data.fingerprint("train") not in found


def test_two_runs_unpack_at_once(server: Any, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(dogs(server, tmp_path / "dogs").prepare_data) for _ in range(4)]:
            done.result()
    data = dogs(server, tmp_path / "dogs")
    data.setup("fit")
    assert len(server.asked) == 2, "one of them downloads"
    assert sorted(path.name for path in (tmp_path / "dogs").iterdir()) == [
        ".lock", "Images", "images.tar", "lists", "lists.tar",
    ]  # fmt: skip
    with ThreadPoolExecutor(4) as pool:  # without the lock
        archive, folder = tmp_path / "dogs" / "images.tar", tmp_path / "again"
        for done in [pool.submit(unpack, archive, folder, "Images") for _ in range(4)]:
            done.result()
    assert len(list(folder.glob("*/*.jpg"))) == 36
    assert not list(tmp_path.glob("*.part"))


def test_what_a_killed_run_left_is_removed_but_not_its_download(server: Any, tmp_path: Path, official: Path) -> None:
    (tmp_path / "dogs" / "Images.abc.part" / "Images").mkdir(parents=True)
    (tmp_path / "dogs" / "lists.tar.part").write_bytes((official / "lists.tar").read_bytes()[:1000])
    dogs(server, tmp_path / "dogs").prepare_data()
    assert "lists.tar bytes=1000-" in server.asked
    assert not list((tmp_path / "dogs").glob("*.part"))


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


def test_what_is_not_the_archive_is_refused(server: Any, tmp_path: Path, official: Path) -> None:
    content = (official / "images.tar").read_bytes()
    (official / "images.tar").write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match=r"images.tar does not have the expected content .*the download was removed"):
        dogs(server, tmp_path / "dogs").prepare_data()
    assert [path.name for path in (tmp_path / "dogs").iterdir()] == [".lock"]
    (tmp_path / "dogs" / "images.tar").write_bytes(b"<html>Service unavailable</html>")
    with pytest.raises(ValueError, match=r"images.tar is not the archive of http.*: remove it, and it is downloaded"):
        dogs(server, tmp_path / "dogs").prepare_data()


def test_a_server_that_is_not_there(official: Path, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"cannot download http://127.0.0.1:9/images.tar: .*refused"):
        StanfordDogs(tmp_path / "dogs", address="http://127.0.0.1:9/").prepare_data()
    (official / "images.tar").unlink()
    with pytest.raises(ConnectionError, match="cannot download"):
        StanfordDogs(official, address=official.as_uri()).prepare_data()


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


def test_a_tree_that_lacks_something_says_what(server: Any, tmp_path: Path) -> None:
    root = tmp_path / "dogs"
    data = dogs(server, root, crop_to_box=True)
    data.prepare_data()
    (root / "Annotation" / BREEDS[1] / "n02091032_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 24 files are missing, first .*Ann.*/n02091032_3: remove .*Ann"):
        data.setup("fit")
    for number in (2, 5):
        (root / "Images" / BREEDS[0] / f"n02085620_{number}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 24 files are missing, first .*/n02085620_2.jpg: remove"):
        dogs(server, root).setup("fit")
    (root / "lists" / "test_list.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*test_list.mat: expected the list from lists.tar"):
        dogs(server, root).setup("fit")
    (root / "lists" / "train_list.mat").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"train_list.mat is not a list of Stanford Dogs"):
        _ = dogs(server, root).class_names


def test_a_file_that_is_whole_needs_only_its_name(server: Any, tmp_path: Path) -> None:
    """All bytes came and the program was killed before the file had its name."""
    size, sha256 = StanfordDogs.expected_archives["lists.tar"]
    part = tmp_path / "lists.tar.part"
    part.write_bytes((tmp_path / "official" / "lists.tar").read_bytes())
    download(f"{server.address}/lists.tar", tmp_path / "lists.tar", size, sha256)
    assert not server.asked
    assert not part.exists()
