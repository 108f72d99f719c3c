"""Export a checkpoint to use without this package: for torch, ONNX, safetensors or transformers.

    python -m recipes.export runs/vision/quickstart/.../best.ckpt --format onnx

Every export is a folder with a README of a few lines that load it. These lines are run, on samples of the run's
validation split, before the folder gets its name: what differs from the checkpoint is refused.

| format | files | is used with |
|---|---|---|
| torch | `model.pt2`, a program of torch.export | torch |
| onnx | `model.onnx` | onnxruntime |
| safetensors | `model.safetensors`, the weights | torch and torchvision, timm or transformers |
| hf | a folder of transformers, for texts; of adapters, one of peft | transformers, peft |

Normalisation is part of the first two: they take images in [0, 1]. Batches, and the lengths of texts, are free. LoRA,
DoRA and IA3 are merged into plain weights, for hf only with `--merged`.
`facts.json` holds the names of the classes, the preprocessing, and how far the outputs differ from the checkpoint's.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import multitask, text, vision  # noqa: F401  whose checkpoints are exported
from .cli import early
from .cli.screen import configure_logging, filter_warnings
from .deploy.check import check, sentence
from .deploy.formats import facts_of, write
from .deploy.restored import Restored, restore
from .deploy.samples import samples_for
from .deploy.snippets import IMAGES, lines_for
from .parts.peft import adapters

FORMATS = ("safetensors", "onnx", "torch", "hf")


def export(
    checkpoint: Path,
    form: str,
    out: Path | None = None,
    given: Path | None = None,
    count: int = 64,
    *,
    base: str | None = None,
    merged: bool = False,
) -> Path:
    """Write a checkpoint in a form, check it, and only then give the folder its name.

    Args:
        checkpoint: Of `recipes.vision`, `recipes.text` or `recipes.multitask`.
        form: One of `FORMATS`.
        out: The folder; by default `<checkpoint>_<form>` in the run's folder, or beside a checkpoint without one.
        given: Samples to check on: a folder of images or a file with a text a line. By default those of the run's
            validation split, or where they are gone, made-up ones.
        count: How many samples at most.
        base: Where the weights are that a checkpoint of adapters leaves out; where they were in training if not given.
        merged: Whether `hf` gets plain weights in place of adapters, as the other forms do where it can be done.

    Raises:
        FileExistsError: The folder is there.
        ValueError: The checkpoint cannot be exported in this form, or its export answers otherwise.
    """
    restored = restore(checkpoint, base)
    target = out or (restored.run or checkpoint.parent) / f"{checkpoint.stem}_{form}"
    if target.exists():
        raise FileExistsError(f"{target} is there already: remove it, or name another folder with --out")
    if form == "hf" and (restored.recipe != "text" or restored.model.pooling != "model"):
        raise ValueError("--format hf needs a text classifier with transformers' own head, model.pooling=model")
    written = restored
    if adapters(restored.net) and (merged or form != "hf"):
        written = replace(restored, model=copy.deepcopy(restored.model))
        written.merge()
        if adapters(written.net) and (merged or form == "safetensors"):
            raise ValueError(f"no plain weights can hold what {restored.model.peft.method} learnt; take torch or onnx")
    lines = lines_for(written, form)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    part.mkdir(parents=True)
    try:
        facts = facts_of(written, checkpoint, form)
        write(written, form, facts, lines, part)
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


def readme(restored: Restored, facts: dict[str, Any], lines: str, name: str) -> str:
    """What the export is, and the lines that use it."""
    if restored.reads == "vision":
        before = f'folder, files = ".", ["image.jpg"]\n{IMAGES}'
    else:
        pair = '[("a text", "a second one")]' if restored.pairs else '["a text"]'
        before = f"texts = {pair}\n"
    return (
        f"# {name}\n\n{learnt(restored)}\n\nWhat goes in:\n\n```python\n{before}```\n\n"
        f'What comes out:\n\n```python\nfolder = "."  # this one\n{lines}```\n\n'
        f"Checked: {sentence(facts['check'])}. `facts.json` holds the rest.\n"
    )


def learnt(restored: Restored) -> str:
    """What the model tells, for a person."""
    told = []
    for task, names in [(t, one["class_names"]) for t, one in restored.tasks.items()] or [("", restored.class_names)]:
        classes = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
        told.append(f"{task or 'Classes'}: {classes or 'a number'}")
    return "\n\n".join(told)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        "python -m recipes.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="runs/.../checkpoints/best.ckpt")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", type=Path, help="the folder to write; by default <checkpoint>_<format> in the run's")
    parser.add_argument("--samples", type=Path, help="to check on: a folder of images, or a file with a text a line")
    parser.add_argument(
        "--base", help="the weights that a checkpoint of adapters was trained beside, if they were moved"
    )
    parser.add_argument("--merged", action="store_true", help="with hf: plain weights in place of adapters for peft")
    parser.add_argument("--count", type=int, default=64, help="samples to check on at most (default 64)")
    arguments = parser.parse_args(argv)
    filter_warnings()
    configure_logging()
    try:
        export(
            arguments.checkpoint,
            arguments.format,
            arguments.out,
            arguments.samples,
            arguments.count,
            base=arguments.base,
            merged=arguments.merged,
        )
    except (ValueError, OSError, ImportError) as error:
        early.stop(str(error))


if __name__ == "__main__":
    main()
