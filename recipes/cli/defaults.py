"""What a run has where its config says nothing: precision, loggers, callbacks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

import callbacks

from ..parts.backbones import backbone_facts
from ..parts.encoders import encoder_path, max_tokens
from . import early
from .runs import keep_metrics
from .screen import progress

log = logging.getLogger(__name__)


def fill_in(trainer: Any) -> None:
    """Complete a trainer's config: bf16 where the hardware has it, and when early stopping looks at its metric."""
    if trainer.precision is None and bf16_is_native(trainer.accelerator):
        trainer.precision = "bf16-mixed"
    for callback in trainer.callbacks if isinstance(trainer.callbacks, list) else ():
        if str(callback.get("class_path", "")).endswith(".EarlyStopping"):
            given = callback.init_args
            if given.check_on_train_epoch_end is None and given.monitor.startswith("val/"):
                given.check_on_train_epoch_end = False  # else a fit that ends before a validation ends in an error


def fill_in_image_size(config: Any) -> None:
    """One size of images for the data and the model: what is given, or what the backbone is meant for.

    Raises:
        ValueError: Two sizes, or one that is too small for the backbone.
    """
    facts = backbone_facts(config.model.backbone)
    given = (config.model.image_size, config.data.init_args.get("image_size"), facts.input_size)
    config.model.image_size = size = next(value for value in given if value is not None)
    if given[1] not in (None, size):
        raise ValueError(f"model.image_size is {size}, data.image_size {given[1]}: set model.image_size alone")
    if size < facts.min_size:
        raise ValueError(
            f"{config.model.backbone} needs images of at least {facts.min_size} px; model.image_size is {size}"
        )
    if "image_size" in config.data.init_args:
        config.data.init_args.image_size = size


def fill_in_tokenizer(model: Any, net: Any, data: Any) -> None:
    """The tokenizer is the encoder's unless the data names one; texts that are longer than it can take are refused."""
    if data.tokenizer_name is None:
        data.tokenizer_name = encoder_path(model.hparams["encoder"])
    most = max_tokens(net)
    if most is not None and data.max_length > most and model.peft and model.peft.method == "prompt":
        log.info("data.max_length: %d; the prompt takes the other positions", most)
        data.max_length = most
    if most is not None and data.max_length > most:
        early.stop(f"data.max_length is {data.max_length}, and {model.hparams['encoder']} takes {most} at most")


def trainer_options(
    config: Any, given: Mapping[str, Any], subcommand: str, folder: Path, monitor: tuple[str, str]
) -> dict[str, Any]:
    """Arguments of the Trainer: loggers and callbacks, each unless the config brings its own.

    Args:
        config: Of the subcommand.
        given: Its `trainer`, with loggers and callbacks built.
        subcommand: fit, validate, test or predict.
        folder: The run's.
        monitor: Metric, and whether the best is its `max` or its `min`.
    """
    options: dict[str, Any] = {}
    if given["logger"] is None:
        options["logger"] = loggers(folder, subcommand)
    added = drop_overridden_callbacks(given["callbacks"] or [])
    if any(isinstance(callback, LearningRateFinder) for callback in added):
        early.stop(
            "LearningRateFinder gives every parameter group the same learning rate, and here they differ by block: "
            "leave it out and try model.optimizer.lr at three values"
        )
    own = default_callbacks(config, subcommand, folder, monitor, has_logger=given["logger"] is not False)
    has_bar = any(isinstance(callback, ProgressBar) for callback in added)
    taken = {callback.state_key for callback in added}
    options["callbacks"] = added + [
        callback
        for callback in own
        if callback.state_key not in taken and not (has_bar and isinstance(callback, ProgressBar))
    ]
    if subcommand != "fit" and not any(isinstance(callback, ModelCheckpoint) for callback in added):
        options["enable_checkpointing"] = False
    if config.quiet:
        options["enable_progress_bar"] = False
    return options


def loggers(folder: Path, subcommand: str) -> list[Logger]:
    """CSV and, of a fit, TensorBoard, in the run's folder."""
    where: dict[str, Any] = {"save_dir": folder.parents[1], "name": folder.parent.name, "version": folder.name}
    keep_metrics(folder)
    found: list[Logger] = [CSVLogger(**where)]
    return [*found, TensorBoardLogger(**where, default_hp_metric=False)] if subcommand == "fit" else found


def default_callbacks(
    config: Any, subcommand: str, folder: Path, monitor: tuple[str, str], *, has_logger: bool
) -> list[Callback]:
    """Best and last checkpoint, learning rates, bar, report; the CSV of predictions."""
    trainer = config.trainer
    own: list[Callback] = []
    if trainer.enable_progress_bar is not False and not config.quiet:
        own.append(progress())
    if subcommand == "fit" and trainer.enable_checkpointing is not False and not trainer.fast_dev_run:
        metric, mode = monitor
        where: dict[str, Any] = {"dirpath": folder / "checkpoints", "enable_version_counter": False}
        own.append(ModelCheckpoint(monitor=metric, mode=mode, filename="best", **where))
        # One of its own: `save_last` above would write only when the best changes.
        own.append(ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **where))
    if subcommand == "fit":
        own += [callbacks.ExactResume(), callbacks.StopOnNonFinite()]
    if subcommand == "fit" and has_logger:
        own.append(LearningRateMonitor("step"))
    if subcommand != "predict" and not trainer.fast_dev_run:
        own.append(callbacks.Report(folder))
    if subcommand == "predict":
        own.append(callbacks.PredictionWriter(predictions_file(config.predictions, folder)))
    return own


def predictions_file(given: str | None, folder: Path) -> Path:
    """Where `predict` writes: `--predictions`, or in the run's folder, which another start does not find again."""
    if given is None:
        log.info("predict: with --predictions FILE the same command goes on where a killed one stopped")
        return folder / "predictions.csv"
    log.info("predict: if it is killed, the same command goes on from %s.parts", given)
    return Path(given)


def drop_overridden_callbacks(given: Sequence[Callback]) -> list[Callback]:
    """Of callbacks that can't be together the last: what the command line adds takes the place of the config's."""
    kept: list[Callback] = []
    for place, callback in enumerate(given):
        later = given[place + 1 :]
        opens = isinstance(callback, callbacks.GradualUnfreezing)
        if any(other.state_key == callback.state_key for other in later) or (
            opens and any(isinstance(other, callbacks.Freeze) for other in later)
        ):
            log.info("callbacks: the config's %s gives way to what is added", type(callback).__name__)
        else:
            kept.append(callback)
    return kept


def bf16_is_native(accelerator: Any = "auto") -> bool:
    """Whether the device multiplies bf16 in hardware: only there is it faster than fp32.

    On processors without it, bf16 takes about twice the time of fp32 (benchmarks/results/threads.json).
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    if accelerator not in ("auto", "cpu"):
        return False
    if accelerator == "auto" and torch.backends.mps.is_available():
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))
