"""Tables with several label columns: images with masks, texts, and what is wrong with a row said by its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from datamodules import ImageColumns, TextColumns
from tests.conftest import picture
from tests.tiny_encoders import tiny_encoder

KINDS: dict[str, Any] = {
    "breed": "classification",
    "weight": "regression",
    "traits": "multi_label",
    "outline": "segmentation",
}
NAMES = {"outline": ["ground", "animal"]}


def write_images(root: Path, rows: int = 24, first: int = 0) -> Path:
    """A table and its pictures; every third has no breed, every fourth no mask, one no weight."""
    lines = ["image,breed,weight,traits,outline"]
    (root / "masks").mkdir(parents=True, exist_ok=True)
    for number in range(first, first + rows):
        picture(number, 40, 32).save(root / f"{number}.jpg")
        mask = Image.new("L", (40, 32), number % 2)
        mask.putpixel((0, 0), 255)
        mask.save(root / "masks" / f"{number}.png")
        breed = "" if number % 3 == 0 else ("pug", "collie")[number % 2]
        traits = ('"calm,long hair"', "[]", "", "calm")[number % 4]
        outline = "" if number % 4 == 3 else f"masks/{number}.png"
        lines.append(f"{number}.jpg,{breed},{'' if number == 5 else number / 2},{traits},{outline}")
    table = root / f"table{first}.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def images(table: Path, **options: Any) -> ImageColumns:
    defaults: dict[str, Any] = {"labels": KINDS, "class_names": NAMES, "image_size": 16, "num_workers": 0}
    data = ImageColumns(str(table), **{**defaults, **options})
    data.setup()
    return data


def everything(data: ImageColumns) -> list[Any]:
    return [*data.train_dataloader(), *data.val_dataloader()]


def test_images_with_labels_of_every_kind(tmp_path: Path) -> None:
    data = images(write_images(tmp_path), test_file=str(write_images(tmp_path, 8, 100)))
    assert {name: task.kind for name, task in data.tasks.items()} == KINDS
    assert data.tasks["breed"].class_names == ("collie", "pug")
    assert data.tasks["traits"].class_names == ("calm", "long hair")
    assert {name: len(part.labels) for name, part in data.splits.items()} == {
        "train": 21, "val": 3, "test": 8, "predict": 8
    }  # fmt: skip
    seen = 0
    for loader, split in ((data.train_dataloader(), "train"), (data.test_dataloader(), "test")):
        for batch in loader:
            batch = data.on_after_batch_transfer(batch, 0)
            for place, row in enumerate(batch["index"].tolist()):
                number = int(Path(data.sample_names(split)(row)).stem)
                labels = {name: values[place] for name, values in batch["labels"].items()}
                assert labels["breed"] == (-100 if number % 3 == 0 else (1, 0)[number % 2])
                assert labels["weight"].isnan() if number == 5 else labels["weight"] == number / 2
                traits = {0: [1, 1], 1: [0, 0], 3: [1, 0]}.get(number % 4)
                assert labels["traits"].isnan().all() if traits is None else labels["traits"].tolist() == traits
                known = labels["outline"] >= 0
                assert not known.any() if number % 4 == 3 else (labels["outline"][known] == number % 2).all()
                seen += 1
    assert seen == 29
    facts = data.label_facts
    assert 0.6 < facts["breed"]["known"] < 0.7 and 0.7 < facts["outline"]["known"] < 0.85
    assert facts["weight"]["mean"] == pytest.approx(5.75, abs=1)


def test_parquet_says_the_same_and_images_to_predict_need_no_labels(tmp_path: Path) -> None:
    import csv

    table = write_images(tmp_path)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    columns = {name: [row[name] or None for row in rows] for name in rows[0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
    (tmp_path / "new.csv").write_text("image\n3.jpg\n4.jpg\n")
    one = images(table)
    other = images(tmp_path / "table.parquet", predict_file=str(tmp_path / "new.csv"))
    for name, values in one.splits["train"].images.columns.values.items():  # type: ignore[attr-defined]
        twin = other.splits["train"].images.columns.values[name]  # type: ignore[attr-defined]
        assert torch.equal(values.nan_to_num(-1), twin.nan_to_num(-1))
    batch = other.on_after_batch_transfer(next(iter(other.predict_dataloader())), 0)
    assert batch["image"].shape == (2, 3, 16, 16) and not batch["labels"]


def test_what_is_wrong_is_said_with_its_place(tmp_path: Path) -> None:
    table = write_images(tmp_path)
    text = table.read_text()
    with pytest.raises(ValueError, match=r"table0.csv has no column 'race', but 'image', 'breed'"):
        images(table, labels={"race": "classification"}, class_names={})
    table.write_text(text.replace("\n6.jpg", "\n"))
    with pytest.raises(ValueError, match=r"table0.csv, line 8: there is no path of an image"):
        images(table)
    table.write_text(text.replace("\n6.jpg", "\n66.jpg"))
    with pytest.raises(FileNotFoundError, match=r"1 of 24 files are missing, first .*66.jpg: image in .* and data"):
        images(table)
    table.write_text(text.replace("masks/6.png", "masks/66.png"))
    with pytest.raises(FileNotFoundError, match=r"66.png: outline in .*table0.csv says where they are"):
        images(table)
    table.write_text(text.replace(",3.0,", ",three,"))
    with pytest.raises(ValueError, match=r"table0.csv, line 8: expected a number, found 'three'"):
        images(table)
    table.write_text(text)
    Image.new("L", (40, 32), 7).save(tmp_path / "masks" / "6.png")
    with pytest.raises(ValueError, match=r"masks/6.png has the value 7; there are 2 classes, 0 to 1, and 255"):
        everything(images(table))
    Image.new("RGB", (40, 32)).save(tmp_path / "masks" / "6.png")
    with pytest.raises(ValueError, match=r"cannot read the mask .*6.png: expected one number a pixel, found the mode"):
        everything(images(table))
    (tmp_path / "masks" / "6.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"cannot read the mask .*6.png"):
        everything(images(table))
    with pytest.raises(ValueError, match="data.train_file is not set"):
        ImageColumns(labels=KINDS, class_names=NAMES).setup()


def test_texts_with_labels_of_every_kind(tmp_path: Path) -> None:
    lines = ["text,topic,stars,tags"]
    for number in range(30):
        topic = "" if number % 3 == 0 else ("sport", "news")[number % 2]
        tags = ('"new,long"', "[]", "")[number % 3]
        lines.append(f"word {number} of many,{topic},{'' if number == 4 else number % 5},{tags}")
    (tmp_path / "texts.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "new.txt").write_text("one text\nanother\n")
    encoder = tiny_encoder(tmp_path / "bert")
    data = TextColumns(
        {"topic": "classification", "stars": "regression", "tags": "multi_label"},
        train_file=str(tmp_path / "texts.csv"),
        predict_file=str(tmp_path / "new.txt"),
        tokenizer=str(encoder),
        batch_size=4,
        val_share=0.2,
    )
    data.prepare_data()
    data.setup()
    assert data.tasks["topic"].class_names == ("news", "sport") and data.tasks["tags"].class_names == ("long", "new")
    assert data.num_classes == 0 and len(data.splits["train"]) == 24
    seen = 0
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        for batch in loader:
            for place, row in enumerate(batch["index"].tolist()):
                number = int(data.sample_names(split)(row).split()[1])
                labels = {name: values[place] for name, values in batch["labels"].items()}
                assert labels["topic"] == (-100 if number % 3 == 0 else (1, 0)[number % 2])
                assert labels["stars"].isnan() if number == 4 else labels["stars"] == number % 5
                tags = {0: [1, 1], 1: [0, 0]}.get(number % 3)
                assert labels["tags"].isnan().all() if tags is None else labels["tags"].tolist() == tags
                seen += 1
    assert seen == 30
    assert data.label_facts["topic"]["known"] == pytest.approx(2 / 3, abs=0.1)
    assert not next(iter(data.predict_dataloader()))["labels"]
    padded = next(iter(data._in_order("val", world=4, rank=3)))
    assert padded["labels"]["stars"].isnan().any()


def test_texts_have_no_masks_and_a_row_that_is_skipped_shifts_no_label(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a text has no mask; segmentation is for images"):
        TextColumns({"m": "segmentation"})
    rows = "".join(f"word {number},{number}\n" if number != 3 else ",3\n" for number in range(20))
    (tmp_path / "texts.csv").write_text(f"text,stars\n{rows}")
    options: dict[str, Any] = {
        "train_file": str(tmp_path / "texts.csv"),
        "tokenizer": str(tiny_encoder(tmp_path / "b")),
    }
    data = TextColumns({"stars": "regression"}, on_error="skip", val_share=0.2, **options)
    data.setup()
    for batch in data.train_dataloader():
        for place, row in enumerate(batch["index"].tolist()):
            assert batch["labels"]["stars"][place] == int(data.sample_names("train")(row).split()[1])
    with pytest.raises(ValueError, match="line 5: the text is empty"):
        TextColumns({"stars": "regression"}, **options).setup()
