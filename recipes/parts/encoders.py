"""Encoders of texts by transformers: how they are loaded, and their blocks from input to output."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .blocks import Fusion
from .spelling import some

log = logging.getLogger(__name__)

Pooling: TypeAlias = Literal["model", "cls", "mean"]
WEIGHTS = Path(__file__).parents[1] / "weights"


class Family(NamedTuple):
    """Where the blocks of an architecture are, as paths within its encoder."""

    layers: str  # a ModuleList; each of its modules is a block
    embeddings: tuple[str, ...] = ("embeddings",)
    last: tuple[str, ...] = ()  # what follows the layers and belongs to the last
    pooler: tuple[str, ...] = ()  # pretrained, and a block of its own


BERT = Family("encoder.layer", pooler=("pooler",))
ROBERTA = Family("encoder.layer", pooler=("pooler",))
FAMILIES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": Family("transformer.layer"),
    "albert": Family(
        "encoder.albert_layer_groups",  # one module for all layers
        embeddings=("embeddings", "encoder.embedding_hidden_mapping_in"),
        pooler=("pooler",),
    ),
    "electra": Family("encoder.layer", embeddings=("embeddings", "embeddings_project")),
    "deberta": Family("encoder.layer", embeddings=("embeddings", "encoder.rel_embeddings")),
    "deberta-v2": Family(
        "encoder.layer", embeddings=("embeddings", "encoder.rel_embeddings", "encoder.LayerNorm", "encoder.conv")
    ),
    "mpnet": Family("encoder.layer", embeddings=("embeddings", "encoder.relative_attention_bias"), pooler=("pooler",)),
    "modernbert": Family("layers", last=("final_norm",)),
}

# Configurations of encoders that shipped configs name: enough to plan a run without the hub.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "google-bert/bert-base-uncased": ("bert", {}),
    "distilbert/distilbert-base-uncased": ("distilbert", {}),
    "FacebookAI/roberta-base": (
        "roberta",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "albert/albert-base-v2": (
        "albert",
        {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    ),
    "nreimers/MiniLM-L6-H384-uncased": (
        "bert",
        {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    ),
}


def encoder_path(name: str) -> str:
    """The folder of an encoder that ships with this package, or the name itself."""
    return str(WEIGHTS / name) if (WEIGHTS / name / "config.json").is_file() else name


def encoder_config(name: str, *, published: bool = False, **changes: Any) -> Any:
    """An encoder's configuration, from a folder or the hub.

    Args:
        name: Folder, name on the hub, or name of an encoder that ships with this package.
        published: Whether to take the configuration of a well-known name from this file rather than the hub.
        **changes: Attributes to set.

    Raises:
        FileNotFoundError: There is none, or the hub cannot be reached.
        ValueError: Its architecture is not known, or would need code from the hub.
    """
    from transformers import AutoConfig

    if published and name in PUBLISHED:
        kind, values = PUBLISHED[name]
        return AutoConfig.for_model(kind, **values, **changes)
    try:
        config = AutoConfig.from_pretrained(encoder_path(name), trust_remote_code=False, **changes)
    except OSError as error:
        raise FileNotFoundError(_missing(name, error)) from error
    except ValueError as error:
        raise ValueError(f"encoder {name!r}: {str(error).splitlines()[0]}") from error
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"encoder {name!r} is of the kind {config.model_type!r}; expected one of {', '.join(sorted(FAMILIES))}"
        )
    return config


def build_encoder(
    name: str,
    *,
    pretrained: bool = True,
    num_classes: int | None = None,
    problem_type: str = "single_label_classification",
    dropout: float | None = None,
    head_dropout: float | None = None,
    reinit_layers: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """An encoder, or with `num_classes` transformers' own classifier on top of it.

    Weights are read from safetensors only, as float32; code from the hub is never run. Its `new_weights` are names
    of parameters of the encoder that nothing was loaded for.

    Args:
        name: Folder, name on the hub, or name of an encoder that ships with this package.
        pretrained: Whether to load weights. Without, the architecture is built from its configuration.
        num_classes: Outputs of the classifier; None for the encoder alone, without its pooler.
        problem_type: For the saved configuration, in transformers' words.
        dropout: Of the encoder's layers and attention; the configuration's if None.
        head_dropout: Before the classifier's last layer; the configuration's if None.
        reinit_layers: So many of the last layers, and the pooler, start from fresh weights.
        changes: Attributes of its configuration that are to be others.

    Raises:
        FileNotFoundError: No such encoder, or none with safetensors.
        ValueError: Weights that do not fit; more layers to start afresh than there are.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    config = encoder_config(name, published=not pretrained, **(changes or {}))
    _set_dropout(config, dropout, head_dropout)
    kind: Any = AutoModel
    if num_classes is not None:
        config.num_labels, config.problem_type = num_classes, problem_type
        kind = AutoModelForSequenceClassification
    model = kind.from_config(config, dtype=torch.float32)
    model.new_weights = []
    if pretrained:
        fresh = model if reinit_layers else None
        model = _load(kind, name, config)
        if fresh is not None:
            model.new_weights += _start_afresh(model, fresh, reinit_layers)
    if num_classes is None and getattr(model, "pooler", None) is not None:
        model.pooler = None  # it would get no gradient, which DDP does not forgive
    return model.train()


