"""Every notebook runs, prints no warning, leaves no file behind, and is stored without results.

The longest with fewer seeds and fewer settings in the cell of the parameters; `--as-stored` runs them with those that
a reader sees, within two minutes each: to be done when a notebook, or what it shows, has changed.
"""

from __future__ import annotations

import ast
import os
import resource
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

HOME = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((HOME / "notebooks").glob("*.ipynb"))
MAY_IMPORT = {"recipes", "callbacks", "datamodules", "torch", "lightning", "torchvision", "matplotlib"}
LIMIT_S = 120  # of CPU time: on a busy machine the clock tells little
SMALL = {  # of what the longest compare, enough for every conclusion that a cell asserts
    "02_freezing_and_unfreezing": "repeats, rates, images = 1, [1e-3, 0.016, 0.25, 1.0], [5, 100]",
    "03_schedules_and_warmup": "repeats, rates = 1, [0.003, 0.01, 1.0]",
    "05_ewc_and_forgetting": "repeats, ewc_strengths, l2sp_strengths = 1, [1e5, 1e7], [1.0, 30.0]",
    "07_low_rank_and_teachers": "repeats, ranks = 1, [2, 16]",
    "08_mixtures_and_small_nets": "repeats, places, sparsities = 1, 5, [0.8, 0.98]",
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code(path: Path) -> list[NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def cpu_of_children() -> float:
    """CPU seconds of child processes that have ended, such as kernels."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.slow
@each_notebook
def test_it_runs(path: Path, own_folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    page = own_folder / "page"
    page.mkdir()
    for file in path.parent.glob("*.mplstyle"):
        shutil.copy(file, page)
    before = set(page.rglob("*"))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):
        (own_folder / name).mkdir()
        monkeypatch.setenv(name, str(own_folder / name))  # nothing of the user's own settings, no trace among them
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HOME), *sys.path[1:]]))
    monkeypatch.delenv("MPLBACKEND")  # a notebook's own puts pictures into the page
    notebook = read(path)
    if path.stem in SMALL and not request.config.getoption("--as-stored"):
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
        known = {node.id for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)}
        assert {node.id for node in ast.walk(ast.parse(SMALL[path.stem])) if isinstance(node, ast.Name)} <= known
        cell.source += f"\n{SMALL[path.stem]}"
    started = cpu_of_children()
    NotebookClient(notebook, timeout=5 * LIMIT_S, resources={"metadata": {"path": str(page)}}).execute()
    assert 1 < cpu_of_children() - started < LIMIT_S
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    noise = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert not noise
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 3, "pictures"
    assert set(page.rglob("*")) == before, "a notebook writes into a folder of its own"


@each_notebook
def test_it_is_stored_without_results(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in code(path):
        assert not cell.outputs and cell.execution_count is None, f"strip the outputs of {path.name}"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata.language_info == {"name": "python"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, f"{path.name}, cell {cell.id}: {sorted(cell.metadata)}"


@each_notebook
def test_one_cell_near_the_top_holds_the_parameters(path: Path) -> None:
    cells = code(path)
    (place,) = [index for index, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", ())]
    assert place <= 1
    names = set()
    for line in ast.parse(cells[place].source).body:
        assert isinstance(line, ast.Assign), "assignments alone"
        values = line.value.elts if isinstance(line.targets[0], ast.Tuple) else [line.value]  # type: ignore[attr-defined]
        for value in values:
            ast.literal_eval(value)
        names |= {node.id for target in line.targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    assert "seed" in names


@each_notebook
def test_it_imports_the_three_packages_and_little_else(path: Path) -> None:
    found = set()
    for cell in code(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
            assert not isinstance(node, ast.ClassDef), f"{path.name} defines {node.name}: a class belongs in a file"
    strangers = found - MAY_IMPORT - set(sys.stdlib_module_names)
    assert not strangers, f"{path.name} imports {strangers}"
    assert found & {"recipes", "callbacks", "datamodules"}


@each_notebook
def test_it_ends_with_three_things_to_try(path: Path) -> None:
    last = read(path).cells[-1]
    assert last.cell_type == "markdown"
    points = last.source.split("## Try")[1].splitlines()
    assert [line[:2] for line in points if line[:1].isdigit()] == ["1.", "2.", "3."]
