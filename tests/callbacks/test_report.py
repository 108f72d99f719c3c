"""The report: in a stranger's module, over ranks, after a resume and a stop; what it says is what was measured."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from sklearn import metrics
from torch import Tensor, nn

from callbacks import ExactResume, GradualUnfreezing, Report
from callbacks.report.callback import MOST_POINTS
from callbacks.report.comparison import main as report_of
from callbacks.report.facts import as_json, balanced_subset, groups_by_block, is_better
from callbacks.report.figures import as_uri
from callbacks.report.outputs import Predictions, find_outputs, gather_outputs, load_predictions, save_predictions
from callbacks.report.page import render
from datamodules import Digits
from recipes.text import main as text
from recipes.vision import VisionClassifier
from recipes.vision import main as vision
from tests.nets import Net, data, fit, quiet

QUICK = ["fit", "--config", "vision/quickstart", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


class Page(HTMLParser):
    """Counts what a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def loaded(path: Path) -> Predictions:
    found = load_predictions(path)
    assert found is not None
    return found


def check_page(folder: Path) -> str:
    """One file, without scripts and without anything from elsewhere; every drawing has words beside it."""
    content = (folder / "report.html").read_text()
    page = Page(content)
    assert "script" not in page.tags and "link" not in page.tags
    assert all(link.startswith(("#", "data:image/")) for link in page.links), page.links
    assert "url(http" not in content and "@import" not in content
    assert page.tags.count("figcaption") == page.tags.count("figure") >= 1
    assert page.tags.count("svg") <= page.tags.count("figure")
    assert len(content) < 2 * 2**20
    return content


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
        logits = torch.cat([net(pictures) for pictures, _ in data(40, seed=5)])
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


@pytest.mark.filterwarnings("ignore")  # forked in a test
def test_two_ranks_agree_on_the_trainers_own_folder(own_folder: Path) -> None:
    logger = CSVLogger(own_folder, name="logs", version="0")
    fit([Report()], max_epochs=1, logger=logger, strategy="ddp_fork", devices=2, limit_val_batches=2)
    found = read(own_folder / "logs" / "0")
    assert found["evaluation"]["samples"] == 8 and found["cost"]["devices"] == 2


def test_tensorboard_has_the_matrix_and_the_classes(own_folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(own_folder, name="board", version="0")
    trainer = quiet(callbacks=[Report()], logger=logger)
    trainer.test(Net(), data(8), verbose=False)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload().Tags()
    assert "test/confusion" in events["images"] and "test/classes/text_summary" in events["tensors"]
    assert (Path(logger.log_dir) / "report.html").is_file()


def some(classes: int, samples: int = 300, **changes: Any) -> dict[str, Any]:
    """A report of random answers."""
    from callbacks.report.evaluation import evaluation

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator)
    curves: dict[str, Any] = {"points": [], "validations": [], "rates": [], "groups": []}
    cost = {"seconds": 0, "samples_per_second": None, "memory_gb": 1, "device": "x", "devices": 1, "precision": "32"}
    report = {
        "version": 1, "title": "net on data", "facts": {}, "config": None, "split": "test", "start": None,
        "chose": False,
        "class_names": [f"class {n}" for n in range(classes)], "evaluation": evaluation(logits, labels), "metrics": {},
        "curves": curves, "phases": [], "best": None, "mistakes": [], "uncertain": [],
        "data": {"counts": {}, "digest": None, "seed": None, "skipped": [], "skipped_rows": 0, "without_numbers": 0},
        "cost": cost | {"parameters": 5, "trained": 4}, "versions": {},
    }  # fmt: skip
    return report | changes


@pytest.mark.parametrize("classes", [2, 25, 120])
def test_few_and_many_classes(classes: int, own_folder: Path) -> None:
    (own_folder / "report.html").write_text(render(some(classes)))
    content = check_page(own_folder)
    found = some(classes)["evaluation"]
    below = found["accuracy"]["interval"][1] < found["majority"]["accuracy"]
    assert f"That is {'reliably worse' if below else 'not reliably more'} than the largest class" in content
    assert content.count("class 7") >= (1 if classes > 2 else 0)


