"""ImageSource in Parquet files: each row group is read once, ranks and workers agree, faults have names."""

from __future__ import annotations

import functools
import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datamodules import ParquetImages
from datamodules.images import row_groups as module
from datamodules.sampling.samplers import BlockSampler
from recipes.vision import main

from ..conftest import write_parquet

SIZES = [30, 7, 22]  # rows of the files, in row groups of 6 at most


@pytest.fixture
def shards(tmp_path: Path) -> str:
    for number, rows in enumerate(SIZES):
        write_parquet(tmp_path / f"train-{number}.parquet", rows, seed=100 * number, group=6)
    return str(tmp_path / "train-*.parquet")


def made(shards: str | list[str], **options: Any) -> ParquetImages:
    given = {"image_size": 32, "batch_size": 4, "num_workers": 0, "in_memory": False, "augment": "none"} | options
    data = ParquetImages(shards, **given)
    data.setup("fit")
    return data


def batches(data: ParquetImages, epoch: int = 0) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def order(sampler: BlockSampler, epoch: int = 0) -> list[int]:
    sampler.set_epoch(epoch)
    return [draw.row for draw in sampler]


def test_every_row_is_found_with_its_label_and_its_name(shards: str) -> None:
    data = made(shards, val_files=shards)
    pictures = data.splits["train"]
    assert len(pictures.labels) == sum(SIZES) and data.class_names == ["class_0", "class_1", "class_2"]
    assert pictures.labels.tolist() == [row % 3 for size in SIZES for row in range(size)]
    assert [pictures.name(index).rsplit("-", 1)[1] for index in (0, 29, 30, 58)] == [
        "0.parquet#0",
        "0.parquet#29",
        "1.parquet#0",
        "2.parquet#21",
    ]
    stored = datasets.Dataset.from_parquet(shards.replace("*", "2"))
    assert np.array_equal(np.array(pictures.read(58)), np.array(stored[21]["image"]))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_get_equal_steps_and_share_no_sample_but_what_fills_up(ranks: int) -> None:
    blocks = np.repeat(np.arange(10), [1, 9, 4, 30, 2, 2, 17, 8, 8, 12])
    samplers = [
        BlockSampler(blocks, batch_size=4, window=16, shuffle=True, num_replicas=ranks, rank=rank)
        for rank in range(ranks)
    ]
    for epoch in range(2):
        dealt = [order(sampler, epoch) for sampler in samplers]
        assert [len(rows) for rows in dealt] == [-(-93 // ranks)] * ranks == [len(sampler) for sampler in samplers]
        seen = Counter(row for rows in dealt for row in rows)
        assert set(seen) == set(range(93)) and sum(seen.values()) - 93 < ranks
    assert order(samplers[0], 0) == order(samplers[0], 0) != order(samplers[0], 1)


def test_evaluation_sees_every_sample_once_in_its_order() -> None:
    for ranks in (1, 2, 4, 7):
        found = []
        for rank in range(ranks):
            sampler = BlockSampler(np.arange(5), batch_size=2, window=4, shuffle=False, num_replicas=ranks, rank=rank)
            found.append(list(sampler))
        assert len({len(part) for part in found}) == 1
        assert [draw.row for part in found for draw in part if not draw.is_padding] == list(range(5))


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_a_block_is_one_workers_own_but_at_the_borders_of_lanes(workers: int) -> None:
    blocks = np.repeat(np.arange(100), 50)
    rows = order(BlockSampler(blocks, batch_size=10, window=800, shuffle=True))
    readers: dict[int, set[int]] = {}
    for batch in range(500):
        for row in rows[10 * batch : 10 * batch + 10]:
            readers.setdefault(int(blocks[row]), set()).add(batch % workers)
    assert sum(map(len, readers.values())) <= 100 + BlockSampler.LANES - 1
    runs = np.flatnonzero(np.diff(rows))
    assert len(runs) > 4_000, "rows of a block come mixed"


def test_a_row_group_is_read_once_an_epoch(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, int]] = []

    def spy(path: str, number: int, column: str) -> Any:
        reads.append((path, number))
        return true(path, number, column)

    true = module.read_group
    monkeypatch.setattr(module, "read_group", spy)
    data = made(shards, val_files=shards, shuffle_rows=32)
    groups = sum(-(-size // 6) for size in SIZES)
    batches(data)
    assert len(set(reads)) == groups and len(reads) <= groups + BlockSampler.LANES
    reads.clear()
    list(data.val_dataloader())
    assert len(reads) == groups


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_workers_change_nothing(shards: str) -> None:
    def rows(workers: int) -> list[int]:
        data = made(shards, val_files=shards, augment="strong", num_workers=workers)
        found = batches(data, epoch=1)
        return [int(batch["image"].double().sum()) for batch in found] + torch.cat([b["index"] for b in found]).tolist()

    assert rows(0) == rows(1) == rows(2) == rows(3)


def test_whole_row_groups_are_held_out(shards: str) -> None:
    data = made(shards, val_share=0.2)
    parts = {name: set(map(data.splits[name].name, range(len(data.splits[name].labels)))) for name in ("train", "val")}
    groups = {name: {(row.split("#")[0], int(row.split("#")[1]) // 6) for row in rows} for name, rows in parts.items()}
    assert not groups["train"] & groups["val"] and len(parts["train"] | parts["val"]) == sum(SIZES)
    assert 12 <= len(parts["val"]) <= 17
    assert {batch["label"].max().item() for batch in data.val_dataloader()} == {2}


def test_names_of_another_order_in_another_file(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "a.parquet", 6)
    names = ["class_2", "class_1", "class_0"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    cells = pq.read_table(train)["image"].to_pylist()
    other = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 2, 0, 1, 2]}, features=features)
    other.to_parquet(str(tmp_path / "b.parquet"))
    data = made(str(train), val_files=str(tmp_path / "b.parquet"))
    assert data.splits["val"].labels.tolist() == [2, 1, 0, 2, 1, 0]


@pytest.mark.parametrize("labels", [["b", "a", "c"], [30, 4, 100]])
def test_plain_parquet_without_metadata(tmp_path: Path, labels: list[Any]) -> None:
    cells = [row["bytes"] for row in pq.read_table(write_parquet(tmp_path / "a.parquet", 6))["image"].to_pylist()]
    pq.write_table(pa.table({"jpg": cells, "cls": labels * 2}), tmp_path / "b.parquet")
    path = str(tmp_path / "b.parquet")
    data = made(path, val_files=path, image_column="jpg", label_column="cls")
    assert data.class_names == [str(name) for name in sorted(labels)]
    assert data.splits["train"].read(5).size == (32, 32)


def test_a_column_of_paths_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.jpg", "b.jpg"], "label": [0, 1]}), tmp_path / "a.parquet")
    data = made(str(tmp_path / "a.parquet"), val_files=str(tmp_path / "a.parquet"))
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
        near, far = (made(source, val_files=source, num_workers=workers) for source in (shards, files))
        Server.failures[:] = [0, 1, 0, 0, 0, 0] if not workers else []
        for one, other in zip(batches(near), batches(far), strict=True):
            assert torch.equal(one["image"], other["image"])
    with pytest.raises(FileNotFoundError, match="no file http.*nowhere.parquet"):
        made([f"{address}/nowhere.parquet"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the checkpoints lie outside their run
def test_a_run_resumed_amid_an_epoch_is_the_uninterrupted_one(shards: str) -> None:
    options = ["--trainer.max_epochs=2", "--model.head_dropout=0.3", "--model.backbone=resnet8", "--data.num_workers=2"]
    options += ["--model.image_size=32", f"--data.train_files={shards}", "--data.batch_size=4", "--data.val_share=0.2"]
    options += ["--data.in_memory=false", "--model.weights=null", "--trainer.enable_progress_bar=false"]
    options += ["--trainer.logger=false", "--trainer.callbacks=null", "--trainer.accelerator=cpu"]
    keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    keep += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.dirpath=steps"]
    keep += ["--trainer.callbacks.filename={step}"]
    quick = ["fit", "--config", "vision/parquet_resnet50"]
    whole = main([*quick, *options, *keep]).model.state_dict()
    for step in (3, 14):
        resumed = main([*quick, *options, f"--ckpt_path=steps/step={step}.ckpt"]).model.state_dict()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), step


def test_a_broken_row_group_is_named_or_skipped_and_counted(shards: str) -> None:
    path = Path(shards.replace("*", "1"))
    footer = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    start = min(footer.data_page_offset, footer.dictionary_page_offset or footer.data_page_offset)
    content[start : start + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-1.parquet#\d: row group 0 cannot be read, .*data.on_error to skip"):
        batches(made(shards, val_files=shards))
    data = made(shards, val_files=shards, on_error="skip")
    found = batches(data) + [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    assert len(data.skipped) == 6
    assert found


@pytest.mark.parametrize(
    "options, words",
    [
        ({"fold": (0, 3)}, "data.fold needs single samples.*set data.val_files"),
        ({"balance": True}, "data.balance needs single samples.*class_weights"),
        ({"image_column": "img"}, "no column 'img' in .*train-0.parquet: it has image, label"),
        ({"train_files": "nowhere-*.parquet"}, "no file nowhere-.*set data.train_files"),
        ({"train_files": "nowhere.parquet"}, "no file nowhere.parquet: set data.train_files"),
    ],
)
def test_what_cannot_be_is_told(shards: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        made(**{"shards": options.pop("train_files", shards), **options})


def test_labels_that_cannot_be(tmp_path: Path, shards: str) -> None:
    table = pq.read_table(shards.replace("*", "0"))
    for label, words in (
        (-1, "row 3 of .*bad.parquet: label '-1' is not among the classes class_0"),
        (None, "row 3 of .*bad.parquet: there is no label"),
    ):
        labels = table["label"].to_pylist()
        labels[3] = label
        column = pa.array(labels, pa.int64())
        pq.write_table(table.set_column(1, "label", column), tmp_path / "bad.parquet")
        with pytest.raises(ValueError, match=words):
            made(str(tmp_path / "bad.parquet"))
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(ValueError, match="text.parquet is not a readable Parquet file"):
        made(str(tmp_path / "text.parquet"))


def test_rows_sorted_by_class_cannot_be_split_by_row_groups(tmp_path: Path, shards: str) -> None:
    table = pq.read_table(shards.replace("*", "0")).sort_by("label")
    pq.write_table(table, tmp_path / "sorted.parquet", row_group_size=10)
    with pytest.raises(ValueError, match=r"no training image of class .* is left.*set data.val_files"):
        made(str(tmp_path / "sorted.parquet"), val_share=0.1)
    pq.write_table(table, tmp_path / "one.parquet")
    with pytest.raises(ValueError, match="one row group"):
        made(str(tmp_path / "one.parquet"))
