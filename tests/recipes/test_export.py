"""Exports answer as their checkpoints do, in processes that know nothing of this package; what differs is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.deploy.restored import restore
from recipes.deploy.samples import pixels, random_images
from recipes.export import export, main
from recipes.parts.checkpoints import load_checkpoint
from tests.conftest import picture
from tests.recipes.deploy.exports import NETS, fit_pictures, fit_texts
from tests.tiny_encoders import sentence

PICTURE_FORMS = ["torch", "onnx", "safetensors"]
IN_RESNET8 = {"resnet18"}  # whose graph has no layer that resnet8\'s lacks; in safetensors another library builds it

# What a stranger's process has: none of this package, and only the libraries that the format says.
STRANGER = """
import json, sys
sys.modules.update(dict.fromkeys({blocked}))
sys.path = [path for path in sys.path if path != {home!r}]
{code}
print(json.dumps([logits.tolist(), labels]))
"""
OURS = {"recipes", "callbacks", "datamodules", "lightning", "datasets", "jsonargparse"}
WITHOUT = {
    "torch": OURS | {"torchvision", "timm", "transformers", "onnxruntime", "safetensors"},
    "onnx": OURS | {"torch", "torchvision", "timm", "transformers", "safetensors"},
    "safetensors": OURS | {"onnxruntime"},
    "hf": OURS | {"onnxruntime", "torchvision", "timm"},
}


def as_a_stranger(folder: Path, form: str, code: str | None = None) -> tuple[torch.Tensor, list[Any]]:
    """Logits and labels of the README's code, run in the folder by a process without this package."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    code = "\n".join([code or blocks[0], blocks[1]])
    home = str(Path(__file__).resolve().parents[2])
    program = STRANGER.format(blocked=WITHOUT[form], home=home, code=code)
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    logits, labels = json.loads(done.stdout)
    return torch.tensor(logits), labels


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("net", NETS)
def test_pictures_in_every_form(own_folder: Path, net: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = fit_pictures(own_folder, *NETS[net])
    restored = restore(checkpoint)
    assert restored.logits(random_images(32, restored.image_size)).std(0).max() > 0.2, "they differ"
    picture(7, 130, 90).save("image.jpg")
    image = pixels("image.jpg", "it", restored.image_size)[None].float() / 255
    expected = restored.logits(image)
    for form in PICTURE_FORMS if net not in IN_RESNET8 else ["safetensors"]:
        folder = export(checkpoint, form)
        assert folder == checkpoint.parents[1] / f"last_{form}"
        found = json.loads((folder / "facts.json").read_text())
        assert found["class_names"] == ["class_0", "class_1", "class_2"]
        assert found["check"]["where"] == "of the run's validation split" and found["check"]["samples"] == 24
        assert (
            found["check"]["agreement"] == 1 and found["check"]["largest_difference"] < found["check"]["tolerance"] / 2
        )
        assert "of the run's validation split, logits differ" in capsys.readouterr().out
        (folder / "image.jpg").write_bytes(Path("image.jpg").read_bytes())
        if net == "resnet8" or form == ("onnx" if net == "mobilenet" else "safetensors"):  # a process takes seconds
            logits, labels = as_a_stranger(folder, form)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
            assert labels == [restored.class_names[int(expected.argmax())]]
    assert not list(own_folder.rglob(".*_onnx*")), "nothing is left of the work"


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_texts_in_every_form(own_folder: Path, pooling: str) -> None:
    checkpoint = fit_texts(own_folder, f"--model.pooling={pooling}", "--model.optimizer=AdamW")
    (own_folder / "train.csv").rename("elsewhere.csv")
    (own_folder / "bert").rename("elsewhere")  # neither the texts nor the encoder's folder are there
    restored = restore(checkpoint)
    texts = [sentence(1, 3, 40), "a dull film"]
    expected = restored.logits(texts)
    (own_folder / "some.txt").write_text("\n".join([*texts, sentence(0, 2, 9)]))
    for form in ["torch", "onnx", "safetensors", *(["hf"] if pooling == "model" else [])]:
        folder = export(checkpoint, form, given=Path("some.txt"))
        assert json.loads((folder / "facts.json").read_text())["check"]["samples"] == 3
        if pooling == "model":  # a process takes seconds
            logits, labels = as_a_stranger(folder, form, f"texts = {texts}")
            torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)
            assert labels == [restored.class_names[label] for label in expected.argmax(1).tolist()]


