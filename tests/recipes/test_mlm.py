"""Masked-language pre-training: whole words, the same after a resume, and a folder that the classifier takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from datamodules import MaskedTexts, TextFiles
from datamodules.masked_texts import mask_words
from recipes.mlm import main
from recipes.text import TextClassifier
from tests.nets import same
from tests.tiny_encoders import KINDS, tiny_encoder, tokenizer, write_csv

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--data.batch_size=8"]


def test_whole_words_are_masked_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    words = np.array([[-1, 0, 0, 1, 2, 2, 2, 3, -1, -1]] * 4000)
    ids = rng.integers(5, 50, words.shape)
    masked, labels = mask_words(ids, words, rng.random((4000, 3, 10)), 0.25, mask=4, vocab_size=50)
    chosen = labels != -100
    assert (labels[chosen] == ids[chosen]).all() and (masked[~chosen] == ids[~chosen]).all()
    assert not chosen[:, [0, 8, 9]].any(), "special tokens and padding are left alone"
    for word in range(4):
        assert (chosen[:, words[0] == word].all(1) == chosen[:, words[0] == word].any(1)).all(), (
            "all of a word or nothing"
        )
    assert chosen[:, 3].mean() == pytest.approx(1 - 0.75 + 0.75**4 / 4, abs=0.02)  # its share, or the only one
    kinds = masked[chosen]
    assert (kinds == 4).mean() == pytest.approx(0.8, abs=0.02)
    assert (kinds == ids[chosen]).mean() == pytest.approx(0.1, abs=0.02)


def test_a_text_with_words_has_one_chosen_and_one_without_has_none() -> None:
    words = np.array([[-1, 7, 8, -1], [-1, -1, -1, -1]])
    _, labels = mask_words(np.full((2, 4), 9), words, np.full((2, 3, 4), 0.9), 0.15, mask=4, vocab_size=10)
    assert (labels[0] != -100).any() and (labels[1] == -100).all()


def masked(folder: Path, **options: object) -> MaskedTexts:
    tokenizer().save_pretrained(folder / "words")
    texts = TextFiles(str(write_csv(folder / "train.csv", 40)))
    found = MaskedTexts(texts, **{"tokenizer": str(folder / "words"), "batch_size": 8, "max_length": 16, **options})  # type: ignore[arg-type]
    found.prepare_data()
    found.setup("fit")
    return found


def test_masks_depend_on_seed_epoch_and_text_alone(own_folder: Path) -> None:
    def masks(epoch: int, split: str = "train", **options: object) -> dict[int, list[int]]:
        data = masked(own_folder, **options)
        loader = data.train_dataloader() if split == "train" else data.val_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        return {
            index: [token for token in row if token != -100]
            for batch in loader
            for index, row in zip(batch["index"].tolist(), batch["labels"].tolist(), strict=True)
        }

    assert masks(1) == masks(1, batch_size=3) != masks(2)
    assert masks(1) != masks(1, seed=5)
    assert masks(1, "val") == masks(2, "val")


def test_long_texts_are_cut_into_pieces_and_nothing_is_lost(own_folder: Path) -> None:
    data = masked(own_folder, max_length=8)
    table = data.splits["train"].table
    pieces = data.tokens(table)
    assert pieces.lengths.max() <= 8 and len(pieces.lengths) > len(table)
    words = AutoTokenizer.from_pretrained(own_folder / "words")
    for row in range(len(table)):
        found = [token for piece in np.flatnonzero(pieces.text_rows == row) for token in pieces.read(piece)[0][1:-1]]
        assert found == words(table[row]["text"])["input_ids"][1:-1]
    train, val = (set(pieces.text_rows[data.splits[name].rows.numpy()]) for name in ("train", "val"))  # type: ignore[union-attr]
    assert not train & val, "a text's pieces are all in one split"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_an_encoder_for_the_classifier(own_folder: Path, kind: str) -> None:
    encoder, file = tiny_encoder(own_folder / kind, kind), write_csv(own_folder / "train.csv", 40)
    data = ["--data=MaskedTexts", "--data.texts=TextFiles", f"--data.texts.train_file={file}", "--data.max_length=32"]
    options = [*data, f"--model.encoder={encoder}", "--trainer.max_epochs=1", *QUIET]
    cli = main(["fit", *options, "--model.optimizer=AdamW", "--model.optimizer.lr=1e-2"])
    assert {"val/loss", "val/accuracy", "train/loss_epoch"} <= set(cli.trainer.callback_metrics)
    hf = cli.folder / "hf"
    AutoModelForMaskedLM.from_pretrained(hf)
    model = TextClassifier(2, encoder=str(hf))
    learnt = cli.model.net.base_model.state_dict()  # type: ignore[union-attr]
    for name, value in model.net.base_model.state_dict().items():
        assert "pooler" in name or torch.equal(learnt[name], value)
    before = TextClassifier(2, encoder=str(encoder)).net.base_model.state_dict()
    assert any(not torch.equal(before[name], value) for name, value in learnt.items())


@pytest.mark.slow
def test_from_scratch_with_a_tokenizer_of_its_own_and_again_after_a_cut(own_folder: Path) -> None:
    file = write_csv(own_folder / "train.csv", 60)
    shape = "{model_type: bert, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}"
    data = ["--data=MaskedTexts", "--data.texts=TextFiles", f"--data.texts.train_file={file}", "--data.vocabulary=90"]
    options = ["fit", *data, f"--model.architecture={shape}", "--trainer.max_epochs=3", *QUIET]
    options += ["--data.max_length=32", "--model.optimizer=AdamW", "--model.optimizer.lr=1e-2"]
    whole = main(options)
    assert whole.model.net.config.vocab_size == len(whole.datamodule.tokenizer) <= 90  # type: ignore[union-attr]
    assert len(AutoTokenizer.from_pretrained(whole.folder / "hf")) == len(whole.datamodule.tokenizer)
    half = main([*options, "--trainer.callbacks+=tests.spies.StopAfterEpoch", "--trainer.callbacks.epoch=1"])
    resumed = main(["fit", "--ckpt_path", str(half.folder / "checkpoints" / "last.ckpt"), "--trainer.callbacks=null"])
    assert same(whole.model, resumed.model)
    assert float(whole.trainer.callback_metrics["val/loss"]) < 4 < np.log(90)


@pytest.mark.slow
def test_what_to_start_from_must_be_said_once(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_csv(own_folder / "train.csv", 20)
    tokenizer().save_pretrained(own_folder / "words")
    data = ["--data=MaskedTexts", "--data.texts=TextFiles", f"--data.texts.train_file={file}", "--data.tokenizer=words"]
    with pytest.raises(SystemExit):
        main(["fit", *data, *QUIET])
    assert "give model.encoder" in capsys.readouterr().err
