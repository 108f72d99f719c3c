"""Who may import whom, read off the syntax trees; and what a stranger's eye would catch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1]
PACKAGES = ("recipes", "callbacks", "datamodules")
FILES = sorted(path for package in PACKAGES for path in (HOME / package).rglob("*.py"))
STANDARD = set(sys.stdlib_module_names) | {"__future__"}

OTHERS = {"callbacks", "callbacks/*", "datamodules", "datamodules/*"}
ROOMS: dict[str, set[str]] = {  # room -> rooms that its files may import from, besides their own
    "recipes": {"recipes/cli", "recipes/training", "recipes/deploy", "recipes/parts"} | OTHERS,
    "recipes/cli": {"recipes/training", "recipes/parts"} | OTHERS,
    "recipes/training": {"recipes/parts"} | OTHERS,
    "recipes/deploy": {"recipes/cli", "recipes/training", "recipes/parts"} | OTHERS,
    "recipes/parts": set(),
    "callbacks": {"callbacks/*"},  # the package's list of names; the techniques know nothing of each other
    "callbacks/*": set(),
    "datamodules": {"datamodules/*"},
    "datamodules/*": {"datamodules/*"},
}
LIBRARIES = {  # package, or room -> what of other people's its files may import
    "recipes/parts": {"torch", "torchvision", "transformers", "peft", "torchmetrics", "timm", "safetensors"}
    | {"torch_pruning"}  # cuts channels
    | {"torchjd"},  # tells gradients that conflict
    "recipes": {
        "torch",
        "torchvision",
        "lightning",
        "torchmetrics",
        "transformers",
        "tokenizers",
        "numpy",
        "safetensors",
    }
    | {"jsonargparse", "yaml", "rich", "tqdm", "typing_extensions"}
    | {"onnx", "onnxruntime", "onnxscript"}  # recipes.export writes with them
    | {"litserve", "fastapi", "starlette", "PIL"},  # recipes.serve; the second and third come with the first
    "callbacks/report": {"torch", "lightning", "torchmetrics", "safetensors", "jinja2", "matplotlib"},
    "callbacks/predictions": {"torch", "lightning", "pyarrow"},
    "callbacks": {"torch", "lightning", "torchmetrics", "safetensors"},
    "datamodules": {"torch", "torchvision", "lightning", "datasets", "transformers", "tokenizers", "numpy"}
    | {"pyarrow", "PIL", "scipy", "sklearn", "filelock", "fsspec", "tqdm"},
}
LONG = {  # files of more than 400 lines, and why they are one
    "recipes/parts/backbones/families.py": "a table, a family a row",
    "recipes/parts/schedules.py": "ten schedules, read side by side; a config names them by this path",
}


def name_of(path: Path) -> str:
    return path.relative_to(HOME).as_posix()


def room_of(path: Path) -> str:
    """The folder, without the folders inside a part."""
    package, *folders = path.relative_to(HOME).parent.parts
    return "/".join([package, *folders[:1]])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(HOME).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports: at its top, in a function, for types only, or by a name in a string."""
    own = module_of(path).split(".")
    package = own if path.name == "__init__.py" else own[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield by_string(node.args[0], path)


def by_string(argument: ast.expr, path: Path) -> str:
    """The module that a string names; of a string with a gap, one of those that it could."""
    start = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
    assert isinstance(start, ast.Constant), f"{name_of(path)} imports what only a run can tell"
    return str(start.value) if start is argument else next(m for m in MODULES if m.startswith(str(start.value)))


def allowed(path: Path, target: Path) -> bool:
    """Whether the rule lets one file of ours import another."""
    own, its = room_of(path), room_of(target)
    general = {name: f"{name.split('/')[0]}/*" if name not in ROOMS else name for name in (own, its)}
    if target == HOME / "recipes" / "__init__.py":  # the version alone
        return own.split("/")[0] == "recipes"
    return own == its or general[its] in ROOMS[general[own]]


def strangers(path: Path) -> list[str]:
    """What a file imports against the rules."""
    library = next(known for room, known in LIBRARIES.items() if f"{name_of(path)}/".startswith(f"{room}/"))
    found = []
    for module in imports(path):
        if module.split(".")[0] in PACKAGES:
            if not allowed(path, MODULES[module]):
                found.append(module)
        elif module.split(".")[0] not in STANDARD | library:
            found.append(module)
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_only_what_its_room_may(path: Path) -> None:
    assert not strangers(path), f"{name_of(path)} imports {strangers(path)}"


def circle() -> list[str]:
    """Files that import each other, the first of them again at the end; nothing where none do."""
    try:
        TopologicalSorter({p: {MODULES[m] for m in imports(p) if m in MODULES} - {p} for p in FILES}).prepare()
    except CycleError as error:
        return list(map(name_of, error.args[1]))
    return []


def test_nothing_goes_round_in_a_circle() -> None:
    assert not circle()


def test_a_circle_is_seen_also_where_it_is_for_types_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    read, line = Path.read_text, "\nif TYPE_CHECKING:\n    from .command import RecipeCLI\n"
    ours = HOME / "recipes" / "cli" / "runs.py"
    monkeypatch.setattr(Path, "read_text", lambda self: read(self) + (line if self == ours else ""))
    assert {"recipes/cli/runs.py", "recipes/cli/command.py"} <= set(circle())


@pytest.mark.parametrize(
    "line",
    [
        "from recipes.vision import main",
        "def late():\n    from ..text import TextClassifier",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from recipes.cli.command import RecipeCLI",
        "import importlib\nmodel = importlib.import_module('recipes.cli.runs')",
        "from importlib import import_module\nmodel = import_module(f'recipes.{1}')",
        "import callbacks",
        "import lightning",
    ],
)
def test_a_part_that_reaches_out_is_seen(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = HOME / "recipes" / "parts" / "losses.py"
    monkeypatch.setattr(Path, "read_text", lambda self: line)
    assert strangers(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_public_thing_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} in {path.name} has no docstring"


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "__init__.py"], ids=name_of)
def test_every_module_has_its_tests_where_the_tree_says(path: Path) -> None:
    where = HOME / "tests" / path.relative_to(HOME).parent / f"test_{path.stem.strip('_')}.py"
    assert "\ndef test_" in where.read_text() or "    def test_" in where.read_text()


def test_no_file_is_two_things() -> None:
    long = {name_of(path) for path in FILES if len(path.read_text().splitlines()) > 400}
    assert long == set(LONG)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_every_config_weight_and_template_is_packaged() -> None:
    import tomllib

    patterns = tomllib.loads((HOME / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in PACKAGES:
        packaged = {path for pattern in patterns.get(package, ()) for path in (HOME / package).glob(pattern)}
        data = {p for p in (HOME / package).rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
        assert data == packaged


def test_no_room_for_leftovers() -> None:
    names = {p.stem for p in FILES} | {p.parent.name for p in FILES}
    assert not names & {"utils", "helpers", "common", "misc"}
