"""Who may import whom, read off the syntax trees; and what a stranger's eye would catch."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1]
STANDARD = set(sys.stdlib_module_names) | {"__future__"}
SCIENCE = {"torch", "numpy", "lightning", "typing_extensions"}

MAY_IMPORT = {
    "recipes/parts": {"torch", "numpy", "torchvision", "transformers", "peft", "torchmetrics", "safetensors", "timm"},
    "recipes": SCIENCE
    | {"torchmetrics", "torchvision", "jsonargparse", "yaml", "rich", "tqdm", "callbacks", "datamodules"}
    | {"safetensors", "tokenizers", "transformers", "onnx", "onnxruntime", "onnxscript"}  # recipes.export writes them
    | {"litserve", "fastapi", "starlette", "PIL"},  # recipes.serve; the second and third come with the first
    "callbacks": {"torch", "lightning", "torchmetrics", "safetensors", "jinja2", "matplotlib", "pyarrow"},
    "datamodules": SCIENCE
    | {"torchvision", "datasets", "pyarrow", "tokenizers", "transformers", "PIL", "scipy", "sklearn"}
    | {"filelock", "fsspec", "tqdm"},
}
ONLY_CLI = {"callbacks", "datamodules"}  # the one place where the three packages meet is recipes/cli.py ...
ALSO = {  # ... but for these
    "loading.py": {"datamodules"},  # reads a picture to predict as one to train on is read
    "doctor.py": {"datamodules"},  # labels of pictures, whose features a recipe knows, are judged as those of texts
    "classifier.py": {"callbacks"},  # counts a run's steps as the warm-up and the phases do
}
ONLY_THERE = {  # of the callbacks; imported where used
    "pyarrow": {"predictions.py"},
    "jinja2": {"page.py"},
    "matplotlib": {"page.py"},
}
FILES = sorted(p for package in ("recipes", "callbacks", "datamodules") for p in (HOME / package).rglob("*.py"))


def imports(tree: ast.Module) -> set[str]:
    """Top-level packages that a file imports absolutely, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def room(path: Path) -> str:
    folder = path.relative_to(HOME).parent.as_posix()
    return folder if folder in MAY_IMPORT else folder.split("/")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(HOME).as_posix())
def test_imports_only_what_its_room_may(path: Path) -> None:
    allowed = MAY_IMPORT[room(path)]
    if path.name != "cli.py":
        allowed = allowed - (ONLY_CLI - ALSO.get(path.name, set()))
    if room(path) == "callbacks":
        allowed = allowed - {package for package, files in ONLY_THERE.items() if path.name not in files}
    strangers = imports(ast.parse(path.read_text())) - STANDARD - allowed
    assert not strangers, f"{path.name} imports {strangers}; {room(path)} may import {sorted(allowed)}"


@pytest.mark.parametrize("path", [p for p in FILES if "parts" in p.parts], ids=lambda p: p.name)
def test_parts_know_no_trainer_and_no_command_line(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level > 1), f"{path.name} reaches out of parts"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(HOME).as_posix())
def test_every_public_thing_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} in {path.name} has no docstring"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_every_config_weight_and_template_is_packaged() -> None:
    import tomllib

    patterns = tomllib.loads((HOME / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in ("recipes", "callbacks", "datamodules"):
        packaged = {path for pattern in patterns.get(package, ()) for path in (HOME / package).glob(pattern)}
        data = {p for p in (HOME / package).rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
        assert data == packaged


def test_no_room_for_leftovers() -> None:
    names = {p.stem for p in FILES} | {p.parent.name for p in FILES}
    assert not names & {"utils", "helpers", "common", "misc"}


REPORT = {
    "comparison.py",
    "evaluation.py",
    "facts.py",
    "outputs.py",
    "page.py",
    "report.py",
}  # one callback, too long to be read as one file


@pytest.mark.parametrize(
    "path", [p for p in sorted((HOME / "callbacks").glob("[a-z]*.py")) if p.name not in REPORT], ids=lambda p: p.name
)
def test_a_callback_file_stands_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name} imports a sibling"


@pytest.mark.parametrize("name", sorted(REPORT))
def test_the_reports_files_need_none_but_each_other(name: str) -> None:
    for node in ast.walk(ast.parse((HOME / "callbacks" / name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert f"{node.module}.py" in REPORT
