"""Writes data sets in the format of their official archives, with small pictures and true names."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from datamodules import StanfordDogs

from .conftest import picture

BREEDS = ["n02085620-Chihuahua", "n02091032-Italian_greyhound", "n02099429-curly-coated_retriever"]
BOX = """<annotation>
  <folder>02085620</folder><filename>{name}</filename><source><database>ImageNet database</database></source>
  <size><width>48</width><height>40</height><depth>3</depth></size><segment>0</segment>
  <object><name>{breed}</name><bndbox><xmin>4</xmin><ymin>6</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>
  <object><name>{breed}</name><bndbox><xmin>10</xmin><ymin>2</ymin><xmax>60</xmax><ymax>24</ymax></bndbox></object>
</annotation>"""


@functools.cache
def as_file(seed: int) -> bytes:
    """A JPEG of 48 x 40 pixels."""
    out = io.BytesIO()
    picture(seed).save(out, "JPEG")
    return out.getvalue()


def trimap(seed: int) -> bytes:
    """Animal, background and outline as 1, 2 and 3."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(1, 4, (40, 48), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_tar(file: Path, members: dict[str, bytes], compression: str = "") -> None:
    with tarfile.open(file, f"w:{compression}") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def as_mat(values: dict[str, Any]) -> bytes:
    """A MATLAB file."""
    out = io.BytesIO()
    savemat(out, values)
    return out.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def as_list(files: list[str], labels: list[int]) -> bytes:
    """A list of Stanford Dogs: columns of cells with the files and their annotations, and of labels from 1."""
    cells, notes = np.empty((len(files), 1), dtype=object), np.empty((len(files), 1), dtype=object)
    cells[:, 0], notes[:, 0] = files, [file.removesuffix(".jpg") for file in files]
    return as_mat({"file_list": cells, "annotation_list": notes, "labels": np.array(labels, dtype=np.uint8)[:, None]})


def write_stanford_dogs(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Three archives, of three breeds with eight pictures to train on and four to test on."""
    folder.mkdir(exist_ok=True)
    files = {breed: [f"{breed}/{breed.split('-')[0]}_{number}.jpg" for number in range(12)] for breed in BREEDS}
    names = [name for some in files.values() for name in some]
    write_tar(folder / "images.tar", {f"Images/{name}": as_file(seed) for seed, name in enumerate(names)})
    lists = {}
    parts = {"train_list.mat": slice(0, 8), "test_list.mat": slice(8, 12), "file_list.mat": slice(None)}
    for name, part in parts.items():
        chosen = [(file, label) for label, breed in enumerate(BREEDS, 1) for file in files[breed][part]]
        lists[name] = as_list([file for file, _ in chosen], [label for _, label in chosen])
    write_tar(folder / "lists.tar", lists)
    notes = {f"Annotation/{name[:-4]}": BOX.format(name=name, breed=name.split("/")[0]).encode() for name in names}
    write_tar(folder / "annotation.tar", notes)
    contents = {file.name: file.read_bytes() for file in folder.glob("*.tar")}
    facts = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()}
    patch.setattr(StanfordDogs, "expected_archives", facts)
    patch.setattr(StanfordDogs, "num_classes", len(BREEDS))


def write_flowers102(root: Path, patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Four pictures of each species: one to train on, one for validation, two for the test."""
    folder = root / "flowers-102"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {f"jpg/image_{number:05d}.jpg": as_file(number % 7) for number in range(1, 409)}
    write_tar(folder / "102flowers.tgz", pictures, "gz")
    numbers = np.arange(1, 409, dtype=np.uint16)
    parts = {"trnid": numbers[0::4], "valid": numbers[1::4], "tstid": np.concatenate([numbers[2::4], numbers[3::4]])}
    (folder / "imagelabels.mat").write_bytes(as_mat({"labels": (numbers[None] - 1) // 4 + 1}))
    (folder / "setid.mat").write_bytes(as_mat({name: part[None] for name, part in parts.items()}))
    names = {"image": "102flowers.tgz", "label": "imagelabels.mat", "setid": "setid.mat"}
    facts = {key: (name, md5((folder / name).read_bytes())) for key, name in names.items()}
    patch.setattr(datasets.Flowers102, "_file_dict", facts)
    return {"train": 102, "val": 102, "test": 204}


def write_oxford_pets(root: Path, patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Six pictures of each breed, four of them to train on; of cats the name begins with a capital."""
    folder = root / "oxford-iiit-pet"
    folder.mkdir(parents=True, exist_ok=True)
    breeds = [f"{'Cat' if number % 3 == 0 else 'dog'}_of_kind_{number:02d}" for number in range(1, 38)]
    pictures, lists = {}, {"trainval": "", "test": ""}
    for label, breed in enumerate(breeds, 1):
        for number in range(6):
            pictures[f"{breed}_{number}"] = as_file(number)
            lists["trainval" if number < 4 else "test"] += f"{breed}_{number} {label} {1 + (label % 3 > 0)} {label}\n"
    write_tar(folder / "images.tar.gz", {f"images/{name}.jpg": content for name, content in pictures.items()}, "gz")
    notes = {f"annotations/{name}.txt": text.encode() for name, text in lists.items()}
    notes |= {f"annotations/trimaps/{name}.png": trimap(int(name[-1])) for name in pictures}
    write_tar(folder / "annotations.tar.gz", notes, "gz")
    facts = tuple((url, md5((folder / Path(url).name).read_bytes())) for url, _ in datasets.OxfordIIITPet._RESOURCES)
    patch.setattr(datasets.OxfordIIITPet, "_RESOURCES", facts)
    return {"train": 74, "val": 74, "test": 74}


def write_food101(root: Path, patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Three pictures of each dish, two of them to train on."""
    root.mkdir(parents=True, exist_ok=True)
    dishes = [f"dish_{number:03d}" for number in range(101)]
    members = {f"food-101/images/{dish}/{number}.jpg": as_file(number) for dish in dishes for number in range(3)}
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        lists = {dish: [f"{dish}/{number}" for number in numbers] for dish in dishes}
        members[f"food-101/meta/{split}.json"] = json.dumps(lists).encode()
    write_tar(root / "food-101.tar.gz", members, "gz")
    patch.setattr(datasets.Food101, "_MD5", md5((root / "food-101.tar.gz").read_bytes()))
    return {"train": 101, "val": 101, "test": 101}
