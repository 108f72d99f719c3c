"""Which method goes with which net: what `tests/test_adapted_nets.py` tries, and docs/adapters.md shows."""

from __future__ import annotations

from typing import Any

METHODS: dict[str, dict[str, Any] | None] = {  # None: the callback Freeze
    "LoRA": {"method": "lora", "rank": 2},
    "DoRA": {"method": "dora", "rank": 2},
    "IA3": {"method": "ia3"},
    "adapter": {"method": "adapter", "rank": 2},
    "prompt": {"method": "prompt", "tokens": 3},
    "prefix": {"method": "prefix", "tokens": 3},
    "BitFit": None,
}
MERGED = ("LoRA", "DoRA", "IA3", "BitFit")  # into plain weights
ENCODERS = {
    "BERT": "bert",
    "RoBERTa": "roberta",
    "DistilBERT": "distilbert",
    "ALBERT": "albert",
    "ELECTRA": "electra",
    "DeBERTa-v2": "deberta-v2",
    "MPNet": "mpnet",
    "ModernBERT": "modernbert",
}
BACKBONES = {
    "ResNet-18": "resnet18",
    "VGG-11": "vgg11_bn",
    "MobileNet v3": "mobilenet_v3_small",
    "EfficientNet": "efficientnet_b0",
    "ConvNeXt": "convnext_tiny",
    "ViT": "vit_b_16",
    "Swin": "swin_t",
    "ViT of timm": "timm/test_vit",
}
FOR_TEXTS = "is for texts; for images take lora, dora, ia3 or adapter"
OWN_ATTENTION = "has positions of its own and takes no keys from outside; take prompt or lora"
REFUSED = {
    **{(method, net): FOR_TEXTS for method in ("prompt", "prefix") for net in BACKBONES},
    ("prefix", "DeBERTa-v2"): OWN_ATTENTION,
    ("prefix", "MPNet"): OWN_ATTENTION,
    ("BitFit", "ModernBERT"): "the blocks that it freezes have no biases to train",
}


def table() -> str:
    """Methods by nets, as Markdown; a refusal is a number."""
    sentences = list(dict.fromkeys(REFUSED.values()))
    rows = []
    for net in (*ENCODERS, *BACKBONES):
        cells = [
            f"no ({sentences.index(REFUSED[method, net]) + 1})" if (method, net) in REFUSED else "yes"
            for method in METHODS
        ]
        rows.append(f"| {net} | {' | '.join(cells)} |")
    notes = [f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1)]
    head = [f"| net | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    return "\n".join([*head, *rows, "", *notes])
