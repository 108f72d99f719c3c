"""The folder opens in plain peft, and answers alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification

from recipes.parts.encoders import build_encoder, encoder_blocks, quietly
from recipes.parts.peft import Peft, adapt
from recipes.parts.peft.folder import save_for_peft
from tests.tiny_encoders import KINDS, tiny_encoder

IDS = torch.tensor([[5, 9, 12, 7, 30], [6, 8, 11, 0, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
WAYS = {
    "lora": Peft("lora", rank=2),
    "rslora": Peft("lora", rank=2, rank_stabilised=True),
    "pissa": Peft("lora", rank=2, start="pissa"),
    "rspissa": Peft("lora", rank=2, start="pissa", rank_stabilised=True),
    "dora": Peft("dora", rank=2),
    "ia3": Peft("ia3"),
    "prompt": Peft("prompt", tokens=3),
    "norms": Peft("lora", rank=2, train=["Norm|norm"]),
}


def written(folder: Path, kind: str, how: Peft) -> Any:
    """Logits of a net whose adapters are in the folder."""
    base = tiny_encoder(folder / kind, kind)
    net = build_encoder(str(base), num_classes=3)
    adapt(net, how, encoder_blocks(net), lambda: net(input_ids=IDS), net.new_weights)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        logits = net.eval()(**INPUTS).logits
    save_for_peft(net, how, str(base), folder / "adapter")
    return logits


def read(folder: Path, kind: str) -> Any:
    with quietly():
        base = AutoModelForSequenceClassification.from_pretrained(folder / kind, num_labels=3)
        return PeftModel.from_pretrained(base, str(folder / "adapter")).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_and_head_of_each_encoder(kind: str, own_folder: Path) -> None:
    logits = written(own_folder, kind, WAYS["lora"])
    torch.testing.assert_close(read(own_folder, kind)(**INPUTS).logits, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "lora"])
@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_every_method(way: str, kind: str, own_folder: Path) -> None:
    logits = written(own_folder, kind, WAYS[way])
    torch.testing.assert_close(read(own_folder, kind)(**INPUTS).logits, logits, atol=1e-5, rtol=0)


def test_the_base_is_named(own_folder: Path) -> None:
    logits = written(own_folder, "bert", WAYS["lora"])
    with quietly():
        net = AutoPeftModelForSequenceClassification.from_pretrained(str(own_folder / "adapter"), num_labels=3).eval()
    torch.testing.assert_close(net(**INPUTS).logits, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["adapter", "prefix"])
def test_what_the_library_lacks_is_refused(method: Any, own_folder: Path) -> None:
    with pytest.raises(ValueError, match=f"the library peft has no {method} for encoders: take --format torch or onnx"):
        written(own_folder, "bert", Peft(method))
