"""The report: in a stranger's module, over ranks, after a resume and a stop; what it says is what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn import metrics
from torch import Tensor, nn

from callbacks import ExactResume, GradualUnfreezing, Report
from callbacks.report.comparison import main as report_of
from callbacks.report.outputs import load_predictions
from recipes.text import main as text
from recipes.vision import main as vision
from tests.callbacks.report.conftest import QUICK, check_page, loaded, read
from tests.nets import Net, data, fit, quiet


@pytest.mark.slow
def test_it_works_in_a_module_that_knows_nothing_of_it(own_folder: Path) -> None:
    report = Report("page")
    net = fit([report])
    assert read(own_folder / "page")["split"] == "val"
    trainer = quiet(callbacks=[report])
    trainer.test(net, data(40, seed=5), verbose=False)
    found, kept = read(own_folder / "page"), loaded(own_folder / "page" / "predictions" / "test.safetensors")
    assert found["split"] == "test" and found["evaluation"]["samples"] == 40
    assert torch.equal(kept.labels, torch.arange(40) % 4)
    net.eval()
    with torch.no_grad():
        logits = torch.cat([net(images) for images, _ in data(40, seed=5)])
    assert torch.allclose(kept.logits, logits, atol=1e-6)
    said = kept.logits.argmax(1)
    assert found["evaluation"]["accuracy"]["value"] == metrics.accuracy_score(kept.labels, said)
    assert found["evaluation"]["confusion"] == metrics.confusion_matrix(kept.labels, said).tolist()
    assert len(found["curves"]["points"]) > 2 and found["class_names"] == ["0", "1", "2", "3"]
    surest = max((said != kept.labels).nonzero().flatten().tolist(), key=lambda place: logits[place].softmax(0).max())
    assert found["start"] is None and found["mistakes"][0]["name"] == f"sample {surest}"
    check_page(own_folder / "page")


@pytest.mark.slow
def test_the_quickstarts_page_says_what_was_measured() -> None:
    cli = vision([*QUICK, "--test", "--trainer.max_epochs=4"])
    found = read(cli.folder)
    kept = loaded(cli.folder / "predictions" / "test.safetensors")
    said = kept.logits.argmax(1)
    assert found["cost"]["trained"] == found["cost"]["parameters"] == 74_965
    tested = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    assert found["evaluation"]["accuracy"]["value"] == pytest.approx(tested["test/accuracy"], abs=1e-6)
    assert found["evaluation"]["f1"]["value"] == pytest.approx(tested["test/f1"], abs=1e-6)
    assert found["evaluation"]["loss"] == pytest.approx(tested["test/loss"], abs=2e-3), "logged in bf16"
    assert found["class_names"] == ["5", "6", "7", "8", "9"] and found["title"] == "resnet8 on Digits"
    assert len(found["curves"]["validations"]) == 4 and found["best"]["monitor"] == "val/accuracy"
    values = [v["metrics"]["val/accuracy"] for v in found["curves"]["validations"]]
    assert found["best"]["score"] == max(values)
    assert found["curves"]["groups"] == ["stem", "layer1", "layer2", "layer3", "head"]
    assert 0.2 < found["start"]["accuracy"] < tested["test/accuracy"] and found["start"]["samples"] <= 179
    wrong = [place for place in range(len(said)) if said[place] != kept.labels[place]]
    assert {item["name"] for item in found["mistakes"]} <= {kept.names[place] for place in wrong}
    assert len(found["mistakes"]) == min(12, len(wrong)) and len(found["uncertain"]) == 12
    assert all(item["picture"] != item["saliency"] for item in found["mistakes"] + found["uncertain"])
    val = loaded(cli.folder / "predictions" / "val.safetensors")
    assert metrics.accuracy_score(val.labels, val.logits.argmax(1)) == pytest.approx(max(values), abs=1e-6)
    assert "temperature" in found["evaluation"]["calibration"]
    content = check_page(cli.folder)
    assert "recipes.vision predict --ckpt_path" in content and "backbone: resnet8" in content
    (cli.folder / "report.html").unlink()
    assert report_of([cli.folder]).read_text() == content, "the page is a function of report.json"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # two folders, to be compared
def test_phases_and_curves_survive_a_resume(own_folder: Path) -> None:
    def run(name: str, **options: Any) -> dict[str, Any]:
        keep = ModelCheckpoint(dirpath=own_folder / name, save_top_k=-1, filename="{step}", every_n_train_steps=6)
        parts: list[Any] = [
            ExactResume(seed=0),
            GradualUnfreezing(every_epochs=1, blocks_per_phase=2),
            Report(own_folder / name),
            keep,
        ]
        fit(parts, enable_checkpointing=True, log_every_n_steps=2, **options)
        return read(own_folder / name)

    whole = run("whole")
    resumed = run("resumed", ckpt_path=own_folder / "whole" / "step=18.ckpt")
    assert [phase["step"] for phase in whole["phases"]] == [0, 12, 24]
    assert [len(phase["open"]) for phase in whole["phases"]] == [1, 3, 5] and whole["phases"][0]["open"] == ["head"]
    for part in ("phases", "mistakes", "evaluation"):
        assert whole[part] == resumed[part], part
    assert whole["curves"] == resumed["curves"]
    page = (own_folder / "whole" / "report.html").read_text()
    assert "what trains" in page and "best val/loss in it" in page, "no checkpoint goes by a metric"
    steps = [point["step"] for point in whole["curves"]["rates"]]
    assert steps == list(range(48)), "a group that opens for a few steps is seen"


@pytest.mark.parametrize("way", ["ctrl-c", "sigterm"])
def test_a_fit_that_is_stopped_by_hand_leaves_a_page(own_folder: Path, way: str) -> None:
    from lightning.pytorch import Callback

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 13:
                if way == "ctrl-c":
                    raise KeyboardInterrupt
                trainer._signal_connector.received_sigterm = True

    with pytest.raises(SystemExit):
        fit([Report("page"), Stop()])
    found = read(own_folder / "page")
    assert len(found["curves"]["validations"]) == 1
    check_page(own_folder / "page")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # forked in a test
def test_two_ranks_agree_on_the_trainers_own_folder(own_folder: Path) -> None:
    logger = CSVLogger(own_folder, name="logs", version="0")
    fit([Report()], max_epochs=1, logger=logger, strategy="ddp_fork", devices=2, limit_val_batches=2)
    found = read(own_folder / "logs" / "0")
    assert found["evaluation"]["samples"] == 8 and found["cost"]["devices"] == 2


class Scores(Net):
    """Learns a number with a point; a stranger's, who returns nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


