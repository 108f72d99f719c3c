"""Each sample counts once in an optimiser step, whatever batch of the step, or rank, it fell in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
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
from recipes.mlm import MaskedLanguageModel
from recipes.parts.losses import IGNORED
from recipes.parts.optim import build_optimizer
from recipes.parts.schedules import Constant, Cosine, Linear, OneCycle, Polynomial, Step, WarmupStableDecay
from recipes.text import TextClassifier
from recipes.training.base import RecipeModule, by_recipe
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


def masked_language() -> tuple[RecipeModule, list[Any], Callable[[Any, Any], Tensor]]:
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


def texts(problem: str, classes: int, **options: Any) -> tuple[RecipeModule, list[Any], Callable[[Any, Any], Tensor]]:
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


def pictures() -> tuple[RecipeModule, list[Any], Callable[[Any, Any], Tensor]]:
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


CASES: dict[str, Callable[[], tuple[RecipeModule, list[Any], Callable[[Any, Any], Tensor]]]] = {
    "masked language": masked_language,
    "texts": partial(texts, "single_label_classification", 3),
    "texts with class weights": partial(texts, "single_label_classification", 3, class_weights=WEIGHTS),
    "texts with several labels": partial(texts, "multi_label_classification", 3),
    "texts with a score": partial(texts, "regression", 1),
    "pictures with class weights": pictures,
}


def built(name: str) -> tuple[RecipeModule, list[Any], Callable[[Any, Any], Tensor]]:
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


def train(name: str, **options: Any) -> RecipeModule:
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# A resume with other batches, accumulation or devices


def rates_by_hand(schedule: type, total: int) -> list[float]:
    """The factors of a run of `total` steps, each formula written anew."""
    last = total - 1
    if schedule is Linear:
        return [1 - step / last for step in range(total)]
    if schedule is Cosine:
        return [(1 + math.cos(math.pi * step / last)) / 2 for step in range(total)]
    if schedule is OneCycle:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total, cycle_momentum=False)
        found = []
        for _ in range(total):
            found.append(theirs.get_last_lr()[0])
            optimizer.step()
            if len(found) < total:
                theirs.step()
        return found
    if schedule is Step:
        return [0.1 ** (3 * step // total) for step in range(total)]
    if schedule is Polynomial:
        return [(1 - step / last) ** 2 for step in range(total)]
    if schedule is WarmupStableDecay:
        begin = total - max(round(0.2 * total), 1)
        return [1 - math.sqrt(max(step - begin, 0) / (last - begin)) if last > begin else 1.0 for step in range(total)]
    return [1.0] * total


class Used(Callback):
    """The rate of each optimiser step; keeps a checkpoint amid an epoch and one at its end."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"] / RATE)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 1):
            trainer.save_checkpoint("amid.ckpt")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint("end.ckpt")


def head_alone(batches: int, schedule: Any) -> tuple[RecipeModule, Dealt]:
    torch.manual_seed(0)
    optimizer = partial(torch.optim.SGD, lr=RATE)
    model = VisionClassifier(3, "resnet8", image_size=32, optimizer=optimizer, schedule=schedule)
    batch = {"features": torch.randn(4, 64), "label": torch.tensor([0, 1, 2, 0])}
    return model, Dealt([batch] * batches)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, bool], Path]:
    """A folder with the checkpoints of 2 epochs by a schedule, with or without ExactResume; each is trained once."""

    @cache
    def folder(schedule: Any, exact: bool) -> Path:
        made = tmp_path_factory.mktemp("begun")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(made)
            model, data = head_alone(8, schedule)
            seeds = [ExactResume(seed=0)] if exact else []
            quiet(max_epochs=2, callbacks=[Used(), *seeds], use_distributed_sampler=False).fit(model, data)
        return made

    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:resumed, but not as if never")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("start", ["end", "amid"])
