"""Exports answer as their checkpoints do, in processes that know nothing of this package; what differs is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.images.decoding import evaluation_crop
from recipes import export as module
from recipes.cli.catalogue import recipe_of
from recipes.deploy import restored as loading
from recipes.deploy.check import compare
from recipes.deploy.graphs import PictureGraph
from recipes.deploy.restored import restore
from recipes.deploy.snippets import PICTURES, PIXELS
from recipes.export import export, main
from recipes.parts.checkpoints import load_checkpoint
from recipes.text import main as text
from recipes.vision import main as vision
from tests.conftest import picture, write_folder
from tests.tiny_encoders import sentence, tiny_encoder, write_csv

QUIET = [
    *("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"),
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.precision=32-true"),
]
PICTURE_FORMS = ["torch", "onnx", "safetensors"]

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


def fit_pictures(folder: Path, *options: str) -> Path:
    """A checkpoint of a net that has seen two batches."""
    root = folder / "pictures"
    if not root.exists():
        write_folder(root, ("train", "val", "test"))
    where = [f"--data.root={root}", "--data.batch_size=8", "--data.num_workers=0"]
    cli = vision(["fit", "--data=ImageFolder", *where, *options, *QUIET])
    return awake(Path(cli.folder) / "checkpoints" / "last.ckpt")


@torch.no_grad()
def awake(checkpoint: Path) -> Path:
    """After two steps BatchNorm's statistics are far off, and all logits alike: a wrong graph would go unseen."""
    model = restore(checkpoint).model.train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    for _ in range(3):
        model(loading.random_pictures(32, model.backbone.input_size))
    list(model.head.parameters())[-2].mul_(10)  # the last layer's weights
    content = load_checkpoint(checkpoint)
    torch.save({**content, "state_dict": model.state_dict()}, checkpoint)
    return checkpoint


def fit_texts(folder: Path, *options: str, kind: str = "bert", file: Path | None = None) -> Path:
    encoder = folder / kind
    if not encoder.exists():
        tiny_encoder(encoder, kind)
    file = file or write_csv(folder / "train.csv", 60)
    data = ["--data=TextFiles", f"--data.train_file={file}", "--data.val_share=0.3", "--data.max_length=32"]
    cli = text(["fit", *data, f"--model.encoder={encoder}", "--data.batch_size=8", *options, *QUIET])
    return Path(cli.folder) / "checkpoints" / "last.ckpt"


NETS = {
    "resnet18": ["--model.backbone=resnet18", "--model.image_size=32", "--model.small_stem=true"],
    "mobilenet": ["--model.backbone=mobilenet_v3_small", "--model.image_size=32", "--model.head_dropout=0.2"],
    "vit": ["--model.backbone=timm/test_vit", "--model.image_size=32"],
    "resnet8": ["--model.backbone=resnet8", "--model.image_size=32", "--model.head=mlp", "--model.head_hidden=8"],
}


