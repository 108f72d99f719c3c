"""Virtual tokens against the same written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.parts.encoders import build_encoder, encoder_blocks, max_tokens, pool
from recipes.parts.peft import Peft, adapt
from recipes.parts.peft.virtual import Prefix, Prompt, prefixed_attention
from tests.tiny_encoders import KINDS, tiny_encoder

IDS = torch.tensor([[5, 9, 12, 7, 30], [6, 8, 11, 0, 0]])
MASK = (IDS > 0).long()


def adapted(folder: Path, kind: str, how: Peft, num_classes: int | None = 3) -> Any:
    net = build_encoder(str(tiny_encoder(folder / kind, kind)), num_classes=num_classes)
    adapt(net, how, encoder_blocks(net), lambda: None)
    return net.eval()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_prompt_is_vectors_in_front_of_the_texts(kind: str, own_folder: Path) -> None:
    net = adapted(own_folder, kind, Peft("prompt", tokens=4))
    plain = build_encoder(str(own_folder / kind), num_classes=3).eval()
    plain.load_state_dict(net.state_dict(), strict=False)
    prompt = net.base_model.embeddings.prompt.weight
    vectors = torch.cat([prompt.expand(2, -1, -1), plain.get_input_embeddings()(IDS)], 1)
    expected = plain(inputs_embeds=vectors, attention_mask=torch.nn.functional.pad(MASK, (4, 0), value=1)).logits
    torch.testing.assert_close(net(input_ids=IDS, attention_mask=MASK).logits, expected)
    torch.testing.assert_close(net(IDS, MASK).logits, expected)  # without names, too


def test_an_encoder_without_a_head_gives_as_many_vectors_as_tokens(own_folder: Path) -> None:
    net = adapted(own_folder, "bert", Peft("prompt", tokens=4), num_classes=None)
    hidden = net(input_ids=IDS, attention_mask=MASK).last_hidden_state
    assert hidden.shape == (2, 5, 32)
    alone = net(input_ids=IDS[1:, :3], attention_mask=MASK[1:, :3]).last_hidden_state
    torch.testing.assert_close(hidden[1:, :3], alone)  # padding is unseen
    torch.testing.assert_close(pool(hidden, MASK, "mean")[1], alone.mean(1)[0])


def test_a_prompt_takes_positions(own_folder: Path) -> None:
    net = build_encoder(str(tiny_encoder(own_folder / "bert")))
    before = max_tokens(net)
    Prompt(net, net, 4)
    assert max_tokens(net) == (before or 0) - 4


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(3) @ value


@pytest.mark.parametrize("masked", ["bool", "float", "none"])
def test_a_prefix_is_more_keys_and_values(masked: str) -> None:
    class Config:
        num_attention_heads, hidden_size = 2, 8

    attention = torch.nn.Module()
    attention.prefix = Prefix(Config, 3)
    attention.is_causal = False
    query, key, value = torch.rand(3, 2, 2, 5, 4)
    seen = MASK.bool()[:, None, None].expand(2, 1, 5, 5) if masked != "none" else torch.ones(2, 1, 5, 5).bool()
    mask = {"bool": seen, "float": torch.where(seen, 0.0, -torch.inf), "none": None}[masked]
    found = prefixed_attention(attention, query, key, value, mask)[0].transpose(1, 2)  # (batch, heads, length, width)
    keys, values = (
        torch.cat([own.expand(2, -1, -1, -1), given], 2)
        for own, given in ((attention.prefix.key, key), (attention.prefix.value, value))
    )
    expected = attention_by_hand(query, keys, values, torch.nn.functional.pad(seen, (3, 0), value=True))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_attention_gets_a_prefix_that_changes_the_answer_or_is_refused(kind: str, own_folder: Path) -> None:
    if kind in ("mpnet", "deberta-v2"):
        with pytest.raises(ValueError, match=f"attention of {kind} has positions of its own and takes no keys"):
            adapted(own_folder, kind, Peft("prefix", tokens=3))
        return
    net = adapted(own_folder, kind, Peft("prefix", tokens=3))
    prefixes = [module for module in net.modules() if isinstance(module, Prefix)]
    assert len(prefixes) == (1 if kind == "albert" else 2)
    before = net(input_ids=IDS, attention_mask=MASK).logits
    for prefix in prefixes:
        torch.nn.init.normal_(prefix.value)
    assert not torch.allclose(net(input_ids=IDS, attention_mask=MASK).logits, before)
