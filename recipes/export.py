"""Export a checkpoint to use without this package: for torch, ONNX, safetensors or transformers.

    python -m recipes.export runs/vision/quickstart/.../best.ckpt --format onnx

Every export is a folder with a README of a few lines that load it. These lines are run, on samples of the run's
validation split, before the folder gets its name: what differs from the checkpoint is refused.

| format | files | is used with |
|---|---|---|
| torch | `model.pt2`, a program of torch.export | torch |
| onnx | `model.onnx` | onnxruntime |
| safetensors | `model.safetensors`, the weights | torch and torchvision, timm or transformers |
| hf | a folder of transformers, for texts | transformers |

Normalisation is part of the first two: they take pictures in [0, 1]. Batches, and the lengths of texts, are free.
`facts.json` holds the names of the classes, the preprocessing, and how far the outputs differ from the checkpoint's.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from . import __version__
from .cli import early as names
from .cli.screen import quieten, speak
from .deploy.graphs import PictureGraph, TokenGraph
from .deploy.restored import Restored, pixels, restore, samples_for
from .deploy.snippets import PICTURES, PIXELS, lines_for
from .parts.backbones import small_resnet
from .parts.encoders import quietly
from .text import save_for_transformers

FORMATS = ("safetensors", "onnx", "torch", "hf")
TOLERANCE = 1e-4  # of the largest logit: fp32 sums in another order differ by a hundredth of it ...
SMALLEST = 1e-2  # ... or of this, where all are about zero, as those of a net that learnt nothing
MOST = 2**20  # a bound on the batch, which torch.export asks for


def export(checkpoint: Path, form: str, out: Path | None = None, given: Path | None = None, count: int = 64) -> Path:
    """Write a checkpoint in a form, check it, and only then give the folder its name.

    Args:
        checkpoint: Of `recipes.vision` or `recipes.text`.
        form: One of `FORMATS`.
        out: The folder; by default `<checkpoint>_<form>` in the run's folder, or beside a checkpoint without one.
        given: Samples to check on: a folder of pictures or a file with a text a line. By default those of the run's
            validation split, or where they are gone, made-up ones.
        count: How many samples at most.

    Raises:
        FileExistsError: The folder is there.
        ValueError: The checkpoint cannot be exported in this form, or its export answers otherwise.
    """
    restored = restore(checkpoint)
    target = out or (restored.run or checkpoint.parent) / f"{checkpoint.stem}_{form}"
    if target.exists():
        raise FileExistsError(f"{target} is there already: remove it, or name another folder with --out")
    if form == "hf" and (restored.recipe != "text" or restored.model.pooling != "model"):
        raise ValueError("--format hf needs a text classifier with transformers' own head, model.pooling=model")
    lines = lines_for(restored, form)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    part.mkdir(parents=True)
    try:
        facts = facts_of(restored, checkpoint, form)
        write(restored, checkpoint, form, facts, lines, part)
        samples, where = samples_for(restored, given, count)
        facts["check"] = {"samples": len(samples), "where": where, **check(restored, samples, lines, part)}
        (part / "facts.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
        (part / "README.md").write_text(readme(restored, facts, lines, target.name), encoding="utf-8")
        part.rename(target)
    except BaseException:
        shutil.rmtree(part)
        raise
    print(f"{target}: {sentence(facts['check'])}")
    return target


def facts_of(restored: Restored, checkpoint: Path, form: str) -> dict[str, Any]:
    """What one must know to use the model, as plain values."""
    facts: dict[str, Any] = {
        "recipe": restored.recipe,
        "format": form,
        "class_names": restored.class_names,
        "problem_type": restored.problem_type,
        "checkpoint": checkpoint.name,
        "versions": {"finetuning-recipes": __version__, "torch": str(torch.__version__)},
    }
    model = restored.model
    if restored.recipe == "vision":
        size = restored.image_size
        return facts | {
            "architecture": {"backbone": model.backbone.name, "head": str(model.hparams["head"])},
            "preprocessing": {
                "colour": "RGB, upright, on white, in [0, 1]; 16 bits as 8",
                "size": size,
                "shorter_side": shorter_side(size),
                "resize": "bilinear; to `shorter_side` where that of the picture is above `size`, else to `size`",
                "crop": "the middle",
                "mean": model.mean.flatten().tolist(),
                "std": model.std.flatten().tolist(),
                "normalised_inside": form in ("torch", "onnx"),
            },
        }
    encoder = named(model.net.config, restored.class_names).to_dict()
    return facts | {
        "encoder": {name: value for name, value in encoder.items() if name != "_name_or_path"},
        "pooling": model.pooling,
        "preprocessing": {"tokenizer": "tokenizer.json", "max_length": restored.max_length, "pairs": restored.pairs},
    }


def named(config: Any, class_names: Sequence[str]) -> Any:
    """A configuration of transformers with the names of the classes."""
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: label for label, name in enumerate(class_names)}
    return config


def shorter_side(size: int) -> int:
    """Pixels that the shorter side of a large picture is brought to before the crop."""
    return round(size * 8 / 7) if size > 96 else size


def write(restored: Restored, checkpoint: Path, form: str, facts: dict[str, Any], lines: str, folder: Path) -> None:
    """Write the model in a form, and the tokenizer beside it."""
    if form == "hf":
        data = SimpleNamespace(class_names=restored.class_names, tokenizer=restored.tokenizer)
        save_for_transformers(restored.model, checkpoint, data, folder)
        return
    if restored.recipe == "text":
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
    if restored.recipe == "text":
        kept = {name: value for name, value in model.state_dict().items() if name.startswith(("net.", "head."))}
    else:
        branches = tuple(f"{path.split('.')[0]}." for path in model.backbone.head[1:])  # for training only
        net = {f"1.{k}": v for k, v in model.backbone.net.state_dict().items() if not k.startswith(branches)}
        kept = net | {f"2.{name}": value for name, value in model.head.state_dict().items()}
    return {name: value.contiguous().clone() for name, value in kept.items()}


def graph_of(restored: Restored) -> nn.Module:
    """The model as one plain graph, with tensors in their usual layout."""
    model = restored.model
    if restored.recipe == "text":
        head = None if model.pooling == "model" else model.head
        return TokenGraph(model.net, head, model.pooling, restored.problem_type).eval()
    graph = PictureGraph(model.backbone, model.head, model.mean, model.std, model.mirror_at_test)
    return graph.eval().to(memory_format=torch.contiguous_format)


def program_of(graph: nn.Module, restored: Restored) -> torch.export.ExportedProgram:
    """The graph for any batch, and any length of texts."""
    batch = torch.export.Dim("batch", min=1, max=MOST)
    if restored.recipe == "vision":
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
    outputs = ["logits"] if restored.problem_type == "regression" else ["logits", "probabilities"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.onnx.*")  # an axis that two inputs share is named once
        written = torch.onnx.export(program, dynamo=True, output_names=outputs, verbose=False)
    assert written is not None
    written.model.metadata_props["facts"] = json.dumps(facts)
    written.save(file)
    onnx.checker.check_model(str(file))


def check(restored: Restored, samples: Any, lines: str, folder: Path) -> dict[str, float]:
    """Run the lines of the README, and compare their logits with the checkpoint's.

    Returns:
        The largest difference, and the share of samples with the same answer: the most probable class, or each
        label's yes or no. Answers between which the checkpoint itself wavers by less than the tolerance are left out.

    Raises:
        ValueError: It does not run; another answer, or a difference above the tolerance.
    """
    expected = restored.logits(samples)
    if restored.recipe == "vision":
        check_reading(folder, restored.image_size)
    given = {"images": samples.numpy()} if restored.recipe == "vision" else {"texts": samples}
    found = {"folder": str(folder), **given}
    try:
        with torch.no_grad(), quietly():
            exec(compile(lines, "README.md", "exec"), found)
    except Exception as error:  # of whichever library it is
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"what was written cannot be loaded by other programs, so it is gone again: {reason}"
        ) from error
    return compare(expected, torch.as_tensor(found["logits"]), restored.problem_type)


def check_reading(folder: Path, size: int) -> None:
    """Read files of many kinds by the lines of the README, and compare with what evaluation sees of them.

    Raises:
        ValueError: They cannot be read by these lines, or look otherwise.
    """
    with tempfile.TemporaryDirectory() as other:
        files = write_odd_pictures(Path(other), size)
        found: dict[str, Any] = {"folder": str(folder), "files": files}
        try:
            exec(compile(PICTURES, "README.md", "exec"), found)
        except Exception as error:
            raise ValueError(f"the lines that read pictures don't run: {error}") from error
        for file, image in zip(files, found["images"], strict=True):
            if not np.array_equal(image, pixels(file, file, size).numpy().astype(np.float32) / 255):
                raise ValueError(f"the lines that read pictures see another {Path(file).name} than evaluation does")


def write_odd_pictures(folder: Path, size: int) -> list[str]:
    """Small files of the kinds that programs read otherwise: 16 and 32 bits, transparent, a palette, turned, CMYK."""
    steps = np.linspace(0, 65535, (size + 9) * (size + 5)).astype(np.uint16).reshape(size + 9, size + 5)
    grey = Image.fromarray((steps // 257).astype(np.uint8))
    clear = Image.merge("RGBA", (grey, grey.rotate(90, expand=False), grey.rotate(180), grey.rotate(270)))
    exif = Image.Exif()
    exif[0x0112] = 6
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "16_bits.png": (Image.fromarray(steps), {}),
        "16_bits.tif": (Image.fromarray(steps), {}),
        "0_is_white.tif": (Image.fromarray(steps), {"tiffinfo": {262: 0}}),
        "32_bits.tif": (Image.fromarray(steps.astype(np.int32)), {}),
        "32_bits_to_255.tif": (Image.fromarray((steps // 257).astype(np.int32)), {}),
        "transparent.png": (clear, {}),
        "grey_transparent.png": (clear.convert("LA"), {}),
        "palette.png": (grey.quantize(16), {"transparency": 3}),
        "turned.jpg": (clear.convert("RGB"), {"exif": exif}),
        "cmyk.jpg": (clear.convert("RGB").convert("CMYK"), {}),
    }
    for name, (image, options) in made.items():
        image.save(folder / name, **options)
    return [str(folder / name) for name in made]


def compare(expected: Tensor, logits: Tensor, problem_type: str) -> dict[str, float]:
    """How far logits `(n, classes)` are from those expected, and how many answers are the same; see `check`."""
    difference = float((expected - logits).abs().max())
    tolerance = TOLERANCE * max(SMALLEST, float(expected.abs().max()))
    if problem_type == "single_label_classification" and expected.shape[1] > 1:
        first, second = expected.topk(2).values.T
        same, sure = expected.argmax(1) == logits.argmax(1), first - second > 2 * tolerance
    else:
        same, sure = (expected > 0) == (logits > 0), expected.abs() > tolerance
    if problem_type == "regression":
        sure = torch.zeros_like(sure)  # a score is no answer of yes or no
    agreement = float(same[sure].float().mean()) if sure.any() else 1.0
    if not difference <= tolerance or agreement < 1:  # NaN is not within it, either
        raise ValueError(
            f"the export is not the checkpoint: outputs differ by up to {difference:.2g}, {tolerance:.2g} is allowed, "
            f"and {100 * agreement:.1f} % of the answers are the same; nothing was written"
        )
    return {"largest_difference": difference, "tolerance": tolerance, "agreement": agreement}


def sentence(check: dict[str, Any]) -> str:
    """What the check found."""
    return (
        f"on {check['samples']} samples {check['where']}, logits differ from the checkpoint's by "
        f"{check['largest_difference']:.1e} at most, and {100 * check['agreement']:.0f} % of the answers are the same"
    )


def readme(restored: Restored, facts: dict[str, Any], lines: str, name: str) -> str:
    """What the export is, and the lines that use it."""
    if restored.recipe == "vision":
        before = f'folder, files = ".", ["picture.jpg"]\n{PICTURES}'
    else:
        pair = '[("a text", "a second one")]' if restored.pairs else '["a text"]'
        before = f"texts = {pair}\n"
    classes = ", ".join(restored.class_names[:20]) + (" ..." if len(restored.class_names) > 20 else "")
    return (
        f"# {name}\n\nClasses: {classes}\n\nWhat goes in:\n\n```python\n{before}```\n\n"
        f'What comes out:\n\n```python\nfolder = "."  # this one\n{lines}```\n\n'
        f"Checked: {sentence(facts['check'])}. `facts.json` holds the rest.\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        "python -m recipes.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="runs/.../checkpoints/best.ckpt")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", type=Path, help="the folder to write; by default <checkpoint>_<format> in the run's")
    parser.add_argument("--samples", type=Path, help="to check on: a folder of pictures, or a file with a text a line")
    parser.add_argument("--count", type=int, default=64, help="samples to check on at most (default 64)")
    arguments = parser.parse_args(argv)
    quieten()
    speak()
    try:
        export(arguments.checkpoint, arguments.format, arguments.out, arguments.samples, arguments.count)
    except (ValueError, OSError, ImportError) as error:
        names.stop(str(error))


if __name__ == "__main__":
    main()
