"""Configs by name, and errors that a person can act on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser

import callbacks
import datamodules

from ..parts import schedules
from ..parts.muon import MuonWithAdamW
from . import early
from .mistakes import explain


class ConfigByName(ActionConfigFile):
    """`--config vision/quickstart` as well as `--config some/file.yaml`."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the config that the name stands for."""
        try:
            path = early.find_config(str(values))
        except FileNotFoundError as error:
            early.stop(str(error))
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
        early.stop(explain(message, parser, self.argv, nameable(), self.recipe))


def nameable() -> list[type]:
    """Classes of this collection that a config can name."""
    modules = (callbacks, datamodules, schedules)
    found = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    return [kind for kind in found if kind not in (schedules.Schedule, schedules.Decay)] + [MuonWithAdamW]
