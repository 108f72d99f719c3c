"""The command line that all recipes share: Lightning's, with configs by name and errors a person can act on.

    python -m recipes.vision fit --config vision/quickstart --trainer.max_epochs 5

What it adds to LightningCLI: configs are found by name; the data module tells the model its number of
classes; each run has a folder of its own with config, metrics and checkpoints; a mistake gets a sentence
instead of a traceback; and what is configured now beats what a checkpoint says.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from jsonargparse import SUPPRESS, ActionConfigFile
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

import callbacks
import datamodules

from ..parts import schedules
from ..parts.optim import MuonWithAdamW
from . import early as names
from .mistakes import explain, sentence_of, unwrapped
from .runs import (
    SaveRunConfig,
    glance,
    keep_metrics,
    run_of_checkpoint,
    with_config_of_checkpoint,
    with_files_to_predict,
)
from .screen import counted, progress, quieten, speak
from .summary import print_interruption, print_summary, report_facts

log = logging.getLogger(__name__)


class ConfigByName(ActionConfigFile):
    """`--config vision/quickstart` as well as `--config some/file.yaml`."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the config that the name stands for."""
        try:
            path = names.find_config(str(values))
        except FileNotFoundError as error:
            names.stop(str(error))
        super().__call__(parser, cfg, str(path), option_string)  # type: ignore[no-untyped-call]