def test_what_comes_from_outside_is_escaped(own_folder: Path) -> None:
    evil = '<script>alert("1")</script>'
    sample = {"name": evil, "label": 0, "predicted": 1, "probability": 0.5, "pieces": [[evil, 0.5]]}
    report = some(2, class_names=[evil, "$x_1$ & \\frac"], title=evil, config=evil, mistakes=[sample])
    report["facts"] = {"model": evil, "doctor": [evil], "commands": {evil: evil}}
    report["data"]["skipped"] = [evil]
    (own_folder / "report.html").write_text(render(report))
    assert "alert" in check_page(own_folder)


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


def test_scores_of_a_stranger_are_evaluated(own_folder: Path) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    pictures = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    truth = pictures.mean((1, 2, 3)) * 10 + 2
    loader = DataLoader(TensorDataset(pictures, truth), batch_size=6)
    net = Scores()
    found = fitted_and_tested(net, loader)
    with torch.no_grad():
        off = (net(pictures) - truth).abs()
    assert (
        found["evaluation"] is None
        and found["scores"]["samples"] == 40
        and found["scores"]["constant"]["of"] == "these"
    )
    assert found["scores"]["mae"]["value"] == pytest.approx(float(off.mean()), rel=1e-5)
    assert found["furthest"][0]["name"] == f"sample {int(off.argmax())}"
    assert "Furthest off" in check_page(own_folder / "page")
    yes_or_no = DataLoader(TensorDataset(pictures, (truth > 2).float()), batch_size=6)
    quiet(callbacks=[Report("page")]).test(net, yes_or_no, verbose=False)
    assert read(own_folder / "page")["scores"] is None, "a logit, perhaps"