def fitted_and_tested(net: Any, loader: Any) -> Any:
    """What the report in the folder `page` holds of a module after two epochs and a test; the module is evaluating."""
    trainer = quiet(callbacks=[Report("page")], max_epochs=2)
    trainer.fit(net, loader, loader)
    trainer.test(net, loader, verbose=False)
    net.eval()
    return read(Path("page"))


@pytest.mark.slow
def test_scores_of_a_stranger_are_evaluated(own_folder: Path) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    images = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    truth = images.mean((1, 2, 3)) * 10 + 2
    loader = DataLoader(TensorDataset(images, truth), batch_size=6)
    net = Scores()
    found = fitted_and_tested(net, loader)
    with torch.no_grad():
        off = (net(images) - truth).abs()
    assert (
        found["evaluation"] is None
        and found["scores"]["samples"] == 40
        and found["scores"]["constant"]["of"] == "these"
    )
    assert found["scores"]["mae"]["value"] == pytest.approx(float(off.mean()), rel=1e-5)
    assert found["furthest"][0]["name"] == f"sample {int(off.argmax())}"
    assert "Largest errors" in check_page(own_folder / "page")
    yes_or_no = DataLoader(TensorDataset(images, (truth > 2).float()), batch_size=6)
    quiet(callbacks=[Report("page")]).test(net, yes_or_no, verbose=False)
    assert read(own_folder / "page")["scores"] is None, "a logit, perhaps"


