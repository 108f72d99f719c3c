"""Tokens and batches: what the encoder's own tokenizer gives, padded no further than needed, from a cache."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from datasets import Features, Value
from lightning.pytorch.trainer.states import TrainerFn
from transformers import AutoTokenizer

from datamodules import Docstrings, MaskedTexts, PackageDocstrings, TextFiles
from datamodules.docstrings import below, docstrings_of, read_kinds
from datamodules.texts.cache import cached_table
from datamodules.texts.tokens import histogram
from tests.tiny_encoders import tokenizer, write_csv


@pytest.fixture
def words(own_folder: Path) -> str:
    """A folder with a tokenizer."""
    tokenizer().save_pretrained(own_folder / "words")
    return str(own_folder / "words")


def module(folder: Path, words: str, rows: int = 60, **options: object) -> TextFiles:
    path = write_csv(folder / "train.csv", rows)
    data = TextFiles(str(path), tokenizer=words, **{"batch_size": 8, "max_length": 32, **options})  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    return data


def test_tokens_are_those_of_the_tokenizer(own_folder: Path, words: str) -> None:
    data = module(own_folder, words, max_length=12)
    names = data.sample_names("val")
    for batch in data.val_dataloader():
        texts = [names(index) for index in batch["index"].tolist()]
        plain = AutoTokenizer.from_pretrained(words)(texts, truncation=True, max_length=12, padding=True)
        width = len(plain["input_ids"][0])
        assert batch["input_ids"][:, :width].tolist() == plain["input_ids"]
        assert batch["attention_mask"][:, :width].tolist() == plain["attention_mask"]
        assert not batch["attention_mask"][:, width:].any()
        assert batch["input_ids"].shape[1] in (8, 12), "a multiple of 8, but not above max_length"


def test_batches_are_padded_to_their_own_longest(own_folder: Path, words: str) -> None:
    widths = set()
    for batch in module(own_folder, words).train_dataloader():
        longest = int(batch["attention_mask"].sum(1).max())
        assert 0 <= batch["input_ids"].shape[1] - longest < 8
        widths.add(batch["input_ids"].shape[1])
    assert len(widths) > 1


def test_labels_go_with_their_texts(own_folder: Path, words: str) -> None:
    data = module(own_folder, words)
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        names = data.sample_names(split)
        for batch in loader:
            for index, label in zip(batch["index"].tolist(), batch["label"].tolist(), strict=True):
                good = any(word in names(index) for word in ("fine", "great", "good", "brilliant"))
                assert label == good


def test_pairs_bring_token_types(own_folder: Path, words: str) -> None:
    (own_folder / "pairs.csv").write_text("a,b,label\n" + "fine film,poor story about war,x\ngood,bad,y\n" * 5)
    data = TextFiles("pairs.csv", text_column=["a", "b"], tokenizer=words, max_length=16)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    plain = AutoTokenizer.from_pretrained(words)("fine film", "poor story about war")
    row = batch["label"].tolist().index(0)
    assert batch["token_type_ids"][row][: len(plain["input_ids"])].tolist() == plain["token_type_ids"]
    assert batch["input_ids"][row][: len(plain["input_ids"])].tolist() == plain["input_ids"]


def test_what_is_cut_off_is_told(own_folder: Path, words: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        module(own_folder, words, max_length=12)
    assert "12 at most" in caplog.text and "cut at 12 tokens" in caplog.text
    lengths = [len(ids) for ids in tokenizer()(texts(own_folder))["input_ids"]]
    share = 100 * sum(length > 12 for length in lengths) / len(lengths)
    assert f"{share:.1f} % cut" in caplog.text


def texts(folder: Path) -> list[str]:
    return [line.rsplit('"', 1)[0][1:] for line in (folder / "train.csv").read_text().splitlines()[1:]]


def test_tokens_are_made_once(own_folder: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = module(own_folder, words)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tokenised again")

    data = TextFiles(str(own_folder / "train.csv"), tokenizer=words, batch_size=8, max_length=32)
    monkeypatch.setattr(type(data.tokenizer), "__call__", refuse)
    data.prepare_data()
    data.setup("fit")
    one, two = next(iter(first.train_dataloader())), next(iter(data.train_dataloader()))
    assert torch.equal(one["input_ids"], two["input_ids"])
    longer = TextFiles(str(own_folder / "train.csv"), tokenizer=words, max_length=16)
    with pytest.raises(AssertionError, match="tokenised again"):
        longer.prepare_data()


def retold(folder: Path, words: str, name: str, **changes: Any) -> str:
    """The same tokenizer, told to do otherwise."""
    AutoTokenizer.from_pretrained(words, **changes).save_pretrained(folder / name)
    return str(folder / name)


@pytest.mark.parametrize("end", ["truncation_side", "model_input_names"])
def test_another_tokenizer_over_the_same_file_makes_its_own_tokens(own_folder: Path, words: str, end: str) -> None:
    (own_folder / "pairs.csv").write_text("a,b,label\n" + "fine film of love,poor story about war,x\ngood,bad,y\n" * 5)
    change: Any = "left" if end == "truncation_side" else ["input_ids", "attention_mask"]
    folders = [words, retold(own_folder, words, "other", **{end: change})]
    for folder in [*folders, *reversed(folders)]:
        data = TextFiles("pairs.csv", text_column=["a", "b"], tokenizer=folder, max_length=6, val_share=0.2)
        data.prepare_data()
        data.setup("fit")
        batch = data.batch("train", [0])
        plain = AutoTokenizer.from_pretrained(folder)(
            *data.splits["train"].text(0).split(" | "), truncation=True, max_length=6
        )
        assert set(batch) - {"label", "index"} == set(plain), "what the tokenizer gives, and nothing else"
        assert batch["input_ids"][0].tolist() == plain["input_ids"] and len(plain["input_ids"]) == 6


def test_a_run_does_not_go_on_with_texts_cut_at_the_other_end(own_folder: Path, words: str) -> None:
    state = module(own_folder, words).state_dict()
    other = module(own_folder, retold(own_folder, words, "left", truncation_side="left"))
    with pytest.raises(ValueError, match="is not the checkpoint's"):
        other.load_state_dict(state)
    del state["truncation_side"]  # a checkpoint of before
    other.load_state_dict(state)


def test_a_tokenizer_without_padding_pads_with_its_end(own_folder: Path, words: str) -> None:
    data = module(own_folder, retold(own_folder, words, "ends", pad_token=None, eos_token="[SEP]"))
    batch = next(iter(data.train_dataloader()))
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["input_ids"][padding] == data.tokenizer.eos_token_id).all()
    with pytest.raises(ValueError, match="has no padding token, nor an end-of-text token"):
        module(own_folder, retold(own_folder, words, "none", pad_token=None, eos_token=None))


def test_the_split_is_stratified_recorded_and_held_to(own_folder: Path, words: str) -> None:
    data = module(own_folder, words, val_share=0.2)
    assert data.splits["val"].labels.bincount().tolist() == [6, 6]
    state = data.state_dict()
    assert len(state["split_rows"]["val"]) == 12 and state["class_names"] == ["bad", "good"]
    module(own_folder, words, val_share=0.2).load_state_dict(state)
    with pytest.raises(ValueError, match="same data, data.seed"):
        module(own_folder, words, val_share=0.2, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="labels would be read as other classes"):
        data.load_state_dict({**state, "class_names": ["good", "bad"]})


def test_few_texts_of_each_class(own_folder: Path, words: str) -> None:
    assert module(own_folder, words, limit_per_class=5).class_counts == [5, 5]
    with pytest.raises(ValueError, match="limit_per_class needs one label per text"):
        TextFiles(problem_type="regression", limit_per_class=5)


@pytest.mark.parametrize("tokens", [None, 128])
def test_as_many_texts_of_each_class(own_folder: Path, words: str, tokens: int | None) -> None:
    lines = (write_csv(own_folder / "all.csv", 60)).read_text().splitlines()
    few = [line for line in lines[1:] if line.endswith(lines[1].rsplit(",", 1)[1])][:6]
    rest = [line for line in lines[1:] if not line.endswith(lines[1].rsplit(",", 1)[1])]
    (own_folder / "uneven.csv").write_text("\n".join([lines[0], *few, *rest]) + "\n")
    file = str(own_folder / "uneven.csv")
    data = TextFiles(file, tokenizer=words, batch_size=8, max_length=32, tokens_per_batch=tokens, balance=True)
    data.setup("fit")
    before = data.class_counts
    assert max(before) > 3 * min(before)
    loader = data.train_dataloader()
    drawn = torch.cat([batch["label"] for batch in loader]).bincount()
    assert drawn.sum() == sum(before) and drawn.max() - drawn.min() <= 1
    assert len(loader) == data.planned_steps(sum(before), 1)
    evaluated = torch.cat([batch["index"] for batch in data.val_dataloader()])
    assert sorted(evaluated.tolist()) == list(range(len(data.splits["val"])))


def test_balance_takes_one_class_per_text(own_folder: Path, words: str) -> None:
    with pytest.raises(ValueError, match=r"data.balance needs one label per text, and data.problem_type is regression"):
        module(own_folder, words, balance=True, problem_type="regression")
    with pytest.raises(ValueError, match=r"data.balance needs one label per text, .* multi_label_classification"):
        module(own_folder, words, balance=True, problem_type="multi_label_classification")
    masked = MaskedTexts(TextFiles(str(write_csv(own_folder / "t.csv", 20))), tokenizer=words, balance=True)
    with pytest.raises(ValueError, match=r"data.balance needs classes, and these texts have none"):
        masked.setup("fit")


def test_predictions_come_in_the_order_of_the_file(own_folder: Path, words: str) -> None:
    (own_folder / "raw.txt").write_text("\n".join(["good", "a bad one"] * 9))
    data = TextFiles(predict_file="raw.txt", class_names=["a", "b"], tokenizer=words)
    data.setup("predict")
    found = [index for batch in data.predict_dataloader() for index in batch["index"].tolist()]
    assert found == list(range(18))


def test_to_predict_nothing_else_is_read(own_folder: Path, words: str, caplog: pytest.LogCaptureFixture) -> None:
    (own_folder / "raw.txt").write_text("good\nbad\n")
    train = str(write_csv(own_folder / "train.csv", 20))
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.PREDICTING), world_size=1, global_rank=0)

    def told(**options: Any) -> TextFiles:
        data = TextFiles(train, tokenizer=words, **options)
        data.trainer = trainer
        caplog.clear()
        with caplog.at_level(logging.INFO):
            data.prepare_data()
            data.setup("predict")
            next(iter(data.predict_dataloader()))
        return data

    assert list(told(predict_file="raw.txt", class_names=["bad", "good"]).splits) == ["predict"]
    assert "train" not in caplog.text and "predict: 3 tokens" in caplog.text
    told(predict_file="raw.txt")  # the classes' names are in the training file
    assert "train:" not in caplog.text and "is not set" not in caplog.text
    told()
    assert "data.predict_file is not set: predicting the val texts" in caplog.text


def test_what_fills_up_a_rank_has_no_label(own_folder: Path, words: str) -> None:
    data = module(own_folder, words, rows=50, val_share=0.1)
    loaders = []
    for rank in (0, 1, 2):
        data.trainer = SimpleNamespace(world_size=3, global_rank=rank)  # type: ignore[assignment]
        loaders.append(data.val_dataloader())
    labels = torch.cat([batch["label"] for loader in loaders for batch in loader])
    assert len(data.splits["val"]) == 4 and len(labels) == 6 and (labels == -100).sum() == 2


def test_no_tokenizer_is_a_sentence(own_folder: Path) -> None:
    data = TextFiles(str(write_csv(own_folder / "train.csv", 8)), tokenizer="not/there")
    with pytest.raises(FileNotFoundError, match="no tokenizer 'not/there': expected a folder"):
        data.prepare_data()


def test_the_histogram_fits_on_a_line() -> None:
    assert histogram([4, 4, 4, 8, 16, 32]) == "6 tokens in the median, 28 at 95 %, 32 at most, 0 ▁█▃▁▃▁▁▃ 32"
    assert histogram([]) == "no texts"


@pytest.mark.slow
def test_docstrings_are_the_interpreters_own(words: str) -> None:
    data = Docstrings(tokenizer=words)
    data.setup("fit")
    splits = data.splits
    assert sum(len(splits[name]) for name in ("train", "val", "test")) > 4000
    assert min(data.class_counts) * 2 > max(data.class_counts), "no class has twice as many as another"
    found = {splits["train"].text(index) for index in range(len(splits["train"]))}
    everything = found | {splits[name].text(index) for name in ("val", "test") for index in range(len(splits[name]))}
    assert inspect.getdoc(json.JSONDecoder) in everything
    files = {text["text"]: text["file"] for text in read_kinds()}
    of_split = {name: {files[texts.text(i)] for i in range(len(texts))} for name, texts in splits.items()}
    assert not of_split["train"] & of_split["test"], "no file in two splits"
    assert not of_split["train"] & of_split["val"]
    assert not of_split["val"] & of_split["test"]
    for name in ("val", "test"):
        assert not found & {splits[name].text(index) for index in range(len(splits[name]))}, "no text in two splits"
    other = Docstrings(tokenizer=words, seed=1)
    other.setup("fit")
    assert torch.equal(other.splits["test"].rows, splits["test"].rows), "the test split is the same for every seed"  # type: ignore[arg-type]
    assert other.splits["val"].rows.tolist() != splits["val"].rows.tolist()  # type: ignore[union-attr]


@pytest.mark.slow
def test_docstrings_of_packages_leave_out_what_is_tested_on(
    words: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_folder / "lone_module.py").write_text('"""A package of one file is one, too."""\n')
    monkeypatch.syspath_prepend(own_folder)
    data = PackageDocstrings(["yaml", "lone_module"], tokenizer=words)
    data.setup("fit")
    found = {texts.text(index) for texts in data.splits.values() for index in range(len(texts))}
    assert len(found) > 6000, "all of the standard library"
    assert {inspect.getdoc(yaml.scan), "A package of one file is one, too."} <= found, "and the packages"
    test = Docstrings(tokenizer=words).read_splits()["test"]
    assert not found & {test.text(index) for index in range(len(test))}
    with pytest.raises(ModuleNotFoundError, match=r"data.packages: not_there is not installed"):
        PackageDocstrings(["not_there"], tokenizer=words).read_splits()


def test_sources_below_a_folder_called_tests(tmp_path: Path) -> None:
    root = tmp_path / "tests" / "package"
    for name in ("a.py", "deep/b.py", "test/c.py", "deep/tests/d.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert sorted(path.name for path in below(root)) == ["a.py", "b.py"]


def test_a_file_that_is_not_python_has_no_docstrings(own_folder: Path) -> None:
    (own_folder / "old.py").write_text('"""This was written for Python 2."""\nprint "hello"\n')
    (own_folder / "zero.py").write_bytes(b"\0")
    (own_folder / "new.py").write_text('"""This has a slip that is warned of."""\nx = "\\d"\n')
    assert [list(docstrings_of(Path(name))) for name in ("old.py", "zero.py")] == [[], []]
    assert list(docstrings_of(Path("new.py"))) == ["This has a slip that is warned of."]


def test_what_is_cached_is_not_read_again() -> None:
    features, calls = Features({"text": Value("string"), "number": Value("int64")}), []

    def read(rows: int = 2500) -> Iterator[dict[str, Any]]:
        calls.append(rows)
        yield from ({"text": f"text {number}", "number": number} for number in range(rows))

    table = cached_table("key", features, read)
    assert table["number"][:] == list(range(2500))
    assert cached_table("key", features, read)._fingerprint == table._fingerprint
    assert len(calls) == 1
    assert cached_table("other", features, read)._fingerprint != table._fingerprint

    def fails() -> Iterator[dict[str, Any]]:
        yield {"text": "", "number": 0}
        raise FileNotFoundError("gone meanwhile")

    with pytest.raises(FileNotFoundError, match="gone meanwhile"):
        cached_table("failing", features, fails)
    assert len(cached_table("failing", features, lambda: read(3))) == 3, "nothing of the failure was kept"
