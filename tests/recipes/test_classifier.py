"""Each sample counts once in an optimiser step, whatever batch of the step, or rank, it fell in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from callbacks import L2, ExactResume
from recipes.classifier import Classifier
from recipes.mlm import MaskedLanguageModel
from recipes.parts.losses import IGNORED
from recipes.parts.schedules import Constant
from recipes.text import TextClassifier
from recipes.vision import VisionClassifier
from tests.nets import quiet, same
from tests.tiny_encoders import tiny_encoder

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
RATE = 0.1
COUNTS = [19, 308, 77, 150, 40, 201, 101, 260]  # masked tokens, or a tenth of them texts, in each batch
CHOICES: dict[str, Any] = {"optimizer": partial(torch.optim.SGD, lr=RATE), "schedule": Constant}
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
WEIGHTS = [0.2, 1.0, 3.0]


def masked_language() -> tuple[Classifier, list[Any], Callable[[Any, Any], Tensor]]:
    """Batches of eight texts with as many masked tokens as `COUNTS` says; the loss by transformers' own forward."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for count in COUNTS:
        ids = torch.randint(5, 60, (8, 48), generator=generator)
        labels = torch.full((8 * 48,), IGNORED)
        chosen = torch.randperm(8 * 48, generator=generator)[:count]
        labels[chosen] = ids.flatten()[chosen]
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": labels.view_as(ids),
                "index": ids[:, 0],
            }
        )

    def loss(model: Any, batch: Any) -> Tensor:
        logits = model.net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)

    return MaskedLanguageModel(60, architecture=BERT, **CHOICES), batches, loss


def texts(problem: str, classes: int, **options: Any) -> tuple[Classifier, list[Any], Callable[[Any, Any], Tensor]]:
    """Batches of unlike size, as `tokens_per_batch` makes them."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for count in COUNTS:
        ids = torch.randint(5, 60, (count // 10, 6), generator=generator)
        label = torch.randint(0, classes, (len(ids),), generator=generator)
        if problem == "multi_label_classification":
            label = F.one_hot(label, classes).float()
        elif problem == "regression":
            label = ids.float().mean(1) / 10
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": label, "index": ids[:, 0]})

    def loss(model: Any, batch: Any) -> Tensor:
        logits = model.net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if problem == "regression":
            return F.mse_loss(logits.squeeze(1), batch["label"])
        if problem == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, batch["label"])
        weight = torch.tensor(WEIGHTS) if options else None
        return F.cross_entropy(logits, batch["label"], weight)

    encoder = str(tiny_encoder(Path("bert"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    model = TextClassifier(classes, encoder, problem_type=problem, **options, **CHOICES)  # type: ignore[arg-type]
    return model, batches, loss


def pictures() -> tuple[Classifier, list[Any], Callable[[Any, Any], Tensor]]:
    """Features of pictures, in batches of one size, which class weights make unlike."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "features": torch.randn(4, 64, generator=generator),
            "label": torch.multinomial(torch.ones(3), 4, replacement=True, generator=generator),
        }
        for _ in COUNTS
    ]

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model.head(batch["features"]), batch["label"], torch.tensor(WEIGHTS))

    model = VisionClassifier(3, "resnet20", image_size=32, class_weights=WEIGHTS, **CHOICES)
    return model, batches, loss


CASES: dict[str, Callable[[], tuple[Classifier, list[Any], Callable[[Any, Any], Tensor]]]] = {
    "masked language": masked_language,
    "texts": partial(texts, "single_label_classification", 3),
    "texts with class weights": partial(texts, "single_label_classification", 3, class_weights=WEIGHTS),
    "texts with several labels": partial(texts, "multi_label_classification", 3),
    "texts with a score": partial(texts, "regression", 1),
    "pictures with class weights": pictures,
}


def built(name: str) -> tuple[Classifier, list[Any], Callable[[Any, Any], Tensor]]:
    torch.manual_seed(0)
    return CASES[name]()


def joined(batches: list[Any]) -> Any:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def by_hand(
    name: str, windows: list[slice], clip: float | None = None, decay: float = 0.0, dtype: Any = None
) -> dict[str, Tensor]:
    """Plain gradient descent with one big batch a step."""
    model, batches, loss = built(name)
    model.train()
    for window in windows:
        model.zero_grad()
        loss(model, joined(batches[window])).backward()
        moving = {n: p for n, p in model.named_parameters() if p.grad is not None}
        for p in moving.values():
            if p.ndim > 1:
                p.grad += decay * p.detach()
        if clip is not None:
            nn.utils.clip_grad_norm_(moving.values(), clip)
        with torch.no_grad():
            for p in moving.values():
                p -= RATE * p.grad
    return {n: p.detach() for n, p in model.named_parameters()}


class Dealt(DataLoader[Any]):
    """Every rank has every `ranks`-th batch."""

    def __init__(self, batches: list[Any], ranks: int = 1) -> None:
        super().__init__(batches, batch_size=None)  # type: ignore[arg-type]
        self.batches, self.ranks = batches, ranks

    def __len__(self) -> int:
        return len(self.batches) // self.ranks

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        rank = torch.distributed.get_rank() if self.ranks > 1 else 0
        return iter(self.batches[rank :: self.ranks])


