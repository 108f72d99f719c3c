"""Docstrings of the standard library and of packages."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
import yaml

from datamodules import Docstrings, PackageDocstrings
from datamodules.docstrings import below, docstrings_of, read_kinds


@pytest.mark.slow
def test_docstrings_are_the_interpreters_own(words: str) -> None:
    data = Docstrings(tokenizer=words)
    data.setup("fit")
    splits = data.splits
    assert sum(len(splits[name]) for name in ("train", "val", "test")) > 4000
    assert min(data.class_counts) * 2 > max(data.class_counts), "no class has twice as many as another"
    found = {splits["train"].text(index) for index in range(len(splits["train"]))}
    everything = found | {splits[name].text(index) for name in ("val", "test") for index in range(len(splits[name]))}
    assert inspect.getdoc(json.JSONDecoder) in everything
    files = {text["text"]: text["file"] for text in read_kinds()}
    of_split = {name: {files[texts.text(i)] for i in range(len(texts))} for name, texts in splits.items()}
    assert not of_split["train"] & of_split["test"], "no file in two splits"
    assert not of_split["train"] & of_split["val"]
    assert not of_split["val"] & of_split["test"]
    for name in ("val", "test"):
        assert not found & {splits[name].text(index) for index in range(len(splits[name]))}, "no text in two splits"
    other = Docstrings(tokenizer=words, seed=1)
    other.setup("fit")
    assert torch.equal(other.splits["test"].rows, splits["test"].rows), "the test split is the same for every seed"  # type: ignore[arg-type]
    assert other.splits["val"].rows.tolist() != splits["val"].rows.tolist()  # type: ignore[union-attr]


@pytest.mark.slow
def test_docstrings_of_packages_leave_out_what_is_tested_on(
    words: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_folder / "lone_module.py").write_text('"""A package of one file is one, too."""\n')
    monkeypatch.syspath_prepend(own_folder)
    data = PackageDocstrings(["yaml", "lone_module"], tokenizer=words)
    data.setup("fit")
    found = {texts.text(index) for texts in data.splits.values() for index in range(len(texts))}
    assert len(found) > 6000, "all of the standard library"
    assert {inspect.getdoc(yaml.scan), "A package of one file is one, too."} <= found, "and the packages"
    test = Docstrings(tokenizer=words).read_splits()["test"]
    assert not found & {test.text(index) for index in range(len(test))}
    with pytest.raises(ModuleNotFoundError, match=r"data.packages: not_there is not installed"):
        PackageDocstrings(["not_there"], tokenizer=words).read_splits()


def test_sources_below_a_folder_called_tests(tmp_path: Path) -> None:
    root = tmp_path / "tests" / "package"
    for name in ("a.py", "deep/b.py", "test/c.py", "deep/tests/d.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert sorted(path.name for path in below(root)) == ["a.py", "b.py"]


def test_a_file_that_is_not_python_has_no_docstrings(own_folder: Path) -> None:
    (own_folder / "old.py").write_text('"""This was written for Python 2."""\nprint "hello"\n')
    (own_folder / "zero.py").write_bytes(b"\0")
    (own_folder / "new.py").write_text('"""This has a slip that is warned of."""\nx = "\\d"\n')
    assert [list(docstrings_of(Path(name))) for name in ("old.py", "zero.py")] == [[], []]
    assert list(docstrings_of(Path("new.py"))) == ["This has a slip that is warned of."]
