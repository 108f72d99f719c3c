"""Every image data module: splits, batches, broken images, resume; on data in the true formats."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from datamodules import CIFAR10, Digits, HuggingFaceImages, ImageFolder, ParquetImages
from datamodules.images.base import ImageDataModule
from datamodules.images.batches import sample_transform
from datamodules.images.sources import decode
from datamodules.sampling.splits import grouped_split, hold_out, limit_per_class, stratified_split

from ..conftest import picture, write_folder, write_parquet


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


def rows(data: ImageDataModule, split: str) -> list[dict[str, Any]]:
    loader = getattr(data, f"{split}_dataloader")()
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def test_batches_of_every_data_module(every: dict[str, ImageDataModule]) -> None:
    for name, data in every.items():
        assert data.num_classes == len(data.class_names) > 1, f"{name}: known before setup"
        data.prepare_data() if name != "cifar10" else None
        data.setup("fit")
        for split in ("train", "val", "test", "predict"):
            batches = rows(data, split)
            images = batches[0]["image"]
            size = data.image_size
            assert images.shape[1:] == (3, size, size) and images.dtype == torch.float32, name
            assert images.is_contiguous(memory_format=torch.channels_last), name
            assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.01, name
            index = torch.cat([batch["index"] for batch in batches])
            labels = torch.cat([batch["label"] for batch in batches])
            assert torch.equal(labels, data.splits[split].labels[index]), name
            if split != "train":
                assert index.tolist() == list(range(len(data.splits[split].labels))), name


def test_train_and_validation_share_nothing_and_keep_every_class(every: dict[str, ImageDataModule]) -> None:
    for name, data in every.items():
        data.setup("fit")
        seen = {
            s: {data.sample_names(s)(i) for i in range(len(data.splits[s].labels))} for s in ("train", "val", "test")
        }
        assert not (seen["train"] & seen["val"] or seen["train"] & seen["test"] or seen["val"] & seen["test"]), name
        assert set(data.splits["val"].labels.tolist()) == set(range(data.num_classes)), name


def test_augmentation_and_order_are_functions_of_seed_and_epoch(every: dict[str, ImageDataModule]) -> None:
    for name, data in every.items():
        data.setup("fit")

        def epoch(number: int, data: ImageDataModule = data) -> torch.Tensor:
            torch.manual_seed(torch.randint(1000, ()).item())  # whatever the global generator holds
            loader = data.train_dataloader()
            loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
            return data.on_after_batch_transfer(next(iter(loader)), 0)["image"]

        assert torch.equal(epoch(3), epoch(3)), name
        assert not torch.equal(epoch(3), epoch(4)), name


def test_the_standard_augmentation_is_torchvisions() -> None:
    steps = [v2.PILToTensor(), v2.RandomResizedCrop(64, scale=(0.35, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    theirs, ours = v2.Compose(steps), sample_transform("standard", 64, train=True)
    mirrored = []
    for seed in range(20):
        made = picture(seed, 90 + seed, 120)
        torch.manual_seed(seed)
        expected = theirs(made)
        torch.manual_seed(seed)
        found = ours(made)
        assert torch.equal(found, expected)
        mirrored.append(float(torch.rand(())))
    assert len(set(mirrored)) == 20, "as many random numbers were drawn"


def test_workers_change_nothing(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f")

    def images(workers: int) -> torch.Tensor:
        data = ImageFolder(root, image_size=100, batch_size=4, augment="strong", num_workers=workers)
        data.setup("fit")
        return torch.cat([batch["image"] for batch in rows(data, "train")])

    assert torch.equal(images(0), images(2))


def test_global_generator_is_left_alone(tmp_path: Path) -> None:
    data = ImageFolder(write_folder(tmp_path / "f"), image_size=100, num_workers=0)
    data.setup("fit")
    before = torch.get_rng_state()
    rows(data, "train")
    drawn = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.empty((), dtype=torch.int64).random_()  # what a loader draws for its base seed
    assert torch.equal(torch.get_rng_state(), drawn)


def test_stratified_split_is_seeded_and_proportional() -> None:
    labels = torch.tensor([0] * 100 + [1] * 10 + [2])
    kept, held_out = stratified_split(labels, 0.2, seed=0)
    assert torch.bincount(labels[held_out], minlength=3).tolist() == [20, 2, 0], "a single sample stays in training"
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(111))
    assert torch.equal(stratified_split(labels, 0.2, seed=0)[1], held_out)
    assert not torch.equal(stratified_split(labels, 0.2, seed=1)[1], held_out)
    with pytest.raises(ValueError, match="between 0 and 1, not 1"):
        stratified_split(labels, 1, seed=0)


@pytest.mark.parametrize("size", [32, 100])  # from memory, and decoded
def test_a_balanced_epoch_shows_rare_classes_as_often_and_never_twice_alike(tmp_path: Path, size: int) -> None:
    root = write_folder(tmp_path / "p", splits=("train", "val", "test"), classes=2, each=12)
    for file in sorted((root / "train" / "class_1").iterdir())[2:]:
        file.unlink()
    data = ImageFolder(root, image_size=size, batch_size=7, num_workers=0, balance=True)
    data.setup("fit")
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
    labels = torch.cat([batch["label"] for batch in batches])
    assert len(labels) == 14
    assert labels.bincount().tolist() == [7, 7]
    images = torch.cat([batch["image"] for batch in batches])[labels == 1].flatten(1)
    assert len(images.unique(dim=0)) == 7, "two images, each time augmented anew"


def test_folds_hold_every_sample_once_and_every_class_alike() -> None:
    labels = torch.tensor([0] * 40 + [1] * 13 + [2] * 2)
    folds = [hold_out(labels, 0.1, (number, 5), seed=0) for number in range(5)]
    assert torch.cat([held_out for _, held_out in folds]).sort().values.tolist() == list(range(55))
    for kept, held_out in folds:
        assert len(held_out) == 11
        assert labels[held_out].bincount()[0] == 8
        assert labels[held_out].bincount()[1] in (2, 3)
        assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(55))
    assert not torch.equal(hold_out(labels, 0.1, (0, 5), seed=1)[1], folds[0][1]), "repeated with other seeds"
    for wrong in ((5, 5), (-1, 5), (0, 1)):
        with pytest.raises(ValueError, match=r"data.fold takes a number from 0 and how many there are"):
            hold_out(labels, 0.1, wrong, seed=0)


def test_a_fold_is_recorded(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", splits=(), classes=2, each=10)
    seen: list[str] = []
    for number in range(4):
        data = ImageFolder(root, image_size=32, fold=(number, 4), seed=2)
        data.setup("fit")
        seen += [data.sample_names("val")(index) for index in range(len(data.splits["val"].labels))]
        assert data.state_dict()["split_rows"]["val"].tolist() == data.cut_rows["val"]
    assert len(seen) == len(set(seen)) == 16, "without the four for the test"


def test_groups_are_held_out_as_a_whole() -> None:
    sizes = {"a": 30, "b": 5, "c": 5, "d": 10, "e": 40, "f": 4, "g": 6}  # a to d are of class 0, e to g of class 1
    groups = [name for name, size in sizes.items() for _ in range(size)]
    labels = torch.tensor([int(name > "d") for name in groups])
    kept, held_out = grouped_split(labels, groups, 0.2, seed=0)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(100))
    assert not {groups[row] for row in kept} & {groups[row] for row in held_out}
    assert labels[held_out].bincount().tolist() == [10, 10], "a fifth of each class, where groups allow it"
    assert torch.equal(grouped_split(labels, groups, 0.2, seed=0)[1], held_out)
    assert any(not torch.equal(grouped_split(labels, groups, 0.2, seed)[1], held_out) for seed in range(1, 5))
    assert not len(grouped_split(labels, groups, 0.01, seed=0)[1]), "never more than the share"
    with pytest.raises(ValueError, match="between 0 and 1"):
        grouped_split(labels, groups, 1, seed=0)


def test_fewer_images_are_a_subset_of_more() -> None:
    labels = torch.arange(100) % 3
    few, more = (set(limit_per_class(labels, k, seed=0).tolist()) for k in (2, 5))
    assert len(few) == 6 and len(more) == 15 and few < more


def test_limit_per_class_leaves_validation_whole() -> None:
    data = Digits(image_size=8, limit_per_class=5)
    data.setup("fit")
    assert data.class_counts == [5] * 10
    whole = Digits(image_size=8)
    whole.setup("fit")
    assert len(data.splits["val"].labels) == len(whole.splits["val"].labels)


def test_digits_keep_their_test_set_whatever_the_seed() -> None:
    first, second = Digits(seed=0), Digits(seed=1)
    for data in (first, second):
        data.setup()
    names = [[d.sample_names("test")(i) for i in range(len(d.splits["test"].labels))] for d in (first, second)]
    assert names[0] == names[1]
    assert first.cut_rows != second.cut_rows


def test_digits_of_some_classes_are_relabelled() -> None:
    data = Digits(classes=[7, 5], image_size=8)
    data.setup()
    assert data.class_names == ["7", "5"] and set(data.splits["train"].labels.tolist()) == {0, 1}
    with pytest.raises(ValueError, match="different digits from 0 to 9"):
        Digits(classes=[5, 10])


# ---- broken, odd and missing files


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:200])
    return path


@pytest.mark.parametrize("size", [32, 100], ids=["in memory", "decoding"])
def test_a_truncated_picture_is_named_or_skipped(tmp_path: Path, size: int) -> None:
    root = write_folder(tmp_path / "f", splits=("train", "val", "test"))
    broken = truncate(root / "train" / "class_1" / "3.jpg")
    data = ImageFolder(root, image_size=size, batch_size=4, num_workers=0)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"cannot read the image .*class_1.3\.jpg.*on_error to skip"):
        rows(data, "train")
    data = ImageFolder(root, image_size=size, batch_size=4, num_workers=0, on_error="skip")
    data.setup("fit")
    names = [data.sample_names("train")(int(i)) for batch in rows(data, "train") for i in batch["index"]]
    assert str(broken) not in names and len(names) >= 20
    assert len(data.skipped) == 1 and str(broken) in next(iter(data.skipped))


def test_a_batch_of_nothing_readable_is_an_error(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f", splits=("train", "val", "test"), classes=2, each=2)
    for path in root.glob("train/*/*.jpg"):
        truncate(path)
    data = ImageFolder(root, image_size=100, batch_size=4, num_workers=0, on_error="skip")
    data.setup("fit")
    with pytest.raises(ValueError, match="no image of a batch of 4 can be read"):
        rows(data, "train")


@pytest.mark.parametrize("size", [32, 100])
def test_what_cannot_be_read_is_black_in_predict_and_named(tmp_path: Path, size: int) -> None:
    """Batches stay as they are, whatever is in them: also one of nothing readable."""
    root = write_folder(tmp_path / "f", splits=("train", "val", "test"), classes=2, each=2)
    for number in (0, 2, 3):
        truncate(sorted(root.glob("test/*/*.jpg"))[number])
    data = ImageFolder(root, image_size=size, eval_batch_size=2, num_workers=0)
    data.setup("predict")
    first, second = rows(data, "predict")
    assert [index for index, _ in first["unreadable"]] == [0] and [i for i, _ in second["unreadable"]] == [2, 3]
    assert all("truncated" in reason.lower() for _, reason in second["unreadable"])
    assert first["image"].shape == second["image"].shape == (2, 3, size, size)
    assert first["index"].tolist() == [0, 1] and first["image"][1].any() and not second["image"].any()
    data.predict_from = 1
    (rest,) = data.predict_dataloader()
    assert rest["index"].tolist() == [2, 3]
    data = ImageFolder(root, image_size=size, eval_batch_size=2, num_workers=0, on_error="raise")
    data.setup("predict")
    with pytest.raises(ValueError, match="cannot read the image"):
        rows(data, "predict")


def test_known_classes_need_no_training_folder(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.jpg")
    data = ImageFolder(predict_root=tmp_path, class_names=["x", "y"], image_size=32, fold=(0, 3), limit_per_class=1)
    data.setup("predict")
    assert list(data.splits) == ["predict"] and data.num_classes == 2 and not data.cut_rows
    with pytest.raises(ValueError, match=r"unless data.predict_root says what to predict"):
        ImageFolder(tmp_path, class_names=["x", "y"])
    with pytest.raises(ValueError, match=r"data.root is not set"):
        ImageFolder().setup()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_pictures_of_every_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png")
    image = Image.new("I;16", (9, 7), 3000) if mode == "I;16" else picture(0, 9, 7).convert(mode)
    image.save(path)
    read = decode(str(path), "a")
    assert read.mode == "RGB" and read.size == (9, 7)


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    picture(0, 40, 20).save(tmp_path / "a.jpg", exif=exif)
    assert decode(str(tmp_path / "a.jpg"), "a").size == (20, 40)


def test_text_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read the image a\.jpg"):
        decode(str(tmp_path / "a.jpg"), "a.jpg")


def test_folder_layouts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def counts(splits: tuple[str, ...]) -> dict[str, int]:
        data = ImageFolder(write_folder(tmp_path / "-".join(splits or ("none",)), splits, each=10), image_size=32)
        with caplog.at_level(logging.INFO):
            data.setup()
        return {name: len(pictures.labels) for name, pictures in data.splits.items() if name != "predict"}

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


def test_loose_pictures_can_be_predicted(tmp_path: Path) -> None:
    loose = tmp_path / "loose" / "deeper"
    loose.mkdir(parents=True)
    for number in range(3):
        picture(number).save(loose / f"{number}.png")
    data = ImageFolder(write_folder(tmp_path / "f"), image_size=32, predict_root=tmp_path / "loose")
    data.setup("predict")
    assert [Path(data.sample_names("predict")(i)).name for i in range(3)] == ["0.png", "1.png", "2.png"]
    assert len(rows(data, "predict")[0]["image"]) == 3


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


def test_a_table_without_rows_is_no_split(tmp_path: Path) -> None:
    files = {
        "train": str(write_parquet(tmp_path / "a.parquet", 9)),
        "test": str(write_parquet(tmp_path / "b.parquet", 0)),
    }
    with pytest.raises(ValueError, match="the test split has no images"):
        ParquetImages(files["train"], test_files=files["test"], val_files=files["train"], image_size=32).setup()


@pytest.mark.parametrize("each", [(1, 2), (1, 1), (2, 1), (2, 2)])
def test_too_few_pictures_to_split_are_told(tmp_path: Path, each: tuple[int, int]) -> None:
    """Of two in a class one is for the test, and none is left to validate on."""
    root = tmp_path / "f"
    for label, count in enumerate(each):
        (root / f"class_{label}").mkdir(parents=True)
        for number in range(count):
            picture(number).save(root / f"class_{label}" / f"{number}.jpg")
    with pytest.raises(ValueError, match=r"too few samples: of \d in 2 classes none can be held out.*three or more"):
        ImageFolder(root, image_size=32).setup("fit")
    with pytest.raises(ValueError, match="too few samples: of 2 in 1 classes"):
        hold_out(torch.tensor([0, 0]), 0.1, (3, 5), seed=0)


def test_classes_that_a_split_lacks_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_folder(tmp_path / "f", ("train", "val", "test"), classes=3, each=4)
    for file in (root / "val" / "class_1").iterdir():
        file.unlink()
    with caplog.at_level(logging.WARNING):
        ImageFolder(root, image_size=32).setup()
    assert "data: val has no image of class_1: its metrics" in caplog.text and "test has no" not in caplog.text


# ---- what cannot be read is left out, by one rule on both ways


@pytest.mark.parametrize("size", [32, 100], ids=["in memory", "decoding"])
@pytest.mark.parametrize("fault", ["broken", "vanished"])
def test_a_whole_batch_of_nothing_readable_is_left_out(tmp_path: Path, size: int, fault: str) -> None:
    root = write_folder(tmp_path / "f", ("train", "val", "test"), classes=2, each=8)
    data = ImageFolder(root, image_size=size, batch_size=4, eval_batch_size=8, num_workers=0, on_error="skip")
    data.setup("fit")
    for split in ("train", "val"):
        for path in sorted((root / split / "class_0").iterdir()):
            truncate(path) if fault == "broken" else path.unlink()
    for split, count in (("val", 8), ("train", 8)):
        batches = rows(data, split)
        labels = torch.cat([batch["label"] for batch in batches])
        assert set(labels[labels >= 0].tolist()) == {1}
        assert len(labels[labels >= 0]) == count if split == "val" else len(labels) >= count
        assert all(len(batch["image"]) for batch in batches)
    assert len(data.skipped) == 16
    for path in (root / "test" / "class_0").iterdir():
        truncate(path)
    for path in (root / "test" / "class_1").iterdir():
        truncate(path)
    with pytest.raises(ValueError, match="no image of a batch of .* nor any other of its split"):
        rows(data, "test")


@pytest.mark.slow
def test_a_batch_of_nothing_counts_nothing(tmp_path: Path) -> None:
    """The loss and the metrics are those of the images that there are."""
    from recipes.vision import main

    found = []
    for name, broken in (("whole", False), ("broken", True)):
        root = write_folder(tmp_path / name, ("train", "val", "test"), classes=2, each=4)
        for path in sorted((root / "test" / "class_0").iterdir()):
            truncate(path) if broken else path.unlink()
        options = [f"--data.root={root}", "--data.batch_size=4", "--data.eval_batch_size=4", "--data.num_workers=0"]
        options += ["--data.on_error=skip", "--model.backbone=resnet8", "--model.image_size=100"]
        quiet = ["--trainer.logger=false", "--trainer.callbacks=null", "--trainer.accelerator=cpu"]
        cli = main(["fit", "--data=ImageFolder", *options, *quiet, "--trainer.enable_progress_bar=false"], plan=True)
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
        found.append({key: float(value) for key, value in cli.trainer.callback_metrics.items()})
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_mistakes_in_a_table_get_a_sentence(tmp_path: Path) -> None:
    files = {"train": str(write_parquet(tmp_path / "a.parquet", 6))}
    with pytest.raises(ValueError, match="no split 'test' in parquet: it has train"):
        HuggingFaceImages("parquet", data_files=files).setup()
    with pytest.raises(ValueError, match="no column 'img' in split 'train' of parquet: it has image, label"):
        HuggingFaceImages("parquet", data_files=files, image_column="img", test_split=None).setup()
    with pytest.raises(FileNotFoundError, match=r"no data set .*nowhere\.parquet"):
        HuggingFaceImages("parquet", data_files={"train": str(tmp_path / "nowhere.parquet")}).setup()
    with pytest.raises(FileNotFoundError, match="no data set some/thing: expected a name on the hub"):
        HuggingFaceImages("some/thing").setup()


def test_labels_may_be_names_or_numbers(tmp_path: Path) -> None:
    import datasets

    for labels, names in ((["wasp", "ant"] * 4, ["ant", "wasp"]), ([7, 3] * 4, ["3", "7"])):
        path = str(tmp_path / f"{names[0]}.parquet")
        cells = [{"bytes": None, "path": str(tmp_path / f"{n}.png")} for n in range(8)]
        for number, cell in enumerate(cells):
            picture(number).save(cell["path"])
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.Value("string" if names[0] == "ant" else "int64")}
        )
        datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features).to_parquet(path)
        data = HuggingFaceImages("parquet", data_files={"train": path}, test_split=None, val_share=0.25, image_size=16)
        data.setup()
        assert data.class_names == names
        assert sorted(data.splits["train"].images.labels.tolist()) == [0] * 4 + [1] * 4  # type: ignore[attr-defined]


def table(path: Path, labels: list[Any], kind: Any = None) -> str:
    """ImageSource and labels in Parquet: a ClassLabel of these names, a type of `datasets`, or without metadata."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    picture(0, 16, 16).save(buffer, "PNG")
    cells = [{"bytes": buffer.getvalue(), "path": None}] * len(labels)
    if kind is None:
        pq.write_table(pa.table({"image": cells, "label": labels}), path)
    else:
        feature = datasets.ClassLabel(names=kind) if isinstance(kind, list) else datasets.Value(kind)
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features).to_parquet(str(path))
    return str(path)


