"""Folders of images: layouts, splits, mistakes, and what is omitted."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from datamodules import Digits, ImageFolder
from datamodules.files import index as file_index
from tests.conftest import picture, write_folder
from tests.datamodules.conftest import batches_of


def test_classes_are_told_by_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one name begins another, from the list and from the note."""
    monkeypatch.setattr(file_index, "MANY", 5)
    root = write_folder(tmp_path / "images", splits=(), classes=3, each=4)
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    for folder, name in zip(folders, ("ant", "ant-eater", "ant.2"), strict=True):
        folder.rename(root / name)
    (root / "ant0.jpg").write_bytes(next((root / "ant").iterdir()).read_bytes())
    found = []
    for _ in range(2):
        data = ImageFolder(root, image_size=32, val_share=0.25, test_share=0.25)
        data.setup("fit")
        for split in ("train", "val", "test"):
            images = data.splits[split]
            names = [Path(images.name(index)) for index in range(len(images.labels))]
            assert [data.class_names[label] for label in images.labels] == [name.parent.name for name in names]
            found.append(names)
    assert found[:3] == found[3:]
    assert sum(map(len, found[:3])) == 12, "a stray image belongs to no class"


def test_known_classes_need_no_training_folder(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.jpg")
    data = ImageFolder(predict_root=tmp_path, class_names=["x", "y"], image_size=32, fold=(0, 3), limit_per_class=1)
    data.setup("predict")
    assert list(data.splits) == ["predict"] and data.num_classes == 2 and not data.cut_rows
    with pytest.raises(ValueError, match=r"unless data.predict_root says what to predict"):
        ImageFolder(tmp_path, class_names=["x", "y"])
    with pytest.raises(ValueError, match=r"data.root is not set"):
        ImageFolder().setup()


def test_folder_layouts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def counts(splits: tuple[str, ...]) -> dict[str, int]:
        data = ImageFolder(write_folder(tmp_path / "-".join(splits or ("none",)), splits, each=10), image_size=32)
        with caplog.at_level(logging.INFO):
            data.setup()
        return {name: len(images.labels) for name, images in data.splits.items() if name != "predict"}

    assert counts(("train", "val", "test")) == {"train": 30, "val": 30, "test": 30}
    assert counts(("train", "valid")) == {"train": 27, "val": 3, "test": 30}
    assert "val/ is kept for the test" in caplog.text
    assert counts(("train", "test")) == {"train": 27, "val": 3, "test": 30}
    assert counts(()) == {"train": 21, "val": 3, "test": 6}


def test_mistakes_in_a_folder_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere: expected one folder of images per class"):
        _ = ImageFolder(tmp_path / "nowhere").class_names
    root = write_folder(tmp_path / "one", classes=1)
    with pytest.raises(ValueError, match=r"two or more classes; found \['class_0'\]"):
        _ = ImageFolder(root).class_names
    root = write_folder(tmp_path / "strange")
    (root / "val" / "class_9").mkdir()
    with pytest.raises(ValueError, match="classes that the training folder lacks: class_9"):
        ImageFolder(root).setup()
    root = write_folder(tmp_path / "empty")
    (root / "train" / "zebra").mkdir()
    with pytest.raises(ValueError, match="no image of class 'zebra'"):
        ImageFolder(root).setup()
    with pytest.raises(FileNotFoundError, match="set data.predict_root"):
        ImageFolder(write_folder(tmp_path / "f"), predict_root=tmp_path / "nowhere").setup()
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        Digits(batch_size=0)


def test_loose_images_can_be_predicted(tmp_path: Path) -> None:
    loose = tmp_path / "loose" / "deeper"
    loose.mkdir(parents=True)
    for number in range(3):
        picture(number).save(loose / f"{number}.png")
    data = ImageFolder(write_folder(tmp_path / "f"), image_size=32, predict_root=tmp_path / "loose")
    data.setup("predict")
    assert [Path(data.sample_names("predict")(i)).name for i in range(3)] == ["0.png", "1.png", "2.png"]
    assert len(batches_of(data, "predict")[0]["image"]) == 3


def test_all_that_can_be_read_is_read_and_what_is_left_out_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_folder(tmp_path / "f", ("train", "val", "test"), classes=2, each=4)
    for ending in ("jfif", "jpe", "JPG"):
        picture(1).save(root / "train" / "class_0" / f"more.{ending}", "JPEG")
    picture(1).convert("L").save(root / "train" / "class_0" / "more.pgm")
    picture(1).save(root / "train" / "class_1" / "._more.jpg")
    for name in ("notes.txt", "more.txt", "Thumbs.db", "README", "drawing.eps"):
        (root / "train" / "class_1" / name).write_text("x")
    picture(1).save(root / "train" / "loose.jpg")
    picture(1).save(root / "beside.jpg")
    (root / "extra").mkdir()
    picture(1).save(root / "extra" / "one.png")
    data = ImageFolder(root, image_size=32)
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert data.class_counts == [8, 4]
    for words in (
        f"files in {root}/train without an image's ending: 5 (2 .txt, 1 ",
        f"images in {root}/train, but in no class folder: 1, first loose.jpg",
        f"beside the splits of {root} lie beside.jpg, extra/, with images: 2",
    ):
        assert any(words in sentence for sentence in data.omitted), data.omitted
        assert f"data: omitted: {words}" in caplog.text
    assert data.inspect()["left_out"] == data.omitted
    assert not ImageFolder(write_folder(tmp_path / "g"), image_size=32).omitted


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("kind", ["loose", "empty", "empty classes"])
def test_a_split_of_no_use_is_refused(tmp_path: Path, split: str, kind: str) -> None:
    root = write_folder(tmp_path / "f", tuple({"train", "val", "test"} - {split}), classes=2, each=4)
    (root / split / "class_0" if kind == "empty classes" else root / split).mkdir(parents=True)
    if kind == "loose":
        for number in range(3):
            picture(number).save(root / split / f"{number}.jpg")
    words = "all 3 lie in no class folder" if kind == "loose" else "it is empty"
    with pytest.raises(
        ValueError, match=rf"no image for {split} in .*{split}: {words}.*one folder per class.*predict_root"
    ):
        ImageFolder(root, image_size=32).setup()


@pytest.mark.parametrize("names", [("val", "validation"), ("test", "Test"), ("train", "training")])
def test_two_folders_for_one_split_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    root = write_folder(tmp_path / "f", tuple({"train", *names}), classes=2, each=2)
    first, second = sorted(names)
    with pytest.raises(ValueError, match=rf"has {first}/ and {second}/, each for {names[0]}: keep one"):
        ImageFolder(root, image_size=32).setup()


def test_split_folders_of_other_spellings_are_no_classes(tmp_path: Path) -> None:
    for names in (("Train", "Test"), ("training_set", "test_set")):
        data = ImageFolder(write_folder(tmp_path / names[0], names), image_size=32)
        assert data.class_names == ["class_0", "class_1", "class_2"]
    with pytest.raises(ValueError, match="has a folder Val/ but none called train/"):
        _ = ImageFolder(write_folder(tmp_path / "odd", ("learn", "Val"))).class_names
