"""The doctor finds what was planted, and nothing in what is sound."""

from __future__ import annotations

import csv
import io
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from datamodules import ImageFolder
from datamodules.images.inspection import alike
from datamodules.texts.inspection import inspect_texts
from recipes.__main__ import main
from recipes.cli.doctor import sentences
from tests.conftest import picture
from tests.tiny_encoders import tiny_encoder

OPTIONS = [
    *("--data", "ImageFolder", "--model.backbone=resnet8", "--model.weights=digits_0_4_resnet8"),
    *("--model.image_size=8", "--data.num_workers=0", "--data.in_memory=false"),
]


def digit(values: Any, quality: int = 90, side: int = 48) -> bytes:
    """A handwritten digit as JPEG."""
    out = io.BytesIO()
    grey = Image.fromarray((values * 255 / 16).astype(np.uint8)).convert("RGB")
    grey.resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=quality)
    return out.getvalue()


def write(root: Path, split: str, label: int | str, name: str, content: bytes) -> str:
    path = root / split / str(label) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def visit(*options: str, config: str = "vision/quickstart", status: int = 0) -> dict[str, Any]:
    with pytest.raises(SystemExit) as end:
        main(["doctor", config, *options])
    assert end.value.code == status
    assert not Path("doctor.json").exists(), "git ignores runs/ alone"
    found: dict[str, Any] = json.loads(Path("runs/doctor/doctor.json").read_text())
    return found


@pytest.fixture
def digits(own_folder: Path) -> tuple[Path, list[Any]]:
    """40 of each digit from 0 to 4 to train on, 10 to test on; and those that are left."""
    bunch, root = load_digits(), own_folder / "digits"
    left = []
    for label in range(5):
        rows = np.flatnonzero(bunch.target == label)
        for number, row in enumerate(rows[:50]):
            write(root, "train" if number < 40 else "test", label, f"{number}.jpg", digit(bunch.images[row]))
        left += [(label, bunch.images[row]) for row in rows[50:70]]
    return root, left


