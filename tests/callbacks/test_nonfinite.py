from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset, TensorDataset

from callbacks import nonfinite as guards
from callbacks.nonfinite import NonFiniteError, StopOnNonFinite, sums, tensors_in, trace


class Scale(nn.Module):
    """Multiplies by a number, from a given call on; what a bug or an overflow would do."""

    def __init__(self, by: float = 1.0, inplace: bool = False, chance: bool = False) -> None:
        super().__init__()
        self.by, self.inplace, self.chance = by, inplace, chance

    def forward(self, x: Tensor) -> Tensor:
        if self.chance:
            return x * torch.where(torch.rand(1) < 0.5, self.by, 1.0)
        return x.mul_(self.by) if self.inplace else x * self.by


class Root(nn.Module):
    """sqrt of a number that is 0 for one sample: finite, with an infinite slope."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.detach()[:, :1]).abs().sqrt()


Build = Callable[[Any], Optimizer]
PLAIN = partial(SGD, lr=0.01)


class Net(LightningModule):
    def __init__(self, *parts: nn.Module, build: Build = PLAIN) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1))
        self.parts, self.head = nn.Sequential(*parts), nn.Linear(8, 3)
        self.build, self.factor = build, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.parts(self.stem(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        ranks = slice(self.global_rank, None, self._trainer.world_size if self._trainer else 1)
        loss = nn.functional.cross_entropy(self(x[ranks]).float(), y[ranks]) * self.factor
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Optimizer:
        return self.build(self.parameters())


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(32, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data()), batch_size=4)


def trainer(*callbacks: Callback, epochs: int = 1, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return Trainer(**{"accelerator": "cpu", "max_epochs": epochs, "callbacks": list(callbacks), **quiet, **options})


def fit(*callbacks: Callback, net: LightningModule, batches: Any = None, **options: Any) -> LightningModule:
    trainer(*callbacks, **options).fit(net, batches or loader())
    return net


def message(net: LightningModule, batches: Any = None, guard: StopOnNonFinite | None = None, **options: Any) -> str:
    with pytest.raises(NonFiniteError) as stopped:
        fit(guard or StopOnNonFinite(), net=net, batches=batches, **options)
    return str(stopped.value)


# the parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_sum_is_finite_if_and_only_if_its_tensor_is(dtype: torch.dtype) -> None:
    tensors = [torch.full((1000,), 6e4, dtype=dtype), *(torch.zeros(3, 4, dtype=dtype) for _ in range(4))]
    for tensor, value in zip(tensors[2:], (math.inf, -math.inf, math.nan), strict=True):
        tensor[1, 2] = value
    tensors[2][0, 0] = -math.inf
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.tensor([[math.nan, 0.0]]), (3, 2), check_invariants=True
    )
    assert sums([*tensors, sparse]).isfinite().tolist() == [True, True, False, False, False, False]


def test_tensors_are_found_in_whatever_holds_them() -> None:
    batch = {"image": [torch.ones(1), (torch.ones(2),)], "label": torch.tensor([1]), "name": "a"}
    assert [path for path, _ in tensors_in(batch)] == ['["image"][0]', '["image"][1][0]']


def test_a_trace_changes_nothing() -> None:
    net = Net(nn.ReLU(inplace=True))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    calls, _ = trace(net, lambda: net(torch.randn(4, 6)))
    assert [call.name for call in calls] == ["stem.0", "stem.1", "stem.2", "stem", "parts.0", "parts", "head", ""]
    assert [call.began for call in calls] == [2, 3, 4, 1, 6, 5, 7, 0]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


# the loss


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_first_module_is_named_in_the_middle_of_a_net(value: float, inplace: bool) -> None:
    parts = [nn.Linear(8, 8), nn.ReLU(), Scale(100.0), Scale(value, inplace), nn.Linear(8, 8), nn.ReLU()]
    text = message(Net(*parts))
    assert (
        "non-finite loss in step 0, epoch 0, batch 0: the first module whose output is not finite is parts.3 (Scale)"
        in text
    )
    assert "the largest number in its input was" in text
    assert text.endswith("Lower the learning rate, warm it up or clip gradients")


def test_a_deep_net_that_grows_without_bound_is_named_where_it_overflows() -> None:
    layers = [nn.Sequential(nn.Linear(8, 8, bias=False), Scale(1e3)) for _ in range(40)]
    net = Net(*layers)
    for layer in layers:
        nn.init.eye_(layer[0].weight)  # type: ignore[arg-type]
    text = message(net)
    name = text.split("output is not finite is ")[1].split(" ")[0]
    largest = float(text.split("largest number in its input was ")[1].split(". ")[0])
    number = int(name.split(".")[1])
    assert name == f"parts.{number}.1" and 10 <= number <= 13  # 1e3 ** 13 is beyond float32
    assert 1e35 < largest < 3.4e38


def test_code_between_modules_is_put_down_to_the_module_around_it() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x) / 0.0)

    assert "not finite is parts.0 (Between)" in message(Net(Between()))


def test_what_training_step_computes_itself_is_named_so() -> None:
    net = Net()
    net.factor = math.nan
    assert "every module's output is finite, but not what training_step makes of it, after the module itself (Net)" in (
        message(net)
    )


def test_broken_weights_are_named() -> None:
    net = Net(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        net.parts[1].bias[3] = math.nan  # type: ignore[index, operator]
    text = message(net)
    assert "is parts.1 (Linear), because its bias is not; an earlier step has broken it" in text


class Rows(Dataset[Any]):
    def __init__(self, planted: float, at: int) -> None:
        self.x, self.y = data()
        self.x[at, 3] = planted

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        masked = torch.tensor([0.0, -math.inf])
        return {"mask": masked, "x": self.x[index], "y": self.y[index], "index": torch.tensor(100 + index)}


@pytest.mark.parametrize("planted", [math.inf, math.nan])
def test_an_input_is_named_with_its_key_its_row_and_its_sample(planted: float) -> None:
    text = message(Net(), DataLoader(Rows(planted, 10), batch_size=4))
    wanted = 'step 2, epoch 0, batch 2: the input is not finite already: batch["x"], row 2 (sample 110); check the data'
    assert wanted in text and "learning rate" not in text
    x, y = data()
    x[9, 0] = planted
    assert "batch[0], row 1; check the data" in message(Net(), DataLoader(TensorDataset(x, y), batch_size=4))


def test_what_is_random_is_found_with_the_same_random_numbers() -> None:
    for seed in range(6):
        net = Net(nn.Linear(8, 8), Scale(math.inf, chance=True))
        torch.manual_seed(seed)
        assert "not finite is parts.1 (Scale)" in message(net)


def test_what_does_not_come_again_is_said_so_and_so_is_what_raises() -> None:
    class Once(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx) * self.factor
            self.factor = 1.0
            return loss * math.nan if not hasattr(self, "again") else loss

        def on_before_backward(self, loss: Tensor) -> None:
            self.again = True

    assert "the same batch, run again, is finite, so it happens at random" in message(Once())

    class Raises(Once):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if hasattr(self, "again"):
                self.stem(batch[0])
                raise ZeroDivisionError("again")
            return super().training_step(batch, batch_idx)

    assert "running the batch again raised ZeroDivisionError('again'), after stem (Sequential)" in message(Raises())


def test_a_step_of_one_argument_and_a_dictionary_will_do() -> None:
    class Short(Net):
        def training_step(self, batch: Any) -> dict[str, Tensor]:  # type: ignore[override]
            return {"loss": super().training_step(batch, 0)}

    assert "not finite is parts.0 (Scale)" in message(Short(Scale(math.inf)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, while it compiles
def test_the_inside_of_a_compiled_module_is_seen_without_compiling_anew() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    net, x = Net(nn.Linear(8, 8), Scale(math.inf)), torch.randn(4, 6)
    net.parts.compile(backend=backend)
    net(x)
    compiled = len(graphs)
    calls, _ = trace(net, lambda: net(x))
    assert compiled and len(graphs) == compiled
    assert next(call.name for call in calls if not call.output_finite) == "parts.1"


def test_the_weights_are_those_before_the_step_and_nothing_is_logged_twice() -> None:
    class Late(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.factor = math.nan if self.trainer.global_step == 3 else 1.0
            return super().training_step(batch, batch_idx)

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.weights = [p.detach().clone() for p in pl_module.parameters()]

    keep, net = Keep(), Late()
    with pytest.raises(NonFiniteError, match="in step 3, epoch 0, batch 3"):
        fit(StopOnNonFinite(), keep, net=net)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), keep.weights, strict=True))
    assert "log" not in vars(net)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_under_accumulation_the_very_batch_is_named(accumulate: int) -> None:
    x, y = data()
    x[16] = math.nan  # batch 4
    batches = DataLoader(TensorDataset(x, y), batch_size=4)
    step = 4 if accumulate == 1 else 1
    assert f"step {step}, epoch 0, batch 4: the input" in message(Net(), batches, accumulate_grad_batches=accumulate)


# gradients


def test_gradients_alone_are_named_in_backward_order() -> None:
    net = Net(nn.Linear(8, 8), nn.Linear(8, 8), Root(), nn.Linear(8, 8))
    text = message(net)
    assert "non-finite gradient in step 0, epoch 0, batch 0: 8 of 12 gradients are not finite" in text
    assert (
        "first in backward order that of parts.1.bias; the largest number in the input of parts.1 (Linear) was" in text
    )
    assert "an infinite slope, as sqrt and log have at 0. Lower the learning rate" in text


def test_backward_order_is_that_of_the_calls_not_of_registration() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(8))  # of the container: used first of all
            self.late, self.early = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return Root()(self.late(self.early(x + self.token)))

    assert "first in backward order that of parts.0.late.bias" in message(Net(Swapped()))


def test_the_update_does_not_happen() -> None:
    net = Net(nn.Linear(8, 8), Root())
    before = [p.detach().clone() for p in net.parameters()]
    message(net)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


class Spoil(Callback):
    """A later callback whose part of the gradient is not a number."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        pl_module.head.bias.grad[0] = math.nan


