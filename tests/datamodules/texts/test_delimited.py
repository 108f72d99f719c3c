"""Rows of text files: none is lost without a word, and each is what an independent reading says."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import pandas
import pytest

from datamodules import TextFiles
from datamodules.texts.delimited import Dialect, rows_of_csv
from datamodules.texts.rows import rows_of

MARKED = Path("marked.csv")


def read(text: str, columns: tuple[str, ...] = ("text", "label"), dialect: Dialect | None = None) -> list[Any]:
    """Line, values and problem of each row of a CSV."""

    def swallows(row: dict[str, Any], inner: list[dict[str, Any]], lines: int) -> bool:
        return 2 * sum(each["label"] in ("a", "b") for each in inner) > lines

    lines = io.StringIO(text, newline="")
    return list(rows_of_csv(MARKED, lines, columns, dialect or Dialect(",", True), swallows))


def numbered(rows: int, **other: str) -> str:
    """A CSV with a text and a label a line; those named otherwise by their row."""
    lines = [other.get(f"row{row}", f"text {row},{'ab'[row % 2]}") for row in range(rows)]
    return "\n".join(["text,label", *lines, ""])


def test_a_quote_that_is_not_closed_costs_its_own_row() -> None:
    found = read(numbered(200, row20='"text 20,a'))
    assert [line for line, _, _ in found] == list(range(2, 202))
    assert [line for line, _, problem in found if problem] == [22]
    assert all(row == {"text": f"text {n}", "label": "ab"[n % 2]} for n, (_, row, bad) in enumerate(found) if not bad)


@pytest.mark.parametrize("second", ['"text 120,a', 'text 120",a', '"text, 120",a'])
def test_two_quotes_do_not_swallow_what_lies_between(second: str) -> None:
    found = read(numbered(200, row20='"text 20,a', row120=second))
    assert [line for line, _, _ in found] == list(range(2, 202)), "every line is a row or is named"
    bad = [line for line, _, problem in found if problem]
    assert bad in ([22, 122], [22])
    good = [row["text"] for _, row, problem in found if not problem]
    assert {f"text {n}" for n in range(200) if n not in (20, 120)} <= set(good)


def test_what_is_skipped_is_counted_line_by_line(own_folder: Path) -> None:
    Path("a.csv").write_text(numbered(200, row20='"text 20,a', row120='"text 120,a'))
    train = TextFiles("a.csv", on_error="skip").read_splits()["train"]
    assert len(train) == 198 and train.skipped == 2
    with pytest.raises(ValueError, match="a.csv, line 22: .*is a double quote in it not closed.*and 1 row more"):
        TextFiles("a.csv").read_splits()


def test_a_quote_in_the_first_row_swallows_nothing_either() -> None:
    found = read(numbered(50, row0='"text 0,a', row30='text 30",a'))
    assert len(found) == 50 and found[0][2] and not any(problem for _, _, problem in found[1:])


def test_texts_of_many_lines_stay_whole(own_folder: Path) -> None:
    poem = "\n".join(f"verse {n}, and {n} more" for n in range(40))
    rows = [(poem, "a"), ("one\ntwo", "b"), ('she said "no",\nand left, b', "a"), ("last", "b")]
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerows([("text", "label"), *rows])
    Path("a.csv").write_bytes(out.getvalue().encode())
    data = TextFiles("a.csv")
    train = data.read_splits()["train"]
    assert [(train.text(row), data.class_names[train.labels[row]]) for row in range(4)] == rows


def test_a_field_without_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.texts.delimited.LONGEST", 50)
    found = read(numbered(200, row20='"text 20,a'))
    assert len(found) == 200 and "more than 50 lines" in found[20][2]


def test_any_damage_costs_few_rows_and_no_line_is_unaccounted_for() -> None:
    rng = random.Random(0)
    for _ in range(200):
        texts = [f"text {n}" + rng.choice(["", ", more", ' "quoted"', "\nsecond line"]) for n in range(40)]
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([("text", "label"), *((text, "ab"[n % 2]) for n, text in enumerate(texts))])
        content = list(out.getvalue())
        places = [n for n, char in enumerate(content) if char == '"' and n > 11]
        for place in rng.sample(places, 2):
            content[place] = ""
        found = read("".join(content))
        right = {row["text"] for _, row, problem in found if not problem}
        assert len(set(texts) - right) <= 8, "a broken quote reaches no further than its neighbours"


def quoted_tsv(folder: Path) -> list[tuple[str, str]]:
    """A TSV as pandas writes it."""
    rows = [("a fine film", "good"), ('he said "no"', "bad"), ("two\nlines", "good"), ("tab\there", "bad")]
    pandas.DataFrame(rows, columns=["text", "label"]).to_csv(folder / "a.tsv", sep="\t", index=False)
    return rows


def test_a_tsv_as_pandas_writes_it(own_folder: Path) -> None:
    rows = quoted_tsv(own_folder)
    train = TextFiles("a.tsv").read_splits()["train"]
    assert [train.text(row) for row in range(4)] == [text for text, _ in rows]


@pytest.mark.parametrize("header", ["text\tlabel", '"text"\t"label"'])
def test_a_tsv_with_all_fields_in_quotes(own_folder: Path, header: str) -> None:
    Path("a.tsv").write_text(header + '\n"fine"\t"good"\n"poor"\t"bad"\n')
    data = TextFiles("a.tsv")
    assert data.class_names == ["bad", "good"] and data.read_splits()["train"].text(0) == "fine"


def test_quotes_in_a_tsv_that_are_part_of_texts_stay(own_folder: Path) -> None:
    texts = ['"Great," he said', "it's 5\" wide", '"A whole sentence."', 'an odd " one']
    Path("a.tsv").write_text("\n".join(["text\tlabel", *(f"{text}\t{n % 2}" for n, text in enumerate(texts)), ""]))
    train = TextFiles("a.tsv").read_splits()["train"]
    assert [train.text(row) for row in range(4)] == texts


def test_a_header_that_is_broken_is_a_sentence(own_folder: Path) -> None:
    Path("a.csv").write_text('"text,label\na,x\n')
    with pytest.raises(ValueError, match="a.csv: the header is not CSV"):
        list(rows_of(Path("a.csv"), ["text"]))


@pytest.mark.parametrize("column", ["last", "first", "in the middle"])
@pytest.mark.parametrize(("one", "other"), [(1, 26), (0, 9), (5, 6), (27, 28)])
def test_wherever_two_quotes_stand_no_row_between_them_is_lost(
    own_folder: Path, column: str, one: int, other: int
) -> None:
    rows = [(f"text {n}", "ab"[n % 2]) for n in range(30)]
    lines = []
    for n, (text, label) in enumerate(rows):
        text = f'"{text}' if n == one else f'{text}"' if n == other else text
        fields = {"last": [text, label], "first": [label, text], "in the middle": [str(n), label, text]}[column]
        lines.append(",".join(fields))
    header = {"last": "text,label", "first": "label,text", "in the middle": "id,label,text"}[column]
    Path("a.csv").write_text("\n".join([header, *lines, ""]))
    data = TextFiles("a.csv", on_error="skip")
    train = data.read_splits()["train"]
    read = {train.text(row): data.class_names[train.labels[row]] for row in range(len(train))}
    for n, (text, label) in enumerate(rows):
        assert n in (one, other) or abs(one - other) == 1 or read[text] == label
    assert data.class_names == ["a", "b"]


def test_a_label_over_several_lines_is_a_quote_that_was_not_closed(own_folder: Path) -> None:
    lines = [f"text {n},{'ab'[n % 2]}" for n in range(30)]
    lines[3], lines[20] = 'text 3,"b', 'text 20,a"'
    Path("a.csv").write_text("\n".join(["text,label", *lines, ""]))
    with pytest.raises(ValueError, match="a.csv, line 5: a field goes on for 18 lines that look like rows"):
        TextFiles("a.csv").read_splits()
    train = TextFiles("a.csv", on_error="skip").read_splits()["train"]
    assert len(train) == 29 and train.skipped == 1, "the lines between are rows, and so is the one that closes it"


def test_a_text_to_predict_is_whole_though_its_lines_look_like_rows(
    own_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["first", "roses, are red\nviolets, are blue\nsugar is sweet", "\n".join("abcdef, and"), "last"]
    texts[2] = "\n".join(f"verse {n}, and on" for n in range(9))
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("text", "label"), *((text, "x") for text in texts)])
    Path("new.csv").write_bytes(out.getvalue().encode())
    splits = TextFiles(predict_file="new.csv", class_names=["x", "y"]).read_splits()
    assert [splits["predict"].text(row) for row in range(4)] == texts
    assert "new.csv, line 6: a field goes on for 9 lines that look like rows" in caplog.text


def test_quotes_far_down_in_a_tsv_are_seen(own_folder: Path) -> None:
    rows = [(f"plain {n}", "good") for n in range(1500)] + [('he said "no"', "bad")]
    pandas.DataFrame(rows, columns=["text", "label"]).to_csv("a.tsv", sep="\t", index=False)
    train = TextFiles("a.tsv").read_splits()["train"]
    assert train.text(1500) == 'he said "no"'
