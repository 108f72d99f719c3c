"""Parts of several ranks and starts become one table."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from callbacks.predictions.parts import NOTE, batches_done, check_ranks, claim, merge_parts


def part(folder: Path, name: str, *batches: dict[str, Any], first: int = 0) -> Path:
    """A file of batches as a rank writes them; each is given by index -> label."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number, rows in enumerate(batches, first):
        record = {
            "batch": number,
            "index": list(map(int, rows)),
            "name": [f"name {index}" for index in rows],
            "columns": {"label": list(rows.values()), "probability": [int(index) / 10 for index in rows]},
            "unreadable": [[int(index), "broken"] for index, label in rows.items() if label == "?"],
        }
        lines.append(json.dumps(record) + "\n")
    (folder / name).write_text("".join(lines))
    return folder / name


def read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_parts_merge_by_index_without_what_filled_up_a_batch(tmp_path: Path) -> None:
    folder = tmp_path / "out.csv.parts"
    part(folder, "rank0.0.jsonl", {"0": "x", "2": "x"}, {"4": "y"})
    part(folder, "rank1.0.jsonl", {"1": "y", "3": "?"}, {"0": "x"})
    assert merge_parts(folder, tmp_path / "out.csv", "name", [("earlier", "empty")]) == (4, 2)
    rows = [["name 0", "x", "0.000000"], ["name 1", "y", "0.100000"], ["name 2", "x", "0.200000"]]
    assert read(tmp_path / "out.csv") == [["name", "label", "probability"], *rows, ["name 4", "y", "0.400000"]]
    assert read(tmp_path / "out.unreadable.csv") == [["name", "reason"], ["earlier", "empty"], ["name 3", "broken"]]
    assert not folder.exists()


def test_one_sample_on_two_ranks_is_written_once(tmp_path: Path) -> None:
    (tmp_path / "out.unreadable.csv").write_text("of an earlier run")
    folder = tmp_path / "parts"
    for rank in (0, 1):
        part(folder, f"rank{rank}.0.jsonl", {"0": "x"})
    assert merge_parts(folder, tmp_path / "out.csv") == (1, 0)
    assert len(read(tmp_path / "out.csv")) == 2
    assert not (tmp_path / "out.unreadable.csv").exists()


def test_a_line_that_was_cut_off_anywhere_counts_for_nothing(tmp_path: Path) -> None:
    file = part(tmp_path, "rank0.0.jsonl", {"0": "a\nb"}, {"1": "c"})
    whole = file.read_bytes()
    second = whole.index(b"\n") + 1
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        assert batches_done([file]) == (1 if end >= second else 0), end
    for left in (bytes(50), bytes(50) + b"\n"):  # the machine went down: a file system may leave zeros
        file.write_bytes(whole[:second] + left)
        assert batches_done([file]) == 1
    file.write_bytes(whole[: second + 20])
    later = part(tmp_path, "rank0.1.jsonl", {"1": "c"}, {"2": "d"}, first=1)
    assert batches_done([file, later]) == 3
    merge_parts(tmp_path, tmp_path / "out.csv")
    assert [row[:2] for row in read(tmp_path / "out.csv")[1:]] == [["name 0", "a\nb"], ["name 1", "c"], ["name 2", "d"]]


def test_batches_that_a_process_wrote_after_its_successor_began_come_once(tmp_path: Path) -> None:
    """Rank 1 of a run whose rank 0 was killed may go on for a while."""
    part(tmp_path, "rank1.0.jsonl", {"1": "a"}, {"3": "b"}, {"5": "c"})
    part(tmp_path, "rank1.1.jsonl", {"3": "b"}, {"5": "c"}, {"7": "d"}, first=1)
    assert merge_parts(tmp_path, tmp_path / "out.csv") == (4, 0)


def test_a_rank_whose_parts_lie_elsewhere_is_missed(tmp_path: Path) -> None:
    part(tmp_path, "rank0.0.jsonl", {"0": "x"})
    check_ranks(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="no predictions of rank 1: name a file in a folder that all machines"):
        check_ranks(tmp_path, 2)


def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    record = {"batch": 0, "index": [0], "name": [name], "columns": {"label": ["x"]}, "unreadable": []}
    for ending in ("csv", "parquet"):
        folder = tmp_path / ending
        folder.mkdir()
        (folder / "rank0.0.jsonl").write_text(json.dumps(record) + "\n")
        merge_parts(folder, tmp_path / f"out.{ending}")
    assert b"caf\xe9.jpg" in (tmp_path / "out.csv").read_bytes()
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist() == [{"name": "caf\ufffd.jpg", "label": "x"}]


def test_parquet_holds_what_the_csv_holds(tmp_path: Path) -> None:
    batches = [{str(16 * n + k): "xy"[k % 2] for k in range(16)} for n in range(600)]  # more than a row group
    for ending in ("csv", "parquet"):
        part(tmp_path / ending, "rank0.0.jsonl", *batches)
        assert merge_parts(tmp_path / ending, tmp_path / f"out.{ending}") == (9600, 0)
    bytes_before = (tmp_path / "out.parquet").read_bytes()
    part(tmp_path / "again", "rank0.0.jsonl", *batches[:217])
    part(tmp_path / "again", "rank0.1.jsonl", *batches[217:], first=217)
    merge_parts(tmp_path / "again", tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").read_bytes() == bytes_before, "wherever it was killed"
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert [str(kind) for kind in table.schema.types] == ["string", "string", "float"]
    words = [[row["name"], row["label"], f"{row['probability']:.4f}"] for row in table.to_pylist()]
    assert words == [[*row[:2], row[2][:-2]] for row in read(tmp_path / "out.csv")[1:]]


def test_what_was_made_of_something_else_is_refused(tmp_path: Path) -> None:
    folder, facts = tmp_path / "out.csv.parts", {"inputs": "a", "class names": ["b"], "model.top_k": 1}
    assert claim(folder, facts) == claim(folder, facts) == ""
    assert "made of another list of inputs: name another file" in claim(folder, {**facts, "inputs": "x"})
    assert "made with other class names" in claim(folder, {**facts, "class names": ["x"]})
    assert "made with model.top_k 1, and it is 5 now" in claim(folder, {**facts, "model.top_k": 5})
    assert "remove that folder" in claim(folder, {**facts, "model.new": 5})
    file = part(folder, "rank0.0.jsonl", {"0": "x"})
    assert claim(folder, facts) == "" and file.exists()
    (folder / NOTE).unlink()  # it was being removed
    assert claim(folder, {**facts, "inputs": "x"}) == "" and not file.exists()
