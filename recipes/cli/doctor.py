"""Looks at a config's data before anyone trains on it, and says what is not sound."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm.auto import tqdm

from datamodules.labels.suspects import label_suspects, neighbour_probabilities, text_suspects

from ..parts.backbones import load_weights
from .early import stop
from .screen import console

FINDINGS = Path("runs") / "doctor" / "doctor.json"  # below the folder where the command is typed, beside the runs
SHOWN = 5  # of what may be many; all of it is in the files
COLUMNS = ("name", "split", "partner", "partner_split", "kind", "similarity", "note")


def doctor(main: Callable[..., Any], args: list[str], file: Path = FINDINGS) -> int:
    """Look, print, and write all that was found.

    Args:
        main: The recipe's `main`.
        args: Command line after the subcommand: `--config` and overrides.
        file: Where the findings go, as JSON; beside it, in a CSV file of the same name, a row for each of them.

    Returns:
        The exit status: 1 where a split leaks into another or something cannot be read, else 0.
    """
    cli = main(["fit", *args], plan=True)
    try:
        cli.datamodule.prepare_data()
        cli.datamodule.setup("fit")
        found = cli.datamodule.inspect()
    except (ValueError, OSError) as error:
        stop(str(error))
    if found["kind"] == "pictures":
        found |= against_backbone(cli.model, found)
        cli.datamodule.on_error = "skip"
        found["suspects"] = suspects(cli.model, cli.datamodule, cli.planned_weights)
    elif cli.datamodule.class_names:
        found["suspects"] = text_suspects(cli.datamodule)
    found["data"] = data_config(cli.config["fit"])
    text = json.dumps(found, indent=1, ensure_ascii=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")  # names of files may be no text
    table = file.with_suffix(".csv")
    with table.open("w", encoding="utf-8", errors="backslashreplace", newline="") as lines:
        csv.writer(lines).writerows([COLUMNS, *findings(found)])
    screen = console()
    show_counts(screen, found)
    for sentence in sentences(found):
        printable = sentence.encode("utf-8", "backslashreplace").decode()
        screen.print(escape(printable), highlight=False, soft_wrap=True)
    screen.print(f"all of it: {file}; every finding in a row: {table}", highlight=False, soft_wrap=True)
    return int(bool(found["leaks"] or found["unreadable"]))


def findings(found: dict[str, Any]) -> list[list[Any]]:
    """A row of `COLUMNS` for each sample that is not sound; copies beside what they are copies of."""
    out: list[list[Any]] = [
        [name, split, "", "", key, "", note]
        for key in ("unreadable", "misnamed", "short", "encoding")
        for split, name, note in found.get(key, [])
    ]
    for (split, name), *copies in found.get("exact", []):
        out += [[copy, its, name, split, "exact", 1.0, ""] for its, copy in copies]
    for ((split, name), (its, copy)), likeness in zip(
        found.get("rescaled", []), found.get("similarity", []), strict=True
    ):
        out.append([copy, its, name, split, "rescaled", likeness, ""])
    doubtful = [] if isinstance(found.get("suspects"), str) else found.get("suspects", [])
    return out + [
        [name, "train", "", "", "suspect", "", f"is {own}, rather {rather}"] for name, own, rather in doubtful
    ]


def data_config(config: Any) -> Any:
    """What the command line says of the data, as plain values."""
    return json.loads(json.dumps(config.data.as_dict(), default=str))


def show_counts(screen: Console, found: dict[str, Any]) -> None:
    """A row per split: samples, classes, the smallest and the largest, and how far they differ."""
    table = Table("split", "samples", "classes", "smallest", "largest", "ratio", box=None, header_style="bold")
    for split, counts in found["splits"].items():
        classes = sorted(counts["classes"].items(), key=lambda item: item[1])
        row = [split, f"{counts['samples']:,}"]
        if classes:
            (least, few), (most, many) = classes[0], classes[-1]
            row += [str(len(classes)), f"{few:,} {least}", f"{many:,} {most}", f"{many / few:.1f}" if few else "-"]
        table.add_row(*map(escape, row))
    screen.print(table)


def sentences(found: dict[str, Any]) -> list[str]:
    """What is not sound, and what to do; and some facts."""
    out, shorten = [], excerpt if found["kind"] == "texts" else str  # a path is whole, to be copied
    for key, words in (
        ("unreadable", "cannot be read; repair or remove them, or set data.on_error to skip"),
        ("misnamed", "have the ending of another format; other programs may not read them"),
        ("short", "have no more than one character"),
        ("encoding", "look as if read in a wrong encoding; see data.encoding"),
    ):
        rows = found.get(key, [])
        if rows:
            out.append(f"{len(rows):,} {words}:")
            out += [f"    {' · '.join(map(shorten, row))}" for row in rows[:SHOWN]]
    for key, words in (("exact", "are there twice or more"), ("rescaled", "again, in other size, quality or light")):
        groups = found.get(key, [])
        if groups:
            out.append(f"{len(groups):,} {words}:")
            out += [
                f"    {' = '.join(' · '.join(map(shorten, place)) for place in group[:3])}" for group in groups[:SHOWN]
            ]
    out += [f"left out: {sentence}" for sentence in found.get("left_out", [])]
    for pair, count in found["leaks"].items():
        out.append(f"LEAK: {count:,} of these in both {' and '.join(pair.split(', '))}: its figure can't be trusted")
    if found["conflicts"]:
        out.append(f"{found['conflicts']:,} of these have different labels")
    for split, counts in found["splits"].items():
        small = {name: count for name, count in counts["classes"].items() if count < 5}
        if small and split == "train":
            out.append(f"classes with fewer than 5 to train on: {', '.join(f'{n} {c}' for n, c in small.items())}")
    doubtful = found.get("suspects", [])
    if isinstance(doubtful, str):
        out.append(doubtful)
    elif doubtful:
        out.append(f"{len(doubtful):,} labels are doubtful: samples like these are of another class:")
        out += [f"    {shorten(name)} is {own}, rather {rather}" for name, own, rather in doubtful[:SHOWN]]
    if not found.get("compared", True):
        out.append("too many images to compare all pairs: only exact copies were looked for")
    if found.get("sizes"):
        modes = ", ".join(f"{count:,} {mode}" for mode, count in found["modes"].items())
        out.append(f"shorter side {quantile_summary(found['sizes'])} px; {modes}")
        out.append(f"mean {found['mean']}, deviation {found['std']}{found.get('against', '')}")
    for split, lengths in found.get("lengths", {}).items():
        out.append(f"{split}: {quantile_summary(lengths)} tokens; {100 * found['cut'][split]:.1f} % cut off")
    return out


def excerpt(text: str) -> str:
    """What fits on a line."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def quantile_summary(marks: dict[str, int]) -> str:
    """Quantiles on a line."""
    return f"{marks['min']} to {marks['max']}, median {marks['median']}, 95 % below {marks['p95']}" if marks else "no"


