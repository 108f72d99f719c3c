"""Stanford Dogs in its true format, over a server of our own: downloads, broken downloads, archives that do harm."""

from __future__ import annotations

import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from datamodules import StanfordDogs
from datamodules.files.archives import unpack
from tests.datamodules.conftest import dogs
from tests.official_archives import BOX, BREEDS


def test_it_is_downloaded_unpacked_and_read(server: Any, tmp_path: Path) -> None:
    data = dogs(server, tmp_path / "dogs", val_share=0.25)
    data.prepare_data()
    data.setup("fit")
    assert data.class_names == ["Chihuahua", "Italian greyhound", "curly-coated retriever"]
    assert {name: len(part.labels) for name, part in data.splits.items()} == {
        "train": 18, "val": 6, "test": 12, "predict": 12,
    }  # fmt: skip
    for split in ("train", "val", "test"):
        names = [data.sample_names(split)(index) for index in range(len(data.splits[split].labels))]
        assert all(BREEDS[label] in name for label, name in zip(data.splits[split].labels, names, strict=True))
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 32, 32)
    asked = len(server.asked)
    assert asked == 2, "boxes are not needed"
    dogs(server, tmp_path / "dogs").prepare_data()
    assert len(server.asked) == asked, "nothing is fetched twice"


def test_archives_on_the_disk_are_enough(official: Path) -> None:
    data = StanfordDogs(official, address="http://127.0.0.1:9", image_size=32)
    data.prepare_data()
    data.setup("fit")
    assert len(data.splits["test"].labels) == 12


def test_lists_may_lie_beside_the_images(official: Path, tmp_path: Path) -> None:
    with tarfile.open(official / "images.tar") as images, tarfile.open(official / "lists.tar") as lists:
        images.extractall(tmp_path / "tree", filter="data")
        lists.extractall(tmp_path / "tree", filter="data")
    data = StanfordDogs(tmp_path / "tree", address="http://127.0.0.1:9", image_size=32)
    data.prepare_data()
    data.setup("fit")
    assert len(data.splits["test"].labels) == 12


def test_images_are_cut_to_the_box_around_all_dogs(server: Any, tmp_path: Path) -> None:
    data = dogs(server, tmp_path / "dogs", crop_to_box=True)
    data.prepare_data()
    data.setup("fit")
    whole = dogs(server, tmp_path / "dogs")
    whole.setup("fit")
    cut, full = data.splits["test"].read(3), whole.splits["test"].read(3)
    assert cut.size == (48 - 4, 30 - 2), "no further than the image goes"
    assert cut.tobytes() == full.crop((4, 2, 48, 30)).tobytes()
    note = tmp_path / "dogs" / "Annotation" / BREEDS[0] / "n02085620_8"
    note.write_text(BOX.replace("<xmin>4<", "<xmin>70<").replace("<xmin>10<", "<xmin>70<"))
    with pytest.raises(ValueError, match=r"the box of .*n02085620_8 lies outside its image of 48 x 40 pixels"):
        data.splits["test"].read(0)
    note.write_text("<annotation>")
    with pytest.raises(ValueError, match=r"cannot read a box from .*n02085620_8"):
        data.splits["test"].read(0)


def test_boxes_change_the_fingerprint(server: Any, tmp_path: Path) -> None:
    """Features of whole images are not those of cut ones."""
    found = []
    for crop in (False, True):
        data = dogs(server, tmp_path / "dogs", crop_to_box=crop)
        data.prepare_data()
        data.setup("fit")
        found.append(data.fingerprint("train"))
    assert found[0] != found[1]
    note = tmp_path / "dogs" / "Annotation" / BREEDS[0] / "n02085620_1"
    note.write_text(note.read_text() + "\n")
    assert data.fingerprint("train") not in found


def test_two_runs_unpack_at_once(server: Any, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(dogs(server, tmp_path / "dogs").prepare_data) for _ in range(4)]:
            done.result()
    data = dogs(server, tmp_path / "dogs")
    data.setup("fit")
    assert len(server.asked) == 2, "one of them downloads"
    assert sorted(path.name for path in (tmp_path / "dogs").iterdir()) == [
        ".lock", "Images", "images.tar", "lists", "lists.tar",
    ]  # fmt: skip
    with ThreadPoolExecutor(4) as pool:  # without the lock
        archive, folder = tmp_path / "dogs" / "images.tar", tmp_path / "again"
        for done in [pool.submit(unpack, archive, folder, "Images") for _ in range(4)]:
            done.result()
    assert len(list(folder.glob("*/*.jpg"))) == 36
    assert not list(tmp_path.glob("*.part"))


def test_what_a_killed_run_left_is_removed_but_not_its_download(server: Any, tmp_path: Path, official: Path) -> None:
    (tmp_path / "dogs" / "Images.abc.part" / "Images").mkdir(parents=True)
    (tmp_path / "dogs" / "lists.tar.part").write_bytes((official / "lists.tar").read_bytes()[:1000])
    dogs(server, tmp_path / "dogs").prepare_data()
    assert "lists.tar bytes=1000-" in server.asked
    assert not list((tmp_path / "dogs").glob("*.part"))


def test_what_is_not_the_archive_is_refused(server: Any, tmp_path: Path, official: Path) -> None:
    content = (official / "images.tar").read_bytes()
    (official / "images.tar").write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match=r"images.tar does not have the expected content .*the download was removed"):
        dogs(server, tmp_path / "dogs").prepare_data()
    assert [path.name for path in (tmp_path / "dogs").iterdir()] == [".lock"]
    (tmp_path / "dogs" / "images.tar").write_bytes(b"<html>Service unavailable</html>")
    with pytest.raises(ValueError, match=r"images.tar is not the archive of http.*: remove it, and it is downloaded"):
        dogs(server, tmp_path / "dogs").prepare_data()


def test_a_server_that_is_not_there(official: Path, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"cannot download http://127.0.0.1:9/images.tar: .*refused"):
        StanfordDogs(tmp_path / "dogs", address="http://127.0.0.1:9/").prepare_data()
    (official / "images.tar").unlink()
    with pytest.raises(ConnectionError, match="cannot download"):
        StanfordDogs(official, address=official.as_uri()).prepare_data()


def test_a_tree_that_lacks_something_says_what(server: Any, tmp_path: Path) -> None:
    root = tmp_path / "dogs"
    data = dogs(server, root, crop_to_box=True)
    data.prepare_data()
    (root / "Annotation" / BREEDS[1] / "n02091032_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 24 files are missing, first .*Ann.*/n02091032_3: remove .*Ann"):
        data.setup("fit")
    for number in (2, 5):
        (root / "Images" / BREEDS[0] / f"n02085620_{number}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 24 files are missing, first .*/n02085620_2.jpg: remove"):
        dogs(server, root).setup("fit")
    (root / "lists" / "test_list.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*test_list.mat: expected the list from lists.tar"):
        dogs(server, root).setup("fit")
    (root / "lists" / "train_list.mat").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"train_list.mat is not a list of Stanford Dogs"):
        _ = dogs(server, root).class_names
