"""From a complaint of the parser, or an error of ours, to a sentence: expected, received, what to do."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch import callbacks as lightning_callbacks
from torch.optim.lr_scheduler import LRScheduler

from ..parts.peft import Peft
from ..parts.spelling import did_you_mean

OURS = [Path(__file__).resolve().parents[2] / package for package in ("recipes", "callbacks", "datamodules")]


def explain(message: str, parser: Any, argv: Sequence[str], classes: Iterable[type], recipe: str) -> str:
    """Shorten a jsonargparse message to at most three lines and add the nearest known word.

    Args:
        message: What the parser says; may run over a screen.
        parser: The parser, for the keys that it knows.
        argv: The command line, to find the whole of a key of which the message has only the end.
        classes: What can be named by class: data modules, callbacks, schedules.
        recipe: The recipe's name, for the command that helps.
    """
    optimizers = _public(torch.optim, torch.optim.Optimizer)
    classes = [*classes, Peft, *optimizers, *_public(lightning_callbacks, object)]
    help_line = f"python -m recipes.{recipe} fit --help lists every key."
    if found := re.search(r"unrecognized arguments: (\S+)", message):
        word = found[1]
        if not word.startswith("-"):
            return f"unexpected word {word!r} on the command line: keys start with --, as in --model.{word}"
        key = word.lstrip("-").split("=")[0]
        known = known_keys(parser) + [f"model.optimizer.{name}" for name in _parameters(optimizers)]
        leaf = key.replace("model.", "model.optimizer.", 1)
        near = f"; did you mean '--{leaf}'?" if leaf in known else _near(key, known, "--")
        return f"key --{key} is not known{near}\n{help_line}"
    if found := re.search(r"does not accept option '([^']+)'", message):
        return f"key {found[1]!r} is not known{_near(found[1], known_keys(parser))}\n{help_line}"
    if found := re.search(r"Option '([^']+)' is not accepted", message):
        key = _whole(found[1], argv)
        return f"key {key!r} is not known{_near(found[1], _parameters(_fitting(key, classes)))}"
    if found := re.search(r"arguments are required: (.+)", message):
        key = _whole(found[1], argv)
        if key == "method" and any(word.startswith("--model.peft.") for word in argv):
            key = "model.peft.method"
        return f"required and not given: {key}; give it on the command line or under init_args"
    if found := re.search(r'Linked "([^"]+)" must be given via "([^"]+)"', message):
        return f"{found[1]} follows from {found[2]}: leave it out"
    if found := re.search(r"argument (\S+): expected one argument", message):
        return f"{found[1].split('/')[-1]} needs a value"
    found = re.search(r'Parser key "([^"]+)"', message)
    key = _whole(found[1], argv) if found else "a value"
    value = re.search(r"Given value: (.*)|Got value: (.*)|import path string: (.*)", message)
    given = next(filter(None, value.groups()), "") if value else ""
    if key == "model.peft":
        return f"{key}: expected a mapping, {{method: lora, rank: 8}}, or --{key}.method=lora; got {given!r}"
    if "import path string" in message and key != "seed_everything" and "class 'float'" not in message:
        known = [kind.__name__ for kind in classes]
        return f"{key}: {given!r} is not the name of a class{_near(given, known)}"
    expected = _expected(message)
    if expected:
        near = _near(given, re.findall(r"'([^']+)'", expected))
        return f"{key}: expected {expected}; got {given!r}{near}"
    return "\n".join(message.strip().splitlines()[:3])


def unwrapped(message: str) -> str:
    """The sentence inside what jsonargparse says when a class of a union of types cannot be built."""
    found = re.search(r"Errors:\n\s*- (.+(?:\n {6}.+)*)", message)
    return " ".join(found[1].split()) if found else message


def known_keys(parser: Any) -> list[str]:
    """Every dotted key that the parser takes."""
    return [action.dest for action in parser._actions if action.dest not in ("help", "==SUPPRESS==")]


def sentence_of(error: BaseException) -> str | None:
    """What an error raised by this collection's own code says; None for any other, which keeps its traceback.

    The error may have been wrapped on its way, or have come as text from a loader's worker process, where its
    last line is the sentence.
    """
    if error.__context__ is not None and (inner := sentence_of(error.__context__)):
        return inner
    if isinstance(error, (ValueError, FileNotFoundError, TypeError)):
        frames = traceback.extract_tb(error.__traceback__)
        if frames and any(home in Path(frames[-1].filename).resolve().parents for home in OURS):
            return str(error)
        if frames and Path(torch.optim.__file__).parent in Path(frames[-1].filename).parents:
            return f"model.optimizer or model.schedule: {error}"
        if "DataLoader worker process" in str(error):
            *_, last = re.findall(r"(?:ValueError|FileNotFoundError|TypeError): (.+)", str(error))
            return str(last)
    return None


def _expected(message: str) -> str:
    kinds = re.findall(r"- ?Expected a (.+?)(?:\. Got.*)?$|^\s*Expected a (.+?)\. Got", message, re.MULTILINE)
    words = []
    for kind in (next(filter(None, pair)) for pair in kinds):
        if kind.startswith("typing.Literal"):
            words.append(f"one of {kind[len('typing.Literal') + 1 : -1]}")
        elif name := re.match(r"<class '(?:.*\.)?(\w+)'>", kind):
            words.append({"NoneType": "null", "int": "a whole number", "float": "a number"}.get(name[1], name[1]))
    return " or ".join(dict.fromkeys(words))


def _whole(key: str, argv: Sequence[str]) -> str:
    words = [word.lstrip("-").split("=")[0] for word in argv if word.startswith("--")]
    return next((word for word in words if word.endswith(f".{key}")), key)


def _fitting(key: str, classes: Iterable[type]) -> list[type]:
    """The classes that the part of the config at a key can name; all of them where the key does not tell."""
    bases = {"data": LightningDataModule, "optimizer": torch.optim.Optimizer, "schedule": LRScheduler, "peft": Peft}
    base = next((base for part, base in bases.items() if part in key.split(".")[:-1]), object)
    return [kind for kind in classes if issubclass(kind, base)]


def _parameters(classes: Iterable[type]) -> list[str]:
    names: set[str] = set()
    for kind in classes:
        for base in kind.__mro__[:-1]:
            names |= set(inspect.signature(base.__init__).parameters)  # type: ignore[misc]
    return sorted(names - {"self", "args", "kwargs"})


def _public(module: Any, base: type) -> list[type]:
    found = (getattr(module, name) for name in dir(module) if not name.startswith("_"))
    return [kind for kind in found if inspect.isclass(kind) and issubclass(kind, base)]


def _near(word: str, known: Iterable[str], prefix: str = "") -> str:
    return did_you_mean(word, known).replace("'", f"'{prefix}", 1)
