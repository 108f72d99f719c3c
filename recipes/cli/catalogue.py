"""What there is: recipes, configs, backbones, data modules and more, read as text without importing them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from pathlib import Path

from ..parts.spelling import did_you_mean
from .early import config_names, find_config, header, stop, strategy_names

HOME = Path(__file__).parents[1]


def recipes() -> dict[str, str]:
    """Runnable modules and their docstrings."""
    found = {}
    for path in sorted(HOME.glob("[a-z]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = ast.get_docstring(tree) or ""
    return found


def configs() -> dict[str, str]:
    """Shipped configs and the first line of their headers."""
    return {name: next(iter(header(find_config(name))), "") for name in config_names()}


def strategies() -> dict[str, str]:
    """Shipped strategies and the first line of their headers."""
    return {name: next(iter(header(find_config(name))), "") for name in strategy_names()}


def backbones() -> dict[str, str]:
    """Names in the table of backbones."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse((HOME / "parts" / "backbones" / "families.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Family":
            names = next(keyword.value for keyword in node.keywords if keyword.arg == "names")
            found |= dict.fromkeys(ast.literal_eval(names), "")
    return found | {"timm/<name>": ""}


def classes(package: str) -> dict[str, str]:
    """Public classes of a package and their docstrings."""
    folder = HOME.parent / package
    found = {}
    for entry in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(entry, ast.ImportFrom) and entry.level:
            public = {alias.name for alias in entry.names}
            place = folder / str(entry.module)
            for path in sorted(place.glob("*.py")) or [place.with_suffix(".py")]:
                text = path.read_text(encoding="utf-8")
                if any(f"class {name}" in text for name in public):
                    for node in ast.parse(text).body:
                        if isinstance(node, ast.ClassDef) and node.name in public:
                            found[node.name] = ast.get_docstring(node) or ""
    return found


KINDS: dict[str, Callable[[], dict[str, str]]] = {
    "recipes": recipes,
    "configs": configs,
    "strategies": strategies,
    "backbones": backbones,
    "datamodules": lambda: classes("datamodules"),
    "callbacks": lambda: classes("callbacks"),
}


def ls(kind: str, word: str) -> None:
    """Print the names of one kind, or of all, that contain a word."""
    if kind and kind not in KINDS:
        kind, word = "", kind
    for name in [kind] if kind else list(KINDS):
        lines = {k: v.split("\n")[0] for k, v in KINDS[name]().items()}
        rows = {k: v for k, v in lines.items() if word.lower() in f"{k} {v}".lower()}
        if not rows:
            continue
        print(f"{name}:")
        if name == "backbones":
            print_columns(list(rows))
            continue
        width = max(map(len, rows))
        for row, text in rows.items():
            print(f"  {row:{width}}  {text}".rstrip())


def print_columns(words: Sequence[str], width: int = 100) -> None:
    """Print words in as many columns as fit."""
    column = max(map(len, words)) + 2
    per_line = max(1, width // column)
    for start in range(0, len(words), per_line):
        print("  " + "".join(f"{word:{column}}" for word in words[start : start + per_line]).rstrip())


def show(name: str) -> None:
    """Print a config, or the docstring of whatever else has this name."""
    if name in (commands := recipes()):
        print(commands[name])
        return
    for package in ("datamodules", "callbacks"):
        if name in (found := classes(package)):
            print(f"{package}.{name}\n\n{found[name]}")
            return
    if name in backbones():
        from ..parts.backbones import backbone_facts

        for key, value in backbone_facts(name)._asdict().items():
            print(f"{key:12} {value}")
        return
    try:
        print(find_config(name).read_text(encoding="utf-8"), end="")
    except FileNotFoundError:
        everything = [known for kind in KINDS.values() for known in kind()]
        stop(f"{name!r} is not known{did_you_mean(name, everything)}\npython -m recipes ls lists what is.")


def copy(name: str, target: Path) -> None:
    """Copy a config to a file of one's own."""
    try:
        source = find_config(name)
    except FileNotFoundError as error:
        stop(str(error))
    if target.exists():
        stop(f"{target} exists already; give another name or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    base = f"--config {recipe_of(name)}/quickstart " if name in strategies() else ""
    print(f"{target}: now `python -m recipes.{recipe_of(name)} fit {base}--config {target}`")


def recipe_of(config: str) -> str:
    """The recipe that a config is for: a folder in its path is named like it."""
    known = {name.split("/")[0] for name in config_names()}
    for part in reversed(Path(config).absolute().parts[:-1] if Path(config).exists() else Path(config).parts):
        if part in known:
            return part
    return "vision"