@pytest.mark.parametrize("net", NETS)
def test_pictures_in_every_form(own_folder: Path, net: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = fit_pictures(own_folder, *NETS[net])
    restored = restore(checkpoint)
    assert restored.logits(loading.random_pictures(32, restored.image_size)).std(0).max() > 0.2, "they differ"
    picture(7, 130, 90).save("picture.jpg")
    image = loading.pixels("picture.jpg", "it", restored.image_size)[None].float() / 255
    expected = restored.logits(image)
    for form in PICTURE_FORMS:
        folder = export(checkpoint, form)
        assert folder == checkpoint.parents[1] / f"last_{form}"
        found = json.loads((folder / "facts.json").read_text())
        assert found["class_names"] == ["class_0", "class_1", "class_2"]
        assert found["check"]["where"] == "of the run's validation split" and found["check"]["samples"] == 24
        assert (
            found["check"]["agreement"] == 1 and found["check"]["largest_difference"] < found["check"]["tolerance"] / 2
        )
        assert "of the run's validation split, logits differ" in capsys.readouterr().out
        (folder / "picture.jpg").write_bytes(Path("picture.jpg").read_bytes())
        if net == "resnet8" or form == ("onnx" if net == "mobilenet" else "safetensors"):  # a process takes seconds
            logits, labels = as_a_stranger(folder, form)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
            assert labels == [restored.class_names[int(expected.argmax())]]
    assert not list(own_folder.rglob(".*_onnx*")), "nothing is left of the work"


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


@pytest.mark.parametrize("kind", ["deberta-v2", "distilbert", "modernbert"])
def test_every_encoder_in_onnx(own_folder: Path, kind: str) -> None:
    checkpoint = fit_texts(own_folder, kind=kind)
    folder = export(checkpoint, "onnx", out=own_folder / "made")
    checked = json.loads((folder / "facts.json").read_text())["check"]
    assert checked["samples"] == 18 and checked["where"] == "of the run's validation split"


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
    for form in ("onnx", "safetensors"):
        folder = export(checkpoint, form)
        assert json.loads((folder / "facts.json").read_text())["problem_type"] == "regression"


def test_predictions_with_mirror_images_are_exported_as_such(own_folder: Path) -> None:
    checkpoint = fit_pictures(own_folder, *NETS["resnet8"], "--model.mirror_at_test=true")
    images = torch.rand(3, 3, 32, 32)
    mirrored = restore(checkpoint).logits(images)
    torch.testing.assert_close(mirrored, restore(checkpoint).logits(images.flip(3)))
    for form in ("torch", "safetensors"):
        export(checkpoint, form)  # or else the check would refuse it


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (97, 98), (60, 40), (333, 1000), (128, 128), (127, 129)])
@pytest.mark.parametrize("side", [32, 96, 128])
def test_the_lines_for_a_picture_crop_as_evaluation_does(own_folder: Path, size: tuple[int, int], side: int) -> None:
    found: dict[str, Any] = {}
    exec(PIXELS.format(size=side, shorter_side=module.shorter_side(side)), found)
    picture(1, *size).save("it.png")
    expected = np.array(evaluation_crop(Image.open("it.png"), side)).transpose(2, 0, 1).astype(np.float32) / 255
    assert np.array_equal(found["pixels"]("it.png"), expected)


@pytest.mark.parametrize("side", [32, 128])
def test_the_lines_for_a_picture_read_as_evaluation_does(own_folder: Path, side: int) -> None:
    Path("it").mkdir()
    Path("it/pixels.py").write_text(PIXELS.format(size=side))
    files = module.write_odd_pictures(own_folder, side)
    found: dict[str, Any] = {"folder": "it", "files": files}
    exec(PICTURES, found)
    for file, image in zip(files, found["images"], strict=True):
        expected = loading.pixels(file, file, side).numpy().astype(np.float32) / 255
        assert np.array_equal(image, expected) and 0.1 < image.mean() < 0.95, file
    module.check_reading(Path("it"), side)