class RecipeParser(LightningArgumentParser):
    """Answers a mistake with a few lines in place of the whole usage."""

    argv: ClassVar[Sequence[str]] = ()  # the command line; a message may hold only the end of a key
    recipe: ClassVar[str] = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)  # else --trainer.max_epoch would pass, unsaid

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with what was expected, what came and what to do."""
        parser = getattr(ex, "subcommand_parser", None) or self
        names.stop(explain(message, parser, self.argv, nameable(), self.recipe))


class RecipeCLI(LightningCLI):
    """LightningCLI for one recipe.

    Args:
        model_class: The recipe's LightningModule, with `num_classes` among its arguments and a `monitor`
            attribute (metric, mode) that says what the best checkpoint is best in.
        args: Command line as a list of strings; the process's own if not given.
        plan: Build everything and run nothing; without data, ten classes are assumed.
    """

    def __init__(self, model_class: type[LightningModule], args: ArgsType = None, *, plan: bool = False) -> None:
        if args is None:
            args = sys.argv[1:]
        self.quiet = isinstance(args, Sequence) and "--quiet" in args
        check_siblings()
        quieten()
        speak(quiet=self.quiet)
        self.plan = plan
        self.recipe = Path(sys.modules[model_class.__module__].__file__ or "recipe").stem
        self.started = started()
        self.building = True
        self.assumed_classes = False  # where a plan has no data to ask
        try:
            if isinstance(args, Sequence):
                names.check_command(self.recipe, args)  # type: ignore[arg-type]
                args = with_config_of_checkpoint(with_files_to_predict(list(args)), self.recipe)  # type: ignore[arg-type]
                RecipeParser.argv, RecipeParser.recipe = args, self.recipe
            super().__init__(
                model_class,
                LightningDataModule,
                subclass_mode_data=True,
                args=args,
                save_config_callback=SaveRunConfig,
                parser_class=RecipeParser,
                trainer_defaults={"enable_model_summary": False},  # the table of groups and the summary say more
                auto_configure_optimizers=False,
                seed_everything_default=0,
            )
        except (ValueError, TypeError, OSError, ImportError, MisconfigurationException) as error:
            sentence = sentence_of(error) or (unwrapped(str(error)) if self.building else None)
            if sentence is None or os.environ.get("RECIPES_TRACEBACK"):
                raise
            names.stop(f"{sentence}\nRECIPES_TRACEBACK=1 shows where this was raised.")
        except KeyboardInterrupt:  # before Lightning's loop, which has its own way
            sys.stderr.write(f"\n{self.recipe}: interrupted before it began; nothing was written\n")
            raise SystemExit(130) from None

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """As Lightning's, with configs by name."""
        parser = super().init_parser(**kwargs)
        action = next(a for a in parser._actions if isinstance(a, ActionConfigFile))
        action.__class__ = ConfigByName
        action.help = "A shipped config's name or a file; several merge from left to right."
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The model learns its number of classes from the data; no config repeats it."""
        parser.link_arguments("data", "model.num_classes", compute_fn=self._num_classes, apply_on="instantiate")

    def _num_classes(self, data: Any) -> int:
        try:
            return int(data.num_classes)
        except (ValueError, OSError) as error:
            if self.plan and isinstance(error, FileNotFoundError):
                self.assumed_classes = True
                return 10
            names.stop(str(error))  # through the parser, it would come wrapped in a screen of text

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for other in {"verbose", "return_predictions"} - set(self._subcommand_method_arguments[subcommand]):
            parser.add_argument(f"--{other}", help=SUPPRESS)  # so that one run's config serves all subcommands
        parser.add_argument(
            "--test",
            type=bool,
            default=False,
            nargs="?",
            const=True,
            help="Test the best checkpoint after the fit.",
        )
        parser.add_argument(
            "--quiet",
            type=bool,
            default=False,
            nargs="?",
            const=True,
            help="Print warnings and errors only, and at the end the run's folder.",
        )
        parser.add_argument(
            "--predictions",
            type=str | None,
            default=None,
            help="File that predict writes to, .csv or .parquet; predictions.csv in the run's folder if not given. "
            "With a file given, the same command goes on where one that was killed stopped.",
        )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """As Lightning's, without its warning that a list was passed."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """The config at hand counts; say where it differs from the checkpoint's hyper-parameters."""
        subcommand = self.config["subcommand"]
        config = self.config[subcommand]
        path = config.get("ckpt_path")
        if self.plan or (subcommand == "fit" and not path):
            return
        if not path:
            names.stop(
                f"{subcommand} needs --ckpt_path runs/.../checkpoints/best.ckpt: without it the head is untrained"
            )
        if path in ("best", "last", "hpc"):
            names.stop(f"--ckpt_path {path}: give the file's path, runs/.../checkpoints/{path}.ckpt")
        checkpoint = glance(path)
        if subcommand == "fit":
            stop_if_finished(checkpoint, path, config.trainer)
        saved = checkpoint.get("hyper_parameters", {})
        now = flatten(config.model.as_dict())
        for key, old in flatten({k: v for k, v in saved.items() if not k.startswith("_")}).items():
            if key in now and plain(now[key]) != plain(old):
                if key == "backbone" and subcommand == "fit":
                    names.stop(
                        f"--ckpt_path goes on with a {old}, and model.backbone is {now[key]}: leave one of them out, "
                        f"or start afresh with --model.weights"
                    )
                log.info("resume: model.%s was %s in the checkpoint and is %s now", key, old, now[key])
        if subcommand != "fit":
            without_weights(config.model)  # the checkpoint's are about to replace them

    def before_instantiate_classes(self) -> None:
        """Train in bf16 where the hardware has it, unless a precision is given."""
        trainer = self.config[self.subcommand].trainer
        if self.plan:
            trainer.logger = False
            self.planned_weights = self.config[self.subcommand].model.get("weights")
            without_weights(self.config[self.subcommand].model)
        if trainer.precision is None and bf16_is_native(trainer.accelerator):
            trainer.precision = "bf16-mixed"
        for callback in trainer.callbacks if isinstance(trainer.callbacks, list) else ():
            if str(callback.get("class_path", "")).endswith(".EarlyStopping"):
                given = callback.init_args
                if given.check_on_train_epoch_end is None and given.monitor.startswith("val/"):
                    given.check_on_train_epoch_end = False  # else a fit that ends before a validation ends in an error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The run's folder, loggers and callbacks, each unless the config brings its own."""
        config = self._get(self.config_init, "trainer")
        folder = self.folder = self.run_folder()
        self.save_config_kwargs = {"folder": folder}
        if config["logger"] is None:
            where: dict[str, Any] = {"save_dir": folder.parents[1], "name": folder.parent.name, "version": folder.name}
            keep_metrics(folder)
            kwargs["logger"] = [CSVLogger(**where)]
            if self.subcommand == "fit":
                kwargs["logger"].append(TensorBoardLogger(**where, default_hp_metric=False))
        given = latest(config["callbacks"] or [])
        if any(isinstance(callback, LearningRateFinder) for callback in given):
            names.stop(
                "LearningRateFinder gives every parameter group the same rate, and here they differ by block: leave "
                "it out and try model.optimizer.lr at three values"
            )
        own = self.default_callbacks(has_logger=config["logger"] is not False)
        has_bar = any(isinstance(other, ProgressBar) for other in given)
        if self.subcommand != "fit" and not any(isinstance(callback, ModelCheckpoint) for callback in given):
            kwargs["enable_checkpointing"] = False
        if self.quiet:
            kwargs["enable_progress_bar"] = False
        taken = {callback.state_key for callback in given}
        kwargs["callbacks"] = given + [
            callback
            for callback in own
            if callback.state_key not in taken and not (has_bar and isinstance(callback, ProgressBar))
        ]
        return super().instantiate_trainer(**kwargs)

    def run_folder(self) -> Path:
        """`runs/<recipe>/<config>/<time>` below the trainer's `default_root_dir`; a resumed run keeps its own."""
        config = self.config[self.subcommand]
        before = run_of_checkpoint(config.get("ckpt_path"))
        if before and self.subcommand == "fit":
            return before.resolve()  # one spelling, or Lightning takes it for another run and forgets the best
        name = Path(str(config.config[0])).stem if config.get("config") else "run"
        if name == "config":  # a finished run's own config: keep the name that run had
            name = Path(str(config.config[0])).absolute().parents[1].name
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(self.started))
        if self.subcommand != "fit":
            stamp += f"-{self.subcommand}"
        parent = Path(config.trainer.default_root_dir or ".") / "runs" / self.recipe / name
        folder, again = parent / stamp, 2
        while folder.exists() and "LOCAL_RANK" not in os.environ:
            folder, again = parent / f"{stamp}-{again}", again + 1
        if not self.plan:  # which writes nothing
            check_writable(folder.resolve())
        return folder.resolve()

    def default_callbacks(self, *, has_logger: bool) -> list[Callback]:
        """Best and last checkpoint, learning rates, bar; the CSV of predictions."""
        config = self.config[self.subcommand].trainer
        own: list[Callback] = []
        if config.enable_progress_bar is not False and not self.quiet:
            own.append(progress())
        if self.subcommand == "fit" and config.enable_checkpointing is not False and not config.fast_dev_run:
            monitor, mode = self.model.monitor  # type: ignore[misc]
            where: dict[str, Any] = {"dirpath": self.folder / "checkpoints", "enable_version_counter": False}
            own.append(ModelCheckpoint(monitor=monitor, mode=mode, filename="best", **where))
            # One of its own: `save_last` above would write only when the best changes.
            own.append(ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **where))
        if self.subcommand == "fit":
            own += [callbacks.ExactResume(), callbacks.StopOnNonFinite()]
        if self.subcommand == "fit" and has_logger:
            own.append(LearningRateMonitor("step"))
        if self.subcommand != "predict" and not config.fast_dev_run:
            self.report = callbacks.Report(self.folder)
            own.append(self.report)
        if self.subcommand == "predict":
            own.append(callbacks.PredictionWriter(self.predictions()))
        return own

    def predictions(self) -> Path:
        """Where `predict` writes: `--predictions`, or in the run's folder, which another start does not find again."""
        given = self.config[self.subcommand].predictions
        if given is None:
            log.info("predict: with --predictions FILE the same command goes on where a killed one stopped")
            return self.folder / "predictions.csv"
        log.info("predict: if it is killed, the same command goes on from %s.parts", given)
        return Path(given)

    def _run_subcommand(self, subcommand: str) -> None:
        self.building = False
        if not self.plan:
            if hasattr(self, "report"):
                self.report.facts = report_facts(self)
            try:
                super()._run_subcommand(subcommand)
            except SystemExit as stop:  # Lightning's, after Ctrl-C and after SIGTERM
                if self.trainer.state.status != TrainerStatus.INTERRUPTED:
                    raise
                print_interruption(self)
                raise SystemExit(143 if isinstance(stop, SIGTERMException) else 130) from None

    def after_fit(self) -> None:
        """Test the best checkpoint if asked to; show what was done."""
        tested = None
        if self.config[self.subcommand].test:
            best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
            try:
                found = self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None, verbose=False)
            except (ValueError, OSError):  # a test that fails does not hide the fit
                print_summary(self)
                raise
            tested = found
        print_summary(self, tested=tested[0] if tested else None)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in ("validate", "test"):
            kwargs["verbose"] = False  # the summary shows the figures
        if subcommand == "predict":
            kwargs["return_predictions"] = False  # they go to the CSV; in memory they would grow without bound
        return kwargs

    def after_validate(self) -> None:
        """Show the figures."""
        print_summary(self)

    after_test = after_predict = after_validate