def test_what_other_callbacks_do_to_gradients_is_seen() -> None:
    with pytest.raises(
        NonFiniteError, match="1 of 6 gradients are not finite, first in backward order that of head.bias"
    ):
        fit(StopOnNonFinite(), Spoil(), net=Net())


def test_a_check_every_few_steps_sees_it_at_the_next() -> None:
    x, y = data()
    x[4] = math.nan  # batch 1
    batches = DataLoader(TensorDataset(x, y), batch_size=4)
    text = message(Net(), batches, guard=StopOnNonFinite(check_every_n_steps=3))
    assert "loss in step 3, epoch 0, batch 3" in text and "stem.0 (Linear), because its weight is not" in text


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are read one check later."""
    monkeypatch.setattr(guards, "_reads_at_once", lambda device: False)


class Steps(Callback):
    steps = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1


def test_on_a_gpu_gradients_are_read_one_step_later(like_a_gpu: None) -> None:
    class Harmless(Callback):
        """Its gradient is not a number, but no update uses it: the loss stays finite."""

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
            if trainer.global_step == 2:
                pl_module.head.bias.grad[0] = math.nan
                optimizer.param_groups[0]["params"] = []

    steps = Steps()
    with pytest.raises(
        NonFiniteError, match="gradient in step 2, epoch 0, batch 2: 1 of 6 gradients .* that of head.bias"
    ):
        fit(StopOnNonFinite(), Harmless(), steps, net=Net())
    assert steps.steps == 3


def test_on_a_gpu_broken_weights_are_not_saved(like_a_gpu: None) -> None:
    options: dict[str, Any] = {"net": Net(nn.Linear(8, 8), Root()), "enable_checkpointing": True}
    with pytest.raises(NonFiniteError, match="gradient in step 0, epoch 0, batch 0: 6 of 8 gradients"):
        fit(StopOnNonFinite(), ModelCheckpoint("here", every_n_train_steps=1), **options)
    assert not list(Path("here").glob("*"))
    with pytest.raises(NonFiniteError, match="gradient in step 0, epoch 0, batch 0: "):  # the last step of all
        fit(StopOnNonFinite(), net=Net(nn.Linear(8, 8), Root()), limit_train_batches=1)


# float16


def float16(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


FUSED = partial(AdamW, lr=0.001, fused=True)


def test_steps_that_a_scaler_skips_do_not_stop_the_run() -> None:
    guard = StopOnNonFinite()
    fit(guard, net=Net(build=FUSED), plugins=[float16(2.0**22)])
    assert guard.skipped == 0
    fit(guard, net=Net(build=FUSED), plugins=[float16(2.0**60)])
    assert guard.skipped == 8


def test_too_many_skipped_steps_in_a_row_do_and_so_does_a_vanished_scale() -> None:
    text = message(Net(build=FUSED), guard=StopOnNonFinite(patience=3), plugins=[float16(2.0**60)])
    assert "gradient in step 3, epoch 0, batch 3, loss scale 1.44115e+17, 4 skipped steps in a row: " in text
    assert text.endswith("clip gradients, or take bf16-mixed instead of float16")
    text = message(Net(nn.Linear(8, 8), Root(), build=FUSED), plugins=[float16(4.0)])
    assert "gradient in step 3, epoch 0, batch 3, loss scale 0.5, 4 skipped steps in a row: " in text


def test_a_loss_that_is_not_finite_stops_at_once_under_a_scaler() -> None:
    text = message(Net(nn.Linear(8, 8), Scale(1e6), build=FUSED), plugins=[float16(4.0)])
    assert "loss in step 0, epoch 0, batch 0, loss scale 4, 0 skipped steps in a row: " in text
    assert "parts.1 (Scale)" in text


def test_skipped_steps_are_counted_over_a_resume() -> None:
    first = trainer(StopOnNonFinite(patience=10), epochs=1, plugins=[float16(2.0**60)])
    first.fit(Net(build=FUSED), loader())
    first.save_checkpoint("half.ckpt")
    resumed = trainer(StopOnNonFinite(patience=10), epochs=2, plugins=[float16(2.0**60)])
    with pytest.raises(NonFiniteError, match="step 10, .* 11 skipped steps in a row"):
        resumed.fit(Net(build=FUSED), loader(), ckpt_path="half.ckpt", weights_only=True)


# what it leaves alone


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}])
def test_a_sound_run_is_the_same_bit_for_bit(options: dict[str, Any]) -> None:
    torch.manual_seed(5)
    plain = fit(net=Net(build=FUSED), **options)
    torch.manual_seed(5)
    guarded = fit(StopOnNonFinite(), net=Net(build=FUSED), **options)
    pairs = zip(plain.state_dict().values(), guarded.state_dict().values(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.slow
def test_one_instance_serves_two_fits() -> None:
    guard = StopOnNonFinite(patience=10)
    for _ in range(2):  # eight skipped steps each
        fit(guard, net=Net(build=FUSED), plugins=[float16(2.0**60)])
    message(Net(Scale(math.nan)), guard=guard)
    assert all(p.isfinite().all() for p in fit(guard, net=Net()).parameters())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="expected check_every_n_steps of 1 or more .* received 0 and 20"):
        StopOnNonFinite(0)
    net = Net()
    net.automatic_optimization = False
    with pytest.raises(
        ValueError, match="StopOnNonFinite runs a batch again, which manual optimisation would train on"
    ):
        fit(StopOnNonFinite(), net=net)


# two ranks


class Tells(StopOnNonFinite):
    """Writes down what it raises, and waits for the other rank, which the first one's end would kill."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def _stop(self, trainer: Trainer, *found: Any) -> None:
        try:
            super()._stop(trainer, *found)
        except NonFiniteError as error:
            (self.folder / f"{trainer.global_rank}.txt").write_text(str(error))
            other = self.folder / f"{1 - trainer.global_rank}.txt"
            for _ in range(500):
                if not other.exists():
                    time.sleep(0.01)
            raise


