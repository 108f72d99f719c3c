"""The text recipe: files in, predictions and a folder for transformers out; with the callbacks as they are."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from callbacks import EWC, L2SP, GradualUnfreezing, LRWarmup
from datamodules import TextFiles
from recipes.deploy.restored import restore
from recipes.parts.checkpoints import load_checkpoint
from recipes.parts.peft import Peft
from recipes.text import TextClassifier, main
from tests.nets import same
from tests.tiny_encoders import KINDS, sentence, tiny_encoder, write_csv

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
FAST = ["--data.batch_size=8", "--data.max_length=32", "--model.optimizer=AdamW", "--model.optimizer.lr=3e-3"]


@pytest.fixture
def options(own_folder: Path) -> list[str]:
    """A fit on a CSV with a tiny BERT, that is good after six epochs."""
    encoder, file = tiny_encoder(own_folder / "bert"), write_csv(own_folder / "train.csv", 95)
    data = ["--data=TextFiles", f"--data.train_file={file}", "--data.val_share=0.2"]
    return ["fit", *data, f"--model.encoder={encoder}", "--trainer.max_epochs=6", *FAST, *QUIET]


def folder_of(cli: Any) -> Path:
    return Path(cli.folder)


@pytest.mark.slow
def test_it_learns_and_plain_transformers_opens_the_result(options: list[str]) -> None:
    cli = main([*options, "--test"])
    assert float(cli.trainer.callback_metrics["test/accuracy"]) == 1.0
    hf = folder_of(cli) / "hf"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(hf), AutoTokenizer.from_pretrained(hf)
    assert model.config.id2label == {0: "bad", 1: "good"}
    texts = [sentence(label, number, number) for label in (0, 1) for number in range(10)]
    plain = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert plain.argmax(1).tolist() == [0] * 10 + [1] * 10
    ours = TextClassifier(2, encoder=str(hf)).eval()
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    torch.testing.assert_close(ours(**inputs), plain)
    best = load_checkpoint(folder_of(cli) / "checkpoints" / "best.ckpt")
    assert torch.equal(best["state_dict"]["net.classifier.weight"], model.classifier.weight)
    assert best["recipe"]["encoder"]["model_type"] == "bert"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_trains_every_parameter_and_survives_the_folder(options: list[str], kind: str) -> None:
    encoder = tiny_encoder(Path(kind), kind)
    start = TextClassifier(2, encoder=str(encoder)).state_dict()
    cli = main([*options, f"--model.encoder={encoder}", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"])
    trained = {name for name, p in cli.model.named_parameters() if not torch.equal(start[name], p)}
    still = {name for name, _ in cli.model.named_parameters()} - trained
    assert not {name for name in still if "position" not in name and "token_type" not in name}
    model = AutoModelForSequenceClassification.from_pretrained(folder_of(cli) / "hf")
    batch = next(iter(cli.datamodule.val_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**inputs).logits, cli.model.eval()(**inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_head_that_transformers_lacks_is_told(options: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        cli = main([*options, "--model.pooling=mean", "--model.head=mlp", "--trainer.max_epochs=1"])
    assert not (folder_of(cli) / "hf").exists()
    assert "no folder for transformers: its classifiers have other heads than pooling mean" in caplog.text
    with pytest.raises(ValueError, match="for head mlp take pooling cls or mean"):
        TextClassifier(2, head="mlp")


@pytest.mark.slow
def test_raw_sentences_are_predicted_as_plain_transformers_does(options: list[str], own_folder: Path) -> None:
    cli = main(options)
    texts = [sentence(number % 2, number, 5 * number % 17) for number in range(21)]
    (own_folder / "raw.txt").write_text("\n".join(texts))
    (own_folder / "train.csv").unlink()  # a checkpoint is enough
    best = str(folder_of(cli) / "checkpoints" / "best.ckpt")
    predicted = main(["predict", "--ckpt_path", best, "--data.predict_file=raw.txt", *QUIET])
    with (folder_of(predicted) / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["text", "label", "probability", "p(bad)", "p(good)"]
    assert [row["text"] for row in rows] == texts
    hf = folder_of(cli) / "hf"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(hf), AutoTokenizer.from_pretrained(hf)
    p = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(1)
    for row, expected in zip(rows, p.tolist(), strict=True):
        assert row["label"] == model.config.id2label[int(expected[1] > expected[0])]
        assert float(row["p(good)"]) == pytest.approx(expected[1], abs=0.02)  # bf16 here, fp32 there
        assert float(row["probability"]) == pytest.approx(max(float(row["p(bad)"]), float(row["p(good)"])))


@pytest.mark.slow
def test_what_docstrings_taught_is_asked_of_other_texts(own_folder: Path) -> None:
    few = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=1", "--trainer.limit_val_batches=1", *QUIET]
    cli = main(["fit", "--config", "text/quickstart", *few])
    (own_folder / "new.txt").write_text("Open a socket and wait.\nReturn the number of days.\n")
    best = str(folder_of(cli) / "checkpoints" / "best.ckpt")
    predicted = main(
        [
            "predict",
            "--ckpt_path",
            best,
            "--data",
            "TextFiles",
            "--data.predict_file=new.txt",
            "--trainer.accelerator=cpu",
        ]
    )
    with (folder_of(predicted) / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == ["Open a socket and wait.", "Return the number of days."]
    assert {row["label"] for row in rows} <= set(cli.datamodule.class_names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The variance of predictions")  # before the first step
def test_several_labels_and_scores(options: list[str], own_folder: Path) -> None:
    rows = [
        (sentence(n % 2, n), ["bad", "good"][n % 2], "tale" if "story" in sentence(n % 2, n) else "") for n in range(80)
    ]
    lines = ['"{}","{}",{}'.format(text, ",".join(filter(None, names)), n % 2) for n, (text, *names) in enumerate(rows)]
    (own_folder / "many.csv").write_text("\n".join(["text,label,score", *lines]))
    many = ["--data.train_file=many.csv", "--data.problem_type=multi_label_classification", "--trainer.max_epochs=48"]
    cli = main([*options, *many])
    assert cli.model.monitor == ("val/f1", "max") and cli.datamodule.class_names == ["bad", "good", "tale"]
    assert float(cli.trainer.callback_metrics["val/f1"]) > 0.9
    best = str(folder_of(cli) / "checkpoints" / "best.ckpt")
    predicted = main(["predict", "--ckpt_path", best, *QUIET])
    with (folder_of(predicted) / "predictions.csv").open() as file:
        found = list(csv.DictReader(file))
    assert {row["label"] for row in found} >= {"bad", "good"} and "p(tale)" in found[0]

    score = ["--data.problem_type=regression", "--data.label_column=score", "--data.train_file=many.csv"]
    cli = main([*options, *score, "--trainer.max_epochs=12"])
    metrics = cli.trainer.callback_metrics
    assert float(metrics["val/spearman"]) > 0.8 and float(metrics["val/mse"]) < 0.1
    model = AutoModelForSequenceClassification.from_pretrained(folder_of(cli) / "hf")
    assert model.config.problem_type == "regression" and model.config.num_labels == 1


@pytest.mark.slow
def test_scores_of_any_scale_are_learnt_alike(options: list[str], own_folder: Path) -> None:
    """Years as well as stars: what is learnt of 64 n + 2048 is 64 times what is learnt of n, and 2048."""
    told = {}
    for name, of in (("stars", lambda n: n % 2), ("years", lambda n: 64 * (n % 2) + 2048)):
        lines = [f'"{sentence(n % 2, n)}",{of(n)}' for n in range(80)]
        Path(f"{name}.csv").write_text("\n".join(["text,score", *lines]))
        score = ["--data.problem_type=regression", "--data.label_column=score", f"--data.train_file={name}.csv"]
        cli = main([*options, *score, "--trainer.max_epochs=12"])
        best = folder_of(cli) / "checkpoints" / "best.ckpt"
        last = folder_of(cli) / "checkpoints" / "last.ckpt"  # whichever is best, within a rounding
        predicted = main(["predict", "--ckpt_path", str(last), *QUIET])
        with (folder_of(predicted) / "predictions.csv").open() as file:
            told[name] = [float(row["score"]) for row in csv.DictReader(file)]
        net = AutoModelForSequenceClassification.from_pretrained(folder_of(cli) / "hf").eval()
        tokens = restore(best).tokens([sentence(n % 2, n) for n in range(4)])
        with torch.no_grad():
            torch.testing.assert_close(net(**tokens).logits, restore(best).model(**tokens), rtol=1e-5, atol=1e-4)
        assert restore(best).learnt == ["score", *map(str, cli.model.scale.tolist())]
    assert [64 * score + 2048 for score in told["stars"]] == pytest.approx(told["years"], rel=1e-4)
    assert max(told["stars"]) - min(told["stars"]) > 0.1


def test_a_score_needs_a_head_that_has_a_size(own_folder: Path) -> None:
    with pytest.raises(ValueError, match="a cosine head tells classes apart and gives no score"):
        TextClassifier(1, encoder="bert", problem_type="regression", pooling="mean", head="cosine")


def test_metrics_do_not_count_what_has_no_label(own_folder: Path) -> None:
    model = TextClassifier(1, encoder=str(tiny_encoder(own_folder / "bert")), problem_type="regression")
    target = torch.tensor([1.0, torch.nan, 3.0])
    logits = torch.tensor([[1.0], [100.0], [2.0]])
    assert float(model.loss(logits, target)) == 0.5
    several = TextClassifier(2, encoder="bert", problem_type="multi_label_classification")
    target = torch.tensor([[1.0, 0.0], [torch.nan, torch.nan]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(torch.ones(1, 2), target[:1])
    torch.testing.assert_close(several.loss(torch.ones(2, 2), target), expected)


def test_padding_changes_nothing(own_folder: Path) -> None:
    for pooling in ("model", "cls", "mean"):
        model = TextClassifier(2, encoder=str(tiny_encoder(own_folder / "bert")), pooling=pooling).eval()  # type: ignore[arg-type]
        ids = torch.tensor([[2, 8, 9, 3]])
        short = model(ids, torch.ones_like(ids))
        padded = torch.cat([ids, torch.full((1, 4), 7)], 1)
        mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 4, dtype=torch.long)], 1)
        torch.testing.assert_close(model(padded, mask), short)


@pytest.mark.parametrize("peft", [None, Peft("lora"), Peft("prefix")])
def test_gradient_checkpointing_gives_the_same_gradients(peft: Peft | None, own_folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = str(tiny_encoder(own_folder / "bert"))
        model = TextClassifier(2, encoder=encoder, gradient_checkpointing=checkpointing, dropout=0.0, peft=peft)
        ids = torch.tensor([[2, 8, 9, 3]])
        model(ids, torch.ones_like(ids)).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the checkpoints lie outside their run
@pytest.mark.parametrize("drawn", [[], ["--data.balance=true", "--data.tokens_per_batch=160"]], ids=["", "balanced"])
def test_a_run_resumed_amid_an_epoch_is_the_uninterrupted_one(options: list[str], drawn: list[str]) -> None:
    """With dropout and batches of like length, from the middle of an epoch and from its last step."""
    options += drawn
    keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    keep += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.dirpath=steps"]
    keep += ["--trainer.callbacks.filename={step}"]
    whole = main([*options, *keep])
    assert whole.trainer.global_step == (6 * whole.datamodule.planned_steps(76, 1) if drawn else 60)
    for step in (4, 10, 23):
        resumed = main([*options, f"--ckpt_path=steps/step={step}.ckpt"])
        assert same(whole.model, resumed.model), step


@pytest.mark.slow
def test_two_ranks_count_every_text_once_and_learn_alike(options: list[str], own_folder: Path) -> None:
    alone = main([*options, "--trainer.precision=32", "--trainer.max_epochs=10"])
    two = [
        "--trainer.strategy=ddp_fork",  # test_vision starts its ranks by the command
        "--trainer.devices=2",
        "--trainer.precision=32",
        "--data.batch_size=4",
        "--trainer.max_epochs=10",
    ]
    main([*options, *two])
    folder = next(run for run in (own_folder / "runs" / "text").glob("*/*") if run != folder_of(alone))
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/accuracy"]]
    last = folder / "checkpoints" / "last.ckpt"
    again = main(["validate", "--ckpt_path", str(last), "--trainer.strategy=auto", "--trainer.devices=1"])
    metrics = again.trainer.callback_metrics
    assert len(again.datamodule.splits["val"]) % 2, "one text fills up the second rank's last batch"
    for name in ("val/accuracy", "val/f1", "val/loss"):
        assert float(rows[-1][name]) == pytest.approx(float(metrics[name]), abs=1e-6), name
    assert float(rows[-1]["val/accuracy"]) == float(alone.trainer.callback_metrics["val/accuracy"]) == 1.0


def data_of(folder: Path, name: str, **options: Any) -> TextFiles:
    file = write_csv(folder / f"{name}.csv", 64)
    return TextFiles(str(file), tokenizer=str(folder / "bert"), batch_size=8, max_length=32, **options)


def fit(model: Any, data: TextFiles, *callbacks: Any, epochs: int = 3) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    return trainer


class Rates(Callback):
    """Notes each group's rate at the update."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            self.found.setdefault(group["name"], []).append(group["lr"])