def test_several_labels_of_a_stranger_are_evaluated(own_folder: Path) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    class Several(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", self.training_step(batch, batch_idx))

        test_step = validation_step

    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(40, 3, 6, 6, generator=generator)
    truth = (torch.rand(40, 4, generator=generator) < 0.4).float()
    loader = DataLoader(TensorDataset(pictures, truth), batch_size=6)
    net = Several()
    found = fitted_and_tested(net, loader)
    with torch.no_grad():
        said = (net(pictures) > 0).numpy()
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
    assert "Furthest off" in check_page(cli.folder)


@pytest.mark.slow
def test_texts_are_shown_with_what_the_answer_hangs_on(own_folder: Path) -> None:
    rows = "".join(f"{word} number {n},{word}\n" for n in range(20) for word in ("cat", "dog", "emu"))
    (own_folder / "t.csv").write_text(f"text,label\n{rows}")
    options = ["--data.train_file=t.csv", "--model.encoder=docstrings_bert", "--trainer.max_epochs=1"]
    cli = text(["fit", "--config", "text/csv_minilm", *options, "--trainer.enable_progress_bar=false"])
    found = read(cli.folder)
    shown = found["mistakes"] + found["uncertain"]
    assert shown and all(item["pieces"] for item in shown)
    for item in shown:
        written = "".join(piece for piece, _ in item["pieces"]).split()
        assert "".join(written) == item["name"].replace(" ", ""), "special tokens are left out"
        assert max(weight for _, weight in item["pieces"]) <= 1
    check_page(cli.folder)


@pytest.mark.slow
def test_two_runs_are_compared_on_the_same_samples(own_folder: Path) -> None:
    runs = []
    for epochs in (1, 3):
        cli = vision([*QUICK, "--test", f"--trainer.max_epochs={epochs}", "--model.weights=null"])
        runs.append(cli.folder)
    page = report_of(runs, own_folder / "comparison.html")
    content = page.read_text()
    first, second = (loaded(run / "predictions" / "test.safetensors") for run in runs)
    right = [found.logits.argmax(1) == found.labels for found in (first, second)]
    gain = 100 * float(right[1].double().mean() - right[0].double().mean())
    assert f"{gain:+.1f} points of accuracy" in content and "McNemar" in content
    assert " of macro F1 (95% interval" in content and " of loss (95% interval" in content
    assert f"{int((right[1] & ~right[0]).sum())} that B gets right and A wrong" in content
    differences = content.split("What differs in their configs")[1].split("</pre>")[0]
    assert [line.split() for line in differences.splitlines() if "max_epochs" in line][-1] == ["+", "max_epochs:", "3"]
    other = vision([*QUICK, "--test", "--trainer.max_epochs=1", "--data.classes=[0,1,2,3,4]"])
    with pytest.raises(
        ValueError, match="evaluated on other samples .* compare runs with the same data, seed and split"
    ):
        report_of([runs[0], other.folder])
    with pytest.raises(FileNotFoundError, match="give the folder of a finished run"):
        report_of([own_folder])


@pytest.mark.parametrize(
    "outputs, batch, found",
    [
        ({"logits": torch.zeros(2, 3), "label": torch.tensor([0, 2])}, None, [0, 2]),
        (None, (torch.zeros(2, 5), torch.tensor([1, 0])), [1, 0]),
        (None, {"x": 0, "labels": torch.tensor([1, -100])}, [1]),
        (None, {"x": 0}, None),
        (None, (torch.zeros(2, 5), torch.zeros(2)), None),
        (None, (torch.zeros(2, 5), torch.zeros(2, 3, dtype=torch.long)), None),
        ({"logits": torch.zeros(2, 1), "label": torch.tensor([0, 0])}, None, None),
        (None, (torch.zeros(2, 5), torch.tensor([1, 0], dtype=torch.int32)), [1, 0]),
        (None, {"x": 0, "y": torch.tensor([1, 255])}, [1]),
        (None, {"x": 0, "y": torch.tensor([1, 2]), "index": ["a.jpg", "b.jpg"]}, [1, 2]),
        (None, (torch.zeros(2, 5), torch.tensor([5, 5]), torch.tensor([1, 0])), None),
    ],
)
def test_where_logits_and_labels_are_looked_for(outputs: Any, batch: Any, found: list[int] | None) -> None:
    made = find_outputs(outputs, batch, torch.zeros(2, 3))
    assert (None if made is None else made[1].tolist()) == found


def test_predictions_come_back_as_they_were(own_folder: Path) -> None:
    names = ["a/ä.jpg", "b\udce9.jpg", "two\nlines\0"]
    one = Predictions(torch.randn(3, 2), torch.tensor([0, 1, 1]), torch.arange(3), names)
    save_predictions(own_folder / "p" / "x.safetensors", one, 7)
    assert load_predictions(own_folder / "p" / "x.safetensors", 8) is None, "of another step"
    other = loaded(own_folder / "p" / "x.safetensors")
    assert other.names == names and all(torch.equal(*pair) for pair in zip(one[:3], other[:3], strict=True))
    save_predictions(own_folder / "x.safetensors", one._replace(names=[]), None)
    assert loaded(own_folder / "x.safetensors").names == []
    chosen = one.part(torch.tensor([True, False, True]))
    assert chosen.names == [names[0], names[2]] and chosen.rows.tolist() == [0, 2]


@pytest.mark.slow
def test_a_curve_stays_short(own_folder: Path) -> None:
    report = Report("page")
    fit([report], max_epochs=400, log_every_n_steps=1)
    points = report.progress["points"]
    assert MOST_POINTS / 2 <= len(points) <= MOST_POINTS and points[-1]["step"] > 4790
    steps = [point["step"] for point in points]
    assert steps == sorted(set(steps))


def test_small_things() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2])
    rows = balanced_subset(labels, 9)
    assert torch.bincount(labels[rows]).tolist() == [5, 3, 1] and rows.tolist() == sorted(rows.tolist())
    one, two = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = groups_by_block([{"name": "a", "params": [one]}, {"name": "a/no_decay", "params": [two]}, {"params": []}])
    assert list(groups) == ["a", "group 2"] and groups["a"][0] == [one, two]
    assert list(groups_by_block([{"name": "a/weight", "params": []}, {"name": "a/bias", "params": []}])) == [
        "a/weight",
        "a/bias",
    ]
    assert is_better(1.0, None, "max") and is_better(0.5, 1.0, "min") and not is_better(float("nan"), 1.0, "min")
    assert is_better(1.0, float("nan"), "max") and is_better(None, 1.0, "max") and not is_better(1.0, 1.0, "max")
    assert as_json({"a": (float("inf"), 1.5), 2: "x"}) == {"a": [None, 1.5], "2": "x"}
    picture = as_uri(torch.rand(1, 300, 200), torch.rand(7, 7))
    assert picture.startswith("data:image/jpeg;base64,") and len(picture) < 10_000


