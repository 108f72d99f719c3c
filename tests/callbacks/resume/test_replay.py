"""Loaders whose order and random numbers are a function of seed and progress."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from callbacks.resume.callback import ExactResume
from datamodules.folder import ImageFolder
from tests.callbacks.resume.conftest import (
    ROWS,
    Net,
    Rows,
    SaveEverywhere,
    Stream,
    Trace,
    X,
    Y,
    differences,
    fit,
    resume_everywhere,
    saved,
    shuffled,
    state_of,
)
from tests.conftest import write_folder


@pytest.mark.slow
def test_a_generator_given_to_the_loader_is_seeded_too(tmp_path: Path) -> None:
    def data() -> DataLoader[Any]:
        generator = torch.Generator()
        generator.seed()
        sampler = RandomSampler(range(ROWS), replacement=True, num_samples=70, generator=generator)
        return shuffled(sampler=sampler, generator=generator)

    assert resume_everywhere(tmp_path, data, max_epochs=1) == {}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
def test_several_loaders_go_on_together(mode: str, tmp_path: Path) -> None:
    def data() -> CombinedLoader:
        return CombinedLoader({"long": shuffled(noise=0.1), "short": shuffled(noise=0.1, batch_size=10)}, mode)  # type: ignore[arg-type]

    assert resume_everywhere(tmp_path, data, max_epochs=2 if mode != "min_size" else 4) == {}


def test_each_loader_each_round_and_each_epoch_has_an_order_of_its_own() -> None:
    long, short = shuffled(), shuffled(batch_size=13)
    fit(lambda: {"long": long, "short": short})
    assert isinstance(long.dataset, Rows) and isinstance(short.dataset, Rows)
    loaded = long.dataset.loaded, short.dataset.loaded
    orders = [tuple(rows[start : start + ROWS]) for rows in loaded for start in range(0, len(rows) - ROWS + 1, ROWS)]
    assert len(orders) > 5 and len(set(orders)) == len(orders) and all(len(set(order)) > 13 for order in orders)


def test_batches_that_were_had_are_not_loaded_again(tmp_path: Path) -> None:
    save = SaveEverywhere(tmp_path)
    fit(shuffled, Trace(), save, max_epochs=1)
    loader = shuffled()
    assert isinstance(loader.dataset, Rows)
    fit(lambda: loader, max_epochs=1, ckpt_path=save.saved[4][2])
    assert save.saved[4][0] == "batch end 0.4" and len(loader.dataset.loaded) == ROWS - 5 * 4


def test_an_epoch_that_was_over_is_not_read_again_to_find_its_end(tmp_path: Path) -> None:
    class Counted(Stream):
        read = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for row in super().__iter__():
                self.read += 1
                yield row

    save, stream = SaveEverywhere(tmp_path), Counted()
    fit(lambda: DataLoader(Counted(), 4), Trace(), save, max_epochs=1)
    assert save.saved[6][0] == "batch end 0.6"
    fit(lambda: DataLoader(stream, 4), max_epochs=1, ckpt_path=save.saved[6][2])
    assert stream.read == 0
    fit(lambda: DataLoader(stream, 4), max_epochs=1, ckpt_path=save.saved[5][2])
    assert stream.read == ROWS, "a stream can only be read up to there"


class OwnIteration(DataLoader[Any]):
    """A generator, so that nothing happens before the first batch is asked for."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


class TakesItsSamplerEarly(DataLoader[Any]):
    """So that nothing can be put in its sampler's place."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.indices = self.batch_sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        assert self.indices is not None
        for rows in self.indices:
            yield X[rows], Y[rows]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OwnIteration, TakesItsSamplerEarly])
def test_loaders_that_iterate_in_their_own_way_resume_exactly(kind: type[DataLoader[Any]], tmp_path: Path) -> None:
    assert resume_everywhere(tmp_path, lambda: kind(Rows(), 4, shuffle=True)) == {}


class RemembersWhereItStands:
    """A loader with a state of its own, as torchdata's StatefulDataLoader; at its end it begins with nothing."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.at = 0
        self.restored = False

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[Any]:
        if not self.restored:
            self.order, self.at = torch.randperm(ROWS).tolist(), 0
        self.restored = False
        while self.at < ROWS:
            rows = self.order[self.at : self.at + 4]
            self.at += 4
            yield X[rows], Y[rows]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.at, self.restored = state["order"], state["at"], True


@pytest.mark.slow
def test_a_stateful_loader_goes_on_by_itself_and_no_epoch_ends_early(tmp_path: Path) -> None:
    found = resume_everywhere(tmp_path, RemembersWhereItStands)
    assert {line for lines in found.values() for line in lines if "combined_loader" not in line} == set()
    assert all(place.endswith("1.6") for place in found), "where the data are over its state is not asked for"


@pytest.mark.slow
def test_images_and_their_augmentation_resume_exactly_in_worker_processes(tmp_path: Path) -> None:
    class Pictures(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(3 * 16 * 16, 3))

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch["image"]), batch["target"])

    def run(*callbacks: Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
        data = ImageFolder(root, batch_size=4, image_size=16, in_memory=False, num_workers=2, mixup=0.4)
        trainer = Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            limit_val_batches=0, callbacks=[Trace(), *callbacks, ExactResume(1)], enable_checkpointing=bool(callbacks),
        )  # fmt: skip
        torch.manual_seed(0)
        net = Pictures()
        trainer.fit(net, datamodule=data, ckpt_path=ckpt_path)
        return state_of(trainer, net)

    root = write_folder(tmp_path / "pictures")
    save = SaveEverywhere(tmp_path)
    whole = run(save)
    for _, _, path in save.saved[2::5]:
        assert differences(whole, run(ckpt_path=path)) == []


@pytest.mark.slow
def test_what_workers_draw_at_random_is_not_exact_during_an_epoch(tmp_path: Path) -> None:
    # A limit: a worker's generator goes on from batch to batch. At the start of an epoch it is exact, with workers
    # that do not live on.
    def data() -> DataLoader[Any]:
        return DataLoader(Rows(noise=0.1), 4, shuffle=True, num_workers=1)

    found = resume_everywhere(tmp_path, data)
    assert "epoch end 0.6" not in found and "batch end 1.6" not in found
    assert "batch end 1.3" in found and "batch end 0.2" in found
    order = [line for line in found["batch end 1.3"] if line.startswith(".loop")]
    assert order == [], "the counters are right all the same"


def test_data_that_end_before_the_checkpoint_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 5)
    with (
        pytest.raises(RuntimeError, match="after batch 6 of an epoch, which has only 4 now; resume with the same data"),
        pytest.warns(UserWarning, match="the number of batches per epoch is inf"),
    ):
        fit(lambda: DataLoader(Stream(), 7), ckpt_path=path)


def test_a_combined_loader_of_another_class_is_refused() -> None:
    class Mixed(CombinedLoader): ...

    with pytest.raises(TypeError, match="expects training data in DataLoaders or a CombinedLoader; received .*Mixed"):
        fit(lambda: Mixed([shuffled()]))
