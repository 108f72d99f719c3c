"""Several tasks at once: what a label counts, over ranks, accumulated batches and resumes; and the whole command."""

from __future__ import annotations

import base64
import csv
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor

from callbacks import ExactResume, Freeze
from datamodules import Shapes, TextColumns
from recipes.deploy.restored import restore
from recipes.deploy.samples import random_images
from recipes.deploy.snippets import lines_for
from recipes.export import export
from recipes.multitask import MultiTask, main
from recipes.parts.checkpoints import load_checkpoint
from recipes.parts.schedules import Constant
from tests.nets import quiet
from tests.tiny_encoders import tiny_encoder

HIDDEN = {"size": 0.5, "colours": 0.7, "outline": 0.6}
BALANCES = ["fixed", "uncertainty", "gradnorm", "upgrad"]


def shapes(**options: Any) -> Shapes:
    given: dict[str, Any] = {"known": HIDDEN, "augment": "none", "batch_size": 16}
    return Shapes(images=128, side=32, image_size=32, **{**given, **options})


def tasks_of(data: Any) -> dict[str, dict[str, Any]]:
    return {name: {"kind": task.kind, "class_names": list(task.class_names)} for name, task in data.tasks.items()}


def model_for(data: Any, **options: Any) -> MultiTask:
    torch.manual_seed(0)
    optimizer = partial(torch.optim.SGD, lr=0.02)
    given: dict[str, Any] = {"backbone": "resnet8", "image_size": 32}
    return MultiTask(tasks_of(data), optimizer=optimizer, schedule=Constant, **{**given, **options})


def first_batch(data: Shapes) -> dict[str, Any]:
    data.setup()
    return data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)


