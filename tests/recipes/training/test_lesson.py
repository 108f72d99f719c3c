"""A student in a run: it learns from its teacher, goes on bit for bit, and is used without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.deploy.restored import restore
from recipes.parts.checkpoints import load_checkpoint
from recipes.text import main as text
from recipes.vision import main as vision
from tests.nets import same
from tests.recipes.deploy.exports import fit_texts

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The dirpath has changed")]
DIGITS = ["fit", "--config=vision/quickstart", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
KEEP = [
    *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"),
    *("--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.dirpath=steps"),
    "--trainer.callbacks.filename={step}",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cli = vision(
        [*DIGITS, "--trainer.max_epochs=4", f"--trainer.default_root_dir={tmp_path_factory.mktemp('teacher')}"]
    )
    return Path(cli.folder) / "checkpoints" / "best.ckpt"


def student(teacher: Path, *options: str) -> list[str]:
    return [*DIGITS, f"--model.teacher={teacher}", "--model.weights=null", "--trainer.max_epochs=3", *options]


def test_without_labels_it_answers_as_its_teacher_does(teacher: Path) -> None:
    cli = vision(student(teacher, "--model.teacher_weight=1", "--trainer.max_epochs=6", "--model.temperature=1"))
    alone = vision([*DIGITS, "--model.weights=null", "--trainer.max_epochs=6"])
    batch = cli.datamodule.on_after_batch_transfer(next(iter(cli.datamodule.val_dataloader())), 0)
    told = restore(teacher).logits(batch["image"]).softmax(1)
    away = [
        float((model.eval()(batch["image"]).softmax(1).detach() - told).abs().mean())
        for model in (cli.model, alone.model)
    ]
    assert away[0] < 0.7 * away[1]


@pytest.mark.parametrize(
    "options",
    [
        ["--data.augment=none"],
        ["--model.match_blocks={layer2: layer3, layer3: layer3}", "--data.augment=standard", "--data.mixup=0.2"],
    ],
    ids=["answers from a file", "features, images mixed"],
)
def test_it_goes_on_bit_for_bit_and_is_used_without_its_teacher(
    options: list[str], teacher: Path, own_folder: Path
) -> None:
    whole = vision(student(teacher, *options, *KEEP))
    assert bool(list(own_folder.glob("runs/features/teacher_*.f32"))) == (len(options) == 1)
    for step in (4, 17):
        resumed = vision(student(teacher, *options, f"--ckpt_path=steps/step={step}.ckpt"))
        assert same(whole.model, resumed.model), step
    last = whole.folder / "checkpoints" / "last.ckpt"
    checkpoint = load_checkpoint(last)
    assert not [name for name in checkpoint["state_dict"] if "teacher" in name or "projections" in name]
    assert bool(checkpoint["projections"]) == (len(options) > 1)
    metrics = whole.trainer.callback_metrics
    assert "train/teacher_loss" in metrics and ("train/match_loss" in metrics) == (len(options) > 1)

    moved = teacher.rename(teacher.with_name("moved.ckpt"))
    try:
        images = torch.rand(4, 3, 8, 8)
        torch.testing.assert_close(restore(last).logits(images), whole.model.eval()(images).detach())
        tested = vision(["test", f"--ckpt_path={last}"])
        assert tested.model.lesson is None
    finally:
        moved.rename(teacher)


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
@pytest.mark.parametrize("match", [None, "{layer2: layer3}"], ids=["answers", "features"])
def test_two_ranks_learn_what_one_does(match: str | None, teacher: Path, own_folder: Path) -> None:
    """Where no statistics of a batch tell them apart: norms are frozen, images left as they are."""
    options = [
        *(f"--model.match_blocks={match or 'null'}", "--data.augment=none", "--trainer.max_epochs=1"),
        *("--model.optimizer=SGD", "--model.optimizer.lr=0.05", "--trainer.callbacks+=Freeze"),
        "--trainer.callbacks.patterns={bn|downsample.1: false}",
    ]
    states = []
    for ranks in (1, 2):
        more = ["--trainer.strategy=ddp_fork", f"--trainer.default_root_dir={ranks}"] if ranks == 2 else []
        vision(student(teacher, *options, *more, f"--trainer.devices={ranks}", f"--data.batch_size={32 // ranks}"))
        (last,) = own_folder.glob(f"{'2/' * (ranks == 2)}runs/vision/*/*/checkpoints/last.ckpt")
        checkpoint = load_checkpoint(last)
        states.append(checkpoint["state_dict"] | checkpoint["projections"])
        assert bool(list(own_folder.glob("**/features/teacher_*.f32"))) == (match is None)
    one, two = states
    assert one.keys() == two.keys() and bool([n for n in one if "projections" in n]) == bool(match)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_a_number_out_of_range_is_refused(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, words in (
        ("--model.teacher_weight=1.5", "model.teacher_weight must be 0 to 1"),
        ("--model.temperature=0", "temperature above 0"),
        ("--model.match_blocks={layer9: layer3}", "has no block 'layer9'; did you mean 'layer"),
        ("--model.match_blocks={layer3: layer9}", "has no block 'layer9'; did you mean 'layer"),
    ):
        with pytest.raises(SystemExit):
            vision(student(teacher, option))
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("match", [None, "{layer0: layer1}"])
def test_texts_have_teachers_too(match: str | None, own_folder: Path) -> None:
    known = fit_texts(own_folder)
    checkpoint = fit_texts(
        own_folder,
        f"--model.teacher={known}",
        f"--model.match_blocks={match or 'null'}",
        "--model.pooling=mean",
        f"--trainer.default_root_dir={own_folder / 'student'}",
    )
    state: dict[str, Any] = load_checkpoint(checkpoint)
    assert state["projections"].keys() == ({f"projections.layer0.{n}" for n in ("weight", "bias")} if match else set())
    assert bool(list(own_folder.glob("student/runs/features/teacher_*.f32"))) == (match is None)
    text(["validate", f"--ckpt_path={checkpoint}"])