LABELS: dict[str, tuple[Any, Any, list[str], list[int] | str]] = {  # training, test; classes, test's numbers or words
    "gaps": ([1, 2, 4, 5], [4, 1, 5], ["1", "2", "4", "5"], [2, 0, 3]),
    "a number that training lacks": (
        [1, 2, 4, 5],
        [4, 3],
        ["1", "2", "4", "5"],
        "1.*: label '3' is not among the classes of the training data",
    ),
    "numbers by value": ([10, 9, 100], [100, 9], ["9", "10", "100"], [2, 0]),
    "leading zeros": (["01", "02", "10"], ["10", "01"], ["01", "02", "10"], [2, 0]),
    "zeros lost in one": (
        ["01", "02"],
        [1, 2],
        ["01", "02"],
        "0.*: label '1' is not among the classes of the training data",
    ),
    "whole floats and integers": ([1.0, 2.0, 4.0], [4, 1], ["1", "2", "4"], [2, 0]),
    "integers and whole floats": ([1, 2, 4], [4.0, 1.0], ["1", "2", "4"], [2, 0]),
    "numbers as words": ([1, 2, 4], ["4", "1"], ["1", "2", "4"], [2, 0]),
    "a name that training lacks": (
        ["a", "b"],
        ["b", "c"],
        ["a", "b"],
        "1.*: label 'c' is not among the classes of the training data",
    ),
    "nothing in the test": ([1, 2], [1, None], ["1", "2"], "1.*: there is no label"),
    "nothing in training": ([1, None, 2], [1], ["1", "2"], "1.*: there is no label"),
    "NaN": ([1.0, 2.0], [1.0, float("nan")], ["1", "2"], "1.*: there is no label"),
    "digits as ClassLabel": (([0, 1, 2], ["5", "1", "2"]), ([2, 0], ["5", "1", "2"]), ["5", "1", "2"], [2, 0]),
    "1 and 0": (([0, 1], ["1", "0"]), ([1, 0], ["1", "0"]), ["1", "0"], [1, 0]),
    "a ClassLabel without label": (([0, 1], ["a", "b"]), ([1, None], ["a", "b"]), ["a", "b"], "1.*: there is no label"),
    "a list": ([["a"], ["b"]], [["a"]], ["a"], "0.*: the label is a list"),
}


