"""Oxford-IIIT Pet in the true format of its archives."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import OxfordPets
from datamodules.images.decoding import evaluation_crop
from tests.official_archives import trimap, write_oxford_pets


def test_pets_have_outlines(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_oxford_pets(own_folder, monkeypatch)
    data = OxfordPets(own_folder, image_size=32)
    data.prepare_data()
    data.setup("fit")
    for split, index in (("train", 5), ("test", 3)):
        number = int(Path(data.sample_names(split)(index)).stem[-1])
        found = data.trimap(split, index)
        assert found.size == data.splits[split].read(index).size
        assert found.tobytes() == Image.open(io.BytesIO(trimap(number))).tobytes()


def test_breed_animal_and_outline_of_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_oxford_pets(tmp_path, monkeypatch)
    data = OxfordPets(tmp_path, trimaps=True, image_size=32, augment="none", num_workers=0, in_memory=False)
    data.prepare_data()
    data.setup()
    assert list(data.tasks) == ["breed", "animal", "outline"] and data.tasks["breed"].outputs == 37
    names = data.sample_names("test")
    for batch in data.test_dataloader():
        batch = data.on_after_batch_transfer(batch, 0)
        labels = batch["labels"]
        assert torch.equal(labels["breed"], batch["label"]) and set(labels["outline"].unique().tolist()) <= {0, 1, 2}
        for place, row in enumerate(batch["index"].tolist()):
            cat = Path(names(row)).stem[0].isupper()
            assert data.tasks["animal"].class_names[labels["animal"][place]] == ("cat" if cat else "dog")
            expected = np.array(evaluation_crop(data.trimap("test", row), 32, Image.Resampling.NEAREST)) - 1
            assert np.array_equal(labels["outline"][place].numpy(), expected)
    plain = OxfordPets(tmp_path, image_size=32, num_workers=0)
    plain.setup()
    batch = next(iter(plain.train_dataloader()))
    assert batch["image"].shape[1] == 3 and list(plain.tasks) == ["breed", "animal"]
    trimap = Path(names(0)).parents[1] / "annotations" / "trimaps" / f"{Path(names(0)).stem}.png"
    trimap.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot read the trimap of"):
        data.batch("test", [0])