def test_what_fills_up_a_ranks_last_batch_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = torch.eye(3), torch.tensor([0, 1, 2]), torch.tensor([0, 2, 4])
    theirs = torch.eye(3), torch.tensor([0, 1, 0]), torch.tensor([1, 3, 0])  # of five samples, the first again

    def gather(everyone: list[Any], one: Any) -> None:
        everyone[:] = [one, theirs]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    made = gather_outputs([mine], 2)
    assert made is not None and made[2].tolist() == [0, 1, 2, 3, 4] and made[1].tolist() == [0, 0, 1, 1, 2]


def test_an_output_of_another_width_is_no_logits() -> None:
    batch = (torch.zeros(2, 5), torch.tensor([1, 0]))
    assert find_outputs(None, batch, torch.zeros(2, 16), classes=3) is None
    assert find_outputs(None, batch, torch.zeros(2, 3), classes=3) is not None


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
        "callbacks.report.callback.evaluation",
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
def test_a_saliency_that_fails_costs_the_pictures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("of memory")

    monkeypatch.setattr("recipes.vision.grad_cam", fail)
    found = read(vision([*QUICK, "--test", "--trainer.max_epochs=1"]).folder)
    assert found["uncertain"] and "picture" not in found["uncertain"][0]


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


def test_names_that_a_picture_cannot_write_as_they_are(own_folder: Path) -> None:
    names = ["$10_$20", "caf\udce9", "x" * 300]
    (own_folder / "report.html").write_text(render(some(3, class_names=names)), errors="backslashreplace")
    assert "$10_$20" in check_page(own_folder)


def test_numbers_that_are_none_are_left_out(own_folder: Path) -> None:
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


@pytest.mark.slow
def test_looking_at_the_start_changes_no_training() -> None:
    class Draws(VisionClassifier):
        def embed(self, batch: Any) -> Tensor:
            torch.rand(3)  # as a net does that is random in evaluation, too
            return super().embed(batch)

    nets = []
    for callbacks in ([], [Report("page")]):
        torch.manual_seed(0)
        net = Draws(10, backbone="resnet8", image_size=8, head_dropout=0.5)
        quiet(callbacks=callbacks, max_epochs=3).fit(net, Digits(image_size=8, batch_size=64))
        nets.append(net)
    assert callbacks[0].progress["start"]
    assert all(torch.equal(*pair) for pair in zip(*(net.state_dict().values() for net in nets), strict=True))


def test_the_clock_and_the_last_point_survive() -> None:
    report = Report("page")
    fit([report], max_epochs=1, log_every_n_steps=50)
    assert [point["step"] for point in report.progress["points"]] == [1, 10, 12]
    other = Report("page")
    other.load_state_dict(report.state_dict())
    assert other.progress["seconds"] == report.progress["seconds"] > 0
