"""python -m recipes: what there is, what a config says, and what it will do.

    python -m recipes ls [recipes|configs|strategies|backbones|datamodules|callbacks] [FILTER]
    python -m recipes show NAME            a config, a recipe, a data module, a callback or a backbone
    python -m recipes copy CONFIG FILE     a config to edit
    python -m recipes plan CONFIG [STRATEGY ...] [--key value ...]    groups, learning rates and steps, without training
    python -m recipes doctor CONFIG [--key value ...]  the data: broken files, copies across splits, doubtful labels
    python -m recipes report RUN [RUN ...] a run's page made again; several runs compared on the same samples

`ls`, `show` and `copy` read source files as text and import neither torch nor Lightning.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .cli.catalogue import KINDS, copy, ls, recipe_of, show
from .cli.early import greet, stop


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(
        "python -m recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("ls", help="list recipes, configs, strategies, backbones, data modules, callbacks")
    command.add_argument(
        "kind", nargs="?", default="", help=f"one of {', '.join(KINDS)}; or a word to search all of them for"
    )
    command.add_argument("word", nargs="?", default="", help="show only what contains this")
    command = commands.add_parser("show", help="print a config, or what a name stands for")
    command.add_argument("name")
    command = commands.add_parser("copy", help="copy a config to edit it")
    command.add_argument("config")
    command.add_argument("file", type=Path)
    command = commands.add_parser("plan", help="show groups, learning rates and steps without data or training")
    command.add_argument("config", nargs="+", help="a shipped config or a file; strategies go on top of it")
    command.add_argument("--samples", type=int, help="training samples, where the data is not at hand")
    command = commands.add_parser(
        "doctor", help="look at the data before anyone trains; status 1 where it is not sound"
    )
    command.add_argument("config", help="a shipped config or a file")
    command.add_argument("--json", type=Path, help="file of all that was found; runs/doctor/doctor.json if not given")
    command = commands.add_parser("report", help="make a run's report.html again, or compare several runs")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    command.add_argument(
        "--out", type=Path, help="page of a comparison; comparison.html beside the first run if not given"
    )
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in ("plan", "doctor"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command in ("plan", "doctor", "report"):
        greet(arguments.command)
    if arguments.command == "ls":
        ls(arguments.kind, arguments.word)
    elif arguments.command == "show":
        show(arguments.name)
    elif arguments.command == "copy":
        copy(arguments.config, arguments.file)
    elif arguments.command == "report":
        from callbacks.report.comparison import main as compare  # takes seconds: it knows Lightning

        try:
            print(compare(arguments.runs, arguments.out))
        except (FileNotFoundError, ValueError) as error:
            stop(str(error))
    elif arguments.command == "doctor":
        recipe = importlib.import_module(f"recipes.{recipe_of(arguments.config)}")
        from .cli.doctor import FINDINGS, doctor

        sys.exit(doctor(recipe.main, ["--config", arguments.config, *rest], arguments.json or FINDINGS))
    else:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a plan needs no data, so it asks no network for any
        recipe = importlib.import_module(f"recipes.{recipe_of(arguments.config[0])}")
        from .cli.plan import plan

        named = [word for config in arguments.config for word in ("--config", config)]
        plan(recipe.main, [*named, *rest], samples=arguments.samples)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # `| head` is done reading
        sys.stderr.close()
