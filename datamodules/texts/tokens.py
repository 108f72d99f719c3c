"""Tokens of many texts, memory-mapped, and padded batches of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..sampling.draws import Batch, Draw, drawn_labels

MULTIPLE = 8  # batches are padded to a multiple of this: matrix units work on tiles


@dataclass
class Texts:
    """The texts of a split, or a part of them.

    Args:
        table: A `datasets.Dataset` with the column `text`, and `pair` where texts come in pairs.
        labels: `(n,)`, or `(n, classes)` for several labels.
        rows: Row of the table for each sample, `(n,)`; the table as it is if not given.
        skipped: Rows of the source that cannot be used.
    """

    table: Any
    labels: Tensor
    rows: Tensor | None = None
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: Tensor) -> Texts:
        return replace(self, labels=self.labels[rows], rows=rows if self.rows is None else self.rows[rows])

    def row(self, index: int) -> int:
        return index if self.rows is None else int(self.rows[index])

    def text(self, index: int) -> str:
        """A sample's text; of a pair both, with a bar between them."""
        row = self.table[self.row(index)]
        return f"{row['text']} | {row['pair']}" if "pair" in row else str(row["text"])


class Tokens:
    """Token numbers of many texts, read where they lie: in a memory-mapped Arrow file, a `datasets.Dataset` with the
    columns `input_ids`, `truncated` and perhaps, `beside` these, another number for each token.
    """

    def __init__(self, table: Any, beside: str = "token_type_ids") -> None:
        columns = table.data.table
        self.ids = [flat(chunk) for chunk in columns["input_ids"].chunks]
        others = columns[beside].chunks if beside in columns.column_names else []
        self.beside = [flat(chunk) for chunk in others]
        self.starts = np.cumsum([0, *(len(offsets) - 1 for offsets, _ in self.ids)])
        self.lengths = np.concatenate([np.zeros(0, np.int32), *(np.diff(offsets) for offsets, _ in self.ids)])
        self.truncated = columns["truncated"].to_numpy()

    def of(self, texts: Texts) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Lengths of the texts, and whether they were cut, each `(n,)`."""
        rows = slice(None) if texts.rows is None else texts.rows.numpy()
        return self.lengths[rows], self.truncated[rows]

    def read(self, row: int) -> list[npt.NDArray[Any]]:
        """Tokens of one text, `(length,)`, and what is beside them."""
        chunk = int(np.searchsorted(self.starts, row, side="right")) - 1
        place = row - self.starts[chunk]
        columns = (self.ids, self.beside) if self.beside else (self.ids,)
        return [
            values[offsets[place] : offsets[place + 1]] for offsets, values in (column[chunk] for column in columns)
        ]


def flat(chunk: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Offsets and values of a chunk of lists, without a copy."""
    return chunk.offsets.to_numpy(), chunk.values.to_numpy()


class TokenBatches(Dataset[Batch]):
    """Whole batches of texts' tokens, padded by the token `pad` to their longest, but not beyond `max_length`."""

    def __init__(self, texts: Texts, tokens: Tokens, pad: int, max_length: int) -> None:
        self.texts, self.tokens, self.pad, self.max_length = texts, tokens, pad, max_length

    def __len__(self) -> int:
        return len(self.texts)

    def padded_lengths(self) -> Any:
        """Length of each text, padding included, if it were a batch of its own."""
        return self.padded(self.tokens.of(self.texts)[0])

    def padded(self, length: Any) -> Any:
        return np.minimum(-(-length // MULTIPLE) * MULTIPLE, self.max_length)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        index, labels = drawn_labels(draws, self.texts.labels)
        rows = index if self.texts.rows is None else self.texts.rows[index]
        found = [self.tokens.read(row) for row in rows.tolist()]
        lengths = np.array([len(ids) for ids, *_ in found])
        width = int(self.padded(lengths.max()))
        columns = np.zeros((1 + bool(self.tokens.beside), len(found), width), np.int64)
        columns[0] = self.pad
        for line, text in enumerate(found):
            for column, values in zip(columns, text, strict=True):
                column[line, : len(values)] = values
        batch = {
            "input_ids": torch.from_numpy(columns[0]),
            "attention_mask": torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64)),
            "label": labels,
            "index": index,
        }
        if self.tokens.beside:
            batch["token_type_ids"] = torch.from_numpy(columns[1])
        return batch


class WholeBatches(Dataset[Batch]):
    """For a sampler that draws whole batches; a `__getitem__` of `TokenBatches` would seem to take single samples."""

    def __init__(self, batches: TokenBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, draws: list[Draw]) -> Batch:
        return self.batches.__getitems__(draws)


def surface_form(token: str) -> str:
    """A token of WordPiece, SentencePiece or byte-level BPE as it stands in a text."""
    for mark in ("\u0120", "\u2581"):  # what byte-level BPE and SentencePiece put where a word begins
        token = token.replace(mark, " ")
    return token.removeprefix("##") if token.startswith("##") else token if token[:1] == " " else f" {token}"


def histogram(lengths: npt.ArrayLike) -> str:
    """How long texts are, on one line: median, 95 %, longest, and a bar for each eighth of the range."""
    lengths = np.asarray(lengths)
    if not len(lengths):
        return "no texts"
    counts, edges = np.histogram(lengths, bins=8, range=(0, lengths.max()))
    bars = "".join("▁▂▃▄▅▆▇█"[int(7 * count / counts.max())] for count in counts)
    median, most = np.percentile(lengths, (50, 95))
    return f"{median:.0f} tokens in the median, {most:.0f} at 95 %, {lengths.max()} at most, 0 {bars} {edges[-1]:.0f}"
