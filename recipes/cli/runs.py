"""A run's folder: its config, what a checkpoint in it knows, and what a resumed run finds there."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

log = logging.getLogger(__name__)

READS = {"--data.predict_root": "ImageFolder", "--data.predict_file": "TextFiles"}  # whatever was trained on


class SaveRunConfig(SaveConfigCallback):
    """Writes the run's complete config into its folder, as one to start a new run from.

    Args:
        parser: As in Lightning, and so is `config`.
        config: The parsed configuration.
        folder: The run's folder.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, folder: Path) -> None:
        config = config.clone()
        config["ckpt_path"] = None  # else whoever starts from this config would go on from that checkpoint
        config["quiet"] = False
        super().__init__(parser, config)
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Too early: what is refused before the first batch should leave no folder behind."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write on the first rank; a resumed run's config replaces the one before."""
        if trainer.is_global_zero and not self.already_saved:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, self.folder / "config.yaml", skip_none=False, overwrite=True)
            self.already_saved = True

    on_validation_start = on_test_start = on_predict_start = on_train_start


def run_of_checkpoint(path: str | None) -> Path | None:
    """The folder of the run that wrote a checkpoint, if the checkpoint still lies in it."""
    folder = Path(path).parent.parent if path else None
    return folder if folder and (folder / "config.yaml").is_file() else None


def with_config_of_checkpoint(args: list[str], recipe: str) -> list[str]:
    """Where only a checkpoint is given, its run's config goes in front of the other arguments.

    To predict, a checkpoint that lies elsewhere is enough: then it says itself how the model was built.
    """
    if any(a in ("-c", "--config") or a.startswith("--config=") for a in args):
        return args
    for position, word in enumerate(args):
        path = word.removeprefix("--ckpt_path=") if "=" in word else args[position + 1 : position + 2]
        if word.split("=")[0] == "--ckpt_path" and path:
            file = path if isinstance(path, str) else path[0]
            whose = glance(file).get("recipe", {}).get("name") if Path(file).is_file() else None
            if whose not in (None, recipe):
                raise ValueError(f"checkpoint {file} is of {whose}: recipes.{recipe} can't open it")
            run = run_of_checkpoint(file)
            if run:
                log.info("config: %s, of the run that wrote the checkpoint", run / "config.yaml")
                return [args[0], "--config", str(run / "config.yaml"), *args[1:]]
            if args[0] == "predict":
                rebuilt = options_of_checkpoint(path if isinstance(path, str) else path[0], recipe, chosen_data(args))
                return [args[0], *rebuilt, *args[1:]]
    return args


def with_files_to_predict(args: list[str]) -> list[str]:
    """What names files to predict names the data module that reads them, whichever the model was trained on."""
    if args[:1] != ["predict"] or chosen_data(args):
        return args
    for position, word in enumerate(args):
        if (key := word.split("=")[0]) in READS:
            return [*args[:position], f"--data={READS[key]}", *args[position:]]
    return args


def chosen_data(args: list[str]) -> str | None:
    """The data module that a command line names."""
    for word, following in zip(args, [*args[1:], None], strict=True):
        if word.split("=")[0] == "--data":
            return word.removeprefix("--data=") if "=" in word else following
    return None


def options_of_checkpoint(path: str, recipe: str, chosen: str | None) -> list[str]:
    """The command line that builds a checkpoint's model again, where the run's config is not beside it.

    Args:
        path: The checkpoint.
        recipe: Whose it must be, such as `vision`.
        chosen: The data module to predict with.

    Raises:
        ValueError: It is another recipe's; or nothing says what to predict.
    """
    content = glance(path)
    data = data_of(content)
    whose = content.get("recipe", {}).get("name")
    if whose != recipe:
        raise ValueError(f"checkpoint {path} is of {whose or 'another program'}: recipes.{recipe} can't open it")
    if chosen is None:
        raise ValueError(
            f"checkpoint {path} has no config.yaml of its run beside it: say what to predict with {' or '.join(READS)}"
        )
    follows = ("num_classes", "problem_type")  # from the data
    model = {k: v for k, v in content["hyper_parameters"].items() if k not in follows and not k.startswith("_")}
    if model.get("image_size", 0) is None:
        model["image_size"] = data.get("image_size")
    words = {f"model.{name}": value for name, value in model.items()}
    words |= {f"data.{name}": data[name] for name in ("problem_type", "max_length") if name in data}
    if data.get("problem_type") == "regression":
        words["data.label_column"] = data["class_names"][0]
    return [f"--data={chosen}"] + [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in words.items()
    ]


def data_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the data module wrote into a checkpoint, whichever it was; nothing, where there was none."""
    states = [state for state in checkpoint.values() if isinstance(state, dict)]
    return next((state for state in states if "class_names" in state), {})


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
    return content


def glance(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content for who asks for names and numbers in it: opened once by a command, its tensors unread."""
    status = Path(path).stat() if Path(path).is_file() else None
    return _glanced(str(path), status and (status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=1)
def _glanced(path: str, version: tuple[int, int] | None) -> dict[str, Any]:
    return load_checkpoint(path, mapped=True)


def with_weights_of(net: Any, checkpoint: str | Path) -> Any:
    """A model of transformers like the recipe's `net`, with the weights that it had in a checkpoint."""
    state = {k: v for k, v in load_checkpoint(checkpoint)["state_dict"].items() if k.startswith("net.")}
    saved = type(net)(copy.deepcopy(net.config))
    saved.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    return saved


def keep_metrics(folder: Path) -> None:
    """Put the metrics of a run that is resumed aside: Lightning's CSV logger would delete them."""
    metrics = folder / "metrics.csv"
    if metrics.is_file() and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        earlier = len(list(folder.glob("metrics.part*.csv")))
        metrics.rename(folder / f"metrics.part{earlier + 1}.csv")