@pytest.mark.parametrize("fault", ["0 is white", "16 bits", "transparent", "turned", "broken"])
def test_lines_that_read_otherwise_are_refused(checkpoint: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = {
        "0 is white": ("255 - grey if inverted else grey", "grey"),
        "16 bits": ("* 255 // most", ""),
        "transparent": ("picture.has_transparency_data", "False"),
        "turned": ("if turn in TURNS", "if False"),
        "broken": ("import numpy as np", "import numpi as np"),
    }[fault]
    assert old in PIXELS
    monkeypatch.setattr(module, "PIXELS", PIXELS.replace(old, new))
    with pytest.raises(ValueError, match="the lines that read pictures"):
        export(checkpoint, "torch")
    assert not list(checkpoint.parents[1].glob("*_torch"))


def test_samples_are_what_can_be_read(checkpoint: Path, own_folder: Path) -> None:
    given = own_folder / "given" / "deeper"
    given.mkdir(parents=True)
    picture(0).save(given / "a.jfif", "JPEG")
    Image.fromarray(np.full((40, 40), 30_000, np.uint16)).save(given / "b.png")
    for name in ("._b.png", "notes.txt", "broken.png"):
        (given / name).write_bytes(b"Mac OS X")
    folder = export(checkpoint, "torch", given=own_folder / "given")
    assert json.loads((folder / "facts.json").read_text())["check"]["samples"] == 2
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere: expected one of pictures"):
        export(checkpoint, "onnx", given=own_folder / "nowhere")


def test_a_checkpoint_alone_is_enough(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = fit_texts(own_folder)
    moved = Path(checkpoint.rename(own_folder / "model.ckpt"))
    for name in ("bert", "runs"):
        (own_folder / name).rename(own_folder / f"no more {name}")
    folder = export(moved, "onnx")
    assert folder == own_folder / "model_onnx"
    assert "made up at random, for the validation samples are not at hand (the checkpoint" in capsys.readouterr().out
    assert "made up at random" in (folder / "README.md").read_text()


def test_other_data_under_the_same_path_is_not_taken_for_the_runs(own_folder: Path) -> None:
    checkpoint = fit_texts(own_folder)
    write_csv(own_folder / "train.csv", 80)
    where = json.loads((export(checkpoint, "safetensors") / "facts.json").read_text())["check"]["where"]
    assert "made up at random" in where and "same data" in where


class Wrong(PictureGraph):
    """A graph that forgets the normalisation."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().forward(images * self.std + self.mean)


@pytest.fixture
def checkpoint(own_folder: Path) -> Path:
    return fit_pictures(own_folder, *NETS["resnet8"])


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_what_answers_otherwise_is_refused_and_nothing_is_left(
    checkpoint: Path, own_folder: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "PictureGraph", Wrong)
    with pytest.raises(SystemExit) as ended:
        main([str(checkpoint), "--format", form, "--out", "made"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the export is not the checkpoint: outputs differ by up to")
    assert not [path for path in own_folder.iterdir() if "made" in path.name]


def test_a_write_that_is_cut_short_leaves_nothing(checkpoint: Path, own_folder: Path, monkeypatch: Any) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="No space left"):
        export(checkpoint, "torch", Path("made"))
    assert not [path for path in own_folder.iterdir() if "made" in path.name]


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "a folder that is there": (lambda c: [str(c), "--format=torch", "--out=."], "is there already: remove it"),
    "pictures for transformers": (lambda c: [str(c), "--format=hf"], "needs a text classifier"),
    "no checkpoint": (lambda c: ["none.ckpt", "--format=onnx"], "no checkpoint none.ckpt"),
    "a damaged one": (lambda c: [str(damaged(c)), "--format=onnx"], "cannot be read safely"),
    "another program's": (lambda c: [str(foreign(c)), "--format=onnx"], "is no checkpoint of recipes.vision or"),
    "no samples": (lambda c: [str(c), "--format=safetensors", "--samples=runs"], "holds no picture"),
}


def damaged(checkpoint: Path) -> Path:
    Path("half.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    return Path("half.ckpt")


def foreign(checkpoint: Path) -> Path:
    content = load_checkpoint(checkpoint)
    del content["recipe"]
    torch.save(content, "foreign.ckpt")
    return Path("foreign.ckpt")


def test_mistakes_get_a_sentence(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for what, (arguments, words) in REFUSED.items():
        with pytest.raises(SystemExit) as ended:
            main(arguments(checkpoint))
        assert ended.value.code == 2, what
        assert words in capsys.readouterr().err, what


def test_a_head_that_no_library_has_goes_by_graph_only(own_folder: Path) -> None:
    checkpoint = fit_pictures(own_folder, *NETS["resnet8"][:2], "--model.head=cosine")
    with pytest.raises(ValueError, match="no other library builds a CosineHead: take --format torch or onnx"):
        export(checkpoint, "safetensors")
    assert export(checkpoint, "torch").is_dir()
    checkpoint = fit_pictures(own_folder, "--model.backbone=mnasnet0_5", "--model.image_size=32")
    with pytest.raises(ValueError, match="cannot be loaded by other programs"):  # it asks for more than its weights
        export(checkpoint, "safetensors")
    assert not [path for path in checkpoint.parents[1].iterdir() if "safetensors" in path.name]


def test_ties_are_no_disagreement_and_other_answers_are() -> None:
    expected = torch.tensor([[1.0, 1.0 + 1e-6], [3.0, 0.0]])
    other = torch.tensor([[1.0 + 1e-6, 1.0], [3.0, 0.0]])
    found = compare(expected, other, "single_label_classification")
    assert found["agreement"] == 1 and found["largest_difference"] == pytest.approx(1e-6, rel=0.2)
    for wrong in (expected.flip(1), expected + torch.nan, expected + 1e-2):
        with pytest.raises(ValueError, match="nothing was written"):
            compare(expected, wrong, "single_label_classification")
    with pytest.raises(ValueError, match="50.0 % of the answers"):
        compare(torch.tensor([[9.0, -9.0]]), torch.tensor([[9.0, 9.0]]), "multi_label_classification")
    assert compare(torch.tensor([[0.0]]), torch.tensor([[1e-7]]), "regression")["agreement"] == 1


def test_a_folder_called_export_is_no_recipe(own_folder: Path) -> None:
    (own_folder / "export").mkdir()
    (own_folder / "export" / "mine.yaml").touch()
    assert recipe_of("export/mine.yaml") == "vision"
    assert recipe_of("text/quickstart") == "text"