class OneRank(Scale):
    """Goes wrong on the second rank alone, in step 2."""

    def forward(self, x: Tensor) -> Tensor:
        wrong = torch.distributed.get_rank() == 1 and self.seen >= 2
        self.seen += self.training
        return super().forward(x) if wrong else x

    seen = 0


@pytest.mark.parametrize("sync_batchnorm", [False, True])
def test_both_ranks_stop_when_one_goes_wrong_and_tell_the_same(tmp_path: Path, sync_batchnorm: bool) -> None:
    net = Net(nn.Linear(8, 8), OneRank(math.nan), nn.BatchNorm1d(8) if sync_batchnorm else nn.ReLU())
    if sync_batchnorm:
        for name, module in list(net.named_modules()):
            if isinstance(module, nn.BatchNorm1d):
                parent, _, child = name.rpartition(".")
                setattr(net.get_submodule(parent), child, Together(8))
    with pytest.raises(Exception, match="non-finite loss in step 2"):
        fit(
            Tells(tmp_path),
            net=net,
            devices=2,
            strategy="ddp_fork",
            use_distributed_sampler=False,
        )
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1]
    assert "non-finite loss in step 2, epoch 0, batch 2, rank 1: " in texts[0]
    assert "not finite is parts.1 (OneRank)" in texts[0]