class Save(Callback):
    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        torch.save({n: p.detach() for n, p in pl_module.named_parameters()}, f"rank{trainer.global_rank}.pt")


def windows(batches: int, ranks: int = 1) -> list[slice]:
    size = batches * ranks
    return [slice(start, min(start + size, len(COUNTS))) for start in range(0, len(COUNTS), size)]


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, **{"rtol": 0.0, "atol": 1e-6, **tolerance}, msg=name)


def train(name: str, **options: Any) -> Classifier:
    model, batches, _ = built(name)
    model.train()
    ranks = options.get("devices", 1)
    quiet(max_epochs=1, use_distributed_sampler=False, **options).fit(model, Dealt(batches, ranks))
    return model


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_steps_of_several_batches_are_those_of_one_big_batch(name: str, batches: int, own_folder: Path) -> None:
    """Eight batches in threes: the last two are a step, too."""
    model = train(name, accumulate_grad_batches=batches)
    close(dict(model.named_parameters()), by_hand(name, windows(batches)))


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_ranks_count_every_sample_once(name: str, batches: int, own_folder: Path) -> None:
    train(
        name,
        accumulate_grad_batches=batches,
        devices=2,
        strategy="ddp_fork_find_unused_parameters_true",
        callbacks=[Save()],
    )
    for rank in (0, 1):
        close(torch.load(f"rank{rank}.pt"), by_hand(name, windows(batches, 2)))


def test_penalties_and_clipping_come_after() -> None:
    options = {"gradient_clip_val": 0.3, "callbacks": [L2(0.5)]}
    model = train("masked language", accumulate_grad_batches=3, **options)
    close(dict(model.named_parameters()), by_hand("masked language", windows(3), clip=0.3, decay=0.5))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_float16_scaler_does_not_mind() -> None:
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))  # type: ignore[attr-defined]
    model = train("masked language", accumulate_grad_batches=3, plugins=[half], gradient_clip_val=0.3)
    close(dict(model.named_parameters()), by_hand("masked language", windows(3), clip=0.3), atol=2e-4)


def test_batches_of_equal_counts_step_as_they_always_did() -> None:
    """Bitwise, where no scale differs from 1."""

    class Plain(MaskedLanguageModel):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None: ...

    weights = []
    for kind in (MaskedLanguageModel, Plain):
        torch.manual_seed(0)
        model = kind(60, architecture=BERT, **CHOICES)
        quiet(max_epochs=2, accumulate_grad_batches=2).fit(model, Dealt([masked_language()[1][2]] * 4))
        weights.append(model)
    assert same(*weights)


def test_a_batch_without_a_masked_token_counts_nothing() -> None:
    model, batches, _ = built("masked language")
    empty = {**batches[0], "labels": torch.full_like(batches[0]["labels"], IGNORED)}
    quiet(max_epochs=1, accumulate_grad_batches=3).fit(model, Dealt([empty, batches[0], batches[1], empty, empty]))
    close(dict(model.named_parameters()), by_hand("masked language", [slice(0, 2)]))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_step_resumed_amid_its_batches_is_the_same(own_folder: Path, stop: int) -> None:
    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx + 1 == stop:
                trainer.save_checkpoint("amid.ckpt")

    options = {"max_epochs": 2, "accumulate_grad_batches": 3, "use_distributed_sampler": False}
    whole, batches, _ = built("masked language")
    quiet(callbacks=[ExactResume(seed=0), Keep()], **options).fit(whole, Dealt(batches))
    again, batches, _ = built("masked language")
    quiet(callbacks=[ExactResume(seed=0)], **options).fit(again, Dealt(batches), ckpt_path="amid.ckpt")
    assert same(whole, again)


def test_training_losses_of_an_epoch_are_means_over_all_ranks_samples(own_folder: Path) -> None:
    class Log(Callback):
        def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
            torch.save(float(trainer.callback_metrics["train/accuracy"]), f"accuracy{trainer.global_rank}.pt")

    _, batches, _ = built("texts")
    kept = [{**batch, "label": torch.zeros_like(batch["label"])} for batch in batches[:2]]  # 1 and 30 texts
    torch.manual_seed(0)
    model, _, _ = texts("single_label_classification", 3)
    model.optimizer = partial(torch.optim.SGD, lr=1e-9)
    hits = sum(float((model.logits(b).argmax(1) == 0).sum()) for b in kept)  # type: ignore[operator]
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork_find_unused_parameters_true"}
    quiet(max_epochs=1, use_distributed_sampler=False, callbacks=[Log()], **options).fit(model, Dealt(kept, 2))
    assert torch.load("accuracy0.pt") == pytest.approx(hits / 31) == torch.load("accuracy1.pt")


def test_lbfgs_and_several_batches_a_step_are_refused() -> None:
    model = MaskedLanguageModel(60, architecture=BERT, optimizer=torch.optim.LBFGS, schedule=Constant)
    with pytest.raises(ValueError, match="needs trainer.accumulate_grad_batches=1"):
        quiet(max_epochs=1, accumulate_grad_batches=2).fit(model, Dealt(masked_language()[1]))