@pytest.mark.slow
def test_several_labels_of_a_stranger_are_evaluated(own_folder: Path) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    class Several(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", self.training_step(batch, batch_idx))

        test_step = validation_step

    generator = torch.Generator().manual_seed(1)
    images = torch.randn(40, 3, 6, 6, generator=generator)
    truth = (torch.rand(40, 4, generator=generator) < 0.4).float()
    loader = DataLoader(TensorDataset(images, truth), batch_size=6)
    net = Several()
    found = fitted_and_tested(net, loader)
    with torch.no_grad():
        said = (net(images) > 0).numpy()
    expected = metrics.f1_score(truth, said, average="micro", zero_division=0)
    assert found["labels"]["f1"]["value"] == pytest.approx(expected)
    assert found["labels"]["threshold_from"] == "validation" and found["class_names"] == ["0", "1", "2", "3"]
    assert "Labels, the worst first" in check_page(own_folder / "page")


class Regression(Net):
    """Learns a score."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch[0])[:, 0] - batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        self.log("val/mse", (self(batch[0])[:, 0] - batch[1]).square().mean())
        return {"logits": self(batch[0])[:, :1], "label": batch[1]}


def test_a_score_has_curves_and_no_classes(own_folder: Path) -> None:
    fit([Report("page")], Regression())
    found = read(own_folder / "page")
    assert found["evaluation"] is None and "val/mse" in found["metrics"]
    assert "mse" in check_page(own_folder / "page")


@pytest.mark.slow
def test_several_labels_and_scores_of_texts(own_folder: Path) -> None:
    (own_folder / "t.csv").write_text("text,label\n" + "".join(f"word {n} here,{n / 9}\n" for n in range(40)))
    options = ["--data.train_file=t.csv", "--data.problem_type=regression", "--model.encoder=docstrings_bert"]
    options += ["--data.class_names=null", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    cli = text(["fit", "--config", "text/csv_minilm", *options])
    found = read(cli.folder)
    assert found["evaluation"] is None
    mean = float(cli.datamodule.splits["train"].labels.mean())
    assert (
        found["scores"]["constant"]["value"] == pytest.approx(mean) and found["scores"]["constant"]["of"] == "training"
    )
    assert found["scores"]["mse"]["value"] == pytest.approx(found["metrics"]["val/mse"], rel=1e-2), "logged in bf16"
    assert "Largest errors" in check_page(cli.folder)


@pytest.mark.slow
def test_a_curve_stays_short(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("callbacks.report.callback.MOST_POINTS", 50)
    report = Report("page")
    fit([report], max_epochs=20, log_every_n_steps=1)
    points = report.progress["points"]
    assert 25 <= len(points) <= 50 and points[-1]["step"] > 230
    steps = [point["step"] for point in points]
    assert steps == sorted(set(steps))


class Odd:
    """What a stranger's data module may be."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "odd",
    [
        {"class_names": ["a"]},
        {"class_names": {0: "cat"}},
        {"sample_names": ["a", "b"]},
        {"splits": (0.8, 0.2)},
        {"splits": None},
        {"state_dict": lambda: None},
        {"state_dict": lambda: 1 / 0},
    ],
    ids=["few names", "names by number", "a list of names", "shares", "no splits", "no state", "a state that raises"],
)
def test_whatever_a_strangers_data_module_is(odd: dict[str, Any], own_folder: Path) -> None:
    from lightning.pytorch import LightningDataModule

    class Module(LightningDataModule):
        def train_dataloader(self) -> Any:
            return data(8)

        val_dataloader = test_dataloader = train_dataloader

    module = Module()
    vars(module).update(odd)
    report = Report("page")
    trainer = quiet(callbacks=[report], max_epochs=1)
    trainer.fit(Net(), module)
    trainer.test(Net(), module, verbose=False)
    assert read(own_folder / "page")["class_names"] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "broken",
    [
        "callbacks.report.page.render",
        "callbacks.report.gallery.evaluation",
        "callbacks.report.callback.save_predictions",
    ],
)
def test_a_page_that_cannot_be_made_costs_no_run(
    broken: str, monkeypatch: pytest.MonkeyPatch, own_folder: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, fail)
    report = Report("page")
    net = fit([report], max_epochs=2)
    quiet(callbacks=[report]).test(net, data(8), verbose=False)
    assert len(report.progress["validations"]) == 2
    if broken == "callbacks.report.page.render":
        assert read(own_folder / "page")["evaluation"], "the facts are written before the page"


