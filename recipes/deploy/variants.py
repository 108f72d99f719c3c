"""Variants of a net, measured on the same samples: each once, kept in a folder, so that a killed command goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from rich.table import Table
from torch import Tensor

from callbacks.report.facts import as_json
from callbacks.report.outputs import Predictions, find_outputs, gather_outputs, load_predictions, save_predictions
from callbacks.report.page import template
from callbacks.report.paired import paired

from ..cli.screen import console

Batch = dict[str, Any]
Answer = Callable[[Batch], Tensor]  # a batch to logits, `(batch, classes)`


class Held(NamedTuple):
    """Samples that variants are measured on."""

    name: str  # unique, for tables and files
    data: Any  # module, after its setup
    split: str  # val or test

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """As in evaluation."""
        loader = self.data.val_dataloader() if self.split == "val" else self.data.test_dataloader()
        for batch in loader:
            yield self.data.on_after_batch_transfer(move_data_to_device(batch, device), 0)


class Variants:
    """What variants of a net answer.

    Args:
        folder: Where answers are kept; its name should change with all that they depend on.
        held: Samples to measure on.
        device: Where batches go.
    """

    def __init__(self, folder: Path, held: Sequence[Held], device: torch.device | None = None) -> None:
        self.folder, self.held, self.device = folder, held, device or torch.device("cpu")

    def answers(self, key: str, make: Callable[[], Callable[[Held], Answer]]) -> dict[str, Predictions]:
        """Predictions of one variant on each of the held samples, from their files or found now.

        Args:
            key: Of the variant; becomes part of the files' names.
            make: Makes the variant, which is called only where there is something to find.

        Raises:
            ValueError: The samples have no labels that its answers can be compared with.
        """
        made, found = None, {}
        for held in self.held:
            name = f"{key}|{held.name}"
            path = self.folder / "predictions" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
            if not path.is_file():
                made = made or make()
                save_predictions(path, predict(made(held), held, self.device), None)
            loaded = load_predictions(path)
            assert loaded is not None
            found[held.name] = loaded
        return found


@torch.no_grad()
def predict(answer: Answer, held: Held, device: torch.device) -> Predictions:
    """What a net answers to held samples, in their order.

    Raises:
        ValueError: There are no labels, or of another kind than its answers.
    """
    parts = [find_outputs({"logits": answer(batch)}, batch, None) for batch in held.batches(device)]
    found = gather_outputs([part for part in parts if part is not None], 1)
    if found is None or not len(found[1]):
        raise ValueError(f"{held.name} has no samples with labels to measure on")
    return Predictions(*found, [])


def figure_of(found: Predictions) -> float:
    """The most important figure: accuracy, F1 of all labels or Spearman's rank correlation; the higher, the better."""
    return float(paired(found, found, draws=1)[0]["first"])


def figures(found: Mapping[str, Predictions], reference: Mapping[str, Predictions]) -> dict[str, list[dict[str, Any]]]:
    """Every figure of a variant on each set of samples, with its gain over the reference's and the 95 % interval."""
    return {name: paired(reference[name], one) for name, one in found.items()}


def digest_of_files(paths: Sequence[Path], *facts: Any) -> str:
    """Eight digits that change with the files' content or the facts."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:8]


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns after the first are numbers."""
    table = Table(columns[0], box=None, header_style="bold")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def write_page(folder: Path, report: Mapping[str, Any], drawn: Sequence[tuple[str, str]]) -> None:
    """Write `report.json`, and `report.html` from it.

    Args:
        folder: Where to.
        report: `title`, `verdict`, `columns`, `table`, `facts` and whatever else a program may want.
        drawn: An SVG and its caption, for each picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = template("variants.html", Path(__file__).parent)
    text = page.render(report=report, drawn=drawn)
    (folder / "report.html").write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")
    content = json.dumps(as_json(report), indent=1, ensure_ascii=False, allow_nan=False)
    beside = folder / "report.json.part"
    beside.write_text(f"{content}\n", encoding="utf-8", errors="backslashreplace")
    beside.replace(folder / "report.json")  # the last file: a folder that has it is complete
