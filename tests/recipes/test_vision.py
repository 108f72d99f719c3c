"""The recipe under resume, two ranks, mixed precision, clipping and cached features, on the quickstart's data."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from callbacks.report.outputs import load_predictions
from recipes.vision import VisionClassifier, VisionCLI, main

from ..conftest import write_folder

QUICK = [
    *("fit", "--config", "vision/quickstart", "--trainer.enable_progress_bar=false"),
    *("--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"),
]
PROBE = ["--trainer.callbacks+=Freeze", "--trainer.callbacks.train_last_blocks=1"]


def weights(cli: VisionCLI) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in cli.model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_the_quickstart_learns_the_other_digits(capsys: pytest.CaptureFixture[str]) -> None:
    cli = main([*QUICK, "--test"])
    assert cli.trainer.callback_metrics["test/accuracy"] >= 0.97
    folder = Path(cli.trainer.log_dir or "")
    assert folder.parent.as_posix().endswith("runs/vision/quickstart")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= found
    assert any("tfevents" in name for name in found)
    screen = capsys.readouterr().out
    for word in (
        "Digits, 5 classes",
        "resnet8",
        "of them trained",
        "best",
        "accuracy 0.9",
        "best.ckpt",
        "predict --ckpt_path",
    ):
        assert word in screen
    assert len(screen.splitlines()) <= 24, "the summary fits on one screen"


@pytest.mark.slow
def test_the_saved_config_gives_the_same_run_again() -> None:
    short = ["--trainer.max_epochs=2"]
    first = main([*QUICK, *short])
    config = Path(first.trainer.log_dir or "") / "config.yaml"
    assert yaml.safe_load(config.read_text())["model"]["backbone"] == "resnet8"
    again = main(["fit", "--config", str(config)])
    assert same(weights(first), weights(again))
    assert Path(again.trainer.log_dir or "").parent == Path(first.trainer.log_dir or "").parent


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    options = ["--trainer.max_epochs=4", "--data.augment=strong", "--model.head_dropout=0"]
    whole = main([*QUICK, *options])
    half = main([*QUICK, *options, "--trainer.callbacks+=tests.spies.StopAfterEpoch", "--trainer.callbacks.epoch=1"])
    assert half.trainer.current_epoch == 2
    last = str(Path(half.trainer.log_dir or "") / "checkpoints" / "last.ckpt")
    resumed = main(["fit", "--ckpt_path", last, "--trainer.callbacks=null"])  # the config is found beside it
    assert resumed.trainer.current_epoch == 4
    assert same(weights(whole), weights(resumed))
    moments = [cli.trainer.optimizers[0].state_dict()["state"] for cli in (whole, resumed)]
    assert all(torch.equal(moments[0][k]["exp_avg"], moments[1][k]["exp_avg"]) for k in moments[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the checkpoints lie outside their run
def test_a_run_resumed_amid_an_epoch_is_the_uninterrupted_one() -> None:
    """With shuffling, augmentation and dropout, from the middle of an epoch and from its last step."""
    options = ["--trainer.max_epochs=3", "--model.head_dropout=0.3", "--data.augment=standard", "--data.mixup=0.2"]
    keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    keep += [
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.dirpath=steps",
        "--trainer.callbacks.filename={step}",
    ]
    whole = main([*QUICK, *options, *keep]).model.state_dict()
    for step in (4, 17, 30):
        resumed = main([*QUICK, *options, f"--ckpt_path=steps/step={step}.ckpt"])
        assert same(whole, resumed.model.state_dict()), step


@pytest.mark.slow
def test_ewc_holds_the_first_digits_while_others_are_learnt() -> None:
    ewc = ["--trainer.callbacks+=EWC", "--trainer.max_epochs=1"]
    first = main([*QUICK, *ewc, "--trainer.callbacks.save=a.safetensors", "--trainer.callbacks.samples=100"])
    distance = []
    for strength in ("0", "1e9"):
        load = ["--trainer.callbacks.load=a.safetensors", f"--trainer.callbacks.strength={strength}"]
        start = ["--model.weights=null", "--data.classes=[0,1,2,3,4]", "--trainer.callbacks.exclude=[head]"]
        cli = main([*QUICK, *ewc, *load, *start])
        pairs = zip(first.model.backbone.parameters(), cli.model.backbone.parameters(), strict=True)
        distance.append(sum(float((one - other).detach().norm()) for one, other in pairs))
    assert distance[1] < distance[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:resumed, but not as if never stopped")  # it is said, and meant
def test_what_is_configured_now_beats_the_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    options = ["--trainer.max_epochs=1", "--model.schedule=Constant"]
    first = main([*QUICK, *options])
    last = str(Path(first.trainer.log_dir or "") / "checkpoints" / "last.ckpt")
    changed = ["--model.optimizer.lr=0.002", "--model.optimizer.weight_decay=0.3", "--trainer.max_epochs=2"]
    resumed = main(["fit", "--ckpt_path", last, *changed, "--trainer.callbacks+=tests.spies.Record"])
    assert "model.optimizer.lr was 0.01 in the checkpoint and is 0.002 now" in caplog.text
    record = next(c for c in resumed.trainer.callbacks if type(c).__name__ == "Record")  # type: ignore[attr-defined]
    groups = resumed.trainer.optimizers[0].param_groups
    assert max(group["lr"] for group in groups) == pytest.approx(0.002)
    assert max(max(rates) for rates in record.rates) == pytest.approx(0.002)  # type: ignore[attr-defined]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}


@pytest.fixture
def gradients() -> Iterator[list[torch.Tensor]]:
    """The gradient, flattened, that each optimiser step used."""
    seen: list[torch.Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        seen.append(torch.cat([p.grad.flatten() for p in params]))

    handle = register_optimizer_step_post_hook(look)
    yield seen
    handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_from_the_command_line_acts(algorithm: str, gradients: list[torch.Tensor]) -> None:
    options = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=3"]
    main([*QUICK, *options, f"--trainer.gradient_clip_algorithm={algorithm}", "--trainer.gradient_clip_val=0.01"])
    for gradient in gradients:
        size = gradient.norm() if algorithm == "norm" else gradient.abs().max()
        assert size <= 0.01 * 1.001
    gradients.clear()
    main([*QUICK, *options, "--trainer.gradient_clip_val=null"])
    assert min(float(gradient.norm()) for gradient in gradients) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_precision_from_the_command_line_acts(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    forward = nn.Linear.forward

    def look(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(nn.Linear, "forward", look)
    cli = main(
        [*QUICK, "--trainer.max_epochs=1", "--trainer.limit_train_batches=3", f"--trainer.precision={precision}"]
    )
    assert seen == {dtype}
    assert all(p.dtype == torch.float32 for p in cli.model.parameters()), "master weights stay fp32"


@pytest.mark.slow
def test_two_ranks_count_every_picture_once_and_agree(own_folder: Path) -> None:
    options = ["--trainer.max_epochs=4", "--trainer.strategy=ddp", "--trainer.devices=2", "--data.eval_batch_size=16"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "recipes.vision", *QUICK, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (own_folder / "runs" / "vision" / "quickstart").iterdir()
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/accuracy"]]
    last = folder / "checkpoints" / "last.ckpt"
    alone = main(["validate", "--ckpt_path", str(last), "--trainer.strategy=auto", "--trainer.devices=1"])
    metrics = alone.trainer.callback_metrics
    assert float(rows[-1]["val/accuracy"]) == pytest.approx(float(metrics["val/accuracy"]), abs=1e-6)
    assert float(rows[-1]["val/loss"]) == pytest.approx(float(metrics["val/loss"]), rel=1e-6)
    best = folder / "checkpoints" / "best.ckpt"
    alone = main(["validate", "--ckpt_path", str(best), "--trainer.strategy=auto", "--trainer.devices=1"])
    both, one = (load_predictions(run / "predictions" / "val.safetensors") for run in (folder, alone.folder))
    assert torch.equal(both.rows, torch.arange(144)) and torch.equal(both.labels, one.labels)
    assert torch.allclose(both.logits, one.logits, atol=0.05) and both.names == one.names
    reports = [json.loads((run / "report.json").read_text()) for run in (folder, alone.folder)]
    assert reports[0]["evaluation"]["confusion"] == reports[1]["evaluation"]["confusion"]
    assert reports[0]["start"] is not None


@pytest.mark.slow
def test_predictions_of_a_folder(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(own_folder / "pictures", each=6)
    options = ["--trainer.max_epochs=1", "--model.weights=null", "--model.image_size=32", "--data.batch_size=4"]
    fit = main([*QUICK, *options, "--data=ImageFolder", f"--data.root={root}", "--test"])
    best = str(Path(fit.trainer.log_dir or "") / "checkpoints" / "best.ckpt")
    capsys.readouterr()
    predict = main(["predict", "--ckpt_path", best])
    assert "predictions.csv" in capsys.readouterr().out
    with (Path(predict.trainer.log_dir or "") / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == sorted(str(path) for path in root.glob("val/*/*.jpg"))
    assert {row["label"] for row in rows} <= {"class_0", "class_1", "class_2"}
    accuracy = sum(row["label"] == Path(row["name"]).parent.name for row in rows) / len(rows)
    assert accuracy == pytest.approx(float(fit.trainer.callback_metrics["test/accuracy"]), abs=1e-6)
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in rows)


@pytest.mark.slow
def test_a_frozen_backbone_does_not_change() -> None:
    freeze = ["--trainer.callbacks+=Freeze", "--trainer.callbacks.train_last_blocks=2"]
    cli = main([*QUICK, "--trainer.max_epochs=1", *freeze, "--model.optimizer.weight_decay=0.5"])
    fresh = VisionClassifier(5, backbone="resnet8", weights="digits_0_4_resnet8", image_size=8)
    before, after = fresh.backbone.state_dict(), cli.model.backbone.state_dict()  # type: ignore[union-attr]
    last = tuple(fresh.backbone.blocks[list(fresh.backbone.blocks)[-1]])
    for name, value in before.items():
        changed = not torch.equal(value, after[name])
        assert changed == name.startswith(last), name


@pytest.mark.slow
def test_lbfgs_goes_to_the_optimum_of_a_probe() -> None:
    cli = main(
        [
            *(*QUICK, *PROBE, "--feature_views=1", "--data.augment=none", "--data.batch_size=573"),
            *("--model.optimizer=torch.optim.LBFGS", "--model.optimizer.max_iter=100", "--model.optimizer.lr=1"),
            *("--model.optimizer.line_search_fn=strong_wolfe", "--model.layer_decay=1", "--model.schedule=Constant"),
            *("--trainer.max_epochs=3", "--trainer.gradient_clip_val=null", "--trainer.log_every_n_steps=1"),
        ]
    )
    assert cli.trainer.callback_metrics["train/loss_epoch"] < 1e-3
    assert cli.trainer.callback_metrics["val/accuracy"] > 0.9


@pytest.mark.slow
def test_class_weights_balanced_come_from_the_training_counts() -> None:
    cli = main([*QUICK, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--model.class_weights=balanced"])
    counts = torch.tensor(cli.datamodule.class_counts, dtype=torch.float32)
    assert torch.allclose(cli.model.class_weights * counts, counts.sum() / 5)  # type: ignore[operator]


def test_mirror_images_are_averaged_in_test_and_predict_alone() -> None:
    model = VisionClassifier(num_classes=3, backbone="resnet8", image_size=8, mirror_at_test=True).eval()
    image = torch.rand(5, 3, 8, 8)
    batch = {"image": image, "label": torch.arange(5) % 3, "index": torch.arange(5)}
    with torch.no_grad():
        one, other = model(image).softmax(1), model(image.flip(3)).softmax(1)
        assert torch.allclose(model.final_logits(batch).softmax(1), (one + other) / 2, atol=1e-6)
        assert torch.allclose(model.predict_step(batch, 0)["probability"], ((one + other) / 2).max(1).values)
        assert not torch.allclose(one, other)
        assert torch.equal(model.logits(batch), model(image)), "training and validation see the picture"
        model.mirror_at_test = False
        assert torch.equal(model.final_logits(batch), model(image))


def test_reinitialised_blocks_are_fresh_and_the_others_pretrained() -> None:
    options: dict[str, Any] = {"backbone": "resnet8", "weights": "digits_0_4_resnet8", "image_size": 8}
    pretrained = VisionClassifier(5, **options).backbone.state_dict()
    model = VisionClassifier(5, reinit_blocks=1, **options)
    last = tuple(list(model.backbone.blocks.values())[-1])
    for name, value in model.backbone.state_dict().items():
        if name.endswith("weight") and value.ndim > 1:
            assert torch.equal(value, pretrained[name]) != name.startswith(last), name


@pytest.mark.slow
def test_inception_trains_its_auxiliary_head_too() -> None:
    model = VisionClassifier(3, backbone="inception_v3", aux_weight=0.4)
    model.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    model.on_train_epoch_start()
    batch = {"image": torch.rand(2, 3, 299, 299), "label": torch.tensor([0, 2])}
    loss = model.training_step(batch, 0)
    loss.backward()
    assert all(p.grad is not None for p in model.aux_heads.parameters())
    assert "aux_heads" in model.layer_groups()["head"]
    model.eval()
    assert model(batch["image"]).shape == (2, 3)


@pytest.mark.slow
def test_checkpoints_hold_no_pickles_and_say_what_they_are() -> None:
    cli = main([*QUICK, "--trainer.max_epochs=1"])
    best = Path(cli.trainer.log_dir or "") / "checkpoints" / "best.ckpt"
    content = torch.load(best, weights_only=True)
    assert content["recipe"]["name"] == "vision" and len(content["recipe"]["mean"]) == 3
    assert content["Digits"]["class_names"] == ["5", "6", "7", "8", "9"]
    assert content["Digits"]["image_size"] == 8
    assert content["hyper_parameters"]["backbone"] == "resnet8"
    again = VisionClassifier.load_from_checkpoint(best, num_classes=5, weights=None)
    assert torch.equal(again.head.weight, cli.model.head.weight)  # type: ignore[union-attr, arg-type]


@pytest.mark.slow
def test_the_schedule_counts_optimiser_steps_under_accumulation() -> None:
    options = [
        "--trainer.max_epochs=2",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.callbacks+=tests.spies.Record",
    ]
    cli = main([*QUICK, *options])
    schedule = cli.trainer.lr_scheduler_configs[0].scheduler
    assert cli.trainer.global_step == schedule.last_epoch == 18  # 17 batches: 9 steps an epoch, the last one short
    assert schedule.total_steps == 18  # type: ignore[union-attr]
    groups = cli.trainer.optimizers[0].param_groups
    ratio = [group["lr"] / group["initial_lr"] for group in groups]
    assert max(ratio) - min(ratio) < 1e-6, "every group is at the same point of its schedule"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:resumed, but not as if never stopped")  # it is said, and meant
def test_a_plateau_hears_its_metric_once_per_validation_and_survives_a_resume() -> None:
    plateau = ["--model.schedule=Plateau", "--model.schedule.monitor=val/loss", "--model.schedule.mode=max"]
    options = [*plateau, "--model.schedule.patience=1", "--model.schedule.drop=0.5", "--trainer.max_epochs=6"]
    options.append("--model.schedule.warmup=0")
    whole = main([*QUICK, *options])  # the loss falls, and more would be better: each second validation is in vain
    schedule = whole.trainer.lr_scheduler_configs[0].scheduler
    assert schedule.drops >= 1  # type: ignore[union-attr]
    half = main([*QUICK, *options, "--trainer.callbacks+=tests.spies.StopAfterEpoch", "--trainer.callbacks.epoch=2"])
    last = str(Path(half.trainer.log_dir or "") / "checkpoints" / "last.ckpt")
    resumed = main(["fit", "--ckpt_path", last, "--trainer.callbacks=null"])
    assert resumed.trainer.lr_scheduler_configs[0].scheduler.state_dict() == schedule.state_dict()
    assert same(weights(whole), weights(resumed))


@pytest.mark.slow
def test_a_metric_that_is_not_logged_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*QUICK, "--model.schedule=Plateau", "--model.schedule.monitor=val/los", "--trainer.max_epochs=1"])
    assert "'val/los' is not logged" in capsys.readouterr().err


@pytest.mark.slow
def test_broken_pictures_in_a_worker_get_a_sentence(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(own_folder / "pictures", each=6)
    broken = root / "train" / "class_0" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:150])
    options = ["--model.weights=null", "--model.image_size=32", "--data=ImageFolder", f"--data.root={root}"]
    options += ["--data.in_memory=false", "--data.num_workers=1", "--data.batch_size=4", "--trainer.max_epochs=1"]
    with pytest.raises(SystemExit):
        main([*QUICK, *options])
    answer = capsys.readouterr().err
    assert "cannot read the image" in answer and str(broken) in answer and "Traceback" not in answer
    cli = main([*QUICK, *options, "--data.on_error=skip"])
    assert len(cli.datamodule.skipped) == 1
    assert "1 skipped that cannot be read" in capsys.readouterr().out


@pytest.mark.slow
def test_the_last_checkpoint_is_the_last_though_nothing_improves() -> None:
    cli = main([*QUICK, "--trainer.max_epochs=3", "--model.optimizer.lr=1e-9", "--trainer.limit_train_batches=2"])
    checkpoints = Path(cli.trainer.log_dir or "") / "checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 6
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:resumed, but not as if never stopped")  # it is said, and meant
def test_a_resumed_run_keeps_its_folder_and_its_best(own_folder: Path) -> None:
    first = main([*QUICK, "--trainer.max_epochs=2"])
    folder = Path(first.trainer.log_dir or "")
    best = float(first.trainer.checkpoint_callback.best_model_score)  # type: ignore[union-attr, arg-type]
    spoilt = ["--trainer.max_epochs=3", "--model.optimizer.lr=5", "--model.schedule=Constant"]
    relative = os.path.relpath(folder / "checkpoints" / "last.ckpt")
    resumed = main(["fit", "--ckpt_path", relative, *spoilt])
    assert Path(resumed.trainer.log_dir or "") == folder
    assert float(resumed.trainer.checkpoint_callback.best_model_score) == best  # type: ignore[union-attr, arg-type]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert (folder / "metrics.part1.csv").is_file(), "the metrics before the interruption are kept"
    assert yaml.safe_load((folder / "config.yaml").read_text())["ckpt_path"] is None


@pytest.mark.slow
def test_a_config_in_the_working_folder_is_not_written_over(own_folder: Path) -> None:
    mine = "# mine\nmodel: {backbone: resnet8, image_size: 8}\ndata: {class_path: datamodules.Digits}\n"
    (own_folder / "config.yaml").write_text(mine)
    main(["fit", "--config", "config.yaml", "--trainer.logger=false", "--trainer.max_epochs=1", *QUICK[3:]])
    assert (own_folder / "config.yaml").read_text() == mine
    assert list(own_folder.glob("runs/vision/*/*/checkpoints/best.ckpt"))


@pytest.mark.slow
def test_other_classes_than_the_checkpoints_are_refused(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(own_folder / "pictures", ("train", "val", "test"), each=4)
    options = ["--data=ImageFolder", f"--data.root={root}", "--model.weights=null", "--model.image_size=32"]
    fit = main([*QUICK, *options, "--trainer.max_epochs=1", "--data.batch_size=4"])
    best = str(Path(fit.trainer.log_dir or "") / "checkpoints" / "best.ckpt")
    for split in ("train", "val", "test"):
        (root / split / "class_0").rename(root / split / "zebra")
    with pytest.raises(SystemExit):
        main(["test", "--ckpt_path", best])
    assert "the checkpoint's classes are class_0, class_1, class_2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:resumed, but not as if never stopped")  # it is said, and meant
def test_a_run_that_skips_broken_pictures_can_be_tested_and_resumed(own_folder: Path) -> None:
    root = write_folder(own_folder / "pictures", (), each=12)
    for name in ("0.jpg", "5.jpg"):
        (root / "class_1" / name).write_bytes(b"broken")
    options = ["--data=ImageFolder", f"--data.root={root}", "--model.weights=null", "--model.image_size=32"]
    fit = main([*QUICK, *options, "--trainer.max_epochs=1", "--data.batch_size=4", "--data.on_error=skip"])
    assert len(fit.datamodule.skipped) >= 1
    last = str(Path(fit.trainer.log_dir or "") / "checkpoints" / "last.ckpt")
    main(["test", "--ckpt_path", last])
    assert main(["fit", "--ckpt_path", last, "--trainer.max_epochs=2"]).trainer.current_epoch == 2


@pytest.mark.slow
def test_true_half_precision_runs() -> None:
    cli = main([*QUICK, "--trainer.max_epochs=1", "--trainer.precision=bf16-true"])
    assert cli.model.head.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
