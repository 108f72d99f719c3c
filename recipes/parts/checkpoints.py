"""What lies in a checkpoint, read without running any code in it."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import os
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from .encoders import encoder_path, quietly
from .heads import on_own_scale
from .peft import Peft, adapters
from .peft.folder import save_for_peft
from .pruning import unpack_zeros

log = logging.getLogger(__name__)


def run_of_checkpoint(path: str | None) -> Path | None:
    """The folder of the run that wrote a checkpoint, if the checkpoint still lies in it."""
    folder = Path(path).parent.parent if path else None
    return folder if folder and (folder / "config.yaml").is_file() else None


def data_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the data module wrote into a checkpoint, whichever it was; nothing, where there was none."""
    states = [state for state in checkpoint.values() if isinstance(state, dict)]
    return next((state for state in states if "class_names" in state), {})


def is_whole(checkpoint: dict[str, Any]) -> bool:
    """Whether it holds all weights; else those that it was trained beside are needed, too."""
    return "base" not in checkpoint.get("recipe", {})


def encoder_files(checkpoint: dict[str, Any]) -> dict[str, str]:
    """Name -> content of a folder with the architecture and the tokenizer that a text checkpoint holds."""
    config = checkpoint.get("recipe", {}).get("encoder")
    return {"config.json": json.dumps(config), **data_of(checkpoint).get("tokenizer_files", {})} if config else {}


def encoder_of(checkpoint: dict[str, Any]) -> Path | None:
    """A folder of `encoder_files`; none, where a checkpoint holds no tokenizer."""
    files = encoder_files(checkpoint)
    if len(files) < 2:
        return None
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(torch.hub.get_dir()).parent / "encoders" / digest
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        beside = folder / f"{name}.{os.getpid()}"
        beside.write_text(text, encoding="utf-8")
        beside.replace(folder / name)  # several ranks do the same
    return folder


def load_checkpoint(path: str | Path, *, mapped: bool = False) -> dict[str, Any]:
    """A checkpoint's content, read without running any code in it.

    Args:
        path: The file.
        mapped: Whether tensors stay in the file, which must not be written to while they are used.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds a pickle of more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}: --ckpt_path must name a .ckpt file, runs/.../best.ckpt for one")
    try:
        mapped = mapped and zipfile.is_zipfile(path)  # torch can't map what it wrote before 1.6
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        reason = str(error).splitlines()[0]
        if "weights_only" in reason:  # torch's advice would run what is in it
            reason = "it is none, is damaged, or holds more than these"
        raise ValueError(f"checkpoint {path} cannot be read safely, as tensors and plain values: {reason}") from error
    if isinstance(content, dict) and "packed" in content:
        content["state_dict"] |= unpack_zeros(content.pop("packed"))
    return content


def glance(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content for who asks for names and numbers in it: opened once by a command, its tensors unread."""
    status = Path(path).stat() if Path(path).is_file() else None
    return _glanced(str(path), status and (status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=1)
def _glanced(path: str, version: tuple[int, int] | None) -> dict[str, Any]:
    return load_checkpoint(path, mapped=True)


def with_weights_of(model: Any, checkpoint: str | Path) -> Any:
    """A copy of a recipe's `net`, of transformers, with the weights that it had in a checkpoint."""
    content = load_checkpoint(checkpoint)
    if model.base is not None:
        model.base.complete(content, model)
    state = {k.removeprefix("net."): v for k, v in content["state_dict"].items() if k.startswith("net.")}
    saved = copy.deepcopy(model.net)
    saved.load_state_dict(state)
    return saved


def save_for_transformers(model: Any, checkpoint: str | Path, data: Any, folder: Path) -> None:
    """Write a folder for `AutoModelForSequenceClassification.from_pretrained`, with class names and tokenizer.

    Of adapters it is one for `PeftModel.from_pretrained`, unless they were merged.

    Args:
        model: Of which the checkpoint is.
        checkpoint: Whose weights to write.
        data: Its `class_names` and `tokenizer`.
        folder: Where to.
    """
    if model.pooling != "model":
        log.info("no folder for transformers: its classifiers have other heads than pooling %s", model.pooling)
        return
    net = with_weights_of(model, checkpoint)
    with on_own_scale(net, model.scale) if model.problem_type == "regression" else nullcontext():
        write_for_transformers(net, model.peft, model.hparams["encoder"], data, folder)


def write_for_transformers(net: Any, how: Peft | None, encoder: str, data: Any, folder: Path) -> None:
    """The same of a net that has its weights.

    Args:
        net: Transformers' classifier, adapted or not.
        how: How it was adapted.
        encoder: What it was fine-tuned from.
        data: Has `class_names` and `tokenizer`.
        folder: Where to.
    """
    net.config.id2label = dict(enumerate(data.class_names))
    net.config.label2id = {name: label for label, name in enumerate(data.class_names)}
    if how is not None and adapters(net):
        save_for_peft(net, how, encoder_path(encoder), folder)
        net.config.save_pretrained(folder)  # architecture and names of the classes
    else:
        with quietly():
            net.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