def build_masked_lm(encoder: str | None, architecture: dict[str, Any] | None, vocab_size: int, pretrained: bool) -> Any:
    """An encoder with its head for masked-language pre-training, pretrained or from scratch.

    Args:
        encoder: As in `build_encoder`; None for an encoder made from scratch.
        architecture: For this one, its `model_type` and the attributes of its configuration.
        vocab_size: Tokens that the tokenizer knows.
        pretrained: Whether to load the encoder's weights.

    Raises:
        ValueError: Neither or both of `encoder` and `architecture`; an encoder of a smaller vocabulary.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM

    kind: Any = AutoModelForMaskedLM

    if (encoder is None) == (architecture is None):
        raise ValueError("give model.encoder, to go on from its weights, or model.architecture, to start from none")
    if architecture is not None:
        config = AutoConfig.for_model(**{**architecture, "vocab_size": vocab_size})
    else:
        config = encoder_config(str(encoder), published=not pretrained)
    if config.vocab_size < vocab_size:
        raise ValueError(f"the tokenizer knows {vocab_size} tokens, and {encoder} {config.vocab_size}")
    if encoder is None or not pretrained:
        model = kind.from_config(config, dtype=torch.float32).train()
        model.new_weights = []
        return model
    return _load(kind, encoder, config).train()


def fill_in(model: Any, hidden: Tensor) -> Tensor:
    """Logits of tokens by the head of a masked language model, whatever it is called.

    Args:
        model: From `build_masked_lm`.
        hidden: Last hidden state of the tokens, `(tokens, width)`.

    Returns:
        `(tokens, vocab_size)`.
    """
    heads = {
        "distilbert": ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
        "electra": ("generator_predictions", "generator_lm_head"),
        "modernbert": ("head", "decoder"),
        "albert": ("predictions",),
        "bert": ("cls",),
        "deberta": ("cls",),
        "deberta-v2": ("cls",),
    }
    for name in heads.get(model.config.model_type, ("lm_head",)):
        hidden = getattr(model, name)(hidden)
    return hidden


def encoder_blocks(model: Any) -> dict[str, list[str]]:
    """Blocks of an encoder or of transformers' classifier, from input to output: name -> paths of modules.

    `embeddings`, `layer0`, `layer1`, ..., the pretrained `pooler` where there is one, and of a classifier the `head`.
    """
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    family = FAMILIES[model.config.model_type]

    def present(paths: tuple[str, ...]) -> list[str]:
        found = []
        for path in paths:
            with contextlib.suppress(AttributeError):
                if next(base.get_submodule(path).parameters(), None) is not None:
                    found.append(prefix + path)
        return found

    blocks = {"embeddings": present(family.embeddings)}
    for index in range(len(base.get_submodule(family.layers))):
        blocks[f"layer{index}"] = [f"{prefix}{family.layers}.{index}"]
    blocks[next(reversed(blocks))] += present(family.last)
    if pooler := present(family.pooler):
        blocks["pooler"] = pooler
    if base is not model:
        heads = [(name, child) for name, child in model.named_children() if child is not base]
        blocks["head"] = [name for name, child in heads if next(child.parameters(), None) is not None]
    return blocks


def pool(hidden: Tensor, attention_mask: Tensor, pooling: Pooling, fusion: Fusion | None = None) -> Tensor:
    """One vector for each text.

    Args:
        hidden: `(batch, length, width)`.
        attention_mask: `(batch, length)`, 0 for padding.
        pooling: `cls`, the first token; `mean`, over real tokens.
        fusion: Blocks whose outputs in the same forward pass are pooled alike and joined.

    Returns:
        `(batch, width)`.
    """
    if fusion is not None:
        length = attention_mask.shape[1]  # a prompt stands in front
        pooled = pool(hidden, attention_mask, pooling)
        return fusion.join(pooled, lambda out: pool(out[:, -length:], attention_mask, pooling))
    if pooling == "cls":
        return hidden[:, 0]
    weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def max_tokens(net: Any) -> int | None:
    """Tokens that an encoder can take, by its table of positions; None where its positions have no end.

    RoBERTa's and MPNet's positions begin after the number of the padding token, and the table is longer by as much. A
    prompt takes some of them.
    """
    prompt = getattr(net.base_model.embeddings, "prompt", None)
    table = getattr(net.base_model.embeddings, "position_embeddings", None)
    if isinstance(table, torch.nn.Embedding):
        before = 0 if table.padding_idx is None else table.padding_idx + 1
        return table.num_embeddings - before - (0 if prompt is None else len(prompt.weight))
    if getattr(net.config, "relative_attention", False):
        return None
    return getattr(net.config, "max_position_embeddings", None)  # rotary positions: what it was trained on


def _load(kind: Any, name: str, config: Any) -> Any:
    try:
        with quietly():
            model, report = kind.from_pretrained(
                encoder_path(name),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a head of other classes starts afresh; see below for the rest
            )
    except OSError as error:
        raise FileNotFoundError(_missing(name, error)) from error
    prefix = f"{model.base_model_prefix}."
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    new = sorted({*report["missing_keys"], *mismatched})
    inside = [key for key in new if model.base_model is model or key.startswith(prefix)]
    lacking = [key for key in inside if "pooler" not in key]
    if lacking:
        raise ValueError(
            f"the weights of {name!r} do not fit its configuration: {len(lacking)} tensors are missing or of another "
            f"shape, such as {lacking[0]}"
        )
    model.new_weights = inside
    log.info(
        "%s: %d tensors loaded; new: %s; left out: %s",
        *(
            name,
            len(model.state_dict()) - len(new),
            some(new) or "nothing",
            some(sorted(report["unexpected_keys"])) or "nothing",
        ),
    )
    return model


def _start_afresh(model: Any, fresh: Any, layers: int) -> list[str]:
    """Zhang et al. 2021, https://arxiv.org/abs/2006.05987."""
    blocks = encoder_blocks(fresh)
    names = [name for name in blocks if name.startswith("layer")]
    if not 0 < layers <= len(names):
        raise ValueError(f"model.reinit_layers must be 0 to {len(names)} for this encoder, not {layers}")
    paths = [path for name in [*names[-layers:], "pooler"] for path in blocks.get(name, [])]
    chosen = {k: v for k, v in fresh.state_dict().items() if any(k.startswith(f"{path}.") for path in paths)}
    model.load_state_dict(chosen, strict=False)
    return list(chosen)


def _set_dropout(config: Any, body: float | None, head: float | None) -> None:
    for key, value in config.to_dict().items():
        if "drop" in key and (value is None or isinstance(value, (int, float))):
            of_head = key.startswith(("classifier", "seq_classif", "pooler", "summary"))
            rate = head if of_head else body
            if rate is not None:
                setattr(config, key, rate)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps transformers from saying at length what is said here in one line."""
    from transformers.utils import logging

    theirs: Any = logging

    level, bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bar:
            theirs.enable_progress_bar()


def _missing(name: str, error: Exception) -> str:
    reason = str(error).splitlines()[0]
    return (
        f"no encoder {name!r}: expected a folder with config.json and model.safetensors, or a name on the hub that can "
        f"be reached ({reason})"
    )
