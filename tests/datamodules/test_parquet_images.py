"""Images in Parquet files: each row group is read once, ranks and workers agree, faults have names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datamodules import ParquetImages
from recipes.vision import main
from tests.conftest import write_parquet
from tests.datamodules.conftest import SIZES, parquet_images, train_batches


def test_every_row_is_found_with_its_label_and_its_name(shards: str) -> None:
    data = parquet_images(shards, val_files=shards)
    images = data.splits["train"]
    assert len(images.labels) == sum(SIZES) and data.class_names == ["class_0", "class_1", "class_2"]
    assert images.labels.tolist() == [row % 3 for size in SIZES for row in range(size)]
    assert [images.name(index).rsplit("-", 1)[1] for index in (0, 29, 30, 58)] == [
        "0.parquet#0",
        "0.parquet#29",
        "1.parquet#0",
        "2.parquet#21",
    ]
    stored = datasets.Dataset.from_parquet(shards.replace("*", "2"))
    assert np.array_equal(np.array(images.read(58)), np.array(stored[21]["image"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_workers_change_nothing(shards: str) -> None:
    def rows(workers: int) -> list[int]:
        data = parquet_images(shards, val_files=shards, augment="strong", num_workers=workers)
        found = train_batches(data, epoch=1)
        return [int(batch["image"].double().sum()) for batch in found] + torch.cat([b["index"] for b in found]).tolist()

    assert rows(0) == rows(1) == rows(2) == rows(3)


def test_whole_row_groups_are_held_out(shards: str) -> None:
    data = parquet_images(shards, val_share=0.2)
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
    data = parquet_images(str(train), val_files=str(tmp_path / "b.parquet"))
    assert data.splits["val"].labels.tolist() == [2, 1, 0, 2, 1, 0]


@pytest.mark.parametrize("labels", [["b", "a", "c"], [30, 4, 100]])
def test_plain_parquet_without_metadata(tmp_path: Path, labels: list[Any]) -> None:
    cells = [row["bytes"] for row in pq.read_table(write_parquet(tmp_path / "a.parquet", 6))["image"].to_pylist()]
    pq.write_table(pa.table({"jpg": cells, "cls": labels * 2}), tmp_path / "b.parquet")
    path = str(tmp_path / "b.parquet")
    data = parquet_images(path, val_files=path, image_column="jpg", label_column="cls")
    assert data.class_names == [str(name) for name in sorted(labels)]
    assert data.splits["train"].read(5).size == (32, 32)


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
        parquet_images(**{"shards": options.pop("train_files", shards), **options})


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
            parquet_images(str(tmp_path / "bad.parquet"))
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(ValueError, match="text.parquet is not a readable Parquet file"):
        parquet_images(str(tmp_path / "text.parquet"))


def test_rows_sorted_by_class_cannot_be_split_by_row_groups(tmp_path: Path, shards: str) -> None:
    table = pq.read_table(shards.replace("*", "0")).sort_by("label")
    pq.write_table(table, tmp_path / "sorted.parquet", row_group_size=10)
    with pytest.raises(ValueError, match=r"no training image of class .* is left.*set data.val_files"):
        parquet_images(str(tmp_path / "sorted.parquet"), val_share=0.1)
    pq.write_table(table, tmp_path / "one.parquet")
    with pytest.raises(ValueError, match="one row group"):
        parquet_images(str(tmp_path / "one.parquet"))


def test_a_table_without_rows_is_no_split(tmp_path: Path) -> None:
    files = {
        "train": str(write_parquet(tmp_path / "a.parquet", 9)),
        "test": str(write_parquet(tmp_path / "b.parquet", 0)),
    }
    with pytest.raises(ValueError, match="the test split has no images"):
        ParquetImages(files["train"], test_files=files["test"], val_files=files["train"], image_size=32).setup()
