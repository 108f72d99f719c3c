"""Small data sets, data modules and their batches, for several test files."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datamodules import (
    CIFAR10,
    Digits,
    HuggingFaceImages,
    ImageFolder,
    ParquetImages,
    StanfordDogs,
    TextFiles,
)
from datamodules.images.base import ImageDataModule
from tests.conftest import write_folder, write_parquet
from tests.official_archives import write_stanford_dogs
from tests.tiny_encoders import tokenizer, write_csv


@pytest.fixture
def every(tmp_path: Path, cifar10: Path) -> dict[str, ImageDataModule]:
    files = {
        "train": str(write_parquet(tmp_path / "a.parquet", 30)),
        "test": str(write_parquet(tmp_path / "b.parquet", 9)),
    }
    options: dict[str, Any] = {"batch_size": 8, "num_workers": 0}
    return {
        "digits": Digits(image_size=8, **options),
        "cifar10": CIFAR10(cifar10, image_size=32, **options),
        "folder": ImageFolder(write_folder(tmp_path / "f"), image_size=32, **options),
        "folder, large": ImageFolder(write_folder(tmp_path / "g"), image_size=100, **options),
        "huggingface": HuggingFaceImages("parquet", data_files=files, image_size=32, **options),
    }


def batches_of(data: ImageDataModule, split: str) -> list[dict[str, Any]]:
    loader = getattr(data, f"{split}_dataloader")()
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:200])
    return path


SIZES = [30, 7, 22]  # rows of the files, in row groups of 6 at most


@pytest.fixture
def shards(tmp_path: Path) -> str:
    for number, rows in enumerate(SIZES):
        write_parquet(tmp_path / f"train-{number}.parquet", rows, seed=100 * number, group=6)
    return str(tmp_path / "train-*.parquet")


def parquet_images(shards: str | list[str], **options: Any) -> ParquetImages:
    given = {"image_size": 32, "batch_size": 4, "num_workers": 0, "in_memory": False, "augment": "none"} | options
    data = ParquetImages(shards, **given)
    data.setup("fit")
    return data


def train_batches(data: ParquetImages, epoch: int = 0) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


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


@pytest.fixture
def words(own_folder: Path) -> str:
    """A folder with a tokenizer."""
    tokenizer().save_pretrained(own_folder / "words")
    return str(own_folder / "words")


def text_module(folder: Path, words: str, rows: int = 60, **options: object) -> TextFiles:
    path = write_csv(folder / "train.csv", rows)
    data = TextFiles(str(path), tokenizer=words, **{"batch_size": 8, "max_length": 32, **options})  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    return data


def write_lines(folder: Path, *lines: str | bytes, name: str = "a.csv") -> str:
    path = folder / name
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return str(path)
