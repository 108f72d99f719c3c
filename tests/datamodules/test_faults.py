"""What the world does to files while they are read: a clear error or a counted skip, no hang, no shorter epoch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules import ImageFolder, TextFiles
from datamodules.files.archives import unpack
from tests.conftest import write_folder
from tests.official_archives import write_tar
from tests.tiny_encoders import tokenizer, write_csv


def image_folder(root: Path, **options: Any) -> ImageFolder:
    data = ImageFolder(
        write_folder(root, each=8), image_size=224, **{"batch_size": 4, "num_workers": 0, "val_share": 0.2, **options}
    )
    data.setup("fit")
    return data


def epoch(data: ImageFolder) -> int:
    """Images of a validation."""
    return sum(len(data.on_after_batch_transfer(batch, 0)["image"]) for batch in data.val_dataloader())


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["permission", "vanished"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_had(
    fault: str, workers: int, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = image_folder(own_folder / "strict", num_workers=workers)
    forgiving = image_folder(own_folder / "forgiving", num_workers=workers, on_error="skip")
    size = len(data.splits["val"].labels)
    assert epoch(data) == epoch(forgiving) == size
    opened = Image.open

    def refuse(file: Any, **options: Any) -> Any:
        if str(file) in lost:
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, **options)

    lost = [some.sample_names("val")(3) for some in (data, forgiving)]
    if fault == "permission":
        monkeypatch.setattr(Image, "open", refuse)
    else:
        for name in lost:
            Path(name).unlink()
    with pytest.raises(ValueError, match=Path(lost[0]).name):
        epoch(data)
    assert epoch(forgiving) == size - 1
    (sentence,) = forgiving.skipped
    assert Path(lost[1]).name in sentence


KILLED = """
import os, signal, sys
from datamodules import ImageFolder

data = ImageFolder(sys.argv[1], image_size=224, batch_size=1, num_workers=1, val_share=0.2)
data.setup("fit")
batches = iter(data.train_dataloader())
next(batches)
os.kill(batches._workers[0].pid, signal.SIGKILL)
for _ in batches:
    pass
print("the epoch came to its end")
"""


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_epoch_with_an_error(own_folder: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(write_folder(own_folder / "images", each=30))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    assert "came to its end" not in done.stdout, "whichever of torch's threads notices first says it in its own way"


def test_a_disk_that_fills_while_texts_are_cached(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer().save_pretrained(own_folder / "words")
    data = TextFiles(str(write_csv(own_folder / "train.csv", 40)), tokenizer=str(own_folder / "words"), batch_size=4)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("datasets.arrow_writer.ArrowWriter.write_table", full)
        with pytest.raises(OSError, match="No space left on device"):
            data.prepare_data()
    data.prepare_data()
    data.setup("fit")
    assert sum(len(part) for name, part in data.splits.items() if name != "predict") == 40, "all of them, later"


def test_a_disk_that_fills_while_an_archive_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", {"Images/1.jpg": b"content", "Images/2.jpg": b"content"})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", full)
        with pytest.raises(OSError, match="No space left on device"):
            unpack(tmp_path / "a.tar", tmp_path / "Images", "Images")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"], "nothing that a later start would take for whole"
    unpack(tmp_path / "a.tar", tmp_path / "Images", "Images")
    assert len(list((tmp_path / "Images").iterdir())) == 2
