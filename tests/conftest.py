"""Hygiene: every test starts from the same state and leaves none behind; fake data in the true formats."""

from __future__ import annotations

import os
import pickle
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # Lightning 2.6 calls what jsonargparse 5 will remove
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for the subprocesses: several tests share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for them, too
torch.set_num_threads(1)  # nets here are tiny, and several tests run at once


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--as-stored", action="store_true", help="Run notebooks with the numbers that a reader sees.")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`-m fast`: all but what is marked as slow. Several workers begin with files that have slow ones."""
    for item in items:
        if item.get_closest_marker("slow") is None:
            item.add_marker("fast")
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("fast") is not None)


@pytest.fixture(autouse=True)
def hygiene(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seed, dtype, environment, plotting and download folders; no network; no process group left over."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    for key in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # of a run that a fixture of several tests made
        monkeypatch.delenv(key, raising=False)
    home = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("TORCH_HOME", str(home / "torch"))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(home / "hf" / "datasets"), raising=False)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before, ending = dict(os.environ), signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, ending)  # recipes.serve has one of its own
    assert torch.get_default_dtype() == torch.float32
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for key in set(os.environ) - set(before):
        del os.environ[key]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder of its own, so that runs/ lands there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports with all their numbers and words, but blank figures: drawing them takes longer than a small fit.

    Figures hang on report.json alone; the tests of the report, of its page and of every shipped config draw them.
    """
    monkeypatch.setattr("callbacks.report.figures.svg", lambda made: "<svg></svg>")
    monkeypatch.setattr("callbacks.report.page.svg", lambda made: "<svg></svg>")
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_figure", lambda *_, **__: None)


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A smooth random picture: it compresses as photographs do."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_folder(root: Path, splits: tuple[str, ...] = ("train", "val"), classes: int = 3, each: int = 8) -> Path:
    """A tree of JPEGs, one folder per class, below split folders if there are any."""
    seed = 0
    for split in splits or ("",):
        for label in range(classes):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(each):
                picture(seed).save(folder / f"{number}.jpg")
                seed += 1
    return root


def write_cifar10(root: Path, per_batch: int = 40) -> Path:
    """CIFAR-10's pickled batches, with few random images."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        batch = {
            "data": rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(per_batch)],
        }
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(n) for n in range(10)]}))
    return root


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 in its true format; torchvision's checksums of the real files are taken off."""
    from torchvision.datasets import CIFAR10

    for table in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, table, [[name, None] for name, _ in getattr(CIFAR10, table)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    return write_cifar10(tmp_path / "cifar10")


def write_parquet(
    path: Path, rows: int, classes: int = 3, size: int = 32, seed: int = 0, group: int | None = None
) -> Path:
    """Encoded pictures and class labels in Parquet, in the Hugging Face image layout, `group` to a row group."""
    import io

    import datasets

    cells = []
    for row in range(rows):
        buffer = io.BytesIO()
        picture(seed + row, size, size).save(buffer, "JPEG")
        cells.append({"bytes": buffer.getvalue(), "path": f"{path.stem}_{row}.jpg"})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class_{n}" for n in range(classes)])}
    )
    table = datasets.Dataset.from_dict(
        {"image": cells, "label": [row % classes for row in range(rows)]}, features=features
    )
    table.to_parquet(str(path), batch_size=group)
    return path
