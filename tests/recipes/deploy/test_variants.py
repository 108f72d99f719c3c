"""Each variant is measured once; its answers are those of the samples, in their order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.deploy.variants import Held, Variants, digest_of_files, figure_of, figures, show, write_page


class Data:
    """Six samples in two batches, the first of the second without a label."""

    def val_dataloader(self) -> list[dict[str, Tensor]]:
        labels, rows = torch.tensor([0, 1, 1, -100, 0, 1]), torch.arange(6)
        return [
            {"x": rows[some].float(), "label": labels[some], "index": rows[some]} for some in (slice(3), slice(3, 6))
        ]

    test_dataloader = val_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def right(held: Held) -> Any:
    return lambda batch: torch.nn.functional.one_hot(batch["label"].clamp(min=0), 2).float()


def wrong(held: Held) -> Any:
    return lambda batch: 1 - right(held)(batch)


def test_a_variant_is_measured_once(tmp_path: Path) -> None:
    variants, made = Variants(tmp_path, [Held("val", Data(), "val"), Held("more", Data(), "test")]), list[str]()

    def make() -> Any:
        made.append("made")
        return right

    found = variants.answers("a", make)
    assert found.keys() == {"val", "more"} and made == ["made"]
    assert found["val"].rows.tolist() == [0, 1, 2, 4, 5] and figure_of(found["val"]) == 1
    again = Variants(tmp_path, variants.held[:1]).answers("a", make)
    assert made == ["made"] and torch.equal(again["val"].logits, found["val"].logits)
    other = variants.answers("b", lambda: wrong)
    assert figure_of(other["val"]) == 0
    compared = figures(other, found)["val"][0]
    assert compared["name"] == "accuracy" and compared["gain"] == -1 and compared["interval"] == (-1, -1)


def test_samples_without_labels_measure_nothing(tmp_path: Path) -> None:
    data = Data()
    data.val_dataloader = lambda: [{"x": torch.zeros(2), "label": torch.tensor([-100, -100])}]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="val has no samples with labels"):
        Variants(tmp_path, [Held("val", data, "val")]).answers("a", lambda: right)


def test_a_digest_hangs_on_content_and_facts(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"x" * 3_000_000)
    first = digest_of_files([file], 1)
    assert first == digest_of_files([file], 1) != digest_of_files([file], 2)
    file.write_bytes(b"x" * 2_999_999 + b"y")
    assert digest_of_files([file], 1) != first


def test_the_page_holds_what_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = {"title": "A <b>", "verdict": "Good.", "columns": ["a", "val"], "table": [["0", "0.5"]]}
    write_page(tmp_path, report | {"facts": {"nan": float("nan")}}, [("<svg></svg>", "words")])
    page = (tmp_path / "report.html").read_text()
    assert "A &lt;b&gt;" in page and "<svg></svg>" in page and '<td class="n">0.5</td>' in page
    assert json.loads((tmp_path / "report.json").read_text())["facts"] == {"nan": None}
    show(report["columns"], report["table"])  # type: ignore[arg-type]
    assert "0.5" in capsys.readouterr().out
