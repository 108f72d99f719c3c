"""Smaller nets, each measured against the whole one; what was killed goes on; what is shipped is a checkpoint, too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes import compress
from recipes.compress import Compression, Options, main
from recipes.deploy.quantising import Setting
from recipes.deploy.restored import restore
from recipes.export import export
from recipes.vision import main as vision
from tests.recipes.deploy.exports import fit_texts
from tests.recipes.test_predict import in_a_process, kill_me

pytest.importorskip("torch_pruning")
pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:resumed, but not as if never stopped. max_epochs is"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxruntime"),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "CALLS", {1: 3, 32: 2})


def report_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


def zeros_by_numpy(path: str) -> tuple[int, int]:
    """Zeros and all of the weights in a checkpoint, read by who knows only the file."""
    content = torch.load(path, weights_only=True)
    zeros = count = 0
    for one in content["packed"].values():
        size = int(np.prod(one["shape"]))
        there = np.unpackbits(one["bits"].numpy(), bitorder="little")[:size]
        assert there.sum() == len(one["values"]) and bool((one["values"] != 0).all())
        zeros, count = zeros + size - int(there.sum()), count + size
    return zeros, count


def test_a_net_made_small(old_and_new: tuple[str, str], own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, new = old_and_new
    main([new, "--epochs=4", "--max_drop=0.1", "--test", "--out=small", "--sparsity=0.7"])
    out = capsys.readouterr().out
    report = report_of(Path("small"))
    rows = {row["name"]: row for row in report["rows"]}
    assert {"as it is", "int8", "sparse 0.7", "cut 0.5"} <= rows.keys()
    whole, sparse, cut = (rows[name] for name in ("as it is", "sparse 0.7", "cut 0.5"))
    assert cut["macs"] <= 0.5 * whole["macs"] and cut["parameters"] < whole["parameters"]
    assert cut["bytes"] < 0.7 * whole["bytes"] and rows["int8"]["bytes"] < 0.5 * whole["bytes"]
    assert sparse["weight_bytes"] < 0.5 * whole["weight_bytes"]
    zeros, count = zeros_by_numpy(sparse["checkpoint"])
    assert zeros / count > 0.69 and zeros <= sparse["zeros"]
    assert whole["gain"]["gain"] == 0 and whole["agreement"] == 1 and "on the test split" in report["facts"]
    chosen = rows[report["chosen"]]
    assert chosen["gain"]["interval"][0] > -0.1 or chosen is whole
    assert all(row["bytes"] >= chosen["bytes"] for row in rows.values() if row["gain"]["interval"][0] > -0.1)
    assert f"To ship: {report['chosen']}" in out and "<svg" in Path("small/report.html").read_text()
    assert Path(chosen["folder"], "model.onnx").is_file()

    for row in (sparse, cut):
        before = row["gain"]["other"]
        checked = vision(["validate", f"--ckpt_path={row['checkpoint']}"]).trainer.callback_metrics["val/accuracy"]
        assert float(checked) == pytest.approx(before, abs=1e-6), row["name"]
        vision(["predict", f"--ckpt_path={row['checkpoint']}"])
        resumed = vision(["fit", f"--ckpt_path={row['checkpoint']}", "--trainer.max_epochs=5"])
        again = restore(resumed.folder / "checkpoints" / "last.ckpt")
        assert sum(p.numel() for p in again.model.parameters()) == row["parameters"]
    moved = shutil.copy(cut["checkpoint"], "moved.ckpt")
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(restore(moved).logits(images), restore(cut["checkpoint"]).logits(images))


def test_killed_in_the_middle_it_ends_with_the_same_files(
    old_and_new: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, new = old_and_new
    command = [new, "--epochs=2", "--cut=0.4", "--sparsity=", "--no_int8", "--out=small"]

    def files() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(Path("small").rglob("*.onnx"))}

    main(command)
    wanted, whole = files(), report_of(Path("small"))
    shutil.rmtree("small")

    def die_amid_the_fit(self: Any, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1:
            kill_me()

    with monkeypatch.context() as patch:
        patch.setattr("callbacks.resume.ExactResume.on_validation_start", die_amid_the_fit, raising=False)
        assert in_a_process(lambda: main(command)) == -9
    kept = set(files())
    assert kept and kept < set(wanted) and Path("small/nets/cut_0.4/checkpoints/last.ckpt").is_file()
    main(command)
    assert files() == wanted
    told = report_of(Path("small"))
    assert told["chosen"] == whole["chosen"]
    same = [[{k: v for k, v in row.items() if k != "times"} for row in one["rows"]] for one in (whole, told)]
    assert same[0] == same[1]
    monkeypatch.setattr(compress, "export", None)
    monkeypatch.setattr(compress, "quantise", None)
    main(command)
    assert report_of(Path("small")) == told


def test_a_setting_that_costs_too_much_is_not_shipped(
    old_and_new: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, new = old_and_new
    ruin = Setting("int8, ruined", percentile=55.0)
    monkeypatch.setattr(compress, "SETTINGS", (ruin, Setting("int8")))
    compress.run(Path(new), Options(cut=(), sparsity=(), out=Path("small")))
    names = [row["name"] for row in report_of(Path("small"))["rows"]]
    assert names == ["as it is", "int8"] and Path("small/exports/int8_ruined").is_dir()


def test_an_encoder_loses_hidden_units_and_opens_in_transformers(own_folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    checkpoint = fit_texts(own_folder)
    best = checkpoint.with_name("best.ckpt")
    main([str(best), "--cut=0.2", "--sparsity=", "--epochs=1", "--out=small", "--max_drop=1"])
    rows = {row["name"]: row for row in report_of(Path("small"))["rows"]}
    assert set(rows) == {"as it is", "int8", "cut 0.2", "cut 0.2, int8"}
    assert rows["cut 0.2"]["macs"] <= 0.8 * rows["as it is"]["macs"]
    folder = export(Path(rows["cut 0.2"]["checkpoint"]), "hf", Path("hf"))
    net = AutoModelForSequenceClassification.from_pretrained(folder)
    assert net.config.intermediate_size < 64
    assert sum(p.numel() for p in net.parameters()) == rows["cut 0.2"]["parameters"]


def test_a_plan_trains_nothing(old_and_new: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    main([old_and_new[1], "--plan"])
    out = capsys.readouterr().out
    assert "trained on for 3 epochs each: sparse 0.8, cut 0.5" in out and "at most 4 settings each" in out
    assert not Path("runs/compress").exists()


def test_what_cannot_be_made_small_gets_a_sentence(
    old_and_new: tuple[str, str], own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, new = old_and_new
    moved = shutil.copy(Path(new, "checkpoints", "best.ckpt"), "moved.ckpt")
    for words, said in (
        ([new, "--cut=1.5"], "--cut takes shares above 0 and below 1"),
        ([new, "--sparsity=much"], "--sparsity takes shares"),
        (["gone.ckpt"], "no checkpoint gone.ckpt"),
        ([moved], "moved away from its run's config.yaml"),
        ([new, "--cut=0.97", "--sparsity=", "--no_int8"], "of the multiplications can be cut; 0.97 was asked for"),
    ):
        with pytest.raises(SystemExit):
            main(list(map(str, words)))
        assert said in capsys.readouterr().err, words


def test_some_samples_are_repeated_where_there_are_too_few(old_and_new: tuple[str, str]) -> None:
    done = Compression(Path(old_and_new[1]), Options())
    assert len(done.some(300)["label"]) == 300