def gradients(model: MultiTask, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Of the weighted sum of the tasks' losses, in evaluation mode: each sample by itself."""
    model.eval()
    losses, counts = model.task_losses(batch, model.outputs(batch))
    model.balance.total(losses * counts / len(batch["index"])).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("task", list(HIDDEN))
def test_a_label_that_is_missing_moves_nothing(task: str) -> None:
    """Not its head, and not the trunk: gradients are those of a net that has no such head, to the last bit."""
    data = shapes()
    batch = first_batch(data)
    labels = batch["labels"][task]
    labels[:] = torch.nan if labels.is_floating_point() else -100
    found = gradients(model_for(data), batch)
    assert not any(found[name].any() for name in found if name.startswith(f"heads.{task}."))
    others = {name: {} for name in data.tasks if name != task}
    alone = model_for(data)
    del alone.heads[task], alone.kinds[task], alone.losses_of[task]
    alone.balance = type(alone.balance)(list(others), [False] * 3)
    expected = gradients(alone, batch)
    assert expected.keys() <= found.keys() and any(name.startswith("trunk.") for name in expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_some_labels_of_a_batch_count_as_those_samples_alone() -> None:
    data = shapes()
    batch = first_batch(data)
    known = ~batch["labels"]["size"].isnan()
    assert 0 < known.sum() < len(known)
    model = model_for(data, heads={"size": {}})
    found = gradients(model, batch)
    part = {"image": batch["image"][known], "labels": {"size": batch["labels"]["size"][known]}, "index": batch["index"]}
    expected = gradients(model_for(data, heads={"size": {}}), part)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def fitted(balance: str, ranks: int = 1, accumulate: int = 1, **options: Any) -> dict[str, Tensor]:
    """Weights after three steps of 16 samples, whatever the ranks and batches; norms stand still."""
    data = shapes(batch_size=16 // ranks // accumulate)
    model = model_for(data, balance=balance, watch_gradients=True, **options)
    many = {"devices": ranks, "strategy": "ddp_fork"} if ranks > 1 else {}
    callbacks = [Freeze(patterns={r"bn|downsample\.1": False})]
    trainer = quiet(
        max_steps=3, callbacks=callbacks, accumulate_grad_batches=accumulate, use_distributed_sampler=False, **many
    )
    trainer.fit(model, datamodule=data)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("balance", BALANCES)
def test_two_ranks_learn_what_one_does(balance: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if balance == "upgrad":
        pytest.importorskip("torchjd")

    def save(self: MultiTask) -> None:
        if self.trainer.world_size > 1:
            torch.save(self.state_dict(), f"{self.trainer.global_rank}.pt")

    monkeypatch.setattr(MultiTask, "on_train_end", save)
    data = shapes()
    one = fitted(balance)
    start = model_for(data, balance=balance).state_dict()
    fitted(balance, ranks=2)
    two, other = (torch.load(f"{rank}.pt") for rank in range(2))
    moved = 0.0
    for name, value in one.items():
        assert torch.equal(two[name], other[name]), name
        torch.testing.assert_close(two[name], value, atol=2e-5, rtol=1e-4, msg=name)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["fixed", "uncertainty"])
def test_accumulated_batches_are_one_batch(balance: str) -> None:
    one, four = fitted(balance), fitted(balance, accumulate=4)
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("balance", BALANCES)
def test_a_resumed_run_is_the_uninterrupted_one(balance: str, own_folder: Path) -> None:
    if balance == "upgrad":
        pytest.importorskip("torchjd")

    def fit(**options: Any) -> dict[str, Tensor]:
        data = shapes(augment="light")
        keep = ModelCheckpoint("steps", "{step}", every_n_train_steps=1, save_top_k=-1)
        given: dict[str, Any] = {"enable_checkpointing": True, "use_distributed_sampler": False}
        trainer = quiet(max_epochs=2, callbacks=[ExactResume(seed=0), keep], **given)
        model = model_for(data, balance=balance, watch_gradients=True)
        model.optimizer = partial(torch.optim.AdamW, lr=0.01)
        trainer.fit(model, datamodule=data, **options)
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole = fit()
    for step in (2, 5):
        again = fit(ckpt_path=f"steps/step={step}.ckpt")
        for name, value in whole.items():
            assert torch.equal(again[name], value), (step, name)


def test_numbers_are_learnt_on_a_scale_of_their_own_and_told_on_theirs() -> None:
    data = shapes()
    model = model_for(data)
    trainer = quiet(max_steps=1, use_distributed_sampler=False)
    trainer.fit(model, datamodule=data)
    place = list(model.kinds).index("size")
    facts = data.label_facts["size"]
    assert model.centre[place] == pytest.approx(facts["mean"]) and model.spread[place] == pytest.approx(facts["spread"])
    batch = first_batch(data)
    with torch.no_grad():
        raw, told = model.eval().outputs(batch)["size"], model(batch)["size"]
    torch.testing.assert_close(told, raw * facts["spread"] + facts["mean"])
    assert model.shares.tolist() == pytest.approx([data.label_facts[name]["known"] for name in model.kinds])


def test_numbers_are_not_rounded_by_half_precision() -> None:
    model = model_for(shapes())
    model.centre += 2080
    with torch.autocast("cpu", torch.bfloat16):
        told = model.on_their_scale({name: torch.ones(1, 1, dtype=torch.bfloat16) for name in model.kinds})
    assert float(told["size"]) == 2081


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # its first steps overflow
@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16"])
def test_gradients_are_weighted_under_mixed_precision(precision: str) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    data = shapes()
    half = {"plugins": [MixedPrecision("16-mixed", "cpu")]} if precision == "fp16" else {"precision": precision}
    full_model, half_model = (model_for(data, balance="gradnorm", watch_gradients=True) for _ in range(2))
    quiet(max_steps=1, use_distributed_sampler=False).fit(full_model, datamodule=shapes())
    quiet(max_steps=1, use_distributed_sampler=False, **half).fit(half_model, datamodule=shapes())
    torch.testing.assert_close(half_model.balance.norms, full_model.balance.norms, rtol=0.05, atol=1e-4)


QUICK = [
    *("--config=multitask/quickstart", "--data.images=160", "--data.batch_size=16", "--model.backbone=resnet8"),
    *("--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
]


@pytest.mark.slow
def test_the_command_from_a_config_to_predictions(own_folder: Path) -> None:
    cli = main(
        [
            "fit",
            "--test",
            *QUICK,
            "--data.known={outline: 0.5}",
            "--model.watch_gradients=true",
            "--trainer.log_every_n_steps=2",
        ]
    )
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    assert 0 <= metrics["test/score"] <= 1
    for name in ("test/shape/accuracy", "test/size/r2", "test/colours/f1", "test/outline/iou", "test/size/loss"):
        assert name in metrics
    parts = [metrics[f"test/{name}"] for name in ("shape/accuracy", "colours/f1", "outline/iou")]
    assert metrics["test/score"] == pytest.approx((sum(parts) + max(metrics["test/size/r2"], 0)) / 4)
    logged = (cli.folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/shape/gradient", "train/cosine/shape_size", "val/score", "train/outline/loss_epoch"} <= set(logged)
    best = cli.folder / "checkpoints" / "best.ckpt"
    report = json.loads((cli.folder / "report.json").read_text())
    assert list(report["tasks"]) == ["colours", "shape", "size"] and report["evaluation"] is None
    assert report["tasks"]["shape"]["evaluation"]["accuracy"]["value"] == pytest.approx(metrics["test/shape/accuracy"])
    assert report["tasks"]["shape"]["class_names"] == list(cli.datamodule.tasks["shape"].class_names)
    assert report["tasks"]["size"]["scores"]["mse"]["value"] == pytest.approx(metrics["test/size/mse"], rel=1e-4)
    assert report["tasks"]["colours"]["labels"]["f1"]["value"] == pytest.approx(metrics["test/colours/f1"], abs=1e-4)
    assert "test/outline/iou" in report["metrics"] and "test/size/mse" in report["tasks"]["size"]["metrics"]
    page = (cli.folder / "report.html").read_text()
    assert all(f"<h2>{name}</h2>" in page for name in report["tasks"]) and "40 test samples" in page
    known = load_checkpoint(best)
    assert known["recipe"]["name"] == "multitask" and "trunk.net.net.conv1.weight" in known["state_dict"]
    main(["predict", "--ckpt_path", str(best), "--predictions=out.csv", *QUICK[-2:]])
    with Path("out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    first = rows[0]
    assert list(first)[1:] == [
        *("shape", "shape_probability", "size", "colours"),
        *(f"colours_p({name})" for name in ("red", "green", "blue")),
        "outline",
    ]
    data = cli.datamodule
    batch = data.on_after_batch_transfer(data.batch("test", [0]), 0)
    with torch.no_grad():
        model = MultiTask(**{k: v for k, v in known["hyper_parameters"].items() if not k.startswith("_")})
        model.on_load_checkpoint(known)
        model.load_state_dict(known["state_dict"])
        told = model.eval()(batch)
    assert first["shape"] == data.tasks["shape"].class_names[int(told["shape"].argmax())]
    assert float(first["size"]) == pytest.approx(float(told["size"]), abs=1e-4)
    with Image.open(first["outline"]) as mask:
        assert mask.size == (24, 24)
        assert mask.tobytes() == told["outline"][0].argmax(0).to(torch.uint8).numpy().tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_head_is_exported_and_served(form: str, own_folder: Path) -> None:
    cli = main(["fit", *QUICK, "--trainer.max_epochs=2"])
    best = cli.folder / "checkpoints" / "best.ckpt"
    folder = export(best, form)
    facts = json.loads((folder / "facts.json").read_text())
    assert list(facts["tasks"]) == ["shape", "size", "colours", "outline"] and facts["check"]["agreement"] == 1
    restored = restore(best)
    images = random_images(3, 24)
    found: dict[str, Any] = {"folder": str(folder), "images": images.numpy()}
    exec(lines_for(restored, form), found)
    told = restored.outputs(images)
    assert found["answers"]["outline"].shape == (3, 24, 24)
    for place in range(3):
        assert found["answers"]["shape"][place] == facts["tasks"]["shape"]["class_names"][told["shape"][place].argmax()]
        assert float(found["answers"]["size"][place]) == pytest.approx(float(told["size"][place]), abs=1e-4)
    readme = (folder / "README.md").read_text()
    assert "shape: triangle, square" in readme and "size: a number" in readme
    with pytest.raises(ValueError, match="no other library builds a net of several tasks: take --format torch or onnx"):
        export(best, "safetensors")
    with pytest.raises(ValueError, match="this checkpoint has 4 tasks, and one is needed here"):
        restored.logits(images)


def test_answers_of_a_server_by_task() -> None:
    pytest.importorskip("litserve")
    from recipes.serve import task_answers

    (one,) = task_answers(torch.tensor([[2.0, 0.0]]), "classification", ["a", "b"])
    assert one["label"] == "a" and list(one["probabilities"]) == ["a", "b"]
    assert task_answers(torch.tensor([[1.5]]), "regression", []) == [{"number": 1.5}]
    assert task_answers(torch.tensor([[1.0, -1.0]]), "multi_label", ["a", "b"])[0]["labels"] == ["a"]
    logits = torch.randn(1, 3, 4, 6)
    (mask,) = task_answers(logits, "segmentation", ["x", "y", "z"])
    with Image.open(io.BytesIO(base64.b64decode(mask["mask"]))) as opened:
        assert opened.tobytes() == logits.argmax(1).to(torch.uint8).numpy().tobytes() and opened.size == (6, 4)


def test_mistakes_get_a_sentence(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (["--model.heads={form: {}}"], "model.heads.form: the data have no such task; there are shape, size"),
        (["--data=Digits"], "data: Digits has one label a sample; recipes.multitask needs data with `tasks`"),
        (["--model.encoder=docstrings_bert"], "give model.backbone, for images, or model.encoder, for texts"),
        (["--data.known={size: 0}"], "no training sample has a label of 'size': leave it out of model.heads"),
        (["--data.mixup=0.2"], "data.mixup and data.cutmix mix classes, and there are several tasks"),
        (["--model.heads.outline.blocks=[layer9]"], "model.heads.outline.blocks: 'layer9' is no block with places"),
    ):
        with pytest.raises(SystemExit):
            main(["fit", *QUICK, *options])
        assert words in capsys.readouterr().err, options


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")
def test_data_sets_are_learnt_together_and_gone_on_with(own_folder: Path) -> None:
    members = (
        "{digit: {class_path: Digits, init_args: {batch_size: 24, augment: none}}, "
        "shapes: {class_path: Shapes, init_args: {images: 160, side: 32, batch_size: 8, augment: light}}}"
    )
    both = [
        *("fit", "--data=Together", f"--data.members={members}", "--model.backbone=resnet8", "--model.image_size=32"),
        *("--model.optimizer=AdamW", "--trainer.max_epochs=2", "--trainer.callbacks+=ModelCheckpoint"),
        *("--trainer.callbacks.every_n_train_steps=7", "--trainer.callbacks.save_top_k=-1"),
        *("--trainer.callbacks.dirpath=steps", "--trainer.callbacks.filename={step}", *QUICK[-2:]),
    ]
    cli = main([*both, "--test"])
    metrics = cli.trainer.callback_metrics
    assert {"test/digit/accuracy", "test/shape/accuracy", "test/outline/iou"} <= set(metrics)
    report = json.loads((cli.folder / "report.json").read_text())
    assert list(report["tasks"]) == ["colours", "digit", "shape", "size"]
    assert report["tasks"]["digit"]["evaluation"]["samples"] == 359
    whole = load_checkpoint(cli.folder / "checkpoints" / "last.ckpt")["state_dict"]
    (amid,) = Path("steps").glob("step=63.ckpt")
    again = main([*both, f"--ckpt_path={amid}", "--trainer.callbacks.dirpath=other"])
    for name, value in load_checkpoint(again.folder / "checkpoints" / "last.ckpt")["state_dict"].items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.slow
def test_texts_have_several_tasks_too(own_folder: Path) -> None:
    lines = ["text,topic,stars"]
    lines += [f"word {n} of many,{('', 'a', 'b')[n % 3]},{n % 5 if n % 4 else ''}" for n in range(60)]
    Path("texts.csv").write_text("\n".join(lines) + "\n")
    Path("new.csv").write_text("text\none text\nanother\n")
    encoder = tiny_encoder(own_folder / "bert")
    data = [
        *("--data=TextColumns", "--data.labels={topic: classification, stars: regression}"),
        *(
            "--data.train_file=texts.csv",
            "--data.predict_file=new.csv",
            "--data.max_length=32",
            f"--model.encoder={encoder}",
        ),
        *("--model.optimizer=AdamW", "--trainer.max_epochs=1", *QUICK[-2:]),
    ]
    cli = main(["fit", *data])
    assert isinstance(cli.datamodule, TextColumns)
    assert {"val/topic/accuracy", "val/stars/r2"} <= set(cli.trainer.callback_metrics)
    main(
        ["predict", "--ckpt_path", str(cli.folder / "checkpoints" / "best.ckpt"), "--predictions=out.csv", *QUICK[-2:]]
    )
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    assert [row["text"] for row in rows] == ["one text", "another"]
    assert list(rows[0]) == ["text", "topic", "topic_probability", "stars"]
    assert json.loads((cli.folder / "report.json").read_text())["split"] == "val"