@pytest.mark.parametrize("module", ["HuggingFaceImages", "ParquetImages"])
@pytest.mark.parametrize("kind", LABELS)
def test_a_label_is_the_right_class_or_its_row_is_named(tmp_path: Path, kind: str, module: str) -> None:
    (train, test, names, expected), options = LABELS[kind], {"image_size": 16, "num_workers": 0}
    train, test = (part if isinstance(part, tuple) else (part, None) for part in (train, test))
    paths = {"train": table(tmp_path / "a.parquet", *train), "test": table(tmp_path / "b.parquet", *test)}
    data: ImageDataModule
    if module == "ParquetImages":
        data = ParquetImages(paths["train"], val_files=paths["train"], test_files=paths["test"], **options)
    else:
        data = HuggingFaceImages("parquet", data_files=paths, val_split="train", **options)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            data.setup()
        return
    data.setup()
    assert data.class_names == names
    assert data.splits["test"].labels.tolist() == expected


def test_labels_of_pictures_in_a_csv(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    files = {}
    for split, labels in (("train", [1, 2, 4, 2]), ("test", [4, 1]), ("strange", [4, 3]), ("gap", [4, ""])):
        lines = [f"{tmp_path}/a.png,{label}" for label in labels]
        (tmp_path / f"{split}.csv").write_text("\n".join(["image,label", *lines]))
        files[split] = str(tmp_path / f"{split}.csv")
    data = HuggingFaceImages("csv", data_files=files, image_size=16, val_split="train")
    data.setup()
    assert data.class_names == ["1", "2", "4"] and data.splits["test"].labels.tolist() == [2, 0]
    assert data.splits["test"].read(0).size == (48, 40)
    for split, words in (
        ("strange", "split 'strange', row 1: label '3' is not among"),
        ("gap", "split 'gap', row 1: there is no label"),
    ):
        with pytest.raises(ValueError, match=words):
            HuggingFaceImages("csv", data_files=files, image_size=16, test_split=split).setup()


def test_missing_cifar10_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python\.tar\.gz"):
        CIFAR10(tmp_path / "nowhere").prepare_data()


def test_another_split_is_refused_on_resume() -> None:
    first = Digits(image_size=8, seed=0)
    first.setup("fit")
    state = first.state_dict()
    same = Digits(image_size=8, seed=0)
    same.setup("fit")
    same.load_state_dict(state)
    other = Digits(image_size=8, seed=1)
    other.setup("fit")
    with pytest.raises(ValueError, match=r"split is not the checkpoint's .* data\.seed"):
        other.load_state_dict(state)


def test_sixteen_bits_are_scaled_and_floats_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    read = np.asarray(decode(str(tmp_path / "a.png"), "a"))[..., 0]
    assert read[0, 0] == 0 and read[-1, -1] == 255 and len(np.unique(read)) > 200
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(ValueError, match="floating point"):
        decode(str(tmp_path / "b.tif"), "b")


def test_split_folders_of_other_spellings_are_no_classes(tmp_path: Path) -> None:
    for names in (("Train", "Test"), ("training_set", "test_set")):
        data = ImageFolder(write_folder(tmp_path / names[0], names), image_size=32)
        assert data.class_names == ["class_0", "class_1", "class_2"]
    with pytest.raises(ValueError, match="has a folder Val/ but none called train/"):
        _ = ImageFolder(write_folder(tmp_path / "odd", ("learn", "Val"))).class_names


def test_evaluation_sees_the_same_picture_from_memory_and_from_disk(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f", ("train", "val", "test"))
    images = []
    for in_memory in (True, False):
        data = ImageFolder(root, image_size=32, in_memory=in_memory, num_workers=0)
        data.setup("test")
        images.append(rows(data, "test")[0]["image"])
    assert torch.equal(*images)


def test_a_label_out_of_range_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f", ("train", "val", "test"))
    data = ImageFolder(root, image_size=32)
    splits = data.read_splits()
    splits["test"].labels[3] = -1
    data.read_splits = lambda: splits  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"label -1 of .*\.jpg is out of range: there are 3 classes"):
        data.setup()
