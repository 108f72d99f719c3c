"""Tokens and batches: what the encoder's own tokenizer gives, padded no further than needed, from a cache."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from transformers import AutoTokenizer

from datamodules import MaskedTexts, TextFiles
from tests.datamodules.conftest import text_module
from tests.datamodules.texts.test_cache import texts
from tests.tiny_encoders import tokenizer, write_csv


def test_what_is_cut_off_is_told(own_folder: Path, words: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        text_module(own_folder, words, max_length=12)
    assert "12 at most" in caplog.text and "cut at 12 tokens" in caplog.text
    lengths = [len(ids) for ids in tokenizer()(texts(own_folder))["input_ids"]]
    share = 100 * sum(length > 12 for length in lengths) / len(lengths)
    assert f"{share:.1f} % cut" in caplog.text


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
    state = text_module(own_folder, words).state_dict()
    other = text_module(own_folder, retold(own_folder, words, "left", truncation_side="left"))
    with pytest.raises(ValueError, match="is not the checkpoint's"):
        other.load_state_dict(state)
    del state["truncation_side"]  # a checkpoint of before
    other.load_state_dict(state)


def test_a_tokenizer_without_padding_pads_with_its_end(own_folder: Path, words: str) -> None:
    data = text_module(own_folder, retold(own_folder, words, "ends", pad_token=None, eos_token="[SEP]"))
    batch = next(iter(data.train_dataloader()))
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["input_ids"][padding] == data.tokenizer.eos_token_id).all()
    with pytest.raises(ValueError, match="has no padding token, nor an end-of-text token"):
        text_module(own_folder, retold(own_folder, words, "none", pad_token=None, eos_token=None))


def test_the_split_is_stratified_recorded_and_held_to(own_folder: Path, words: str) -> None:
    data = text_module(own_folder, words, val_share=0.2)
    assert data.splits["val"].labels.bincount().tolist() == [6, 6]
    state = data.state_dict()
    assert len(state["split_rows"]["val"]) == 12 and state["class_names"] == ["bad", "good"]
    text_module(own_folder, words, val_share=0.2).load_state_dict(state)
    with pytest.raises(ValueError, match="same data, data.seed"):
        text_module(own_folder, words, val_share=0.2, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="labels would be read as other classes"):
        data.load_state_dict({**state, "class_names": ["good", "bad"]})


def test_few_texts_of_each_class(own_folder: Path, words: str) -> None:
    assert text_module(own_folder, words, limit_per_class=5).class_counts == [5, 5]
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
        text_module(own_folder, words, balance=True, problem_type="regression")
    with pytest.raises(ValueError, match=r"data.balance needs one label per text, .* multi_label_classification"):
        text_module(own_folder, words, balance=True, problem_type="multi_label_classification")
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
    data = text_module(own_folder, words, rows=50, val_share=0.1)
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