def latest(given: Sequence[Callback]) -> list[Callback]:
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


def check_writable(folder: Path) -> None:
    """End the program where a run's folder cannot be made."""
    there = next(part for part in (folder, *folder.parents) if part.exists())
    if not there.is_dir():
        names.stop(f"{there} is a file, and the run's folder goes below it: move it, or set trainer.default_root_dir")
    if not os.access(there, os.W_OK | os.X_OK):
        names.stop(f"no permission to write in {there}, where the run's folder goes: set trainer.default_root_dir")


def started() -> float:
    """When the command began, the same on all ranks that one command starts."""
    if "LOCAL_RANK" not in os.environ:
        os.environ["RECIPES_STARTED"] = str(time.time())
    return float(os.environ.get("RECIPES_STARTED", time.time()))


def without_weights(model: Any) -> None:
    """Have a model's config load no pretrained weights."""
    for name, value in (("weights", None), ("pretrained", False)):
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


def nameable() -> list[type]:
    """Classes of this collection that a config can name."""
    modules = (callbacks, datamodules, schedules)
    found = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    return [kind for kind in found if kind not in (schedules.Schedule, schedules.Decay)] + [MuonWithAdamW]


def check_siblings() -> None:
    """A folder called `callbacks` or `datamodules` where the command is typed must not stand in for ours."""
    home = Path(__file__).resolve().parents[2]
    for package in (callbacks, datamodules):
        found = Path(package.__file__ or next(iter(package.__path__))).resolve()
        if home not in found.parents:
            names.stop(
                f"the folder {found.parent} hides this collection's own {package.__name__!r} package.\n"
                f"Run `python -P -m recipes...` (Python 3.11 and later), or type the command in another folder."
            )