@pytest.mark.parametrize(("batches", "accumulate"), [(1, 1), (8, 3), (6, 2), (24, 1), (3, 1)])
def test_rates_after_a_resume_are_those_of_steps_done_and_steps_left(
    begun: Callable[[Any, bool], Path], batches: int, accumulate: int, start: str, exact: bool
) -> None:
    """8 batches an epoch before, of 4 epochs 1 1/4 or 2 are done; then other batches, for the epochs that are left."""
    if start == "amid" and batches < 2:
        pytest.skip("the checkpoint stands beyond the end of the data")
    seeds = [ExactResume(seed=0)] if exact else []
    for schedule in (Linear, Cosine, OneCycle, Step, Polynomial, WarmupStableDecay, Constant):
        model, data = head_alone(batches, schedule)
        used = Used()
        options: dict[str, Any] = {"max_epochs": 4, "accumulate_grad_batches": accumulate}
        trainer = quiet(callbacks=[used, *seeds], use_distributed_sampler=False, **options)
        trainer.fit(model, data, ckpt_path=begun(schedule, exact) / f"{start}.ckpt")
        done = 16 if start == "end" else 10
        per_epoch = -(-batches // accumulate)
        left = 2 * per_epoch + (0 if start == "end" else per_epoch - 2 // accumulate)
        assert trainer.global_step == done + left, schedule
        assert used.rates == pytest.approx(rates_by_hand(schedule, done + left)[done:], abs=1e-9), schedule


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:resumed, but not as if never")
def test_warmups_and_cycled_momentum_go_on_as_of_the_new_length(own_folder: Path) -> None:
    """Of 16 + 4 steps a warm-up of a half has six left over: after the 16 it is long over; of 16 + 48 it is not."""
    for batches, total in ((2, 20), (24, 64)):
        schedule = partial(OneCycle, cycle_momentum=True, warmup=0.5)
        model, data = head_alone(8, schedule)
        model.optimizer = partial(torch.optim.SGD, lr=RATE, momentum=0.9)
        quiet(max_epochs=2, callbacks=[Used(), ExactResume(seed=0)]).fit(model, data)
        model, data = head_alone(batches, schedule)
        model.optimizer = partial(torch.optim.SGD, lr=RATE, momentum=0.9)
        used = Used()
        quiet(max_epochs=4, callbacks=[used, ExactResume(seed=0)]).fit(model, data, ckpt_path="end.ckpt")
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
        wanted = OneCycle(optimizer, total, cycle_momentum=True, warmup=0.5)
        assert used.rates == pytest.approx([wanted.factor(step) for step in range(16, total)])
        assert model.trainer.optimizers[0].param_groups[0]["momentum"] == pytest.approx(0.95)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:resumed, but not as if never")
def test_two_ranks_go_on_where_one_stopped(own_folder: Path) -> None:
    class Tell(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            torch.save(used.rates, f"rates{trainer.global_rank}.pt")

    model, data = head_alone(8, Linear)
    quiet(max_epochs=2, callbacks=[Used(), ExactResume(seed=0)]).fit(model, data)
    model, data = head_alone(8, Linear)
    used, two = Used(), Dealt(data.batches, 2)
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork_find_unused_parameters_true"}
    trainer = quiet(
        max_epochs=4, callbacks=[used, ExactResume(seed=0), Tell()], use_distributed_sampler=False, **options
    )
    trainer.fit(model, two, ckpt_path="end.ckpt")
    for rank in (0, 1):
        assert torch.load(f"rates{rank}.pt") == pytest.approx(rates_by_hand(Linear, 24)[16:], abs=1e-9)


def test_a_strategys_factor_is_the_recipes_own() -> None:
    both = {"vision": 3.0, "text": 30.0}
    assert [by_recipe(both, recipe, "lr_factor") for recipe in ("vision", "text", "mlm")] == [3.0, 30.0, 30.0]
    assert by_recipe(2.0, "vision", "lr_factor") == 2.0
    with pytest.raises(ValueError, match=r"model\.lr_factor has no value for text; it has some for vision"):
        by_recipe({"vision": 3.0}, "text", "lr_factor")
    with pytest.raises(ValueError, match=r"model\.lr_limit must be above 0; received 0"):
        by_recipe(0.0, "text", "lr_limit")


def test_a_limit_holds_for_what_comes_of_the_factor() -> None:
    adam = partial(torch.optim.AdamW, lr=0.01)
    options = {"backbone": "resnet8", "image_size": 8, "optimizer": adam, "layer_decay": 0.5}
    model = VisionClassifier(3, lr_factor=4.0, lr_limit=0.011, **options)  # type: ignore[arg-type]
    rates = {
        group["name"]: group["lr"] for group in build_optimizer(model.optimizer, model.param_groups()).param_groups
    }
    assert rates["stem"] == pytest.approx(0.01 * 4 * 0.5**4) and rates["head"] == rates["layer3"] == 0.011
