"""A trained classifier from its checkpoint alone, and samples to try it on.

    restored = restore("runs/vision/quickstart/.../best.ckpt")
    restored.model, restored.class_names

Neither the training data nor the hub nor the encoder's own folder is asked for: the checkpoint holds the model's
arguments, the encoder's configuration, the tokenizer and the names of the classes.
"""

from __future__ import annotations

import inspect
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.images import decoding

from ..parts.checkpoints import data_of, encoder_files, is_whole, load_checkpoint, run_of_checkpoint
from ..parts.encoders import quietly
from ..parts.peft import is_mergeable, merge
from ..training.base import RecipeModule

log = logging.getLogger(__name__)

SERVED = ("vision", "text", "multitask")  # whose checkpoints come back to life
Text = str | tuple[str, str]  # a text, or a pair of them
READING = inspect.getsource(decoding)  # how evaluation reads an image, to go with an export


@dataclass
class Restored:
    """A classifier and what is needed to use it.

    Args:
        recipe: `vision`, `text` or `multitask`.
        model: In evaluation mode, on the processor.
        class_names: In the order of the outputs; of several tasks those of the data.
        problem_type: One class, several, or a score.
        data: What the data module wrote into the checkpoint.
        run: The folder of the run, if the checkpoint still lies in it.
        tokenizer: Of the texts.
        tasks: Of several: name -> kind and names of the classes; else empty.
    """

    recipe: str
    model: Any
    class_names: list[str]
    problem_type: str
    data: dict[str, Any]
    run: Path | None
    tokenizer: Any = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def reads(self) -> str:
        """What goes in: `vision` for images, `text` for texts."""
        return str(self.model.trunk.reads) if self.tasks else self.recipe

    @property
    def image_size(self) -> int:
        """Side in pixels of the images."""
        return int(self.net.input_size)

    @property
    def learnt(self) -> list[str]:
        """What two nets must share for their heads to be mixed: names of classes; of scores also their scale."""
        scale = self.model.scale.tolist() if self.problem_type == "regression" and not self.tasks else []
        return [*self.class_names, *map(str, scale)]

    @property
    def pairs(self) -> bool:
        """Whether a sample is two texts."""
        return bool(self.data.get("pairs", False))

    @property
    def max_length(self) -> int:
        """Tokens that are kept of a text."""
        return int(self.data["max_length"])

    @property
    def typed(self) -> bool:
        """Whether the encoder is told which tokens are the second text's."""
        return self.pairs and "token_type_ids" in self.tokenizer.model_input_names

    def tokens(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        """Inputs of the model, each `(batch, length)`, padded to the longest."""
        columns = zip(*texts, strict=True) if self.pairs else [texts]
        found = self.tokenizer(
            *map(list, columns),
            truncation=True,
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
            return_token_type_ids=self.typed,
            verbose=False,
        )
        return dict(found)

    @property
    def net(self) -> Any:
        """What was pretrained."""
        if self.tasks:
            return self.model.trunk.net
        return self.model.backbone if self.recipe == "vision" else self.model.net

    def merge(self) -> None:
        """Put what adapters learnt into plain weights, where these can hold it."""
        if is_mergeable(self.net):
            merge(self.net)

    @torch.no_grad()
    def outputs(self, samples: Any) -> dict[str, Tensor]:
        """What `predict` sees of images in [0, 1], `(n, 3, size, size)`, or of texts, by task.

        Logits `(n, classes)`, of masks `(n, classes, size, size)`, or numbers `(n, 1)`; of one task `logits` alone.
        """
        if not self.tasks:
            return {"logits": self.logits(samples)}
        batch = {"image": samples} if self.reads == "vision" else self.tokens(samples)
        found = self.model({name: values.to(self.model.device) for name, values in batch.items()})
        return {name: values.float().cpu() for name, values in found.items()}

    @torch.no_grad()
    def logits(self, samples: Any) -> Tensor:
        """What `predict` sees of images in [0, 1], `(n, 3, size, size)`, or of texts: `(n, classes)`, float32.

        Raises:
            ValueError: There are several tasks.
        """
        device = self.model.device
        if self.tasks:
            raise ValueError(f"this checkpoint has {len(self.tasks)} tasks, and one is needed here: see recipes.export")
        if self.recipe == "vision":
            logits: Tensor = self.model.final_logits({"image": samples.to(device)})
        else:
            logits = self.model(**{name: tokens.to(device) for name, tokens in self.tokens(samples).items()})
        return logits.float().cpu()


def restore(path: str | Path, base: str | None = None) -> Restored:
    """The classifier of a checkpoint of `recipes.vision`, `recipes.text` or `recipes.multitask`.

    Args:
        path: The checkpoint.
        base: Where the weights are that the checkpoint leaves out; where they were in training if not given.

    Raises:
        FileNotFoundError: There is no such file; or no weights for what was trained beside them.
        ValueError: It is damaged, or another program's; or it was trained beside other weights.
    """
    checkpoint = load_checkpoint(path)
    recipe = recipe_of(checkpoint, path)
    data, run, whole = data_of(checkpoint), run_of_checkpoint(str(path)), is_whole(checkpoint)
    arguments = arguments_of(checkpoint)
    if not whole and base:
        arguments[loads(arguments)] = base
    try:
        model, tokenizer = build(recipe, arguments, encoder_files(checkpoint), run, whole=whole)
    except FileNotFoundError as error:
        if whole:
            raise
        raise FileNotFoundError(
            f"{path} holds only what was trained beside the weights {arguments[loads(arguments)]}; say with --base "
            f"where they are now ({error})"
        ) from error
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return Restored(
        recipe,
        model.eval(),
        list(data.get("class_names") or map(str, range(arguments.get("num_classes", 0)))),
        arguments.get("problem_type", "single_label_classification"),
        data,
        run,
        tokenizer,
        {name: arguments["tasks"][name] for name in model.kinds} if recipe == "multitask" else {},
    )


def start_of(path: str | Path, base: str | None = None) -> dict[str, Tensor]:
    """The pretrained weights that a run began with, by the names that its module has for them.

    Args:
        path: A checkpoint of the run.
        base: Where these weights are; where they were in training if not given.

    Raises:
        FileNotFoundError: They are gone.
        ValueError: It began with none.
    """
    checkpoint = load_checkpoint(path)
    recipe = recipe_of(checkpoint, path)
    arguments = arguments_of(checkpoint) | {"peft": None, "save_base": False}
    source = loads(arguments)
    arguments[source] = base or arguments[source]
    if arguments[source] is None or not arguments.get("pretrained", True):
        raise ValueError(f"{path}: its run began with random weights; give two checkpoints, from one to the other")
    model, _ = build(recipe, arguments, encoder_files(checkpoint), run_of_checkpoint(str(path)), whole=False)
    return dict(model.base.weights())


def recipe_of(checkpoint: dict[str, Any], path: str | Path) -> str:
    """The recipe that wrote a checkpoint.

    Raises:
        ValueError: It is none whose checkpoints come back to life.
    """
    recipe = checkpoint.get("recipe", {}).get("name")
    if recipe not in SERVED:
        known = "recipes.vision, recipes.text or recipes.multitask"
        raise ValueError(f"{path} is no checkpoint of {known}: it names the recipe {recipe!r}")
    if recipe not in RecipeModule.known:
        raise ValueError(f"{path} is a checkpoint of recipes.{recipe}: import that first")
    return str(recipe)


def loads(arguments: dict[str, Any]) -> str:
    """The argument that names the weights to load."""
    return "encoder" if arguments.get("encoder") else "weights"


def arguments_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the model was built with, but for what only training needs."""
    saved = checkpoint["hyper_parameters"].items()
    found = {name: value for name, value in saved if name not in ("optimizer", "schedule") and not name.startswith("_")}
    return found | {name: None for name in ("teacher", "match_blocks") if name in found}


def build(
    recipe: str, arguments: dict[str, Any], files: dict[str, str], run: Path | None, *, whole: bool
) -> tuple[Any, Any]:
    """The model of these arguments, and its tokenizer if it reads texts.

    Args:
        recipe: Its name.
        arguments: Of the model.
        files: What the checkpoint holds of the encoder.
        run: The folder of the run.
        whole: Whether a checkpoint replaces all weights, so that none are loaded.

    Raises:
        FileNotFoundError: The weights to load are gone.
    """
    kind = RecipeModule.known[recipe]
    if arguments.get("encoder"):
        return text_model(kind, arguments, files, run, whole=whole)
    afresh: dict[str, Any] = {"weights": None, "reinit_blocks": 0} if whole else {}
    changed = {**afresh, "compile_backbone": False}
    return kind(**arguments | {name: value for name, value in changed.items() if name in arguments}), None


def text_model(
    kind: Any, arguments: dict[str, Any], files: dict[str, str], run: Path | None, *, whole: bool = True
) -> tuple[Any, Any]:
    """The model of these arguments and its tokenizer, from the checkpoint: the encoder's folder may be gone.

    Args:
        kind: Class of the model.
        arguments: Of the model.
        files: What the checkpoint holds of the encoder: architecture and tokenizer.
        run: The folder of the run, whose tokenizer for transformers is taken where the checkpoint holds none.
        whole: Whether the checkpoint holds all weights; else those of `encoder` are loaded.

    Raises:
        FileNotFoundError: There is no such encoder.
        ValueError: There is no tokenizer.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_text(content, encoding="utf-8")
        afresh = {"encoder": folder, "pretrained": False, "architecture": None, "reinit_layers": 0} if whole else {}
        changed = {**afresh, "gradient_checkpointing": False}
        model: Any = kind(**arguments | {name: value for name, value in changed.items() if name in arguments})
        model.hparams.update(encoder=arguments["encoder"])  # not a folder that is about to go
        source = folder if len(files) > 1 else f"{run}/hf"
        try:
            with quietly():
                return model, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"the checkpoint is from before they held their tokenizer, and there is none at {source}: put it there"
            ) from error