@pytest.mark.slow
def test_other_data_are_not_held_against_the_start_nor_a_validation_called_a_test(own_folder: Path) -> None:
    from tests.conftest import write_folder

    options = ["--data=ImageFolder", "--model.weights=null", "--model.image_size=32", "--data.batch_size=4"]
    first, second = (
        str(write_folder(own_folder / name, ("train", "val"), each=60 - 20 * n)) for n, name in enumerate("ab")
    )
    cli = vision(
        [*QUICK, *options, f"--data.root={first}", "--test", "--trainer.max_epochs=16", "--data.val_share=0.5"]
    )
    found = read(cli.folder)
    assert found["start"] is not None and found["split"] == "test" and not found["chose"]
    best = str(cli.folder / "checkpoints" / "best.ckpt")
    other = vision(["test", "--ckpt_path", best, f"--data.root={second}", "--trainer.enable_progress_bar=false"])
    found = read(other.folder)
    assert found["start"] is None and found["evaluation"]["samples"] == 120
    assert set(found["metrics"]) == {"test/loss", "test/accuracy", "test/f1"}


def test_samples_without_finite_logits_are_ignored(own_folder: Path) -> None:
    class Broken(Net):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            logits[0, 0] = torch.inf
            return {"logits": logits, "label": batch[1]}

    quiet(callbacks=[Report("page")]).test(Broken(), data(8), verbose=False)
    found = read(own_folder / "page")
    assert found["data"]["without_numbers"] == 2 and found["evaluation"]["samples"] == 6
    assert "2 samples whose logits" in check_page(own_folder / "page")


@pytest.mark.slow
def test_an_earlier_run_in_the_same_folder_is_not_this_one(own_folder: Path) -> None:
    fit([Report("page")], max_epochs=1)
    assert read(own_folder / "page")["evaluation"]
    fit([Report("page")], max_epochs=1, limit_val_batches=0)
    assert read(own_folder / "page")["evaluation"] is None
    fit([Report("page")], max_epochs=1)
    fit([Report("page")], Regression(), max_epochs=1)
    assert read(own_folder / "page")["evaluation"] is None, "not even after as many steps"
    before = (own_folder / "page" / "report.json").read_text()
    fit([Report("page")], fast_dev_run=True)
    assert (own_folder / "page" / "report.json").read_text() == before


@pytest.mark.slow
def test_the_page_is_about_the_best_epoch(own_folder: Path) -> None:
    class Scripted(Net):
        def on_validation_epoch_end(self) -> None:
            self.log("val/error", [1.0, 0.5, float("nan"), 0.7][self.current_epoch])

    keep = ModelCheckpoint(dirpath=own_folder, monitor="val/error", filename="best")
    fit([Report("page"), keep], Scripted(), enable_checkpointing=True, num_sanity_val_steps=0)
    found = read(own_folder / "page")
    assert found["best"]["epoch"] == 1 and found["best"]["score"] == 0.5 and found["chose"]
    assert load_predictions(own_folder / "page" / "predictions" / "val.safetensors", found["best"]["step"])
    assert found["mistakes"] + found["uncertain"] and "saliency" not in found["uncertain"][0]


def test_the_clock_and_the_last_point_survive() -> None:
    report = Report("page")
    fit([report], max_epochs=1, log_every_n_steps=50)
    assert [point["step"] for point in report.progress["points"]] == [1, 10, 12]
    other = Report("page")
    other.load_state_dict(report.state_dict())
    assert other.progress["seconds"] == report.progress["seconds"] > 0
