"""Adapters as a folder that the library peft opens by itself: `PeftModel.from_pretrained(base, folder)`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..encoders import encoder_blocks
from .adapt import adapters, library_config
from .options import Peft
from .targets import is_inside

TASK = "SEQ_CLS"
WHOLE = "base_model.model."  # what the library puts in front of names ...
PROMPTED = "base_model."  # ... and with a prompt


def save_for_peft(net: Any, how: Peft, base: str, folder: Path) -> None:
    """Write the adapters of transformers' classifier, with its head and whatever else trained.

    Args:
        net: Adapted.
        how: The method.
        base: Name or folder of the encoder that it was adapted from.
        folder: Where to.

    Raises:
        ValueError: The library has no such adapters.
    """
    if how.method not in ("lora", "dora", "ia3", "prompt"):
        raise ValueError(f"the library peft has no {how.method} for encoders: take --format torch or onnx")
    own = list(adapters(net))
    head = encoder_blocks(net)["head"]
    others = [n for n, p in net.named_parameters() if p.requires_grad and not _in(n, [*own, *head])]
    whole = sorted({*head, *(name.rpartition(".")[0] for name in others)})
    shared = {"task_type": TASK, "modules_to_save": whole, "base_model_name_or_path": base, "inference_mode": True}
    prefix = PROMPTED if how.method == "prompt" else WHOLE
    state = {prefix + n: v for n, v in net.state_dict().items() if any(is_inside(n, path) for path in whole)}
    if how.method == "prompt":
        state["prompt_embeddings"] = net.base_model.embeddings.prompt.weight
        config = _prompt_config(net, how, **shared)
    else:
        config = library_config(how, net, own, **shared)
        state |= {prefix + plain_name(n): v for n, v in net.state_dict().items() if ".default" in n and _in(n, own)}
        if how.start == "pissa":
            state |= _as_lora(net, own, prefix)
            config.r, config.init_lora_weights, config.use_rslora = 2 * how.rank, True, False
            config.lora_alpha = 2 * how.alpha * (math.sqrt(how.rank) if how.rank_stabilised else 1.0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous().clone() for k, v in state.items()}, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)


def plain_name(name: str) -> str:
    """A tensor's name in the library's file: without the adapter's own name."""
    return re.sub(r"\.default(\.weight)?$", "", name) if "magnitude" in name else name.replace(".default", "")


def _as_lora(net: nn.Module, layers: list[str], prefix: str) -> dict[str, Tensor]:
    """What PiSSA has learnt beside the weight as it was: B A - B0 A0 is a product of twice the rank."""
    state = {}
    for name in layers:
        layer: Any = net.get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        state[f"{prefix}{name}.lora_A.weight"] = torch.cat([a, layer.start_A])
        state[f"{prefix}{name}.lora_B.weight"] = torch.cat([b, -layer.start_B], 1)
    return state


def _prompt_config(net: Any, how: Peft, **shared: Any) -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(
        num_virtual_tokens=how.tokens,
        token_dim=net.get_input_embeddings().embedding_dim,  # of ALBERT and ELECTRA, not the width of their layers
        num_layers=net.config.num_hidden_layers,
        num_attention_heads=net.config.num_attention_heads,
        num_transformer_submodules=1,
        **shared,
    )


def _in(name: str, paths: list[str]) -> bool:
    return any(is_inside(name, path) for path in paths)
