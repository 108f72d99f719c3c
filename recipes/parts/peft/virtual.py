"""Virtual tokens of texts: in front of the input, or as keys and values of each attention."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

VALUE = re.compile(r"^(value|v_lin|Wqkv)$")  # what an attention calls the layer that makes its values


class Prompt(nn.Module):
    """Learnt vectors in front of each text's tokens (Lester et al. 2021, https://arxiv.org/abs/2104.08691).

    As in the library peft, they stand before the token [CLS] and take its position: transformers' own heads read the
    first of them. Where the encoder has no such head, they are taken off its output again.

    Args:
        encoder: The encoder within `net`; its embeddings get the prompt as a part of theirs.
        net: The encoder, or transformers' classifier on top of it.
        tokens: How many.
    """

    def __init__(self, encoder: Any, net: Any, tokens: int) -> None:
        super().__init__()
        table = encoder.get_input_embeddings()
        start = table.weight[torch.randint(len(table.weight), (tokens,))]  # words: better than noise, in the paper
        self.weight = nn.Parameter(start.detach().clone())
        self.forward_of = inspect.signature(encoder.forward)
        encoder.embeddings.prompt = self
        encoder.register_forward_pre_hook(_prepend, with_kwargs=True)
        if encoder is net:
            encoder.register_forward_hook(_take_off)


def _prepend(encoder: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
    """Tokens `(batch, length)` to vectors `(batch, prompt + length, width)`, with a mask and types as long."""
    prompt: Prompt = encoder.embeddings.prompt
    given: dict[str, Any] = {**dict(zip(prompt.forward_of.parameters, args, strict=False)), **kwargs}
    ids: Tensor = given.pop("input_ids")
    vectors = encoder.get_input_embeddings()(ids)
    front = prompt.weight.to(vectors.dtype).expand(len(ids), -1, -1)
    given["inputs_embeds"] = torch.cat([front, vectors], 1)
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if given.get(name) is not None:
            given[name] = nn.functional.pad(given[name], (front.shape[1], 0), value=value)
    return (), given


def _take_off(encoder: Any, args: Any, output: Any) -> Any:
    output.last_hidden_state = output.last_hidden_state[:, len(encoder.embeddings.prompt.weight) :]
    return output


class Prefix(nn.Module):
    """Learnt keys and values that every token of a text attends to (Li & Liang 2021, https://arxiv.org/abs/2101.00190).

    In each layer, as in P-tuning v2, Liu et al. 2022, https://arxiv.org/abs/2110.07602; where layers share their
    weights, as in ALBERT, they share the prefix.

    Args:
        config: The encoder's.
        tokens: How many.
    """

    def __init__(self, config: Any, tokens: int) -> None:
        super().__init__()
        heads = config.num_attention_heads
        self.key = nn.Parameter(torch.empty(heads, tokens, config.hidden_size // heads))
        self.value = nn.Parameter(torch.empty_like(self.key))
        nn.init.normal_(self.key, std=0.02)
        nn.init.normal_(self.value, std=0.02)


def prefixed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """Attention over a module's prefix and its tokens; of transformers' kind `sdpa` else.

    Args:
        module: The attention, with a `prefix`.
        query: `(batch, heads, length, head width)`, as `key` and `value`.
        key: See `query`.
        value: See `query`.
        attention_mask: `(batch, 1, length, length)`, true or 0 where a token is seen.
        **options: Of transformers' attention.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    prefix: Prefix = module.prefix
    batch, tokens = len(query), prefix.key.shape[1]
    key = torch.cat([prefix.key.to(key.dtype).expand(batch, -1, -1, -1), key], 2)
    value = torch.cat([prefix.value.to(value.dtype).expand(batch, -1, -1, -1), value], 2)
    if attention_mask is not None:
        seen = attention_mask.dtype == torch.bool
        attention_mask = nn.functional.pad(attention_mask, (tokens, 0), value=float(seen))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def add_prefixes(net: Any, tokens: int) -> list[str]:
    """Give each attention of an encoder its prefix; returns their names.

    Raises:
        ValueError: The encoder's attention is its own, and takes no other keys.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if not getattr(net, "_supports_attention_backend", False):
        raise ValueError(
            f"peft.method prefix: the attention of {net.config.model_type} has positions of its own and takes no keys "
            "from outside; take prompt or lora"
        )
    AttentionInterface.register("prefixed", prefixed_attention)
    AttentionMaskInterface.register("prefixed", sdpa_mask)
    attentions = {
        name: module
        for name, module in net.named_modules()
        if any(VALUE.search(child) for child, _ in module.named_children())
    }
    for module in attentions.values():
        module.prefix = Prefix(net.config, tokens)
    net.set_attn_implementation("prefixed")
    return list(attentions)
