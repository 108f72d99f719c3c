"""From one net to another, and soups of several: right at the ends, cached, and a checkpoint like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.deploy import variants
from recipes.deploy.lines import Mixing, Options
from recipes.deploy.mixing import End
from recipes.deploy.restored import restore, start_of
from recipes.export import export
from recipes.interpolate import main
from recipes.parts.checkpoints import load_checkpoint
from recipes.vision import main as vision
from tests.recipes.deploy.exports import NEW, fit_digits, fit_texts
from tests.recipes.test_predict import in_a_process, kill_me

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:resumed, but not as if never stopped. max_epochs is"),
]


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], Path, str]:
    """The report, the checkpoint and the screen of a command."""
    capsys.readouterr()
    main(words)
    out = capsys.readouterr().out
    checkpoint = Path(out.split("checkpoint: ")[1].strip())
    return json.loads((checkpoint.parents[1] / "report.json").read_text()), checkpoint, out


def test_from_one_net_to_another(
    old_and_new: tuple[str, str], own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = old_and_new
    also = "vision/quickstart_pretrain"
    report, checkpoint, out = told([old, new, f"--also={also}", "--test", "--at=0.4,0.6"], capsys)
    assert report["places"] == [0.0, 0.4, 0.6, 1.0] and report["at"] in report["places"]
    figures = {
        row["name"]: {name: found[0]["other"] for name, found in row["figures"].items()} for row in report["rows"]
    }
    assert figures["0"][also] > 0.9 > figures["1"][also], "it has forgotten"
    assert figures["1"]["val"] > 0.8 > figures["0"]["val"], "what the old net's trunk is worth to the new head"
    best = max(figures, key=lambda name: sum(figures[name].values()))
    assert float(best) == report["at"] and 0 < report["at"] < 1
    assert set(report["chosen"]) == {"val", also, "test"} and "On test" in out
    page = (checkpoint.parents[1] / "report.html").read_text()
    assert page.count("<svg") == 2 and also in page

    predicted = vision(["validate", f"--ckpt_path={checkpoint}"]).trainer.callback_metrics["val/accuracy"]
    assert float(predicted) == pytest.approx(figures[best]["val"], abs=1e-6)
    vision(["predict", f"--ckpt_path={checkpoint}"])
    assert (export(checkpoint, "safetensors") / "model.safetensors").is_file()
    resumed = vision(["fit", f"--ckpt_path={checkpoint}", "--trainer.max_epochs=5"])
    assert resumed.trainer.global_step > load_checkpoint(checkpoint)["global_step"]


def test_from_where_a_run_started(old_and_new: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    old, new = old_and_new
    report, _, out = told([new, "--at=0.5", "--per_block"], capsys)
    start = start_of(Path(new, "checkpoints", "best.ckpt"))
    trunk = load_checkpoint(Path(old, "checkpoints", "best.ckpt"))["state_dict"]
    assert start and all(torch.equal(tensor, trunk[name]) for name, tensor in start.items())
    assert not [name for name in start if name.startswith("head")]
    assert [row["name"] for row in report["rows"]] == ["0", "0.5", "1", "per block"]
    assert set(report["at"]) == {"stem", "layer1", "layer2", "layer3"}
    assert "its start" in report["facts"]["nets"] and "Chosen: stem" in out


def test_killed_in_the_middle_it_ends_with_the_same_bytes(
    old_and_new: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*old_and_new, "--at=0.3,0.6"]
    whole, checkpoint, _ = told(command, capsys)
    wanted = checkpoint.read_bytes()
    shutil.rmtree("runs/interpolate")
    save, saved = variants.save_predictions, list[Path]()

    def save_and_die(path: Path, *rest: Any) -> None:
        save(path, *rest)
        saved.append(path)
        if len(saved) == 2:
            kill_me()

    monkeypatch.setattr(variants, "save_predictions", save_and_die)
    assert in_a_process(lambda: main(command)) == -9
    assert not checkpoint.is_file() and len(list(checkpoint.parents[1].glob("predictions/*"))) == 2
    monkeypatch.setattr(variants, "save_predictions", lambda *given: (saved.append(given[0]), save(*given)))
    report, again, _ = told(command, capsys)
    assert again.read_bytes() == wanted and report == whole
    assert len(saved) == 2, "what was measured before is read"
    monkeypatch.setattr(variants, "predict", None)
    assert told(command, capsys)[0] == whole


def test_a_soup_of_nets_from_one_start(
    old_and_new: tuple[str, str], own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = old_and_new
    weights = f"--model.weights={old}/checkpoints/best.ckpt"
    others = [
        str(fit_digits(*NEW, weights, f"--seed_everything={seed}", f"--trainer.default_root_dir={seed}"))
        for seed in (1, 2)
    ]
    report, checkpoint, _ = told([new, *others, "--test"], capsys)
    assert [row["name"] for row in report["rows"]][3:] == ["mean of all", "greedy"]
    values = {row["name"]: row["figures"]["val"][0]["other"] for row in report["rows"]}
    assert values["greedy"] >= max(list(values.values())[:3]) and len(report["barriers"]) == 2
    chosen = report["chosen"]["val"][0]["other"]
    assert chosen == max(values.values())
    assert float(vision(["validate", f"--ckpt_path={checkpoint}"]).trainer.callback_metrics["val/accuracy"]) == (
        pytest.approx(chosen, abs=1e-6)
    )
    if report["members"] == [0, 1, 2]:
        mean = sum(End(Path(p)).weights()["head.weight"].double() for p in (new, *others)) / 3
        torch.testing.assert_close(load_checkpoint(checkpoint)["state_dict"]["head.weight"], mean.float())

    stranger = fit_digits(*NEW, "--model.weights=null", "--seed_everything=3", "--trainer.max_epochs=8")
    with pytest.raises(SystemExit):
        main([new, others[0], str(stranger)])
    said = capsys.readouterr().err
    assert "no soup: half way to " in said and stranger.name in said.split("below the mean of both")[1]


def test_what_lora_learnt_is_mixed_as_plain_weights(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = fit_digits(*NEW, "--config=strategy/lora")
    ended = End(lora)
    merged, restored = ended.weights(), restore(lora / "checkpoints" / "best.ckpt")
    images = torch.rand(4, 3, 8, 8)
    wanted = restored.logits(images)
    mixing = Mixing([lora], Options(at=[0.5]))
    assert not mixing.mixture.remeasured, "statistics of frozen norms stand still"
    half = dict(mixing.weights(0.5))
    start = start_of(ended.path)
    name = "backbone.net.layer3.0.conv1.weight"
    assert not torch.equal(start[name], merged[name])
    torch.testing.assert_close(half[name], (start[name] + merged[name]) / 2)
    report, checkpoint, _ = told([str(lora), "--at=1"], capsys)
    assert report["at"] == 1.0
    torch.testing.assert_close(restore(checkpoint).logits(images), wanted, atol=1e-5, rtol=0)
    assert load_checkpoint(checkpoint)["hyper_parameters"]["peft"] is None
    vision(["validate", f"--ckpt_path={checkpoint}"])
    vision(["fit", f"--ckpt_path={checkpoint}", "--trainer.max_epochs=5"])


def test_texts_too(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = fit_texts(own_folder, "--model.optimizer.lr=0.01")
    report, checkpoint, _ = told([str(first), "--at=0.5"], capsys)
    assert report["rows"][0]["name"] == "0" and restore(checkpoint).logits(["a text"]).shape == (1, 2)
    assert export(checkpoint, "hf").is_dir()


def test_a_plan_measures_nothing(old_and_new: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*old_and_new, "--also=vision/quickstart_pretrain", "--per_block", "--plan"])
    out = capsys.readouterr().out
    assert "measured on: vision/quickstart_pretrain, 72 samples" in out and "BatchNorm: measured anew" in out
    assert "stem, layer1, layer2, layer3" in out and not Path("runs/interpolate").exists()


def test_what_cannot_be_mixed_gets_a_sentence(
    old_and_new: tuple[str, str], own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = old_and_new
    wide = str(fit_digits(*NEW, "--model.backbone=resnet14", "--model.weights=null", "--trainer.max_epochs=1"))
    moved = shutil.copy(Path(new, "checkpoints", "best.ckpt"), "moved.ckpt")
    texts = str(fit_texts(own_folder))
    for words, said in (
        ([new, wide], "are different nets, whose weights can't be mixed"),
        ([wide], "began with random weights; give two checkpoints"),
        ([old, new, "--at=1.5"], "--at 1.5 lies beyond the ends, 0 and 1: add --extrapolate"),
        ([old, new, "--at=half"], "--at takes numbers"),
        ([old, str(moved)], "say with --data which samples to measure on"),
        ([old, "gone.ckpt"], "no checkpoint gone.ckpt"),
        ([texts, new], "is of recipes.text, and"),
        ([old, new, wide], "need the same classes"),
        ([new, new, "--also=vision/quickstart_pretrain"], "has a head for vision/quickstart_pretrain"),
        ([new, "--also=vision/quikstart"], "did you mean"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*words, "--plan"])
            pytest.fail(str(words))
        assert said in capsys.readouterr().err, words
    main([old, str(moved), "--data=vision/quickstart", "--at=1.2", "--extrapolate", "--out=given"])
    assert Path("given/checkpoints/best.ckpt").is_file()
