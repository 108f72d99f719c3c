"""Every image data module: splits, batches, broken images, resume; on data in the true formats."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from datamodules import ImageFolder
from datamodules.images.base import ImageDataModule
from datamodules.sampling.splits import hold_out
from tests.conftest import picture, write_folder
from tests.datamodules.conftest import batches_of, truncate


def test_batches_of_every_data_module(every: dict[str, ImageDataModule]) -> None:
    for name, data in every.items():
        assert data.num_classes == len(data.class_names) > 1, f"{name}: known before setup"
        data.prepare_data() if name != "cifar10" else None
        data.setup("fit")
        for split in ("train", "val", "test", "predict"):
            batches = batches_of(data, split)
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


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f")

    def images(workers: int) -> torch.Tensor:
        data = ImageFolder(root, image_size=100, batch_size=4, augment="strong", num_workers=workers)
        data.setup("fit")
        return torch.cat([batch["image"] for batch in batches_of(data, "train")])

    assert torch.equal(images(0), images(2))


def test_global_generator_is_left_alone(tmp_path: Path) -> None:
    data = ImageFolder(write_folder(tmp_path / "f"), image_size=100, num_workers=0)
    data.setup("fit")
    before = torch.get_rng_state()
    batches_of(data, "train")
    drawn = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.empty((), dtype=torch.int64).random_()  # what a loader draws for its base seed
    assert torch.equal(torch.get_rng_state(), drawn)


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


def test_a_fold_is_recorded(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", splits=(), classes=2, each=10)
    seen: list[str] = []
    for number in range(4):
        data = ImageFolder(root, image_size=32, fold=(number, 4), seed=2)
        data.setup("fit")
        seen += [data.sample_names("val")(index) for index in range(len(data.splits["val"].labels))]
        assert data.state_dict()["split_rows"]["val"].tolist() == data.cut_rows["val"]
    assert len(seen) == len(set(seen)) == 16, "without the four for the test"


@pytest.mark.parametrize("size", [32, 100], ids=["in memory", "decoding"])
def test_a_truncated_image_is_named_or_skipped(tmp_path: Path, size: int) -> None:
    root = write_folder(tmp_path / "f", splits=("train", "val", "test"))
    broken = truncate(root / "train" / "class_1" / "3.jpg")
    data = ImageFolder(root, image_size=size, batch_size=4, num_workers=0)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"cannot read the image .*class_1.3\.jpg.*on_error to skip"):
        batches_of(data, "train")
    data = ImageFolder(root, image_size=size, batch_size=4, num_workers=0, on_error="skip")
    data.setup("fit")
    names = [data.sample_names("train")(int(i)) for batch in batches_of(data, "train") for i in batch["index"]]
    assert str(broken) not in names and len(names) >= 20
    assert len(data.skipped) == 1 and str(broken) in next(iter(data.skipped))


@pytest.mark.parametrize("size", [32, 100])
def test_what_cannot_be_read_is_black_in_predict_and_named(tmp_path: Path, size: int) -> None:
    """Batches stay as they are, whatever is in them: also one of nothing readable."""
    root = write_folder(tmp_path / "f", splits=("train", "val", "test"), classes=2, each=2)
    for number in (0, 2, 3):
        truncate(sorted(root.glob("test/*/*.jpg"))[number])
    data = ImageFolder(root, image_size=size, eval_batch_size=2, num_workers=0)
    data.setup("predict")
    first, second = batches_of(data, "predict")
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
        batches_of(data, "predict")


@pytest.mark.parametrize("each", [(1, 2), (1, 1), (2, 1), (2, 2)])
def test_too_few_images_to_split_are_told(tmp_path: Path, each: tuple[int, int]) -> None:
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
        batches = batches_of(data, split)
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
        batches_of(data, "test")


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


def test_evaluation_sees_the_same_image_from_memory_and_from_disk(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f", ("train", "val", "test"))
    images = []
    for in_memory in (True, False):
        data = ImageFolder(root, image_size=32, in_memory=in_memory, num_workers=0)
        data.setup("test")
        images.append(batches_of(data, "test")[0]["image"])
    assert torch.equal(*images)
