"""`predict` as people need it: a checkpoint is enough, a broken picture or a kill is no end, two ranks are as one."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from callbacks.predictions import callback, parts
from datamodules.images.sources import ImageFiles
from datamodules.texts.tokens import TokenBatches
from recipes import text, vision
from recipes.parts.checkpoints import load_checkpoint

from ..conftest import picture, write_folder
from ..tiny_encoders import tiny_encoder, write_csv

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
PICTURES, BATCH, EACH = 2_000, 40, 400  # `EACH` in a folder
BROKEN = (0, 7, 39, 40, 494, 1000, 1001, 1599, 1998, 1999)
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for two steps on digits, and moved away from its run, which is gone."""
    folder, home = tmp_path_factory.mktemp("model"), Path.cwd()
    os.chdir(folder)
    cli = vision.main(["fit", "--config", "vision/quickstart", *QUIET, *SHORT])
    os.chdir(home)
    shutil.copy(Path(cli.folder) / "checkpoints" / "best.ckpt", folder / "moved.ckpt")
    shutil.rmtree(folder / "runs")
    return folder / "moved.ckpt"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 JPEGs in five folders, ten of them broken in ways that happen."""
    root = tmp_path_factory.mktemp("pictures")
    encoded = []
    for seed in range(251):
        buffer = BytesIO()
        picture(seed, 16, 16).save(buffer, "JPEG")
        encoded.append(buffer.getvalue())
    for number in range(PICTURES):
        path = root / f"{number // EACH}" / f"{number:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        content = encoded[number % len(encoded)]
        if number in BROKEN:
            content = [b"", content[:200], b"no picture at all", content[:20] + bytes(300)][number % 4]
        path.write_bytes(content)
    gone = root / "3" / "1599.jpg"
    gone.unlink()
    gone.symlink_to("nowhere.jpg")
    return root


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pictures: Path) -> dict[str, bytes]:
    """What a run that nothing interrupts writes."""
    folder, home = tmp_path_factory.mktemp("expected"), Path.cwd()
    os.chdir(folder)
    predict(checkpoint, pictures)
    os.chdir(home)
    return written(folder)


def command(checkpoint: Path, pictures: Path, *more: str) -> list[str]:
    which = ["--ckpt_path", str(checkpoint), "--data.predict_root", str(pictures)]
    return ["predict", *which, "--predictions=out.csv", f"--data.eval_batch_size={BATCH}", *QUIET, *more]


def predict(checkpoint: Path, pictures: Path, *more: str) -> vision.VisionCLI:
    return vision.main(command(checkpoint, pictures, "--data.num_workers=0", *more))


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("out.*") if path.is_file()}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def in_a_process(work: Callable[[], Any]) -> int:
    """The exit code of a forked process, with a group of its own that can be killed as one."""

    def leading() -> None:
        os.setsid()
        work()

    child = multiprocessing.get_context("fork").Process(target=leading)
    child.start()
    child.join(60)
    return child.exitcode if child.exitcode is not None else 99


def batches_in(folder: Path) -> int:
    return sum(1 for part in folder.glob("*.jsonl") for _ in parts.records(part))


def cut_last_line(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-9])


def kill_me() -> None:
    os.killpg(os.getpgid(0), signal.SIGKILL)


def note_what_is_read(patch: pytest.MonkeyPatch, file: Path) -> None:
    """Adds a line for each picture that any process of this run reads."""
    read = ImageFiles.read

    def noted(self: ImageFiles, index: int) -> Any:
        with file.open("a") as out:
            out.write(f"{index}\n")
        return read(self, index)

    patch.setattr(ImageFiles, "read", noted)


@pytest.mark.slow
def test_a_moved_checkpoint_predicts_all_that_can_be_read_and_lists_the_rest(
    own_folder: Path, checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = predict(checkpoint, pictures)
    found, unreadable = rows(own_folder / "out.csv"), rows(own_folder / "out.unreadable.csv")
    paths = [str(pictures / str(number // EACH) / f"{number:04}.jpg") for number in range(PICTURES)]
    assert [row["name"] for row in unreadable] == [paths[number] for number in BROKEN]
    assert [row["name"] for row in found] == [path for number, path in enumerate(paths) if number not in BROKEN]
    assert {row["label"] for row in found} <= {"5", "6", "7", "8", "9"}
    assert "truncated" in unreadable[1]["reason"] or "cannot identify" in unreadable[1]["reason"]
    screen, words = capsys.readouterr()
    assert "1,990 predictions in out.csv; 10 unreadable, see out.unreadable.csv" in screen
    assert "2000 to predict" in screen
    assert "the same command goes on from out.csv.parts" in " ".join(words.split())
    assert cli.model.hparams["image_size"] == cli.datamodule.image_size == 8


MOMENTS = ("amid a line", "last line", "merge", "merged", "being removed")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(
    own_folder: Path, checkpoint: Path, pictures: Path, expected: dict[str, bytes], moment: str
) -> None:
    done = {"amid a line": 17, "last line": 49}.get(moment, 50)

    def first() -> None:
        append, remove = callback.PredictionWriter.on_predict_batch_end, parts.remove_parts

        def dying(self: Any, trainer: Any, module: Any, outputs: Any, batch: Any, number: int, loader: int = 0) -> None:
            if number == done:
                self.part.write(b'{"batch": 17, "index": [17')
                self.part.flush()
                kill_me()
            append(self, trainer, module, outputs, batch, number, loader)

        def removing(folder: Path) -> None:
            if Path("out.csv").exists():
                if moment == "being removed":
                    (folder / parts.NOTE).unlink()
                kill_me()
            remove(folder)

        callback.PredictionWriter.on_predict_batch_end = dying  # type: ignore[method-assign]
        parts.remove_parts = removing
        if moment == "merge":
            parts.TABLES[".csv"] = lambda path, kinds, rows: (path.write_text("half"), next(rows), kill_me())
        predict(checkpoint, pictures)

    assert in_a_process(first) == -signal.SIGKILL
    assert Path("out.csv").exists() == (moment in ("merged", "being removed"))
    with pytest.MonkeyPatch.context() as patch:
        note_what_is_read(patch, own_folder / "read.txt")
        (own_folder / "read.txt").touch()
        predict(checkpoint, pictures)
    read = list(map(int, (own_folder / "read.txt").read_text().split()))
    assert read == list(range(done * BATCH if moment != "being removed" else 0, PICTURES))
    assert written(own_folder) == expected
    assert not Path("out.csv.parts").exists()


@pytest.mark.slow
def test_two_ranks_with_workers_killed_at_random_are_as_one_that_is_not(
    own_folder: Path, checkpoint: Path, pictures: Path, expected: dict[str, bytes]
) -> None:
    """Also the batches are the same: each rank has every second picture."""
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--data.num_workers=2"]
    chance, kills, progress = random.Random(3), 0, []
    patch = pytest.MonkeyPatch()
    patch.setattr("torch.cuda._is_in_bad_fork", lambda: False)  # a fork forks, and there is no CUDA in it
    note_what_is_read(patch, own_folder / "read.txt")
    while not Path("out.csv").exists():
        child = multiprocessing.get_context("fork").Process(
            target=lambda: (os.setsid(), vision.main(command(checkpoint, pictures, *ranks)))
        )
        child.start()
        began = batches_in(Path("out.csv.parts"))
        while child.is_alive() and kills < 2:
            if batches_in(Path("out.csv.parts")) > began:
                time.sleep(chance.uniform(0, 0.04))
                os.killpg(child.pid or 0, signal.SIGKILL)
                break
            time.sleep(0.005)
        child.join(60)
        kills += child.exitcode == -signal.SIGKILL
        assert child.exitcode in (0, -signal.SIGKILL)
        ours = [list(Path("out.csv.parts").glob(f"rank{rank}.*.jsonl")) for rank in (0, 1)]
        progress.append([parts.batches_done(each) for each in ours])
    assert kills == 2 and any(some not in ([0, 0], [25, 25]) for some in progress), progress
    assert written(own_folder)["out.unreadable.csv"] == expected["out.unreadable.csv"]
    ours, alone = rows(own_folder / "out.csv"), expected["out.csv"].decode().splitlines()
    assert [(row["name"], row["label"]) for row in ours] == [tuple(line.split(",")[:2]) for line in alone[1:]]
    times = Counter((own_folder / "read.txt").read_text().split())
    assert set(times) == set(map(str, range(PICTURES))) and max(times.values()) <= kills + 1
    first = written(own_folder)
    Path("out.csv").unlink()
    merge = callback.merge_parts
    patch.setattr(callback, "merge_parts", lambda *_: (0, 0))
    assert in_a_process(lambda: vision.main(command(checkpoint, pictures, *ranks))) == 0  # never killed ...
    cut_last_line(Path("out.csv.parts/rank1.0.jsonl"))  # ... but for the end of one rank; the other is done
    patch.setattr(callback, "merge_parts", merge)
    assert in_a_process(lambda: vision.main(command(checkpoint, pictures, *ranks))) == 0
    assert written(own_folder) == first
    patch.undo()


@pytest.mark.slow
def test_what_a_killed_run_left_is_not_gone_on_with_for_something_else(
    own_folder: Path, checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = own_folder / "few"
    few.mkdir()
    for number in range(1, 6):
        shutil.copy(pictures / "0" / f"{number:04}.jpg", few)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callback, "merge_parts", lambda *_: (_ for _ in ()).throw(ValueError("stopped")))
        with pytest.raises(ValueError, match="stopped"):
            predict(checkpoint, few)

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit):
            predict(checkpoint, few, *more)
        return capsys.readouterr().err.split("error: ")[-1]

    assert "made with model.top_k 1, and it is 2 now: name another file" in refused("--model.top_k=2")
    assert f"made with data.eval_batch_size {BATCH}, and it is 50 now" in refused("--data.eval_batch_size=50")
    other = shutil.copy(few / "0001.jpg", few / "0009.jpg")
    assert "made of another list of inputs" in refused()
    Path(other).unlink()
    content = load_checkpoint(checkpoint)
    content["state_dict"]["head.bias"][0] += 1e-6
    torch.save(content, own_folder / "other.ckpt")
    begun = {path: path.read_bytes() for path in Path("out.csv.parts").iterdir()}
    for done in (True, False):  # no batch is left to predict, or one is
        if not done:
            cut_last_line(next(path for path in begun if path.suffix == ".jsonl"))
        with pytest.raises(SystemExit):
            predict(own_folder / "other.ckpt", few)
        assert "made with another checkpoint" in capsys.readouterr().err
    assert set(Path("out.csv.parts").iterdir()) == set(begun)
    moved = Path(shutil.copy(checkpoint, own_folder / "moved.ckpt"))
    predict(moved, few)  # the same, elsewhere
    assert len(rows(own_folder / "out.csv")) == 5


@pytest.mark.slow
def test_pictures_that_are_all_unreadable_are_listed(own_folder: Path, checkpoint: Path) -> None:
    (own_folder / "new").mkdir()
    for number in range(3):
        (own_folder / "new" / f"{number}.jpg").write_bytes(b"broken")
    predict(checkpoint, own_folder / "new", "--data.eval_batch_size=2")
    assert Path("out.csv").read_text() == "name,label,probability\n"
    assert len(rows(own_folder / "out.unreadable.csv")) == 3
    with pytest.raises(SystemExit):
        predict(checkpoint, own_folder / "new", "--data.on_error=raise")


@pytest.mark.slow
def test_the_most_probable_classes_in_parquet_with_mirror_images(own_folder: Path, checkpoint: Path) -> None:
    root = write_folder(own_folder / "new", ("a",), classes=2, each=3)
    more = ["--predictions=top.parquet", "--model.top_k=5", "--model.mirror_at_test=true"]
    cli = predict(checkpoint, root, *more)
    table = pyarrow.parquet.read_table("top.parquet").to_pylist()
    heads = [f"{kind}{nth}" for nth in ("", "_2", "_3", "_4", "_5") for kind in ("label", "probability")]
    assert list(table[0]) == ["name", *heads]
    for row in table:
        found = [row[head] for head in heads[1::2]]
        assert found == sorted(found, reverse=True) and sum(found) == pytest.approx(1, abs=1e-5)
        assert {row[head] for head in heads[::2]} == {"5", "6", "7", "8", "9"}
    assert cli.model.mirror_at_test
    predict(checkpoint, root)
    plain = {row["name"]: float(row["probability"]) for row in rows(own_folder / "out.csv")}
    assert any(abs(plain[row["name"]] - row["probability"]) > 1e-4 for row in table)


@pytest.mark.slow
def test_too_many_classes_and_other_endings_are_refused(
    own_folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(own_folder / "new", ("a",), classes=2, each=1)
    for option, sentence in {
        "--model.top_k=6": "model.top_k must be 1 to 5, the number of classes, not 6",
        "--predictions=out.txt": "ending in .csv or .parquet; received out.txt",
    }.items():
        with pytest.raises(SystemExit):
            predict(checkpoint, root, option)
        assert sentence in capsys.readouterr().err


def test_a_checkpoint_alone_says_what_it_cannot_do(
    own_folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, path, sentence in (
        (
            vision.main,
            checkpoint,
            "has no config.yaml of its run beside it: say what to predict with --data.predict_root",
        ),
        (vision.main, "nowhere.ckpt", "no checkpoint nowhere.ckpt"),
        (text.main, checkpoint, "is of vision: recipes.text can't open it"),
    ):
        with pytest.raises(SystemExit):
            main(["predict", "--ckpt_path", str(path), *QUIET])
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_the_training_folder_may_be_gone_and_the_config_moved_too(own_folder: Path) -> None:
    root = write_folder(own_folder / "pictures", ("train", "val"), each=6)
    options = ["--data=ImageFolder", f"--data.root={root}", "--model.weights=null", "--model.image_size=32"]
    options += ["--data.batch_size=4", "--data.fold=[0,3]", "--data.num_workers=0"]
    fit = vision.main(["fit", "--config", "vision/quickstart", *options, *QUIET, *SHORT])
    shutil.move(root / "val", own_folder / "new")
    shutil.rmtree(root)
    best = Path(fit.folder) / "checkpoints" / "best.ckpt"
    with_config = predict(best, own_folder / "new")
    assert with_config.datamodule.batch_size == 4 and with_config.config.predict.config, "the run's own config"
    first = Path("out.csv").read_bytes()
    moved = Path(shutil.copy(best, own_folder / "alone.ckpt"))
    shutil.rmtree(own_folder / "runs")
    predict(moved, own_folder / "new")
    assert Path("out.csv").read_bytes() == first
    assert {row["label"] for row in rows(own_folder / "out.csv")} <= {"class_0", "class_1", "class_2"}
    assert len(rows(own_folder / "out.csv")) == 18


@pytest.mark.slow
def test_a_text_checkpoint_brings_its_tokenizer_and_broken_lines_are_listed(own_folder: Path) -> None:
    encoder, file = tiny_encoder(own_folder / "bert"), write_csv(own_folder / "train.csv", 40)
    options = [f"--data.train_file={file}", f"--model.encoder={encoder}", "--data.batch_size=8", "--data.max_length=16"]
    options += ["--data.fold=[0,4]", "--model.optimizer=AdamW"]
    fit = text.main(["fit", "--data=TextFiles", *options, *QUIET, *SHORT])
    best = Path(fit.folder) / "checkpoints" / "best.ckpt"
    file.unlink()
    (own_folder / "new.txt").write_bytes(b"a fine film\n\nbad acting \xff\na dull story\n   \nwhat music\n")
    ask = ["--data.predict_file=new.txt", "--predictions=out.csv", *QUIET]
    text.main(["predict", "--ckpt_path", str(best), *ask])
    first = written(own_folder)
    assert [row["text"] for row in rows(own_folder / "out.csv")] == ["a fine film", "a dull story", "what music"]
    assert rows(own_folder / "out.unreadable.csv") == [
        {"text": "new.txt, line 2", "reason": "the text is empty"},
        {"text": "new.txt, line 3", "reason": "the text is not in the encoding that data.encoding names"},
        {"text": "new.txt, line 5", "reason": "the text is empty"},
    ]
    moved = shutil.copy(best, own_folder / "alone.ckpt")
    for path in (encoder, own_folder / "runs"):
        shutil.rmtree(path)
    cli = text.main(["predict", "--ckpt_path", str(moved), *ask])
    assert written(own_folder) == first
    assert cli.datamodule.max_length == 16 and list(rows(own_folder / "out.csv")[0])[-1] == "p(good)"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The variance of predictions")  # after two steps
def test_texts_go_on_where_they_were_cut_off(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores: also these need neither the run nor its encoder."""
    encoder = tiny_encoder(own_folder / "bert")
    (own_folder / "train.csv").write_text("text,stars\n" + "".join(f"a fine film {n},{n / 9}\n" for n in range(30)))
    options = ["--data.train_file=train.csv", f"--model.encoder={encoder}", "--data.label_column=stars"]
    options += ["--data.max_length=32", "--data.problem_type=regression", "--model.optimizer=AdamW", *QUIET, *SHORT]
    fit = text.main(["fit", "--data=TextFiles", *options])
    moved = shutil.copy(Path(fit.folder) / "checkpoints" / "best.ckpt", own_folder / "alone.ckpt")
    for path in (encoder, own_folder / "runs"):
        shutil.rmtree(path)
    (own_folder / "new.txt").write_text("one\ntwo words\nthree more words\n")
    ask = ["predict", "--ckpt_path", str(moved), "--data.predict_file=new.txt", "--data.eval_batch_size=1", *QUIET]
    text.main([*ask, "--predictions=out.csv"])
    assert list(rows(own_folder / "out.csv")[0]) == ["text", "score"]
    with monkeypatch.context() as patch:
        patch.setattr(callback, "merge_parts", lambda *_: (0, 0))
        text.main([*ask, "--predictions=again.csv"])
    cut_last_line(Path("again.csv.parts/rank0.0.jsonl"))
    draws, batch = [], TokenBatches.__getitems__

    def noted(self: TokenBatches, some: list[Any]) -> Any:
        draws.extend(draw.row for draw in some)
        return batch(self, some)

    monkeypatch.setattr(TokenBatches, "__getitems__", noted)
    text.main([*ask, "--predictions=again.csv"])
    assert draws == [2]
    assert Path("again.csv").read_bytes() == Path("out.csv").read_bytes()


def test_pictures_are_normalised_as_in_training(own_folder: Path, checkpoint: Path) -> None:
    content = load_checkpoint(checkpoint)
    content["recipe"]["mean"] = [0.1, 0.2, 0.3]  # as if the backbone's table had changed since
    torch.save(content, own_folder / "older.ckpt")
    model = predict(own_folder / "older.ckpt", write_folder(own_folder / "new", ("a",), classes=2, each=1)).model
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.std.flatten().tolist() == pytest.approx(content["recipe"]["std"])
