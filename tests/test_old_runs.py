"""What an older version wrote still works: its checkpoints, configs, Fisher file, and classes by their old paths.

The files in old_runs/ were written by version 0.1.0 at commit dc178e5; old_runs/README.md says how.
"""

from __future__ import annotations

import csv
import importlib
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

import callbacks
import datamodules
from callbacks import EWC
from callbacks.ewc import load_memory
from recipes.deploy.restored import restore
from recipes.export import main as export
from recipes.text import TextClassifier
from recipes.text import main as text
from recipes.vision import VisionClassifier
from recipes.vision import main as vision

from .conftest import write_folder
from .spies import Losses, Record, States

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as with any run that was moved

OLD = Path(__file__).parent / "old_runs"
MAIN: dict[str, Callable[..., Any]] = {"vision": vision, "text": text}
STEPS = 5  # that a checkpoint has seen
CHANGED = {("Report", "seconds"), ("Report", "every")}  # the clock goes on; each curve has a stride of its own now
QUIET = ["--trainer.enable_progress_bar=false"]


@pytest.fixture
def checkpoint(recipe: str, own_folder: Path) -> Path:
    """A checkpoint in its run's folder, beside what its config names."""
    run = own_folder / "runs" / recipe / "old" / "2026-01-01_00-00-00"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(OLD / recipe / "config.yaml", run)
    path = run / "checkpoints" / "step5.ckpt"
    path.write_bytes(lzma.decompress((OLD / recipe / "step5.ckpt.xz").read_bytes()))
    for name in ("fisher.safetensors", "texts.csv"):
        shutil.copy(OLD / name, own_folder)
    shutil.copytree(OLD / "encoder", own_folder / "encoder")
    return path