def against_backbone(model: Any, found: dict[str, Any]) -> dict[str, Any]:
    """How the images' mean lies to what the backbone was trained on."""
    mean = torch.as_tensor(model.backbone.mean).flatten().tolist()
    std = torch.as_tensor(model.backbone.std).flatten().tolist()
    off = max(abs(own - its) / deviation for own, its, deviation in zip(found["mean"], mean, std, strict=True))
    far = "; far from them: is the image's range or colour what it should be?" if off > 1.5 else ""
    values = [round(value, 3) for value in mean], [round(value, 3) for value in std]
    return {"against": f"; the backbone expects {values[0]}, {values[1]}{far}"}


@torch.no_grad()
def suspects(model: Any, data: Any, weights: str | None) -> list[list[str]] | str:
    """Training images whose neighbours in the backbone's features are of another class: name, class, rather.

    Args:
        model: Its `backbone` gives the features.
        data: After `setup`.
        weights: Of the backbone, as the config names them.

    Returns:
        The clearest first; or why this can't be told.
    """
    if weights is None:
        return "without model.weights the backbone's features say nothing about labels"
    try:
        load_weights(model.backbone, weights)
    except (OSError, ValueError) as error:
        return f"labels were not looked at, for lack of the backbone's weights ({' '.join(str(error).split())})"
    model.eval()
    loader, part = data.view_dataloader("train", None), data.splits["train"]
    features = torch.zeros(len(part.labels), model.backbone.width)
    seen = torch.zeros(len(part.labels), dtype=torch.bool)
    try:
        for batch in tqdm(loader, desc="features", unit=" batches"):
            ready = data.on_after_batch_transfer(batch, 0)
            features[ready["index"]] = model.backbone(model.normalise(ready["image"])).float()
            seen[ready["index"]] = ready["label"].cpu() >= 0
    except ValueError as error:  # a whole batch of files that are no images
        return f"labels were not looked at: {' '.join(str(error).split())}"
    names, rows = data.class_names, seen.nonzero().flatten()
    labels = part.labels[rows]
    found = label_suspects(neighbour_probabilities(features[rows], labels, len(names)), labels)
    return [[part.name(int(rows[i])), names[int(part.labels[rows[i]])], names[named]] for i, named in found]