@pytest.mark.slow
def test_pairs_several_labels_and_scores(own_folder: Path) -> None:
    rows = [f"{sentence(n % 2, n)},{sentence(1, n, 2)},{('bad', 'good', 'bad|good')[n % 3]},{n % 7}" for n in range(40)]
    file = own_folder / "train.csv"
    file.write_text("\n".join(["one,two,label,score", *(row.replace(", ", " ") for row in rows), ""]))
    pair = "--data.text_column=[one, two]"
    several = ["--data.problem_type=multi_label_classification", "--data.label_separator=|"]
    checkpoint = fit_texts(own_folder, pair, *several, file=file)
    texts = [("a fine film", "what a story"), ("what a story", "a fine film")]
    for form in ("torch", "safetensors", "hf"):
        export(checkpoint, form)
    logits, labels = as_a_stranger(export(checkpoint, "onnx"), "onnx", f"texts = {texts}")
    torch.testing.assert_close(logits, restore(checkpoint).logits(texts), atol=1e-4, rtol=0)
    names = restore(checkpoint).class_names
    assert labels == [[name for name, logit in zip(names, row, strict=True) if logit > 0] for row in logits]
    score = ["--data.problem_type=regression", "--data.label_column=score", "--data.text_column=one"]
    checkpoint = fit_texts(own_folder, *score, "--trainer.max_epochs=2", file=file)
    assert restore(checkpoint).model.scale.tolist() == [3, 2]  # of 0 to 6
    for form in ("onnx", "safetensors", "hf"):
        folder = export(checkpoint, form)
        assert json.loads((folder / "facts.json").read_text())["problem_type"] == "regression"


@pytest.mark.slow
def test_a_write_that_is_cut_short_leaves_nothing(checkpoint: Path, own_folder: Path, monkeypatch: Any) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="No space left"):
        export(checkpoint, "torch", Path("made"))
    assert not [path for path in own_folder.iterdir() if "made" in path.name]


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "a folder that is there": (lambda c: [str(c), "--format=torch", "--out=."], "is there already: remove it"),
    "images for transformers": (lambda c: [str(c), "--format=hf"], "needs a text classifier"),
    "no checkpoint": (lambda c: ["none.ckpt", "--format=onnx"], "no checkpoint none.ckpt"),
    "a damaged one": (lambda c: [str(damaged(c)), "--format=onnx"], "cannot be read safely"),
    "another program's": (
        lambda c: [str(foreign(c)), "--format=onnx"],
        "is no checkpoint of recipes.vision, recipes.text or recipes.multitask",
    ),
    "no samples": (lambda c: [str(c), "--format=safetensors", "--samples=runs"], "holds no image"),
}


def damaged(checkpoint: Path) -> Path:
    Path("half.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    return Path("half.ckpt")


def foreign(checkpoint: Path) -> Path:
    content = load_checkpoint(checkpoint)
    del content["recipe"]
    torch.save(content, "foreign.ckpt")
    return Path("foreign.ckpt")


@pytest.mark.slow
def test_mistakes_get_a_sentence(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for what, (arguments, words) in REFUSED.items():
        with pytest.raises(SystemExit) as ended:
            main(arguments(checkpoint))
        assert ended.value.code == 2, what
        assert words in capsys.readouterr().err, what


@pytest.mark.slow
def test_a_head_that_no_library_has_goes_by_graph_only(own_folder: Path) -> None:
    checkpoint = fit_pictures(own_folder, *NETS["resnet8"][:2], "--model.head=cosine")
    with pytest.raises(ValueError, match="no other library builds a CosineHead: take --format torch or onnx"):
        export(checkpoint, "safetensors")
    assert export(checkpoint, "torch").is_dir()
    checkpoint = fit_pictures(own_folder, "--model.backbone=mnasnet0_5", "--model.image_size=32")
    with pytest.raises(ValueError, match="cannot be loaded by other programs"):  # it asks for more than its weights
        export(checkpoint, "safetensors")
    assert not [path for path in checkpoint.parents[1].iterdir() if "safetensors" in path.name]