@pytest.mark.slow
def test_blocks_open_from_the_head_down_each_with_a_warm_up_of_its_own(own_folder: Path) -> None:
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    model = TextClassifier(2, encoder=str(tiny_encoder(own_folder / "bert")), optimizer=optimizer)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    unfreezing = GradualUnfreezing(every_epochs=1)
    rates = Rates()
    fit(model, data_of(own_folder, "a"), unfreezing, LRWarmup(steps=4), rates, epochs=5)
    phases = [["head"], ["pooler"], ["layer1"], ["layer0"], ["embeddings"]]
    assert [list(phase) for phase in unfreezing.plan(model)] == phases
    assert unfreezing.opening_steps == [0, 8, 16, 24, 32]
    assert all(not torch.equal(start[name], p) for name, p in model.named_parameters() if "token_type" not in name)
    for group, opened in (("head", 0), ("pooler", 8), ("layer1", 16), ("layer0", 24), ("embeddings/no_decay", 32)):
        shares = [rate / 1e-3 / (1 - step / 39) for step, rate in enumerate(rates.found[group][:39])]
        assert not any(shares[:opened])
        assert shares[opened : opened + 5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.slow
def test_ewc_and_l2sp_hold_the_first_task_while_a_second_is_learnt(own_folder: Path) -> None:
    """The second task has the labels of the first exchanged: what is learnt there breaks what was learnt before."""
    encoder = str(tiny_encoder(own_folder / "bert"))
    optimizer = partial(torch.optim.SGD, lr=0.3)
    first = data_of(own_folder, "a")
    text = (own_folder / "a.csv").read_text()
    (own_folder / "b.csv").write_text(
        text.replace(",bad\n", ",x\n").replace(",good\n", ",bad\n").replace(",x\n", ",good\n")
    )
    kept = {}
    for way in ("nothing", "ewc", "l2sp"):
        torch.manual_seed(0)
        model = TextClassifier(2, encoder=encoder, optimizer=optimizer, dropout=0.0)
        ewc = EWC(strength=1e5, samples=64)
        fit(model, first, *([ewc] if way == "ewc" else []), epochs=8)
        second = TextFiles(str(own_folder / "b.csv"), tokenizer=encoder, batch_size=8, max_length=32)
        holding = {"nothing": [], "ewc": [ewc], "l2sp": [L2SP(strength=1.0)]}[way]
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        fit(model, second, *holding, epochs=1)
        kept[way] = sum(float((p.detach() - start[name]).square().sum()) for name, p in model.named_parameters())
    assert kept["ewc"] < 0.5 * kept["nothing"] and kept["l2sp"] < 0.9 * kept["nothing"], kept


@pytest.mark.slow
def test_mistakes_get_a_sentence(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, words in (
        (["--data.max_length=500"], "takes 66 at most"),
        (["--data.text_column=txt"], "has no column 'txt'"),
        (["--model.encoder=not/there"], "no encoder 'not/there'"),
        (["--data.train_file=no.csv"], "no file no.csv"),
        (["--data.problem_type=regression"], "the score is 'bad', not a number"),
    ):
        with pytest.raises(SystemExit):
            main([*options, *wrong])
        assert words in capsys.readouterr().err, words
