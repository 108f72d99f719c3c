"""The command line that all recipes share: Lightning's, with configs by name and errors a person can act on.

    python -m recipes.vision fit --config vision/quickstart --trainer.max_epochs 5

What it adds to LightningCLI: configs are found by name; the data module tells the model its number of
classes; each run has a folder of its own with config, metrics and checkpoints; a mistake gets a sentence
instead of a traceback; and what is configured now beats what a checkpoint says.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from jsonargparse import SUPPRESS, ActionConfigFile
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from ..training.base import RecipeModule
from . import defaults, early, overrides
from .mistakes import sentence_of, unwrapped
from .parser import ConfigByName, RecipeParser
from .runs import FinishedRun, SaveRunConfig, check_writable, folder_for, started
from .screen import configure_logging, filter_warnings
from .summary import print_interruption, print_summary, report_facts


class RecipeCLI(LightningCLI):
    """LightningCLI for one recipe.

    Args:
        model_class: The recipe's LightningModule, with `num_classes` among its arguments and a `monitor`
            attribute (metric, mode) that says what the best checkpoint is best in.
        args: Command line as a list of strings; the process's own if not given.
        plan: Build everything and run nothing; without data, ten classes are assumed.
    """

    def __init__(self, model_class: type[RecipeModule], args: ArgsType = None, *, plan: bool = False) -> None:
        if args is None:
            args = sys.argv[1:]
        early.check_siblings()
        filter_warnings()
        configure_logging(quiet=isinstance(args, Sequence) and "--quiet" in args)
        self.only = args[0] if isinstance(args, Sequence) and args else None
        self.plan = plan
        self.recipe = model_class.recipe
        self.started = started()
        self.building = True
        self.assumed_classes = False  # where a plan has no data to ask
        self.next_command: str | None = None
        try:
            if isinstance(args, Sequence):
                early.check_command(self.recipe, args)  # type: ignore[arg-type]
                args = overrides.with_checkpoint(list(args), self.recipe)  # type: ignore[arg-type]
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
            early.stop(f"{sentence}\nRECIPES_TRACEBACK=1 shows where this was raised.")
        except KeyboardInterrupt:  # before Lightning's loop, which has its own way
            sys.stderr.write(f"\n{self.recipe}: interrupted before it began; nothing was written\n")
            raise SystemExit(130) from None

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is asked for: parsers of the others would only take time."""
        known = LightningCLI.subcommands()
        return {self.only: known[self.only]} if self.only in known else known

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
            early.stop(str(error))  # through the parser, it would come wrapped in a screen of text

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for other in {"verbose", "return_predictions"} - set(self._subcommand_method_arguments[subcommand]):
            parser.add_argument(f"--{other}", help=SUPPRESS)  # so that one run's config serves all subcommands
        switch: dict[str, Any] = {"type": bool, "default": False, "nargs": "?", "const": True}
        parser.add_argument("--test", **switch, help="Test the best checkpoint after the fit.")
        parser.add_argument(
            "--quiet", **switch, help="Print warnings and errors only, and at the end the run's folder."
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
        """The config at hand counts, not what the checkpoint says."""
        subcommand = self.config["subcommand"]
        if not self.plan:
            overrides.override_checkpoint(self.config[subcommand], subcommand)

    def before_instantiate_classes(self) -> None:
        """Fill in what the config leaves open."""
        config = self.config[self.subcommand]
        if self.plan:
            config.trainer.logger = False
            self.planned_weights = config.model.get("weights")
            overrides.without_weights(config.model)
        defaults.fill_in(config.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The run's folder, loggers and callbacks, each unless the config brings its own."""
        config, subcommand = self.config[self.subcommand], str(self.subcommand)
        self.folder = folder_for(config, self.recipe, subcommand, self.started)
        if not self.plan:  # which writes nothing
            check_writable(self.folder)
        self.save_config_kwargs = {"folder": self.folder}
        given, monitor = self._get(self.config_init, "trainer"), self.model.monitor
        options = defaults.trainer_options(config, given, subcommand, self.folder, monitor)  # type: ignore[arg-type]
        return super().instantiate_trainer(**kwargs, **options)

    @property
    def finished(self) -> FinishedRun:
        """The run, for who tells of it."""
        config, subcommand = self.config[self.subcommand], str(self.subcommand)
        made = self.trainer, self.model, self.datamodule
        return FinishedRun(self.recipe, subcommand, config, self.folder, self.started, *made, self.next_command)

    def _run_subcommand(self, subcommand: str) -> None:
        self.building = False
        if self.plan:
            return
        run = self.finished
        if run.report is not None:
            run.report.facts = report_facts(run)
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stop:  # Lightning's, after Ctrl-C and after SIGTERM
            if self.trainer.state.status != TrainerStatus.INTERRUPTED:
                raise
            print_interruption(run)
            raise SystemExit(143 if isinstance(stop, SIGTERMException) else 130) from None

    def after_fit(self) -> None:
        """Test the best checkpoint if asked to; show what was done."""
        run, tested = self.finished, None
        if run.config.test:
            try:
                tested = self.trainer.test(
                    self.model, datamodule=self.datamodule, ckpt_path=run.best or None, verbose=False
                )
            except (ValueError, OSError):  # a test that fails does not hide the fit
                print_summary(run)
                raise
        print_summary(run, tested=tested[0] if tested else None)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in ("validate", "test"):
            kwargs["verbose"] = False  # the summary shows the figures
        if subcommand == "predict":
            kwargs["return_predictions"] = False  # they go to the CSV; in memory they would grow without bound
        return kwargs

    def after_validate(self) -> None:
        """Show the figures."""
        print_summary(self.finished)

    after_test = after_predict = after_validate