class Together(nn.BatchNorm1d):
    """A layer that talks to the other ranks in its forward pass, as SyncBatchNorm does on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.detach().sum()
        torch.distributed.all_reduce(total)
        return super().forward(x) + 0 * total


def test_both_ranks_stop_on_a_gradient_of_one(tmp_path: Path) -> None:
    class RootOnOne(Root):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if torch.distributed.get_rank() == 1 else x

    with pytest.raises(Exception, match="non-finite gradient in step 0"):
        fit(
            Tells(tmp_path),
            net=Net(nn.Linear(8, 8), RootOnOne()),
            devices=2,
            strategy="ddp_fork",
            use_distributed_sampler=False,
        )
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert all("first in backward order that of parts.0.bias" in text for text in texts)


def test_between_full_checks_small_tensors_stand_for_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "SMALL", 8)  # biases and norms alone

    class From(Root):
        """An infinite slope from a step on."""

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return super().forward(x) if self.seen > 3 else x

        seen = 0

    assert "gradient in step 3, epoch 0, batch 3: 6 of 8 gradients" in message(Net(nn.Linear(8, 8), From()))

    class SpoilLarge(Callback):
        def __init__(self, at: int) -> None:
            self.at = at

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
            if trainer.global_step == self.at:
                pl_module.head.weight.grad[0] = math.nan

    for at, text in (
        (0, "gradient in step 0, .* 1 of 6 gradients are not finite, first in backward order that of head.weight"),
        (3, r"loss in step 4, .* is head \(Linear\), because its weight is not; an earlier step has broken it"),
        (10, "gradient in step 10, .* that of head.weight"),
    ):
        with pytest.raises(NonFiniteError, match=text):
            fit(StopOnNonFinite(), SpoilLarge(at), net=Net(), epochs=2)


def test_the_first_gradient_is_looked_at_however_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "SMALL", 0)

    class SpoilFirst(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
            if trainer.global_step == 1:
                pl_module.stem[0].weight.grad[0] = math.nan

    with pytest.raises(NonFiniteError, match="gradient in step 1"):
        fit(StopOnNonFinite(), SpoilFirst(), net=Net())
