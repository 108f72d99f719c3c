"""Every strategy on top of every config of images and texts: it plans, or says why it makes no sense; and it trains."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import initialization  # by now: first imported amid `unset`, it would keep what that puts in place

from recipes.__main__ import main as command
from recipes.cli import early
from recipes.text import main as text
from recipes.vision import main as vision

STRATEGIES = early.strategy_names()


def kind(config: str) -> str:
    """What a strategy meets: the same net, head and callbacks on other data are the same to it."""
    content = early.read_yaml(early.find_config(config))
    model, trainer = content["model"], content["trainer"]
    net = [model.get(key) for key in ("backbone", "encoder", "architecture", "pooling", "head", "lr_multipliers")]
    return repr([*net, [callback["class_path"] for callback in trainer.get("callbacks") or []]])


CONFIGS = list({kind(name): name for name in early.config_names() if name.startswith(("vision/", "text/"))}.values())
ONLY_TEXTS = ("strategy/prompt", "strategy/prefix")
QUICK = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]


def test_all_are_there() -> None:
    names = {"probe", "full", "layer_decay", "two_stage", "gradual", "bitfit", "lora", "dora", "ia3", "adapter"}
    assert {f"strategy/{name}" for name in names | {"prompt", "prefix", "l2sp", "ema", "prune_gradual"}} == set(
        STRATEGIES
    )
    assert not set(STRATEGIES) & set(early.config_names())


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_header_says_what_how_and_how_well(name: str) -> None:
    head = "\n".join(early.header(early.find_config(name)))
    assert f"--config {name}" in head
    for word in ("Measured:", "Source:"):
        assert word in head
    for file in re.findall(r"benchmarks/results/\w+\.json", head):
        assert (Path(__file__).parents[1] / file).is_file()


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Random numbers for weights that nobody looks at cost more than all the rest."""
    for name in ("normal_", "trunc_normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
        monkeypatch.setitem(initialization.TORCH_INIT_FUNCTIONS, name, lambda tensor, *_, **__: tensor)
    return


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_takes_every_strategy(
    config: str, strategy: str, unset: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if config.startswith("vision/") and strategy in ONLY_TEXTS:
        with pytest.raises(SystemExit):
            command(["plan", config, strategy])
        assert "is for texts; for images take lora, dora, ia3 or adapter" in capsys.readouterr().err
        return
    command(["plan", config, strategy])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if re.search(r"\s\d[\d,]*\s+[\d.]+\s+(frozen|[\d.e-]+)", line)]
    closed = {row[0].split("/")[0] for row in rows if set(row[4:]) == {"frozen"}}
    head = {row[0] for row in rows if row[0].startswith("head")}
    assert head and not closed & {"head"}
    if strategy == "strategy/probe":
        assert closed == {row[0].split("/")[0] for row in rows} - {"head"}
    elif strategy in ("strategy/full", "strategy/layer_decay", "strategy/two_stage", "strategy/gradual"):
        assert not closed


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in ONLY_TEXTS])
def test_it_trains_on_images(strategy: str) -> None:
    cli = vision(["fit", "--config=vision/quickstart", f"--config={strategy}", *QUICK])
    assert cli.trainer.global_step == 4
    assert cli.folder.parent.name == f"quickstart+{strategy.removeprefix('strategy/')}"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["strategy/bitfit", "strategy/lora", "strategy/l2sp", *ONLY_TEXTS])
def test_it_trains_on_texts(strategy: str) -> None:
    cli = text(["fit", "--config=text/quickstart", f"--config={strategy}", *QUICK, "--trainer.limit_val_batches=1"])
    assert cli.trainer.global_step == 4


@pytest.mark.slow
def test_several_go_together_and_what_the_config_freezes_gives_way() -> None:
    mine = ["--trainer.callbacks+=Freeze", "--trainer.callbacks.train_last_blocks=1"]
    overlays = [f"--config=strategy/{name}" for name in ("lora", "gradual", "l2sp", "ema")]
    amp = ["--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=2"]
    cli = vision(["fit", "--config=vision/quickstart", *mine, *overlays, *QUICK, *amp])
    kinds = [type(callback).__name__ for callback in cli.trainer.callbacks]  # type: ignore[attr-defined]
    assert {"LRWarmup", "GradualUnfreezing", "L2SP", "EMA"} <= set(kinds)
    assert kinds.count("Freeze") == 1
    assert cli.model.peft.method == "lora" and cli.model.lr_factor == 3


def test_ls_and_copy(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(["ls", "strategies"])
    assert re.search(r"strategy/lora +LoRA: the net is frozen", capsys.readouterr().out)
    command(["copy", "strategy/lora", "mine.yaml"])
    assert "fit --config vision/quickstart --config mine.yaml" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command(["plan", "vision/quickstart", "strategy/lorra"])
    assert "did you mean 'strategy/lora'" in capsys.readouterr().err
