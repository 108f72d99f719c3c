"""A net that is done learning and teaches another: its answers, in the student's order of classes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..parts.blocks import Watch
from ..parts.features import digest_of, extract, fingerprint
from ..parts.spelling import some
from ..training.lesson import Lesson
from .restored import restore

log = logging.getLogger(__name__)

Batch = dict[str, Any]


class Teacher:
    """A checkpoint of the same recipe, whatever its architecture, or a program that `recipes.export` wrote.

    No module of the student's: it is in no checkpoint, has no gradient, stays in evaluation mode and in float32. Images
    are given to it in [0, 1], as they are augmented, and it normalises them itself; where it takes another size, they
    are resized.

    Args:
        path: A `.ckpt`; an export's folder with its `model.pt2`; or a folder with runs: the newest's best.
        recipe: The student's.
        blocks: Whose features are asked for; of a checkpoint only.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: It is another recipe's, or has no such block.
    """

    def __init__(self, path: str, recipe: str, blocks: Sequence[str] = ()) -> None:
        self.path, self.recipe = path, recipe
        self.order: Tensor | None = None
        self.device = torch.device("cpu")
        self.told: Tensor | None = None  # logits of each training sample, where they can be computed once
        file = file_of(Path(path))
        if file.suffix == ".pt2":
            if blocks:
                raise ValueError(
                    "match_blocks needs the teacher's blocks: give its checkpoint, not an exported program"
                )
            extra = {"facts.json": ""}
            program = torch.export.load(file, extra_files=extra)
            self.net: Any = program.module()
            facts = json.loads(extra["facts.json"])
            made_by, self.class_names, self.problem_type = facts["recipe"], facts["class_names"], facts["problem_type"]
            self.size = facts["preprocessing"].get("size")
            self.fixed, self.tokens, self.digest = True, None, hashlib.sha256(file.read_bytes()).hexdigest()
        else:
            restored = restore(file)
            self.net, made_by, self.class_names = restored.model, restored.recipe, restored.class_names
            self.problem_type = restored.problem_type
            self.size = restored.image_size if made_by == "vision" else None
            self.fixed, self.tokens = False, restored.data.get("tokenizer_digest")
            self.digest = fingerprint(self.net)
            self.net.requires_grad_(False)
        if made_by != recipe:
            raise ValueError(f"the teacher {path} is of recipes.{made_by}, and its student of recipes.{recipe}")
        self.watch = Watch(self.net, self.net.layer_groups(), blocks, "model.match_blocks") if blocks else None

    def meet(self, data: Any) -> None:
        """Bring its classes into the data's order, by name.

        Raises:
            ValueError: It lacks one of them, learnt another kind of label, or reads other tokens; there are no names.
        """
        if getattr(data, "class_names", None) is None:
            raise ValueError("a teacher's classes are matched by name: fit with a data module that has class_names")
        problem = getattr(data, "problem_type", "single_label_classification")
        if self.problem_type != problem:
            raise ValueError(f"the teacher learnt {self.problem_type}, and the data are for {problem}")
        if self.tokens is not None and self.tokens != data.digest(data.tokenizer_state):
            raise ValueError(f"the teacher {self.path} reads other tokens: teacher and student need the same tokenizer")
        if problem == "regression":
            return
        unknown = [name for name in data.class_names if name not in self.class_names]
        if unknown:
            raise ValueError(
                f"the teacher {self.path} does not know {some(unknown)}; it knows {some(sorted(self.class_names))}"
            )
        self.order = torch.tensor([self.class_names.index(name) for name in data.class_names])

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Its answers to a batch, `(batch, classes)`, in the data's order."""
        if self.told is not None and self.watch is None:
            return self.told[batch["index"].cpu()].to(batch["index"].device)
        answers = self._answer(batch)
        return answers if self.order is None else answers[:, self.order.to(answers.device)]

    def _answer(self, batch: Batch) -> Tensor:
        with torch.autocast(_device_type(batch), enabled=False):
            if self.recipe == "vision":
                if "image" not in batch:
                    raise ValueError(
                        "a teacher needs the images, and feature_views gives features: leave one of them out"
                    )
                images = batch["image"].float()
                if images.shape[-1] != self.size:
                    images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
                inputs: Mapping[str, Tensor] = {"images": images}
            else:
                names = ("input_ids", "attention_mask", "token_type_ids")
                inputs = {name: batch[name] for name in names if name in batch}
            if not self.fixed and self.recipe == "vision":
                return self.net.final_logits({"image": inputs["images"]})  # type: ignore[no-any-return]
            found: Any = self.net(**inputs)
            return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]

    def to(self, device: torch.device) -> None:
        """Move it; an exported program stays on the device that it was traced for."""
        self.device = device
        if not self.fixed:
            self.net.to(device).eval()

    def answer_once(self, data: Any, folder: Path) -> None:
        """Compute its answers to all training samples, or read them where they were computed before.

        Only where a sample is the same in every epoch: texts, and images without augmentation or mixing.
        """
        same = (
            getattr(data, "augment", "none") == "none"
            and not getattr(data, "mixup", 0)
            and not getattr(data, "cutmix", 0)
        )
        if not same or self.watch is not None or not hasattr(data, "fisher_dataloader"):
            return
        names = [self.class_names[i] for i in self.order.tolist()] if self.order is not None else []
        key = digest_of({}, self.digest, data.fingerprint("train"), names)
        count = len(data.splits["train"].labels)
        file = folder / f"teacher_{key}.f32"
        log.info("teacher: its answers to %d samples, %s", count, "from a file" if file.is_file() else "computed once")
        self.told = extract(self.logits, [_batches(data, self.device)], count, file)[0]


def lesson_from(path: str, student: Any, batch: Batch, *, match: Mapping[str, str] | None, **options: Any) -> Lesson:
    """What a student learns from the teacher at a path; the options are those of `Lesson`."""
    teacher = Teacher(path, student.recipe, list((match or {}).values()))
    return Lesson(teacher, student, batch, match=match, **options)


def file_of(path: Path) -> Path:
    """The checkpoint or the program that a path stands for.

    Raises:
        FileNotFoundError: There is none.
    """
    if (path / "model.pt2").is_file():
        return path / "model.pt2"
    runs = sorted(path.glob("**/checkpoints/best.ckpt"), key=lambda file: file.stat().st_mtime)
    file = runs[-1] if runs else path
    if not file.is_file():
        make = ""
        if path.parts[:1] == ("runs",) and len(path.parts) == 3:
            _, recipe, config = path.parts
            make = f"; python -m recipes.{recipe} fit --config {recipe}/{config} makes one"
        raise FileNotFoundError(
            f"no teacher {path}: give a checkpoint, an export's folder, or a folder with finished runs{make}"
        )
    return file


def _batches(data: Any, device: torch.device) -> Any:
    from lightning.fabric.utilities import move_data_to_device

    for batch in data.fisher_dataloader():
        yield data.on_after_batch_transfer(move_data_to_device(batch, device), 0)


def _device_type(batch: Batch) -> str:
    return str(batch["index"].device.type)