@pytest.mark.slow
def test_what_is_sound_is_called_sound(digits: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = visit(*OPTIONS, f"--data.root={digits[0]}")
    assert not any(found[key] for key in ("unreadable", "misnamed", "exact", "rescaled", "leaks", "conflicts"))
    screen = capsys.readouterr().out
    assert "train  160      5        32 0" in screen
    assert "the backbone expects" in screen


@pytest.mark.slow
def test_what_was_planted_is_found(digits: Any, capsys: pytest.CaptureFixture[str]) -> None:
    root, left = digits
    broken, misnamed, twice, rescaled, wrong = set(), set(), set(), set(), set()
    for number in range(5):
        label, values = left[number]
        broken.add(write(root, "train", label, f"broken{number}.jpg", digit(values)[:400]))
    for number in range(3):
        out = io.BytesIO()
        picture(100 + number).save(out, "GIF")
        misnamed.add(write(root, "train", number, f"gif{number}.jpg", out.getvalue()))
    for number in range(7):
        label, values = left[20 + number]
        for split in ("train", "test"):
            twice.add(write(root, split, label, f"twice{number}.jpg", digit(values)))
    for number in range(7):
        label, values = left[40 + number]
        rescaled.add(write(root, "train", label, f"large{number}.jpg", digit(values, side=96)))
        rescaled.add(write(root, "test", label, f"small{number}.jpg", digit(values, quality=60, side=40)))
    for number in range(4):
        label, values = left[60 + number]
        wrong.add(write(root, "train", (label + 2) % 5, f"wrong{number}.jpg", digit(values)))
    for number in range(2):
        write(root, "train", "rare", f"{number}.jpg", digit(left[90 + number][1]))
    found = visit(*OPTIONS, f"--data.root={root}", "--data.val_share=0.01", status=1)
    assert {name for _, name, _ in found["unreadable"]} == broken
    assert {name for _, name, _ in found["misnamed"]} == misnamed
    assert {name for group in found["exact"] for _, name in group} == twice
    assert len({name for pair in found["rescaled"] for _, name in pair} & rescaled) >= 12, "6 of 7 pairs"
    assert not {name for pair in found["rescaled"] for _, name in pair} - rescaled - twice
    assert found["leaks"]["train, test"] >= 13
    assert len({name for name, _, _ in found["suspects"]} & wrong) >= 3
    assert found["splits"]["train"]["classes"]["rare"] < 5
    with Path("runs/doctor/doctor.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    kinds = {kind: {row["name"] for row in rows if row["kind"] == kind} for kind in {row["kind"] for row in rows}}
    assert kinds["unreadable"] == broken and kinds["misnamed"] == misnamed
    pairs = {(row["name"], row["split"], row["partner"], row["partner_split"]) for row in rows}
    for key in ("exact", "rescaled"):
        for (split, name), (its, copy) in found[key]:
            assert (copy, its, name, split) in pairs, "the whole list, and not the five that the screen shows"
    likeness = {row["kind"]: float(row["similarity"]) for row in rows if row["similarity"]}
    assert likeness["exact"] == 1 and 0.9 < likeness["rescaled"] <= 1
    assert kinds["suspect"] == {name for name, _, _ in found["suspects"]}
    screen = capsys.readouterr().out
    assert "every finding in a row: runs/doctor/doctor.csv" in screen
    assert "5 cannot be read; repair or remove them" in screen
    assert "3 have the ending of another format" in screen
    assert "is GIF, not .jpg" in screen
    assert "LEAK: " in screen
    assert "classes with fewer than 5 to train on: rare" in screen
    assert "labels are doubtful" in screen


@pytest.mark.slow
def test_files_that_no_other_program_would_open(digits: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A class of pointers to files elsewhere, a picture that would fill the memory, a name that is no text."""
    root, left = digits
    for path in (root / "train" / "2").iterdir():
        path.write_text("version https://git-lfs.github.com/spec/v1")
    size = (30_000).to_bytes(4, "big")
    header = b"IHDR" + size + size + b"\x08\x02\x00\x00\x00"
    bomb = b"\x89PNG\r\n\x1a\n\x00\x00\x00\r" + header + zlib.crc32(header).to_bytes(4, "big")
    write(root, "train", 0, "bomb.png", bomb)
    odd = write(root, "train", 1, os.fsdecode(b"caf\xe9.jpg"), digit(left[0][1]))
    write(root, "test", 1, "same.jpg", Path(odd).read_bytes())
    found = visit(*OPTIONS, f"--data.root={root}", "--data.batch_size=4", "--data.eval_batch_size=4", status=1)
    assert len(found["unreadable"]) == 41
    assert "labels were not looked at" not in capsys.readouterr().out, "a batch of nothing readable is left out"
    assert len(found["exact"]) == 1


@pytest.mark.slow
def test_many_copies_are_one_group(own_folder: Path) -> None:
    for number in range(30):
        write(own_folder / "p", "train", number % 2, f"{number}.jpg", digit(load_digits().images[0]))
    write(own_folder / "p", "train", 0, "small.jpg", digit(load_digits().images[0], side=40))
    data = ImageFolder(own_folder / "p", image_size=8, val_share=0.1, num_workers=0)
    data.setup("fit")
    found = data.inspect()
    assert [len(group) for group in found["exact"]] == [30]
    assert len(found["rescaled"]) == 1, "not one for each pair"


@pytest.mark.slow
def test_without_weights_labels_are_not_looked_at(digits: Any, capsys: pytest.CaptureFixture[str]) -> None:
    visit(*OPTIONS, f"--data.root={digits[0]}", "--model.weights=null")
    assert "without model.weights the backbone's features say nothing" in capsys.readouterr().out
    visit(*OPTIONS, f"--data.root={digits[0]}", "--model.weights=not/there.safetensors")
    assert "labels were not looked at, for lack of the backbone's weights" in capsys.readouterr().out


@pytest.mark.slow
def test_texts(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a fine film", "good"), ("A  fine film", "bad"), ("x", "good"), ("it was a cafÃ© story", "bad")]
    rows += [(f"sentence number {number} of many", "good" if number % 2 else "bad") for number in range(20)]
    for name, some in (("train", rows), ("val", [("a Fine film", "good"), ("another one", "bad")])):
        lines = ["text,label", *(f"{text},{label}" for text, label in some)]
        Path(f"{name}.csv").write_text("\n".join(lines) + "\n")
    encoder = tiny_encoder(own_folder / "bert", "bert")
    options = [f"--model.encoder={encoder}", "--data.max_length=8", "--data.train_file=train.csv"]
    found = visit(*options, "--data.val_file=val.csv", config="text/csv_minilm", status=1)
    assert found["leaks"] == {"train, val": 1}
    assert found["conflicts"] == 1
    assert [row[1] for row in found["short"]] == ["x"]
    assert [row[1] for row in found["encoding"]] == ["it was a cafÃ© story"]
    assert found["lengths"]["train"]["max"] == 8
    assert 0 < found["cut"]["train"] < 1
    screen = capsys.readouterr().out
    assert "1 of these have different labels" in screen
    assert "train · a fine film = train · A fine film = val · a Fine film" in screen


@pytest.mark.slow
def test_texts_to_pretrain_on(own_folder: Path) -> None:
    """Longer ones are cut into pieces; looked at are the texts."""
    lines = ["text", *(f"sentence number {number} of many, " * 9 for number in range(30)), "twice", "Twice"]
    Path("train.csv").write_text("\n".join(f'"{line}"' for line in lines) + "\n")
    options = [f"--model.encoder={tiny_encoder(own_folder / 'bert', 'bert')}", "--data.max_length=16"]
    found = visit(*options, "--data.texts.train_file=train.csv", config="mlm/csv_bert", status=0)
    assert sum(part["samples"] for part in found["splits"].values()) == 32
    assert len(found["exact"]) == 1
    assert found["lengths"]["train"]["max"] > 16


def test_flat_pictures_are_not_copies_of_each_other() -> None:
    rng = np.random.default_rng(0)
    flat = np.linspace(120, 126, 768).astype(np.uint8)[None] + rng.integers(0, 2, (20, 1), dtype=np.uint8)
    assert alike(flat) == []
    full = rng.integers(0, 256, (20, 768), dtype=np.uint8)
    darker = (full[3:4] * 0.9).astype(np.uint8)
    assert [pair for *pair, _ in alike(np.concatenate([flat, full, darker]), block=7)] == [[23, 40]]


def reviews(wrong: set[int], number: int = 300) -> list[tuple[str, str]]:
    """Sentences on food and on films, some under the other's name."""
    words = {
        "food": ["soup", "bread", "cheese", "pepper", "dinner", "tasty", "cook", "kitchen", "plate", "salt", "oven"],
        "film": ["actor", "scene", "plot", "camera", "cinema", "screen", "director", "story", "drama", "role", "cut"],
    }
    rng = np.random.default_rng(0)
    rows = []
    for row in range(number):
        kind = ("food", "film")[row % 2]
        text = " ".join(rng.choice(words[kind], 8)) + f" number {row}"
        rows.append((text, kind if row not in wrong else {"food": "film", "film": "food"}[kind]))
    return rows


def write_texts(rows: list[tuple[str, str]], file: str = "train.csv") -> None:
    Path(file).write_text("\n".join(["text,label", *map(",".join, rows)]) + "\n")


@pytest.mark.slow
def test_wrong_labels_of_texts_are_found(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {7, 90, 133, 200, 271, 18, 44}
    write_texts(reviews(wrong))
    write_texts([(f"new {text}", label) for text, label in reviews(set(), 20)], "val.csv")
    options = ["--model.encoder=docstrings_bert", "--data.train_file=train.csv", "--data.val_file=val.csv"]
    found = visit(*options, config="text/csv_minilm")
    texts = reviews(set())
    suspects = {name for name, _, _ in found["suspects"]}
    assert suspects <= {texts[row][0] for row in wrong}
    assert len(suspects) >= 5, "of 7"
    assert all(rather == dict(texts)[name] != own for name, own, rather in found["suspects"])
    screen = capsys.readouterr().out
    assert f"{len(suspects)} labels are doubtful: samples like these are of another class:" in screen
    assert " is film, rather food" in screen
    with Path("runs/doctor/doctor.csv").open(newline="") as lines:
        kinds = [row["kind"] for row in csv.DictReader(lines)]
    assert kinds.count("suspect") == len(suspects), "all of them, not five"


@pytest.mark.slow
def test_texts_of_scores_have_no_suspects(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts([(text, str(row / 10)) for row, (text, _) in enumerate(reviews(set(), 30))])
    options = ["--model.encoder=docstrings_bert", "--data.train_file=train.csv", "--data.problem_type=regression"]
    visit(*options, config="text/csv_minilm")
    assert "labels were not looked at: this takes texts of one class each" in capsys.readouterr().out


def test_a_data_set_without_classes_has_no_counts() -> None:
    class Scores:
        labels = torch.tensor([0.5, 1.5])

        def __len__(self) -> int:
            return 2

        def text(self, index: int) -> str:
            return f"text {index}"

    found = inspect_texts({"train": Scores()}, [], {"train": np.array([3, 4])}, {"train": 0.0})
    assert found["splits"]["train"] == {"samples": 2, "classes": {}}
    assert sentences(found) == ["train: 3 to 4, median 4, 95 % below 4 tokens; 0.0 % cut off"]
