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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from torch import Tensor

from datamodules.files.index import list_files
from datamodules.images import decoding
from datamodules.images.decoding import evaluation_crop, readable_endings
from datamodules.images.sources import decode

from ..cli.runs import data_of, encoder_files, load_checkpoint, run_of_checkpoint
from ..parts.encoders import quietly
from ..text import TextClassifier
from ..vision import VisionClassifier

log = logging.getLogger(__name__)

Text = str | tuple[str, str]  # a text, or a pair of them
READING = inspect.getsource(decoding)  # how evaluation reads a picture, to go with an export


@dataclass
class Restored:
    """A classifier and what is needed to use it.

    Args:
        recipe: `vision` or `text`.
        model: In evaluation mode, on the processor.
        class_names: In the order of the outputs.
        problem_type: One class, several, or a score.
        data: What the data module wrote into the checkpoint.
        run: The folder of the run, if the checkpoint still lies in it.
        tokenizer: Of the texts.
    """

    recipe: str
    model: Any
    class_names: list[str]
    problem_type: str
    data: dict[str, Any]
    run: Path | None
    tokenizer: Any = None

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures."""
        return int(self.model.backbone.input_size)

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

    @torch.no_grad()
    def logits(self, samples: Any) -> Tensor:
        """What `predict` sees of pictures in [0, 1], `(n, 3, size, size)`, or of texts: `(n, classes)`, float32."""
        device = self.model.device
        if self.recipe == "vision":
            logits: Tensor = self.model.final_logits({"image": samples.to(device)})
        else:
            logits = self.model(**{name: tokens.to(device) for name, tokens in self.tokens(samples).items()})
        return logits.float().cpu()


def restore(path: str | Path) -> Restored:
    """The classifier of a checkpoint of `recipes.vision` or `recipes.text`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or another program's.
    """
    checkpoint = load_checkpoint(path)
    made_by = checkpoint.get("recipe", {})
    recipe = made_by.get("name")
    if recipe not in ("vision", "text"):
        raise ValueError(f"{path} is no checkpoint of recipes.vision or recipes.text: it names the recipe {recipe!r}")
    left_out = ("optimizer", "schedule")
    saved = checkpoint["hyper_parameters"].items()
    arguments = {name: value for name, value in saved if name not in left_out and not name.startswith("_")}
    data, run, tokenizer = data_of(checkpoint), run_of_checkpoint(str(path)), None
    if recipe == "vision":  # without pretrained weights: the checkpoint's replace them
        model: Any = VisionClassifier(**{**arguments, "weights": None, "reinit_blocks": 0, "compile_backbone": False})
        model.on_load_checkpoint(checkpoint)
    else:
        model, tokenizer = text_model(arguments, encoder_files(checkpoint), run)
    model.load_state_dict(checkpoint["state_dict"])
    return Restored(
        recipe,
        model.eval(),
        list(data.get("class_names") or map(str, range(arguments["num_classes"]))),
        arguments.get("problem_type", "single_label_classification"),
        data,
        run,
        tokenizer,
    )


def text_model(arguments: dict[str, Any], files: dict[str, str], run: Path | None) -> tuple[TextClassifier, Any]:
    """The model of these arguments and its tokenizer, from the checkpoint: the encoder's folder may be gone.

    Args:
        arguments: Of the model.
        files: What the checkpoint holds of the encoder: architecture and tokenizer.
        run: The folder of the run, whose tokenizer for transformers is taken where the checkpoint holds none.

    Raises:
        ValueError: There is no tokenizer.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_text(content, encoding="utf-8")
        options = {"encoder": folder, "pretrained": False, "reinit_layers": 0, "gradient_checkpointing": False}
        model = TextClassifier(**{**arguments, **options})
        source = folder if len(files) > 1 else f"{run}/hf"
        try:
            with quietly():
                return model, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"the checkpoint is from before they held their tokenizer, and there is none at {source}: put it there"
            ) from error


def pixels(file: Any, name: str, size: int) -> Tensor:
    """A picture as in evaluation, uint8 `(3, size, size)`.

    Args:
        file: A path or an open binary file.
        name: What to call it in an error.
        size: Side in pixels.

    Raises:
        ValueError: It cannot be read.
    """
    return torch.from_numpy(np.array(evaluation_crop(decode(file, name), size))).permute(2, 0, 1)