def loaded(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def first_texts() -> list[str]:
    with (OLD / "texts.csv").open() as file:
        return [row["text"] for row in csv.DictReader(file)][:8]


def plain_resnet8(state: dict[str, Tensor], images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """The net in plain torch: pictures in [0, 1] to logits."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias)

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"].contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, stride=stride, padding=1)

    net = "backbone.net"
    x = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    x = conv(x.contiguous(memory_format=torch.channels_last), f"{net}.conv1")
    x = F.relu(norm(x, f"{net}.bn1"))
    for stage, stride in (("layer1", 1), ("layer2", 2), ("layer3", 2)):
        block = f"{net}.{stage}.0"
        y = F.relu(norm(conv(x, f"{block}.conv1", stride), f"{block}.bn1"))
        y = norm(conv(y, f"{block}.conv2"), f"{block}.bn2")
        shortcut = x[:, :, ::stride, ::stride]
        x = F.relu(y + F.pad(shortcut, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])))
    return F.linear(x.mean((2, 3)), state["head.weight"], state["head.bias"])


def plain_text_logits(state: dict[str, Tensor], tokens: dict[str, Tensor]) -> Tensor:
    """The encoder as transformers builds it, the mean over real tokens, and a linear head."""
    net = AutoModel.from_config(AutoConfig.from_pretrained(OLD / "encoder"), add_pooling_layer=False).eval()
    net.load_state_dict({k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")})
    hidden = net(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    features = (hidden * mask).sum(1) / mask.sum(1)
    (weight,) = (v for k, v in state.items() if k.startswith("head.") and v.ndim == 2)
    (bias,) = (v for k, v in state.items() if k.startswith("head.") and v.ndim == 1)
    return F.linear(features, weight, bias)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["vision", "text"])
def test_a_checkpoint_gives_the_logits_it_gave(recipe: str, checkpoint: Path) -> None:
    expected, content = load_file(OLD / "expected.safetensors"), loaded(checkpoint)
    state = content["state_dict"]
    restored = restore(checkpoint)
    samples: Any = expected["images"] if recipe == "vision" else first_texts()
    logits = restored.logits(samples)
    # Processors differ in their kernels: to the bit against plain torch here, closely against the old code there.
    torch.testing.assert_close(logits, expected[f"{recipe}.logits"], rtol=1e-4, atol=1e-5)
    if recipe == "vision":
        plain = plain_resnet8(state, samples, content["recipe"]["mean"], content["recipe"]["std"])
        again = VisionClassifier.load_from_checkpoint(checkpoint).eval()(samples)
        assert restored.class_names == ["5", "6", "7", "8", "9"]
    else:
        tokens = restored.tokens(samples)
        plain = plain_text_logits(state, tokens)
        again = TextClassifier.load_from_checkpoint(checkpoint).eval()(**tokens)
        assert restored.class_names == ["bad", "good"]
    assert torch.equal(logits, plain)
    assert torch.equal(again, plain)


@pytest.mark.parametrize("recipe", ["vision", "text"])
def test_it_is_validated_and_exported(recipe: str, checkpoint: Path, own_folder: Path) -> None:
    cli = MAIN[recipe](["validate", "--ckpt_path", str(checkpoint), "--trainer.fast_dev_run=2", *QUIET])
    assert 0 < float(cli.trainer.callback_metrics["val/loss"]) < 3
    export([str(checkpoint), "--format", "safetensors", "--out", str(own_folder / "export"), "--count", "4"])
    facts = json.loads((own_folder / "export" / "facts.json").read_text())
    assert facts["check"]["agreement"] == 1


@pytest.mark.parametrize("alone", [False, True], ids=["in its run", "alone"])
@pytest.mark.parametrize("recipe", ["vision", "text"])
def test_it_predicts(recipe: str, checkpoint: Path, own_folder: Path, alone: bool) -> None:
    if alone:
        checkpoint = checkpoint.rename(own_folder / "moved.ckpt")
        shutil.rmtree(own_folder / "encoder")
    if recipe == "vision":
        new, count = f"--data.predict_root={write_folder(own_folder / 'new', (), 2, 3)}", 6
    else:
        new, count = "--data.predict_file=texts.csv", 24
    MAIN[recipe](["predict", "--ckpt_path", str(checkpoint), new, "--predictions=found.csv", *QUIET])
    with Path("found.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    assert {row["label"] for row in rows} <= set(restore(checkpoint).class_names)


@pytest.mark.parametrize("recipe", ["vision", "text"])
def test_its_config_starts_a_new_run(recipe: str, checkpoint: Path) -> None:
    config = checkpoint.parents[1] / "config.yaml"
    cli = MAIN[recipe](["fit", "--config", str(config), "--trainer.fast_dev_run=2", *QUIET])
    assert cli.trainer.global_step == 2


def same(first: Any, second: Any) -> bool:
    """Equality of nested values with tensors in them, NaN like NaN."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


@pytest.mark.parametrize("recipe", ["vision", "text"])
def test_it_is_resumed_as_the_old_code_would_have(recipe: str, checkpoint: Path) -> None:
    spies = [f"--trainer.callbacks+=tests.spies.{kind.__name__}" for kind in (Record, States, Losses)]
    cli = MAIN[recipe](["fit", "--ckpt_path", str(checkpoint), *spies, *QUIET])
    record, states, losses = (
        next(c for c in cli.trainer.callbacks if isinstance(c, kind)) for kind in (Record, States, Losses)
    )
    saved = loaded(checkpoint)["callbacks"]
    assert saved.keys() <= states.found.keys() | {"ExactResume"}
    for key, value in saved.items():
        if key == "ExactResume" or key.startswith("ModelCheckpoint"):
            continue  # seen in the order of samples below; of another folder
        known = {name: part for name, part in value.items() if (key, name) not in CHANGED}
        assert known and same(known, {name: states.found[key][name] for name in known}), key
    expected = load_file(OLD / "expected.safetensors")
    assert record.indices == expected[f"{recipe}.indices"][STEPS:].tolist()
    torch.testing.assert_close(torch.tensor(losses.losses), expected[f"{recipe}.losses"][STEPS:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("recipe", ["vision"])
def test_its_fisher_holds_a_new_task(recipe: str, checkpoint: Path, own_folder: Path) -> None:
    written = load_file(OLD / "fisher.safetensors")
    memory = load_memory(OLD / "fisher.safetensors")
    assert {f"fisher/{name}" for name in memory.fisher} | {f"anchor/{name}" for name in memory.anchor} == set(written)
    assert all(torch.equal(value, written[f"fisher/{name}"]) for name, value in memory.fisher.items())
    assert all(torch.equal(value, written[f"anchor/{name}"]) for name, value in memory.anchor.items())
    assert [task["name"] for task in memory.tasks] == ["digits 0-4"]
    model = VisionClassifier.load_from_checkpoint(checkpoint)
    held = EWC(load=OLD / "fisher.safetensors", exclude=["^head"])
    held.on_fit_start(None, model)  # type: ignore[arg-type]  # it asks the module alone
    assert held.memory is not None and set(held.memory.fisher) == {
        name for name, _ in model.named_parameters() if name.startswith(("backbone.net.conv1", "backbone.net.bn1"))
    }


PATHS: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load((OLD / "class_paths.yaml").read_text())


def found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", [path for paths in PATHS.values() for path in paths])
def test_an_old_path_is_the_class_itself(path: str) -> None:
    """Another class of that name would be no instance of the one that other code asks for."""
    kind = found(path)
    package, name = path.split(".")[0], path.rpartition(".")[2]
    if package != "recipes":
        assert kind is getattr({"callbacks": callbacks, "datamodules": datamodules}[package], name)
    assert kind.__qualname__ == name  # by which a checkpoint knows its state


def test_the_command_line_takes_every_callback_by_its_old_path(
    own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def listed(kind: str) -> list[dict[str, Any]]:
        return [{"class_path": path, "init_args": given} for path, given in PATHS[kind].items()]

    config = {
        "model": {"optimizer": listed("optimizer")[0]},
        "trainer": {"callbacks": listed("callbacks"), "plugins": listed("plugins")},
    }
    Path("all.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as end:
        vision(["fit", "--config", "vision/quickstart", "--config", "all.yaml", "--print_config"])
    assert not end.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert len(printed["trainer"]["callbacks"]) == len(PATHS["callbacks"])
    assert found(printed["model"]["optimizer"]["class_path"]) is found(next(iter(PATHS["optimizer"])))


def test_a_parser_takes_each_class_by_its_old_path() -> None:
    """As the command line does, whose own parser takes half a second for each."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", required=False)
    parser.add_subclass_arguments(Callback, "callbacks", required=False)
    for key in ("data", "callbacks"):
        for path, given in PATHS[key].items():
            parsed = parser.parse_object({key: {"class_path": path, "init_args": given}})
            assert type(parser.instantiate_classes(parsed)[key]) is found(path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(VisionClassifier, "model", skip={"num_classes"})
    for path, given in PATHS["schedule"].items():
        parsed = parser.parse_object({"model": {"schedule": {"class_path": path, "init_args": given}}})
        assert found(parsed.model.schedule.class_path) is found(path)
