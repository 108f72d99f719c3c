"""Several data sets in one batch: every label stands with its sample, and is not known of the others'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from datamodules import Digits, Shapes, TextColumns, TextFiles, Together
from datamodules.together import merged
from tests.nets import quiet
from tests.tiny_encoders import tiny_encoder


def together(**options: Any) -> Together:
    members: dict[str, Any] = {
        "digit": Digits(batch_size=6, augment="none", image_size=None),
        "shapes": Shapes(images=120, side=24, batch_size=10, augment="none", known={"size": 0.5}),
    }
    data = Together(members, image_size=24, **options)
    data.trainer = quiet()
    data.prepare_data()
    data.setup("fit")
    return data


def stage(data: Together, doing: TrainerFn) -> None:
    trainer: Any = data.trainer
    trainer.state.fn = doing


def test_tasks_are_those_of_all_members() -> None:
    data = together()
    assert list(data.tasks) == ["digit", "shape", "size", "colours", "outline"]
    assert data.tasks["digit"].class_names == tuple("0123456789") and data.batch_size == 16
    facts = data.label_facts
    assert facts["digit"]["known"] == pytest.approx(6 / 16) and facts["shape"]["known"] == pytest.approx(10 / 16)
    assert facts["size"]["known"] == pytest.approx(0.5 * 10 / 16, abs=0.02) and facts["size"]["spread"] > 0
    longest = data.counts("train")["digit"] // 6
    assert data.planned_steps(0, 1) == longest == len(list(data.train_dataloader()))
    shortest = together(mode="min_size")
    assert shortest.planned_steps(0, 1) == data.counts("train")["shapes"] // 10 < longest
    assert shortest.planned_steps(0, 1) == len(list(shortest.train_dataloader()))


def test_a_training_batch_holds_samples_of_each_with_its_own_labels() -> None:
    data = together()
    stage(data, TrainerFn.FITTING)
    batch, _, _ = next(iter(data.train_dataloader()))
    before = {name: {**part} for name, part in batch.items()}
    batch = data.on_after_batch_transfer(batch, 0)
    labels = batch["labels"]
    assert batch["image"].shape == (16, 3, 24, 24)
    assert torch.equal(labels["digit"][:6], before["digit"]["label"]) and (labels["digit"][6:] == -100).all()
    assert (labels["shape"][:6] == -100).all() and torch.equal(labels["shape"][6:], before["shapes"]["label"])
    assert labels["size"][:6].isnan().all() and not labels["size"][6:].isnan().all()
    assert labels["colours"].shape == (16, 3) and labels["colours"][:6].isnan().all()
    assert labels["outline"].shape == (16, 24, 24) and (labels["outline"][:6] == -100).all()
    names = [data.sample_names("train")(row) for row in batch["index"].tolist()]
    assert all(name.startswith("digit: digits/") for name in names[:6])
    assert all(name.startswith("shapes: shapes/") for name in names[6:])


def test_evaluation_goes_through_one_after_the_other() -> None:
    data = together()
    stage(data, TrainerFn.TESTING)
    seen: dict[str, int] = {"digit": 0, "shape": 0}
    rows = []
    for batch, _, place in data.test_dataloader():
        batch = data.on_after_batch_transfer(batch, place)
        assert set(batch["labels"]) == set(data.tasks)
        for name in seen:
            seen[name] += int((batch["labels"][name] >= 0).sum())
        rows += batch["index"].tolist()
    assert seen == {"digit": data.counts("test")["digit"], "shape": data.counts("test")["shapes"]}
    assert rows == list(range(sum(seen.values()))), "indices go on from member to member"
    with pytest.raises(IndexError):
        data.sample_names("test")(len(rows))


def test_what_a_checkpoint_tells_is_each_members_own() -> None:
    data, other = together(), together()
    state = data.state_dict()
    other.load_state_dict(state)
    other.members["shapes"].cut_rows["train"] = [0]
    trainer: Any = other.members["shapes"].trainer
    assert isinstance(trainer, Trainer)
    trainer.state.fn = TrainerFn.FITTING
    with pytest.raises(ValueError, match="the train split is not the checkpoint's"):
        other.load_state_dict(state)


def test_texts_are_padded_to_the_longest(tmp_path: Path) -> None:
    rows = "".join(f"word {n} of many,{n % 2}\n" for n in range(40))
    (tmp_path / "short.csv").write_text(f"text,label\n{rows}")
    rows = "".join(f"{'word ' * 14}{n},{n / 10}\n" for n in range(40))
    (tmp_path / "long.csv").write_text(f"text,stars\n{rows}")
    members: dict[str, Any] = {
        "topic": TextFiles(str(tmp_path / "short.csv"), batch_size=4, max_length=32),
        "rated": TextColumns(
            {"stars": "regression"}, train_file=str(tmp_path / "long.csv"), batch_size=4, max_length=32
        ),
    }
    data = Together(members)
    data.tokenizer_name = str(tiny_encoder(tmp_path / "bert"))
    assert data.max_length == 32 and data.tokenizer_name == members["topic"].tokenizer_name
    data.trainer = quiet()
    data.prepare_data()
    data.setup("fit")
    stage(data, TrainerFn.FITTING)
    batch, _, _ = next(iter(data.train_dataloader()))
    widths = [part["input_ids"].shape[1] for part in batch.values()]
    batch = data.on_after_batch_transfer(batch, 0)
    assert widths[0] < widths[1] == batch["input_ids"].shape[1]
    assert batch["attention_mask"][:4].sum(1).max() <= widths[0] and not batch["attention_mask"][:4, widths[0] :].any()
    assert batch["labels"]["topic"].tolist()[4:] == [-100] * 4 and batch["labels"]["stars"][:4].isnan().all()


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="data.members is empty"):
        Together({})
    with pytest.raises(ValueError, match="data.members: 'shape' is a task of two of them"):
        Together({"one": Shapes(), "other": Shapes()}).tasks  # noqa: B018
    assert merged([], {}) == {"labels": {}}
