"""Row groups of Parquet files: each is read once, near or far away, and a broken one is named."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datamodules.images import row_groups
from datamodules.sampling.samplers import BlockSampler
from tests.datamodules.conftest import SIZES, parquet_images, train_batches


def test_a_row_group_is_read_once_an_epoch(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, int]] = []

    def spy(path: str, number: int, column: str) -> Any:
        reads.append((path, number))
        return true(path, number, column)

    true = row_groups.read_group
    monkeypatch.setattr(row_groups, "read_group", spy)
    data = parquet_images(shards, val_files=shards, shuffle_rows=32)
    groups = sum(-(-size // 6) for size in SIZES)
    train_batches(data)
    assert len(set(reads)) == groups and len(reads) <= groups + BlockSampler.LANES
    reads.clear()
    list(data.val_dataloader())
    assert len(reads) == groups


def test_a_column_of_paths_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.jpg", "b.jpg"], "label": [0, 1]}), tmp_path / "a.parquet")
    data = parquet_images(str(tmp_path / "a.parquet"), val_files=str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="a.parquet#1 has no image, only a path, b.jpg"):
        data.splits["train"].read(1)


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves parts of files, as object stores do; fails where it is told to."""

    failures: ClassVar[list[int]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            return self.send_error(404)
        content, wanted = file.read_bytes(), self.headers.get("Range")
        if body and self.failures and self.failures.pop():
            return self.send_error(503)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last or len(content)), len(content) - 1)
            self.send_header("Content-Range", f"bytes {first}-{end}/{len(content)}")
            content = content[int(first) : end + 1]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)
        return None


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(tmp_path)))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()


@pytest.mark.slow
def test_files_far_away_are_read_in_part_and_asked_for_again(
    shards: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    files = [f"{address}/train-{number}.parquet" for number in range(3)]
    for workers in (0, 2):
        near, far = (parquet_images(source, val_files=source, num_workers=workers) for source in (shards, files))
        Server.failures[:] = [0, 1, 0, 0, 0, 0] if not workers else []
        for one, other in zip(train_batches(near), train_batches(far), strict=True):
            assert torch.equal(one["image"], other["image"])
    with pytest.raises(FileNotFoundError, match="no file http.*nowhere.parquet"):
        parquet_images([f"{address}/nowhere.parquet"])


def test_a_broken_row_group_is_named_or_skipped_and_counted(shards: str) -> None:
    path = Path(shards.replace("*", "1"))
    footer = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    start = min(footer.data_page_offset, footer.dictionary_page_offset or footer.data_page_offset)
    content[start : start + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-1.parquet#\d: row group 0 cannot be read, .*data.on_error to skip"):
        train_batches(parquet_images(shards, val_files=shards))
    data = parquet_images(shards, val_files=shards, on_error="skip")
    found = train_batches(data) + [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    assert len(data.skipped) == 6
    assert found