def samples_for(restored: Restored, given: Path | None, count: int) -> tuple[Any, str]:
    """Samples to compare two forms of a model on, and the words for where they are from.

    Those given come first; else the run's own validation split; else, and the words say so, made-up ones.

    Args:
        restored: The model.
        given: A folder of pictures, or a file with a text a line.
        count: How many at most.

    Returns:
        Pictures in [0, 1], `(n, 3, size, size)`, or a list of texts.

    Raises:
        ValueError: What is given cannot be read, or holds none.
    """
    vision = restored.recipe == "vision"
    size = restored.image_size if vision else 0
    if given is not None:
        found = given_pictures(given, size, count) if vision else given_texts(given, count, restored.pairs)
        return found, f"from {given}"
    try:
        split = validation_split(restored)
        rows = np.linspace(0, len(split.labels) - 1, min(count, len(split.labels))).round().astype(int).tolist()
        found = validation_pictures(split, rows, size) if vision else validation_texts(split, rows)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        found = random_pictures(count, size) if vision else random_texts(restored, count)
        return found, f"made up at random, for the validation samples are not at hand ({reason})"
    return found, "of the run's validation split"


def validation_split(restored: Restored) -> Any:
    """The validation split of the data that the run's config names, if it is still the run's."""
    if restored.run is None:
        raise FileNotFoundError("the checkpoint has been moved away from its run's config.yaml")
    config = yaml.safe_load((restored.run / "config.yaml").read_text(encoding="utf-8"))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    data = parser.instantiate_classes(parser.parse_object({"data": config["data"]})).data
    if restored.recipe == "vision":
        data.image_size = restored.image_size
    else:
        data.tokenizer = restored.tokenizer
    data.setup("fit")
    data.load_state_dict(restored.data)
    return data.splits["val"]


def validation_pictures(split: Any, rows: Sequence[int], size: int) -> Tensor:
    """Some pictures of a split as in evaluation, without those that cannot be read."""
    found = []
    for row in rows:
        try:
            found.append(torch.from_numpy(np.array(evaluation_crop(split.read(row), size))).permute(2, 0, 1))
        except ValueError as error:
            log.warning("%s", error)
    return stacked(found, "the validation split")


def validation_texts(split: Any, rows: Sequence[int]) -> list[Text]:
    """Some texts of a split, or pairs of texts."""
    table = [split.table[split.row(row)] for row in rows]
    return [(row["text"], row["pair"]) if "pair" in row else row["text"] for row in table]


def given_pictures(folder: Path, size: int, count: int) -> Tensor:
    """Pictures of a folder and those below it, without those that cannot be read."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected one of pictures")
    found: list[Tensor] = []
    for path in list_files(folder, readable_endings()):
        try:
            found.append(pixels(folder / path, str(folder / path), size))
        except ValueError as error:
            log.warning("%s", error)
        if len(found) == count:
            break
    return stacked(found, str(folder))


def given_texts(file: Path, count: int, pairs: bool) -> list[Text]:
    """Texts of a file, one a line; of a pair both, with a tab between them."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
    if not lines:
        raise ValueError(f"{file} holds no text: expected one a line")
    if not pairs:
        return list(lines)
    split = [line.partition("\t") for line in lines]
    alone = next((number for number, (_, tab, _) in enumerate(split, 1) if not tab), None)
    if alone:
        raise ValueError(f"{file}, line {alone}: expected two texts with a tab between them")
    return [(first, second) for first, _, second in split]


def stacked(pictures: Sequence[Tensor], where: str) -> Tensor:
    """uint8 pictures as one batch in [0, 1]."""
    if not pictures:
        raise ValueError(f"{where} holds no picture that can be read")
    return torch.stack(list(pictures)).float() / 255


def random_pictures(count: int, size: int) -> Tensor:
    """Smooth ones, as photographs are."""
    small = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear")


def random_texts(restored: Restored, count: int) -> list[Text]:
    """Of random tokens, up to the longest that the model takes."""
    generator = np.random.default_rng(0)
    most = max(1, restored.max_length - 4)  # with room for the special ones

    def text(length: int) -> str:
        return str(restored.tokenizer.decode(generator.integers(0, len(restored.tokenizer), length).tolist()))

    lengths = np.linspace(1, most, count).astype(int).tolist()
    make: Callable[[int], Text] = (lambda n: (text(n // 2), text(n // 2))) if restored.pairs else text
    return [make(length) for length in lengths]
