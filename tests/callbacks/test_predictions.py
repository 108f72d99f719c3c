from __future__ import annotations

from pathlib import Path

from callbacks.predictions import merge_parts


def test_parts_merge_by_index_without_what_filled_up_a_batch(tmp_path: Path) -> None:
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("0,a,x,0.9\n2,c,x,0.8\n4,e,y,0.7\n")
    second.write_text('1,"b, with comma",y,0.6\n3,d,x,0.5\n0,a,x,0.9\n')
    merge_parts([first, second], tmp_path / "all.csv", ["name", "label", "probability"])
    lines = (tmp_path / "all.csv").read_text().splitlines()
    assert lines == ["name,label,probability", "a,x,0.9", '"b, with comma",y,0.6', "c,x,0.8", "d,x,0.5", "e,y,0.7"]
    assert not first.exists() and not second.exists()


def test_one_sample_on_two_ranks_is_written_once(tmp_path: Path) -> None:
    parts = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for part in parts:
        part.write_text("0,a,x,0.9\n")
    merge_parts(parts, tmp_path / "all.csv", ["name", "label", "probability"])
    assert (tmp_path / "all.csv").read_text().splitlines() == ["name,label,probability", "a,x,0.9"]
