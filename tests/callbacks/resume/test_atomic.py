"""Checkpoints that are saved atomically."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from callbacks.resume.atomic import AtomicCheckpointIO, save_atomically
from tests.callbacks.resume.conftest import Net, differences, fit, shuffled, state_of


class Large(Net):
    """Saving it takes far longer than a step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ballast", torch.zeros(6_000_000))


def train_and_tell(folder: Path, pipe: Any, tmp: Path) -> None:
    """In a process of its own: goes on from the last checkpoint, and tells after each batch."""

    class Tell(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            pipe.send(trainer.global_step)

    os.environ["TMPDIR"] = str(tmp)
    save = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=2, monitor="step", mode="max", save_last=True)
    last = folder / "last.ckpt"
    trainer, net = fit(shuffled, Tell(), save, make=Large, ckpt_path=last if last.exists() else None)
    torch.save(state_of(trainer, net), folder / "nearly.pt")  # it may be killed here, too
    (folder / "nearly.pt").replace(folder / "done.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_kill_at_any_moment_also_during_a_save_ends_with_the_uninterrupted_run(tmp_path: Path) -> None:
    expected = state_of(*fit(shuffled, make=Large))
    fork, chance = multiprocessing.get_context("fork"), random.Random(5)
    during_a_save = kills = 0
    while not (tmp_path / "done.pt").exists():
        ours, theirs = fork.Pipe(duplex=False)
        child = fork.Process(target=train_and_tell, args=(tmp_path, theirs, tmp_path / "tmp"))
        child.start()
        theirs.close()
        try:
            for _ in range(chance.choice([1, 1, 2])):  # at least one step is made and its checkpoint begun
                ours.recv()
            time.sleep(chance.uniform(0.0, 0.08))
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        except EOFError:  # there was nothing more to do
            pass
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        assert child.exitcode in (0, -signal.SIGKILL)
        during_a_save += any(tmp_path.glob(".*.checkpoint-part"))
        for file in tmp_path.glob("*.ckpt"):
            torch.load(file, weights_only=True)  # whole, whatever moment it was
    assert kills >= 3 and during_a_save >= 1
    assert differences(expected, torch.load(tmp_path / "done.pt")) == []


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.ckpt"
    save_atomically({"x": 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_atomically({"x": lambda: None}, path)
    assert torch.load(path) == {"x": 1} and [file.name for file in path.parent.iterdir()] == ["a.ckpt"]


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    here = os.uname().nodename.split(".")[0]
    gone = multiprocessing.get_context("fork").Process()
    gone.start()
    gone.join()
    names = [
        f".a.ckpt.{here}.{gone.pid}.checkpoint-part",
        f".b.ckpt.{here}.{os.getpid()}.checkpoint-part",
        ".c.ckpt.far.1.checkpoint-part",
    ]
    for name in [*names, ".d.ckpt.far.2.checkpoint-part"]:
        (tmp_path / name).touch()
    os.utime(tmp_path / ".d.ckpt.far.2.checkpoint-part", (0, time.time() - 7200))
    save_atomically({}, tmp_path / "a.ckpt")
    assert sorted(file.name for file in tmp_path.iterdir()) == [*names[1:], "a.ckpt"]


def test_the_data_reach_the_disk_before_the_name_and_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        calls.append("fsync folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "fsync file")
        fsync(descriptor)

    def spy_replace(self: Path, target: Path) -> Path:
        calls.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    save_atomically({"x": 1}, tmp_path / "a.ckpt")
    assert calls == ["fsync file", "replace", "fsync folder"]


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"trap": Trap()}, tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "sprung").exists()
    AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert (tmp_path / "sprung").exists(), "only where somebody asks for it"


def test_remote_paths_are_left_to_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", lambda self, *args: calls.append(args))
    AtomicCheckpointIO().save_checkpoint({}, "s3://bucket/a.ckpt")
    assert calls == [({}, "s3://bucket/a.ckpt", None)]


def test_it_takes_the_place_of_the_default_and_of_nothing_else(tmp_path: Path) -> None:
    trainer, _ = fit(shuffled, max_epochs=1)
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    chosen = AsyncCheckpointIO()
    trainer, _ = fit(shuffled, max_epochs=1, plugins=[chosen])
    assert trainer.strategy.checkpoint_io is chosen
    trainer, _ = fit(shuffled, max_epochs=1, plugins=[AtomicCheckpointIO()], exact=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO and (tmp_path / "a.ckpt").exists()
