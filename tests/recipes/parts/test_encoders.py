"""Encoders: every parameter in a block, weights as transformers loads them, nothing from the hub runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from recipes.parts.encoders import (
    FAMILIES,
    PUBLISHED,
    build_encoder,
    build_masked_lm,
    encoder_blocks,
    encoder_config,
    fill_in,
    max_tokens,
    pool,
)
from recipes.parts.param_groups import param_groups
from tests.tiny_encoders import KINDS, tiny_encoder

INPUT: dict[str, Any] = {
    "input_ids": torch.tensor([[2, 9, 8, 7, 3], [2, 9, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [None, 3])
def test_blocks_hold_every_parameter_from_input_to_output(own_folder: Path, kind: str, num_classes: int | None) -> None:
    model = build_encoder(str(tiny_encoder(own_folder / kind, kind)), num_classes=num_classes)
    blocks = encoder_blocks(model)
    param_groups(model, blocks, weight_decay=0.01)  # refuses a parameter in no block, or in two
    names = list(blocks)
    layers = ["layer0"] if kind == "albert" else ["layer0", "layer1"]
    assert names[: 1 + len(layers)] == ["embeddings", *layers]
    assert (names[-1] == "head") == (num_classes is not None)
    assert all(blocks.values()), "no block is empty"


@pytest.mark.parametrize("kind", KINDS)
def test_the_classifier_is_transformers_own(own_folder: Path, kind: str) -> None:
    folder = tiny_encoder(own_folder / kind, kind)
    torch.manual_seed(3)
    ours = build_encoder(str(folder), num_classes=3)
    assert ours.training and ours.dtype == torch.float32
    ours.eval()
    ours.save_pretrained(own_folder / "saved")
    theirs = AutoModelForSequenceClassification.from_pretrained(own_folder / "saved")
    torch.testing.assert_close(ours(**INPUT).logits, theirs(**INPUT).logits)
    loaded = AutoModel.from_pretrained(folder).state_dict()
    own = ours.base_model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in loaded.items() if key in own and "pooler" not in key)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_are_filled_in_as_by_transformers(own_folder: Path, kind: str) -> None:
    folder = str(tiny_encoder(own_folder / kind, kind))
    model = build_masked_lm(folder, None, vocab_size=100, pretrained=True).eval()
    hidden = model.base_model(**INPUT).last_hidden_state
    chosen = INPUT["input_ids"] == 9
    torch.testing.assert_close(fill_in(model, hidden[chosen]), model(**INPUT).logits[chosen])


def test_every_family_is_tested_or_shares_a_tested_ones_blocks() -> None:
    tested = {FAMILIES[kind] for kind in KINDS} | {FAMILIES["deberta"]}
    assert set(FAMILIES.values()) == tested


def test_fresh_layers_are_the_last_ones(own_folder: Path) -> None:
    folder = str(tiny_encoder(own_folder / "bert"))
    start = build_encoder(folder, num_classes=2).state_dict()
    torch.manual_seed(9)
    found = build_encoder(folder, num_classes=2, reinit_layers=1).state_dict()
    changed = {key for key in start if "weight" in key and not torch.equal(start[key], found[key])}
    assert any("layer.1." in key for key in changed)
    assert not any("layer.0." in key or "embeddings" in key for key in changed)
    with pytest.raises(ValueError, match="reinit_layers must be 0 to 2 for this encoder, not 3"):
        build_encoder(folder, reinit_layers=3)


def test_dropout_reaches_body_and_head_each(own_folder: Path) -> None:
    model = build_encoder(str(tiny_encoder(own_folder / "bert")), num_classes=2, dropout=0.3, head_dropout=0.5)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert rates.pop("dropout") == 0.5
    assert set(rates.values()) == {0.3} and model.config.attention_probs_dropout_prob == 0.3


def test_only_safetensors_are_read(own_folder: Path) -> None:
    folder = tiny_encoder(own_folder / "bert")
    state = AutoModel.from_pretrained(folder).state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="a folder with config.json and model.safetensors"):
        build_encoder(str(folder))


def test_code_from_the_hub_is_not_run(own_folder: Path) -> None:
    folder = tiny_encoder(own_folder / "bert")
    (folder / "evil.py").write_text("raise SystemExit('it ran')\n")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"model_type": "bert"', '"model_type": "evil"').replace(
            "{", '{"auto_map": {"AutoConfig": "evil.Config"},', 1
        )
    )
    with pytest.raises(ValueError, match="encoder"):
        build_encoder(str(folder))


def test_what_is_no_encoder_is_a_sentence(own_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no encoder 'bret-base': expected a folder"):
        encoder_config("bret-base")
    AutoConfig.for_model("gpt2").save_pretrained(own_folder / "gpt")
    with pytest.raises(ValueError, match="is of the kind 'gpt2'; expected one of albert, bert"):
        encoder_config(str(own_folder / "gpt"))


def test_weights_that_do_not_fit_are_refused(own_folder: Path) -> None:
    folder = tiny_encoder(own_folder / "bert")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ValueError, match="do not fit its configuration: 16 tensors are missing .* encoder.layer.2"):
        build_encoder(str(folder))


def test_a_head_of_other_classes_starts_afresh(own_folder: Path) -> None:
    build_encoder(str(tiny_encoder(own_folder / "bert")), num_classes=5).save_pretrained(own_folder / "five")
    assert build_encoder(str(own_folder / "five"), num_classes=2).classifier.out_features == 2


def test_pooling_does_not_see_padding() -> None:
    hidden = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(pool(hidden, mask, "mean")[0], hidden[0, :2].mean(0))
    torch.testing.assert_close(pool(hidden, mask, "mean")[1], hidden[1].mean(0))
    assert torch.equal(pool(hidden, mask, "cls"), hidden[:, 0])


def test_an_encoder_alone_has_no_pooler_that_would_get_no_gradient(own_folder: Path) -> None:
    for kind in ("bert", "albert", "roberta"):
        model = build_encoder(str(tiny_encoder(own_folder / kind, kind)))
        model(**INPUT).last_hidden_state.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


LONGEST = {  # of tiny encoders with a table of 66 positions; None: any
    **{kind: {"": 66} for kind in ("albert", "bert", "distilbert", "electra")},
    **{kind: {"": 64} for kind in ("camembert", "mpnet", "roberta", "xlm-roberta")},
    "deberta": {"absolute": 66, "relative": None},
    "deberta-v2": {"absolute": 66, "relative": None},
    "modernbert": {"": 66},
}


@pytest.mark.parametrize(("kind", "way"), [(kind, way) for kind, ways in LONGEST.items() for way in ways])
def test_how_many_tokens_an_encoder_takes_by_its_table_and_by_trial(kind: str, way: str, own_folder: Path) -> None:
    assert set(LONGEST) == set(FAMILIES), "every family is tried"
    positions = {"absolute": {"relative_attention": False}, "relative": {"position_biased_input": False}}.get(way, {})
    if way == "relative":
        positions = {**positions, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    padding = {"pad_token_id": 1} if LONGEST[kind][way] == 64 else {}
    model = build_encoder(str(tiny_encoder(own_folder / "net", kind, **positions, **padding))).eval()
    most = max_tokens(model)
    assert most == LONGEST[kind][way]

    def takes(length: int) -> bool:
        ids = torch.full((1, length), 5)
        try:
            with torch.no_grad():
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (IndexError, RuntimeError):
            return False
        return True

    assert takes(most or 200)
    if kind != "modernbert":  # rotary positions go on; it was trained on so many
        assert takes((most or 200) + 1) == (most is None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_build(name: str) -> None:
    config = encoder_config(name, published=True)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    expected = {"bert": 109.5, "distilbert": 67.0, "roberta": 124.6, "albert": 11.7}  # as their papers and cards say
    assert millions == pytest.approx(22.7 if "MiniLM" in name else expected[config.model_type], rel=0.01)
