"""A model written for torch, ONNX, safetensors or transformers, and the facts that go with it."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .. import __version__
from ..parts.backbones import small_resnet
from ..parts.checkpoints import write_for_transformers
from ..parts.heads import on_own_scale
from .graphs import ImageGraph, ImageTasksGraph, TokenGraph, TokenTasksGraph
from .restored import Restored
from .snippets import PIXELS

MOST = 2**20  # a bound on the batch, which torch.export asks for


def facts_of(restored: Restored, checkpoint: Path, form: str) -> dict[str, Any]:
    """What one must know to use the model, as plain values."""
    facts: dict[str, Any] = {
        "recipe": restored.recipe,
        "format": form,
        **(
            {"tasks": restored.tasks}
            if restored.tasks
            else {"class_names": restored.class_names, "problem_type": restored.problem_type}
        ),
        "checkpoint": checkpoint.name,
        "versions": {"finetuning-recipes": __version__, "torch": str(torch.__version__)},
    }
    model = restored.model
    if restored.reads == "vision":
        size, normalised = restored.image_size, model.trunk if restored.tasks else model
        return facts | {
            "architecture": {"backbone": restored.net.name, "head": str(model.hparams.get("head", "one a task"))},
            "preprocessing": {
                "colour": "RGB, upright, on white, in [0, 1]; 16 bits as 8",
                "size": size,
                "shorter_side": shorter_side(size),
                "resize": "bilinear; to `shorter_side` where that of the image is above `size`, else to `size`",
                "crop": "the middle",
                "mean": normalised.mean.flatten().tolist(),
                "std": normalised.std.flatten().tolist(),
                "normalised_inside": form in ("torch", "onnx"),
            },
        }
    config = restored.net.config
    encoder = (config if restored.tasks else named(config, restored.class_names)).to_dict()
    return facts | {
        "encoder": {name: value for name, value in encoder.items() if name != "_name_or_path"},
        "pooling": model.trunk.pooling if restored.tasks else model.pooling,
        "preprocessing": {"tokenizer": "tokenizer.json", "max_length": restored.max_length, "pairs": restored.pairs},
    }


def named(config: Any, class_names: Sequence[str]) -> Any:
    """A configuration of transformers with the names of the classes."""
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: label for label, name in enumerate(class_names)}
    return config


def shorter_side(size: int) -> int:
    """Pixels that the shorter side of a large image is brought to before the crop."""
    return round(size * 8 / 7) if size > 96 else size


def write(restored: Restored, form: str, facts: dict[str, Any], lines: str, folder: Path) -> None:
    """Write the model in a form, and the tokenizer beside it; a score's head gives it on its own scale."""
    if not restored.tasks and restored.problem_type == "regression":
        model = restored.model
        with on_own_scale(model.net if model.pooling == "model" else model.head, model.scale):
            _write(restored, form, facts, lines, folder)
    else:
        _write(restored, form, facts, lines, folder)


def _write(restored: Restored, form: str, facts: dict[str, Any], lines: str, folder: Path) -> None:
    if form == "hf":
        data = SimpleNamespace(class_names=restored.class_names, tokenizer=restored.tokenizer)
        model = restored.model
        write_for_transformers(model.net, model.peft, model.hparams["encoder"], data, folder)
        return
    if restored.reads == "text":
        write_tokenizer(restored, folder / "tokenizer.json")
    else:
        (folder / "pixels.py").write_text(PIXELS.format(size=restored.image_size), encoding="utf-8")
    if form == "safetensors":
        (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")  # the lines of the check read it
        if "small_resnet" in lines:  # which no other library has
            (folder / "small_resnet.py").write_text(inspect.getsource(small_resnet), encoding="utf-8")
        (folder / "model.safetensors").write_bytes(save(plain_weights(restored)))  # save_file lets nobody else read
        return
    graph = graph_of(restored)
    program = program_of(graph, restored)
    if form == "torch":
        torch.export.save(program, folder / "model.pt2", extra_files={"facts.json": json.dumps(facts)})
    else:
        write_onnx(program, restored, facts, folder / "model.onnx")


def write_tokenizer(restored: Restored, file: Path) -> None:
    """The tokenizer, told to cut and to pad by itself."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(restored.tokenizer.backend_tokenizer.to_str())
    tokenizer.enable_truncation(restored.max_length)
    tokenizer.enable_padding(pad_id=restored.tokenizer.pad_token_id, pad_token=restored.tokenizer.pad_token)
    tokenizer.save(str(file))


def plain_weights(restored: Restored) -> dict[str, Tensor]:
    """Weights by the names that the lines of `usage` give them."""
    model = restored.model
    if restored.reads == "text":
        kept = {name: value for name, value in model.state_dict().items() if name.startswith(("net.", "head."))}
    else:
        branches = tuple(f"{path.split('.')[0]}." for path in model.backbone.head[1:])  # for training only
        net = {f"1.{k}": v for k, v in model.backbone.net.state_dict().items() if not k.startswith(branches)}
        kept = net | {f"2.{name}": value for name, value in model.head.state_dict().items()}
    return {name: value.contiguous().clone() for name, value in kept.items()}


def graph_of(restored: Restored) -> nn.Module:
    """The model as one plain graph, with tensors in their usual layout."""
    model = restored.model
    if restored.tasks:
        graph: nn.Module = (ImageTasksGraph if restored.reads == "vision" else TokenTasksGraph)(model)
        return graph.eval().to(memory_format=torch.contiguous_format)
    if restored.reads == "text":
        head = None if model.pooling == "model" else model.head
        return TokenGraph(model.net, head, model.pooling, restored.problem_type, model.fusion).eval()
    graph = ImageGraph(model.backbone, model.head, model.mean, model.std, model.mirror_at_test)
    return graph.eval().to(memory_format=torch.contiguous_format)


def program_of(graph: nn.Module, restored: Restored) -> torch.export.ExportedProgram:
    """The graph for any batch, and any length of texts."""
    batch = torch.export.Dim("batch", min=1, max=MOST)
    if restored.reads == "vision":
        inputs: dict[str, Tensor] = {"images": torch.rand(2, 3, restored.image_size, restored.image_size)}
        free: dict[str, Any] = {"images": {0: batch}}
    else:
        texts: list[Any] = [("one", "another"), ("a longer one", "too")] if restored.pairs else ["one", "a longer one"]
        inputs = restored.tokens(texts)
        length = torch.export.Dim("length", min=2, max=restored.max_length)
        free = {name: {0: batch, 1: length} for name in inputs}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\..*")  # of its own ways inside
        try:
            return torch.export.export(graph, (), inputs, dynamic_shapes=free)
        except Exception as error:  # torch raises a dozen kinds
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"torch.export cannot follow this net; take --format safetensors ({reason})") from error


def write_onnx(program: torch.export.ExportedProgram, restored: Restored, facts: dict[str, Any], file: Path) -> None:
    """The program as ONNX, with the facts among its metadata."""
    try:
        import onnx
        import onnxruntime  # noqa: F401  the check runs on it
        import onnxscript  # noqa: F401  torch.onnx writes with it
    except ImportError as error:
        raise ImportError('--format onnx needs more packages: pip install "finetuning-recipes[export]"') from error
    outputs = list(restored.tasks) or ["logits", *(["probabilities"] if restored.problem_type != "regression" else [])]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.onnx.*")  # an axis that two inputs share is named once
        exported = torch.onnx.export(program, dynamo=True, output_names=outputs, verbose=False)
    assert exported is not None
    exported.model.metadata_props["facts"] = json.dumps(facts)
    exported.save(file)
    onnx.checker.check_model(str(file))
