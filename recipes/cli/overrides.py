"""What a checkpoint brings to a command line, and what the command line overrides."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..parts.checkpoints import data_of, glance, is_whole, run_of_checkpoint
from . import early
from .screen import counted

log = logging.getLogger(__name__)

READS = {"--data.predict_root": "ImageFolder", "--data.predict_file": "TextFiles"}  # whatever was trained on


def with_checkpoint(args: list[str], recipe: str) -> list[str]:
    """A command line with what its checkpoint, or the files that it is to predict, bring along in front."""
    return with_config_of_checkpoint(with_files_to_predict(args), recipe)


def override_checkpoint(config: Any, subcommand: str) -> None:
    """The config at hand counts; say where it differs from the checkpoint's hyper-parameters.

    Args:
        config: Of the subcommand; where the checkpoint's weights are about to replace pretrained ones, it loads none.
        subcommand: fit, validate, test or predict.
    """
    path = config.get("ckpt_path")
    if subcommand == "fit" and not path:
        return
    if not path:
        early.stop(f"{subcommand} needs --ckpt_path runs/.../checkpoints/best.ckpt: without it the head is untrained")
    if path in ("best", "last", "hpc"):
        early.stop(f"--ckpt_path {path}: give the file's path, runs/.../checkpoints/{path}.ckpt")
    checkpoint = glance(path)
    if subcommand == "fit":
        stop_if_finished(checkpoint, path, config.trainer)
    saved = checkpoint.get("hyper_parameters", {})
    now = flatten(config.model.as_dict())
    for key, old in flatten({k: v for k, v in saved.items() if not k.startswith("_")}).items():
        if key in now and plain(now[key]) != plain(old):
            if key == "backbone" and subcommand == "fit":
                early.stop(
                    f"--ckpt_path goes on with a {old}, and model.backbone is {now[key]}: leave one of them out, "
                    f"or start afresh with --model.weights"
                )
            log.info("resume: model.%s was %s in the checkpoint and is %s now", key, old, now[key])
    if subcommand != "fit" and "teacher" in config.model:
        config.model.teacher = config.model.match_blocks = None  # it has taught
    if subcommand != "fit" and is_whole(checkpoint):
        without_weights(config.model)


def take_class_names(config: Any) -> bool:
    """Give data that name no classes those of the checkpoint, in its order; whether they took them.

    Args:
        config: Of the subcommand.
    """
    if not config.ckpt_path or config.data.init_args.get("class_names", "") is not None:
        return False
    config.data.init_args.class_names = data_of(glance(config.ckpt_path)).get("class_names")
    return True


def stop_if_finished(checkpoint: Mapping[str, Any], path: str, trainer: Any) -> None:
    """End the program where a checkpoint's run has done all that it was asked for: to go on would spoil its record."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {})
    epochs, steps = progress.get("processed", 0), checkpoint.get("global_step", 0)
    if trainer.max_epochs is not None and 0 < trainer.max_epochs <= epochs:
        asked = f"--trainer.max_epochs above {epochs}"
    elif 0 < trainer.max_steps <= steps:
        asked = f"--trainer.max_steps above {steps}"
    else:
        return
    print(f"{path}: finished, after {counted(epochs, 'epoch')} and {counted(steps, 'step')}; to go on, set {asked}")
    raise SystemExit(0)


def without_weights(model: Any) -> None:
    """Have a model's config load no pretrained weights."""
    for name, value in (
        ("weights", None),
        ("pretrained", False),
        ("save_base", None),
        ("teacher", None),
        ("match_blocks", None),
    ):
        if name in model:
            model[name] = value


def plain(value: Any) -> Any:
    """A tuple as the list that it becomes in a checkpoint."""
    return list(value) if isinstance(value, tuple) else value


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys; the parts that only name an object's class disappear."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        path = prefix if key in ("init_args", "dict_kwargs") else f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            flat |= flatten(value, path)
        else:
            flat[path] = value
    return flat


def value_of(args: list[str], key: str) -> str | None:
    """What a command line gives for a key, as `--key value` or as `--key=value`."""
    for word, following in zip(args, [*args[1:], None], strict=True):
        if word.partition("=")[0] == f"--{key}":
            return word.partition("=")[2] if "=" in word else following
    return None


def with_config_of_checkpoint(args: list[str], recipe: str) -> list[str]:
    """Where only a checkpoint is given, its run's config goes in front of the other arguments.

    To predict, a checkpoint that lies elsewhere is enough: then it says itself how the model was built.
    """
    path = value_of(args, "ckpt_path")
    if not path or "-c" in args or value_of(args, "config"):
        return args
    whose = glance(path).get("recipe", {}).get("name") if Path(path).is_file() else None
    if whose not in (None, recipe):
        raise ValueError(f"checkpoint {path} is of {whose}: recipes.{recipe} can't open it")
    if run := run_of_checkpoint(path):
        log.info("config: %s, of the run that wrote the checkpoint", run / "config.yaml")
        return [args[0], "--config", str(run / "config.yaml"), *args[1:]]
    if args[0] == "predict":
        return [args[0], *options_of_checkpoint(path, recipe, value_of(args, "data")), *args[1:]]
    return args


def with_files_to_predict(args: list[str]) -> list[str]:
    """What names files to predict names the data module that reads them, whichever the model was trained on."""
    if args[:1] == ["predict"] and not value_of(args, "data"):
        for position, word in enumerate(args):
            if (key := word.partition("=")[0]) in READS:
                return [*args[:position], f"--data={READS[key]}", *args[position:]]
    return args


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
