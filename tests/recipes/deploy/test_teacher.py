"""What a teacher says: in the student's order of classes, and once where samples stay the same."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes.deploy.restored import restore
from recipes.deploy.teacher import Teacher, file_of
from recipes.export import export
from tests.recipes.deploy.exports import fit_texts


def data(names: list[str], **more: Any) -> Any:
    return SimpleNamespace(class_names=names, **more)


@pytest.fixture
def images() -> dict[str, torch.Tensor]:
    return {"image": torch.rand(5, 3, 32, 32), "index": torch.arange(5)}


def test_its_classes_come_in_the_order_of_the_data(checkpoint: Path, images: dict[str, Any]) -> None:
    teacher, restored = Teacher(str(checkpoint), "vision"), restore(checkpoint)
    names = restored.class_names
    turned = list(reversed(names))
    teacher.meet(data(turned))
    torch.testing.assert_close(teacher.logits(images), restored.logits(images["image"]).flip(1))
    teacher.meet(data(names[1:]))  # it may know more
    torch.testing.assert_close(teacher.logits(images), restored.logits(images["image"])[:, 1:])
    with pytest.raises(ValueError, match=f"does not know ape; it knows {sorted(names)[0]}"):
        teacher.meet(data([*names, "ape"]))


def test_images_of_another_size_are_brought_to_its_own(checkpoint: Path) -> None:
    teacher = Teacher(str(checkpoint), "vision")
    large = torch.nn.functional.interpolate(torch.rand(2, 3, 32, 32), scale_factor=2, mode="nearest")
    resized = torch.nn.functional.interpolate(large, size=(32, 32), mode="bilinear", antialias=True)
    expected = restore(checkpoint).logits(resized)
    torch.testing.assert_close(teacher.logits({"image": large, "index": torch.arange(2)}), expected)


@pytest.mark.slow
def test_an_exported_program_teaches_as_its_checkpoint_does(
    checkpoint: Path, own_folder: Path, images: dict[str, Any]
) -> None:
    export(checkpoint, "torch", own_folder / "program", count=4)
    program, teacher = Teacher(str(own_folder / "program"), "vision"), Teacher(str(checkpoint), "vision")
    assert program.class_names == teacher.class_names
    torch.testing.assert_close(program.logits(images), teacher.logits(images), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="match_blocks needs the teacher's blocks"):
        Teacher(str(own_folder / "program"), "vision", ["layer1"])


def test_what_cannot_teach_is_refused(checkpoint: Path, images: dict[str, Any]) -> None:
    with pytest.raises(FileNotFoundError, match=r"no teacher gone\.ckpt: give a checkpoint"):
        Teacher("gone.ckpt", "vision")
    with pytest.raises(ValueError, match=r"is of recipes\.vision, and its student of recipes\.text"):
        Teacher(str(checkpoint), "text")
    with pytest.raises(FileNotFoundError, match="; python -m recipes.text fit --config text/quickstart makes one"):
        file_of(Path("runs/text/quickstart"))
    with pytest.raises(FileNotFoundError, match="no teacher empty: give a checkpoint"):
        Teacher("empty", "vision")
    teacher = Teacher(str(checkpoint), "vision")
    with pytest.raises(ValueError, match="the teacher learnt single_label_classification, and the data are for regr"):
        teacher.meet(data([], problem_type="regression"))
    with pytest.raises(ValueError, match="matched by name: fit with a data module that has class_names"):
        teacher.meet(None)
    with pytest.raises(ValueError, match="a teacher needs the images, and feature_views gives features"):
        teacher.logits({"features": torch.rand(5, 64), "index": torch.arange(5)})


@pytest.mark.slow
def test_a_teacher_of_other_tokens_is_refused(own_folder: Path) -> None:
    checkpoint = fit_texts(own_folder)
    teacher, restored = Teacher(str(checkpoint), "text"), restore(checkpoint)
    same = SimpleNamespace(digest=lambda state: state, tokenizer_state=restored.data["tokenizer_digest"])
    teacher.meet(data(restored.class_names, **vars(same)))
    same.tokenizer_state = "another"
    with pytest.raises(ValueError, match="reads other tokens: teacher and student need the same tokenizer"):
        teacher.meet(data(restored.class_names, **vars(same)))


def test_its_answers_are_computed_once_where_samples_stay_the_same(
    checkpoint: Path, own_folder: Path, images: dict[str, Any]
) -> None:
    teacher = Teacher(str(checkpoint), "vision")
    calls = []

    class Pictures:
        class_names = teacher.class_names
        splits: dict[str, Any] = {"train": SimpleNamespace(labels=torch.zeros(5))}
        augment = "none"

        def fingerprint(self, split: str) -> str:
            return split

        def fisher_dataloader(self) -> Any:
            calls.append(1)
            return [images]

        def on_after_batch_transfer(self, batch: Any, number: int) -> Any:
            return batch

    pictures = Pictures()
    teacher.meet(pictures)
    expected = teacher.logits(images)
    pictures.augment = "standard"
    teacher.answer_once(pictures, own_folder)
    assert teacher.told is None, "an augmented image is another one in each epoch"
    pictures.augment = "none"
    teacher.answer_once(pictures, own_folder)
    again = Teacher(str(checkpoint), "vision")
    again.meet(pictures)
    again.answer_once(pictures, own_folder)
    assert len(calls) == 1, "the second time from the file"
    again.net = None
    some = {"index": torch.tensor([3, 1])}
    torch.testing.assert_close(again.logits(some), expected[[3, 1]])
    pictures.class_names = list(reversed(teacher.class_names))
    other = Teacher(str(checkpoint), "vision")
    other.meet(pictures)
    other.answer_once(pictures, own_folder)
    assert len(calls) == 2, "another order is another file"
    torch.testing.assert_close(other.logits(some), expected.flip(1)[[3, 1]])


def test_a_folder_of_runs_stands_for_the_newest_best(own_folder: Path) -> None:
    for number, name in enumerate(("newest", "oldest", "middle")):
        file = own_folder / "runs" / name / "checkpoints" / "best.ckpt"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (0, -number % 3))
    assert file_of(own_folder / "runs").parents[1].name == "oldest"
