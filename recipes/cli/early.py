"""Names that a person types: shipped configs, files, commands, and the nearest one where there is a slip.

Standard library and YAML only: mistakes in a name are told at once, before torch and Lightning are imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import yaml

from ..parts.spelling import did_you_mean

CONFIGS = Path(__file__).parents[1] / "configs"
STRATEGIES = "strategy/"
WEIGHTS = Path(__file__).parents[1] / "weights"
SUBCOMMANDS = {
    "fit": "train; with --test, test the best checkpoint afterwards",
    "validate": "evaluate on the validation split",
    "test": "evaluate on the test split",
    "predict": "write a CSV or Parquet file of names or texts, classes and probabilities",
}
TOP_LEVEL_KEYS = (
    *("seed_everything", "trainer", "model", "data", "test", "feature_views", "ckpt_path", "weights_only"),
    *("verbose", "return_predictions", "config", "predictions", "quiet"),
)


def config_names() -> list[str]:
    """Names of the shipped configs, such as `vision/quickstart`, sorted."""
    return [name for name in _shipped() if not name.startswith(STRATEGIES)]


def strategy_names() -> list[str]:
    """Names of the shipped strategies, such as `strategy/lora`, sorted: configs that go on top of another."""
    return [name for name in _shipped() if name.startswith(STRATEGIES)]


def _shipped() -> list[str]:
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """The file of a config: a local file of that name wins over a shipped one.

    Raises:
        FileNotFoundError: Neither exists; names the nearest.
    """
    for candidate in (Path(name), Path(f"{name}.yaml"), CONFIGS / f"{name}.yaml", CONFIGS / name):
        if candidate.is_file():
            return candidate
    hint = did_you_mean(name.removesuffix(".yaml"), _shipped())
    raise FileNotFoundError(
        f"config {name!r} is neither a file nor a shipped config{hint}\npython -m recipes ls configs lists them."
    )


def stop(message: str) -> NoReturn:
    """End the program over a user's mistake: the message, no traceback, status 2."""
    sys.stderr.write(f"error: {message.rstrip()}\n")
    raise SystemExit(2)


def header(path: Path) -> list[str]:
    """Comment lines at the top of a config, without the comment sign."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].strip())
    return lines


def read_yaml(path: Path) -> dict[str, Any]:
    """A config's content; a mistake in its YAML ends the program with the line and the reason."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        stop(f"{path} is not valid YAML{where}: {getattr(error, 'problem', None) or error}")
    if not isinstance(content, dict):
        stop(f"{path} must hold keys such as model, data and trainer; found {type(content).__name__}")
    return content


def start(recipe: str, argv: Sequence[str]) -> None:
    """What a recipe does first when it is the program, before torch is imported.

    By default OpenMP's threads spin while they wait for each other. Beside another busy program that nearly doubles
    the time of a step; asleep, they cost up to a tenth of it alone (benchmarks/results/threads.json).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    check_siblings()
    check_command(recipe, argv)
    if "--quiet" not in argv and "--help" not in argv:
        greet(f"{recipe} {argv[0]}")
    if not hub_can_be_found():
        os.environ["HF_HUB_OFFLINE"] = "1"  # its library would try for 25 s before it says so


def check_siblings() -> None:
    """A folder called `callbacks` or `datamodules` where the command is typed must not stand in for ours."""
    home = Path(__file__).resolve().parents[2]
    for package in ("callbacks", "datamodules"):
        spec = importlib.util.find_spec(package)
        assert spec is not None, f"{package} is installed with recipes"
        found = Path(next(iter(spec.submodule_search_locations or [str(spec.origin)]))).resolve()
        if found != home / package:
            stop(
                f"{found} hides this collection's own {package!r} package.\n"
                f"Run `python -P -m recipes...` (Python 3.11 and later), or type the command in another folder."
            )


def hub_can_be_found(seconds: float = 3) -> bool:
    """Whether the hub's name is known here, or somebody else sees to that: a proxy, or a setting."""
    settled = ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if any(os.environ.get(name) for name in settled):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    found: list[bool] = []

    def look() -> None:
        with contextlib.suppress(OSError):
            found.append(bool(socket.getaddrinfo(host, 443)))

    asking = threading.Thread(target=look, daemon=True)  # a name server that is gone would hold us up for longer
    asking.start()
    asking.join(seconds)
    return bool(found)


def greet(what: str) -> None:
    """Say that something goes on, within a second of the command: the imports that follow take several."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{what}: starting\n")
        sys.stderr.flush()


def check_command(recipe: str, argv: Sequence[str]) -> None:
    """Answer what needs no heavy import: help, an unknown subcommand, a config that is not there or not YAML.

    Args:
        recipe: The module's name, such as `vision`.
        argv: The command line after `python -m recipes.<recipe>`.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m recipes.{recipe} SUBCOMMAND --config NAME_OR_FILE [--key value ...]\n")
        for name, meaning in SUBCOMMANDS.items():
            print(f"  {name:9} {meaning}")
        print(f"\npython -m recipes.{recipe} fit --help lists every key; python -m recipes ls configs, the configs.")
        raise SystemExit(0 if argv else 2)
    if argv[0] not in SUBCOMMANDS:
        if argv[0].startswith("-"):
            stop(f"the subcommand comes first: python -m recipes.{recipe} fit {argv[0]} ...; got {argv[0]!r} before it")
        expected = f"expected one of {', '.join(SUBCOMMANDS)}{did_you_mean(argv[0], SUBCOMMANDS)}"
        stop(f"subcommand {argv[0]!r} is not known; {expected}")
    for position, word in enumerate(argv):
        if word in ("-c", "--config") or word.startswith("--config="):
            if word.startswith("--config="):
                name = word.removeprefix("--config=")
            elif position + 1 < len(argv):
                name = argv[position + 1]
            else:
                stop(f"{word} needs a name or a file\npython -m recipes ls configs lists the names.")
            check_config(name)


def check_config(name: str) -> None:
    """A config must exist, be YAML, and have known keys at its top."""
    try:
        path = find_config(name)
    except FileNotFoundError as error:
        stop(str(error))
    for key in read_yaml(path):
        if key not in TOP_LEVEL_KEYS:
            expected = f"expected model, data, trainer, seed_everything{did_you_mean(str(key), TOP_LEVEL_KEYS)}"
            stop(f"{path}: key {key!r} is not known at the top; {expected}")
