"""Every method on every net: it trains, is saved without frozen weights, loads, merges, exports; or is refused."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import vision_transformer

from callbacks import Freeze
from recipes.deploy.graphs import ImageGraph, TokenGraph
from recipes.parts.backbones import build_backbone
from recipes.parts.peft import Peft, adapters, is_mergeable, merge
from recipes.text import TextClassifier
from recipes.vision import VisionClassifier
from tests.adapted_nets import BACKBONES, ENCODERS, MERGED, METHODS, REFUSED
from tests.tiny_encoders import tiny_encoder

CELLS = [(method, net) for net in (*ENCODERS, *BACKBONES) for method in METHODS]


@pytest.fixture(scope="module", autouse=True)
def few_layers() -> Iterator[None]:
    """Torchvision's ViT has 86 million weights in twelve layers that are alike; two of them say as much."""
    build = vision_transformer._vision_transformer
    with pytest.MonkeyPatch.context() as patch:
        two = {"num_layers": 2}
        patch.setattr(
            vision_transformer, "_vision_transformer", lambda *given, **more: build(*given, **{**more, **two})
        )
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the pretrained weights of each net are, made when first asked for."""

    class Made(dict[str, Path]):
        def __missing__(self, net: str) -> Path:
            folder = tmp_path_factory.mktemp("weights")
            if net in ENCODERS:
                self[net] = tiny_encoder(folder / net, ENCODERS[net])
            else:
                self[net] = folder / "weights.safetensors"
                save_file(build_backbone(BACKBONES[net], image_size=32).net.state_dict(), self[net])
            return self[net]

    return Made()


def build(net: str, method: str, weights: Path) -> Any:
    how = METHODS[method]
    options: dict[str, Any] = {"peft": how and Peft(**how), "save_base": False, "num_classes": 3}
    torch.manual_seed(1)
    if net in ENCODERS:
        return TextClassifier(encoder=str(weights), dropout=0.0, head_dropout=0.0, **options)
    return VisionClassifier(backbone=BACKBONES[net], weights=str(weights), image_size=32, **options)


@functools.cache
def plain_names(net: str, weights: Path) -> list[str]:
    return list(build(net, "BitFit", weights).state_dict())


def batch_of(net: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if net not in ENCODERS:
        return {"image": torch.rand(2, 3, 32, 32, generator=generator)}
    ids = torch.randint(5, 30, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def frozen(model: Any, method: str) -> Iterator[None]:
    """In a fit, as far as a checkpoint asks for it."""
    held = [] if METHODS[method] else [Freeze(train_last_blocks=1, train_biases=True)]
    for callback in held:
        callback.freeze(model)
    model.trainer = Trainer(logger=False, enable_checkpointing=False, callbacks=[*held], barebones=False)
    yield
    model.trainer = None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GPU available")
@pytest.mark.parametrize(("method", "net"), CELLS)
def test_it_trains_saves_loads_merges_and_exports_or_is_refused(
    method: str, net: str, weights: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    if (method, net) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[method, net]), frozen(build(net, method, weights[net]), method):
            pass
        return
    model, batch = build(net, method, weights[net]), batch_of(net)
    with frozen(model, method):
        train(model, batch)
        checkpoint = {"state_dict": model.state_dict()}
        model.on_save_checkpoint(checkpoint)
    logits = model.eval().logits(batch).detach()

    whole = sum(t.numel() for t in model.state_dict().values())
    kept = checkpoint["state_dict"]
    assert sum(t.numel() for t in kept.values()) < whole / 2
    assert not kept.keys() & {n for n, p in model.named_parameters() if p in model.base.loaded and not p.requires_grad}

    loaded = build(net, method, weights[net])
    loaded.on_load_checkpoint(checkpoint)
    loaded.load_state_dict(checkpoint["state_dict"])
    close = 1e-5 * float(logits.abs().max())
    torch.testing.assert_close(loaded.eval().logits(batch), logits, atol=close, rtol=0)

    inner = loaded.net if net in ENCODERS else loaded.backbone
    assert is_mergeable(inner) == (method in MERGED)
    if method in MERGED:
        merge(inner)
        assert not adapters(inner)
        torch.testing.assert_close(loaded.logits(batch), logits, atol=close, rtol=0)
        assert list(loaded.state_dict()) == plain_names(net, weights[net])  # exports as the plain net does
    else:
        with pytest.raises(ValueError, match="no plain weights can hold"):
            merge(copy.deepcopy(inner))
        torch.testing.assert_close(exported(loaded, batch), logits, atol=10 * close, rtol=0)


def train(model: Any, batch: dict[str, Tensor]) -> None:
    """Some steps, in which everything that should gets a gradient, but for what is off at random or saturated."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # LoRA's first matrix has none in the first, the other being zero
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train().logits(batch), torch.tensor([0, 2])).backward()
        optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(bool(p.grad.any()) for p in trained) > 0.7 * len(trained)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def exported(model: Any, batch: dict[str, Tensor]) -> Tensor:
    if "image" in batch:
        graph: nn.Module = ImageGraph(model.backbone, model.head, model.mean, model.std)
        inputs = {"images": batch["image"]}
    else:
        graph, inputs = TokenGraph(model.net, None, "model", model.problem_type), batch
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(graph.eval(), (), inputs).module()(**inputs)[0]
