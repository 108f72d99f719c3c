from __future__ import annotations

import copy
import logging
import math
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from callbacks.ewc.callback import EWC
from callbacks.ewc.fisher import fisher_diagonal
from callbacks.ewc.memory import Memory, load_memory, save_memory
from callbacks.ewc.penalty import penalty
from tests.callbacks.ewc.conftest import (
    QUIET,
    Net,
    Noisy,
    fit,
    largest_difference,
    learnt,
    loader,
    still,
    task,
    weights,
)


@pytest.mark.parametrize("mode", ["proximal", "gradient"])
def test_another_trainer_goes_on_from_the_file_and_the_penalty_is_not_zero(mode: Any) -> None:
    model, path = learnt()
    start, free = weights(model), copy.deepcopy(model)
    values: list[float] = []

    class Read(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            values.append(float(trainer.callback_metrics["ewc/penalty"]))
            memory = ewc.active
            assert memory is not None and float(trainer.callback_metrics["ewc/ratio"]) == pytest.approx(
                values[-1] / float(args[1]["loss"]), rel=1e-5
            )

    ewc = EWC(strength=50.0, mode=mode, load=path)
    fit(model, 1, ewc, Read())
    fit(free, 1)
    assert values[0] == 0 and min(values[1:]) > 0
    memory = load_memory(path)
    moved, moved_freely = (float(penalty(weights(net), start, memory.fisher, 1.0)) for net in (model, free))
    assert 0 < moved < 0.5 * moved_freely


def manual(
    model: Net, ewc: Callable[[dict[str, nn.Parameter], float], None], when: str, steps: int = 12
) -> dict[str, Tensor]:
    """The same training by hand."""
    model = copy.deepcopy(model).train()
    optimizer = model.configure_optimizers()
    batches = list(loader(1))
    for step in range(steps):
        loss = model.training_step(batches[step % len(batches)], 0)
        optimizer.zero_grad()
        loss.backward()
        for at in ("gradient", "update"):
            if at == "update":
                optimizer.step()
            if at == when:
                ewc(dict(model.named_parameters()), 0.1)
    return weights(model)


def test_gradient_mode_is_the_penalty_everyone_writes() -> None:
    model, path = learnt()
    memory, start = load_memory(path), copy.deepcopy(model)

    def add(parameters: dict[str, nn.Parameter], lr: float) -> None:
        penalty(parameters, memory.anchor, memory.fisher, 20.0).backward()

    fit(model, 1, EWC(20.0, "gradient", load=path))
    for name, t in manual(start, add, "gradient").items():
        torch.testing.assert_close(model.get_parameter(name).detach(), t, rtol=1e-4, atol=1e-6)


def test_proximal_mode_follows_the_learning_rate_of_each_group() -> None:
    model, path = learnt()
    memory, start = load_memory(path), copy.deepcopy(model)

    def pull(parameters: dict[str, nn.Parameter], lr: float) -> None:
        with torch.no_grad():
            for name, p in parameters.items():
                c = 20.0 * (lr if name.startswith("head") else lr / 2)
                p.copy_((p + c * memory.fisher[name] * memory.anchor[name]) / (1 + c * memory.fisher[name]))

    fit(model, 1, EWC(20.0, load=path))
    for name, t in manual(start, pull, "update").items():
        torch.testing.assert_close(model.get_parameter(name).detach(), t, rtol=1e-4, atol=1e-6)


class Ramp(Callback):
    """As a warm-up does: scales learning rates before the update, restores them before others' hooks run after it."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def scale(optimizer: Any, *args: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] *= 0.25

        def restore(optimizer: Any, *args: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] /= 0.25

        trainer.optimizers[0].register_step_pre_hook(scale)
        trainer.optimizers[0].register_step_post_hook(restore)


def test_a_warm_up_counts_in_the_proximal_step() -> None:
    model, path = learnt()
    slow, ramped = copy.deepcopy(model), copy.deepcopy(model)
    slow.lr = 0.025
    fit(slow, 1, EWC(100.0, load=path))
    fit(ramped, 1, Ramp(), EWC(100.0, load=path))
    assert all(torch.equal(t, weights(slow)[name]) for name, t in weights(ramped).items())


def test_proximal_survives_a_strength_at_which_gradient_explodes() -> None:
    model, path = learnt()
    exploding = copy.deepcopy(model)
    start = weights(model)
    fit(model, 1, EWC(1e12, load=path))
    memory = load_memory(path)
    held = weights(model)
    far = max(float(((held[n] - start[n]).abs() * (memory.fisher[n] > 1e-6)).max()) for n in held)
    assert far < 1e-3
    with pytest.warns(UserWarning, match=r"lr \* strength \* F reaches .*e\+.* diverges above 2. Use mode proximal"):
        fit(exploding, 1, EWC(1e12, "gradient", load=path))
    gone = weights(exploding)
    assert (
        not all(torch.isfinite(t).all() for t in gone.values())
        or max(float(t.abs().max()) for t in gone.values()) > 1e6
    )


def test_no_warning_where_gradient_mode_is_stable(recwarn: pytest.WarningsRecorder) -> None:
    model, path = learnt()
    fit(model, 1, EWC(1.0, "gradient", load=path))
    assert not [w for w in recwarn if "diverges" in str(w.message)]


def test_penalty_is_added_once_under_accumulation_and_in_a_short_last_window() -> None:
    model, path = learnt()
    memory = load_memory(path)
    added: list[Tensor] = []

    class Spy(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            added.append(pl_module.body[0].weight.grad.clone())

    class Gradients(Spy):
        state_key = "before"

    with torch.no_grad():
        model.body[0].weight += 0.1
    fit(model, 1, Gradients(), EWC(50.0, "gradient", load=path), Spy(), accumulate_grad_batches=3, max_epochs=1)
    assert len(added) == 4  # two steps: three batches, and the one that is left
    expected = 50 * memory.fisher["body.0.weight"] * 0.1
    torch.testing.assert_close(added[1] - added[0], expected, rtol=1e-3, atol=1e-6)
    assert (added[3] - added[2]).norm() > 0.1 * expected.norm()


def test_the_ratio_is_to_the_whole_loss_under_accumulation() -> None:
    model, path = learnt()
    ratios: list[tuple[float, float]] = []

    class Read(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 3:
                metrics = trainer.callback_metrics
                ratios.append((float(metrics["ewc/ratio"]), float(metrics["ewc/penalty"] / (2 * outputs["loss"]))))

    fit(model, 1, EWC(10.0, load=path), Read(), accumulate_grad_batches=2, max_epochs=2)
    assert ratios[1][0] == pytest.approx(ratios[1][1], rel=1e-5) != 0


def test_clipping_counts_the_penalty() -> None:
    model, path = learnt()
    with torch.no_grad():
        model.body[0].weight += 1.0
    norms: list[float] = []

    class Spy(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            grads = [p.grad.norm() for p in pl_module.parameters()]
            norms.append(float(torch.stack(grads).norm()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, 1, EWC(1e4, "gradient", load=path), Spy(), gradient_clip_val=0.5, max_epochs=1)
    assert norms == pytest.approx([0.5] * len(norms), rel=1e-3)


@pytest.mark.parametrize("mode", ["proximal", "gradient"])
def test_a_fused_optimiser_under_a_scaler_sees_true_gradients(mode: Any) -> None:
    model, path = learnt()
    model.optimizer = lambda groups: torch.optim.SGD(groups, lr=0.1, fused=True)
    scaled = copy.deepcopy(model)
    fit(model, 1, EWC(20.0, mode, load=path))
    fit(scaled, 1, EWC(20.0, mode, load=path), plugins=[MixedPrecision("16-mixed", "cpu")])
    for name, t in weights(model).items():
        torch.testing.assert_close(scaled.get_parameter(name).detach(), t, rtol=0.02, atol=2e-3)


def test_a_step_that_the_scaler_skips_pulls_nothing() -> None:
    model, path = learnt()
    with torch.no_grad():
        model.body[0].weight += 0.5
    before = weights(model)

    class Overflow(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.head.weight.grad.fill_(math.inf)

    fit(model, 1, EWC(1e4, load=path), Overflow(), plugins=[MixedPrecision("16-mixed", "cpu")])
    assert all(torch.equal(t, before[name]) for name, t in weights(model).items())


def test_fisher_is_taken_in_float32_under_bf16_mixed() -> None:
    torch.manual_seed(5)
    model = Net(dropout=0.5)
    fit(model, 0, EWC(save="a.safetensors"), precision="bf16-mixed")
    expected, _ = fisher_diagonal(model, [task(0).tensors[0]], dict(model.named_parameters()), module=model)
    assert largest_difference(load_memory(Path("a.safetensors")).fisher, expected) < 1e-5


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precisions(precision: Any) -> None:
    torch.manual_seed(5)
    model = Net()
    ewc = EWC(1e3, samples=32)
    fit(model, 0, ewc, precision=precision)
    fit(model, 1, ewc, precision=precision)
    assert ewc.memory is not None and len(ewc.memory.tasks) == 2
    assert {t.dtype for t in ewc.memory.fisher.values()} <= {torch.float32, torch.float64}


def test_exclude_leaves_a_head_of_other_classes_free() -> None:
    _, path = learnt(exclude=["^head"])
    assert {name.split(".")[0] for name in load_memory(path).fisher} == {"body"}
    _, whole = learnt("whole.safetensors")
    model = Net(classes=5)
    trainer = Trainer(**QUIET, max_epochs=1)
    for source, exclude in ((path, ()), (whole, ["^head"])):
        ewc = EWC(load=source, exclude=exclude)
        trainer = Trainer(**QUIET, max_epochs=1, callbacks=[ewc])
        trainer.fit(model, DataLoader(task(1, classes=5), 16))
        assert ewc.active is not None and not any("head" in name for name in ewc.active.fisher)
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[EWC(load=whole)])
    with pytest.raises(
        ValueError, match=r"head.bias has shape \(5,\) in Net and \(3,\) in the Fisher.*exclude: \['\^head'\]"
    ):
        trainer.fit(model, DataLoader(task(1, classes=5), 16))
    assert trainer.global_step == 0


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="exclude: '\\^haed' matches no parameter"):
        fit(Net(), 0, EWC(exclude=["^haed"]))
    with pytest.raises(ValueError, match="leaves nothing of the Fisher to hold"):
        fit(Net(), 0, EWC(load=learnt()[1], exclude=["."]))


def test_a_fisher_of_other_names_is_refused() -> None:
    _, path = learnt()
    memory = load_memory(path)
    for table in (memory.fisher, memory.anchor):
        table["body.0.wieght"] = table.pop("body.0.weight")
    save_memory(path, memory)
    with pytest.raises(ValueError, match="Fisher has 'body.0.wieght', which Net lacks; did you mean 'body.0.weight'"):
        fit(Net(), 1, EWC(load=path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strength": -1.0}, "strength must be a number of at least 0; received -1.0"),
        ({"strength": math.nan}, "strength must be"),
        ({"mode": "implicit"}, "mode must be proximal or gradient; received 'implicit'"),
        ({"samples": 0}, "samples must be 1 or more"),
        ({"estimator": "true"}, "estimator must be one of auto, exact, signs, empirical; received 'true'"),
        ({"draws": 0}, "draws must be 1 or more"),
        ({"online_decay": 1.5}, "online_decay must be above 0 and at most 1; received 1.5"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EWC(**arguments)


def test_an_old_configs_estimator_is_taken_as_signs() -> None:
    with pytest.warns(UserWarning, match="estimator 'sampled' is no longer there; 'signs' takes its place"):
        assert EWC(estimator="sampled", draws=2).estimator == "signs"


def test_three_tasks_in_one_process_with_separate_anchors() -> None:
    torch.manual_seed(0)
    model, ewc = Net(), EWC(10.0)
    fit(model, 0, ewc)
    first = copy.deepcopy(ewc.memory)
    fit(model, 1, ewc)
    second_anchor = weights(model)
    second_fisher, _ = fisher_diagonal(model, [task(1).tensors[0]], dict(model.named_parameters()), module=model)
    assert first is not None and ewc.memory is not None
    fit(model, 2, ewc)
    held = ewc.active
    assert held is not None and [t["name"] for t in held.tasks] == ["task 1", "task 2"]
    elsewhere = {name: torch.randn_like(t) for name, t in second_anchor.items()}
    expected = penalty(elsewhere, first.anchor, first.fisher, 1.0) + penalty(
        elsewhere, second_anchor, second_fisher, 1.0
    )
    found = penalty(elsewhere, held.anchor, held.fisher, 1.0) + held.constant / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert ewc.memory is not None and len(ewc.memory.tasks) == 3
    assert load_memory(Path("fisher.safetensors")).tasks == ewc.memory.tasks


def test_online_keeps_one_running_fisher_at_the_newest_anchor() -> None:
    model, ewc = Net(), EWC(10.0, online_decay=0.5)
    fit(model, 0, ewc)
    assert ewc.memory is not None
    first = copy.deepcopy(ewc.memory.fisher)
    fit(model, 1, ewc)
    second, _ = fisher_diagonal(model, [task(1).tensors[0]], dict(model.named_parameters()), module=model)
    for name, t in weights(model).items():
        torch.testing.assert_close(ewc.memory.fisher[name], 0.5 * first[name] + second[name], rtol=1e-4, atol=1e-9)
        assert torch.equal(ewc.memory.anchor[name], t)


def test_files_of_independent_tasks_add_up_and_the_same_task_twice_is_refused() -> None:
    _, a = learnt("a.safetensors", task="a")
    torch.manual_seed(9)
    other = Net()
    fit(other, 1, EWC(save="b.safetensors", task="b"))
    ewc = EWC(load=[a, "b.safetensors"])
    fit(Net(), 2, ewc)
    assert ewc.active is not None and [t["name"] for t in ewc.active.tasks] == ["a", "b"]
    one, two = load_memory(a), load_memory(Path("b.safetensors"))
    torch.testing.assert_close(ewc.active.fisher["head.bias"], one.fisher["head.bias"] + two.fisher["head.bias"])
    fit(Net(), 2, EWC(load=a, save="both.safetensors"))
    with pytest.raises(
        ValueError, match="both.safetensors holds 'a', as another of the loaded files does.*newest only"
    ):
        fit(Net(), 2, EWC(load=[a, "both.safetensors"]))


def test_normalised_fishers_have_a_mean_of_one_and_do_not_mix() -> None:
    model, path = learnt(normalise=True)
    memory = load_memory(path)
    assert float(torch.cat([t.flatten() for t in memory.fisher.values()]).mean()) == pytest.approx(1, rel=1e-5)
    raw = load_memory(learnt("raw.safetensors")[1])
    assert memory.tasks[0]["normalised"] and memory.tasks[0]["mean"] == pytest.approx(raw.tasks[0]["mean"])
    with pytest.raises(
        ValueError, match="'task 1' was taken with normalise=True, and this EWC has normalise=False; make them"
    ):
        fit(model, 1, EWC(load=path))


def test_loading_alone_takes_no_fisher_at_the_end() -> None:
    model, path = learnt()
    fit(model, 1, EWC(load=path))
    assert sorted(p.name for p in Path().glob("*.safetensors")) == ["a.safetensors"]
    fit(model, 1, EWC(load=path, consolidate=True))
    assert len(load_memory(Path("fisher.safetensors")).tasks) == 2
    fit(model, 1, EWC(consolidate=False))


def test_two_tensors_for_each_held_parameter_and_no_more() -> None:
    model, path = learnt()
    ewc = EWC(load=[path], consolidate=False)
    held: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            tensors: dict[int, Tensor] = {}

            def walk(value: Any) -> None:
                if isinstance(value, Tensor):
                    tensors[value.untyped_storage().data_ptr()] = value
                elif isinstance(value, Memory):
                    walk(vars(value))
                elif isinstance(value, dict):
                    for inner in value.values():
                        walk(inner)
                elif isinstance(value, (list, tuple)):
                    for inner in value:
                        walk(inner)

            walk(vars(ewc))
            held.append(sum(t.numel() for t in tensors.values()))

    fit(model, 1, ewc, Count())
    assert set(held) == {2 * sum(p.numel() for p in model.parameters())}


class Stop(Callback):
    """As if the run were killed at a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint("stopped.ckpt")
            trainer.should_stop = True
            trainer.limit_val_batches = 0


@pytest.mark.parametrize("mode", ["proximal", "gradient"])
@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_fit_needs_no_file_and_ends_as_the_uninterrupted_one(mode: Any, step: int) -> None:
    model, path = learnt()
    again, resumed = copy.deepcopy(model), Net()
    fit(model, 1, EWC(10.0, mode, load=path))
    fit(again, 1, EWC(10.0, mode, load=path), Stop(step))
    path.unlink()
    torch.load("stopped.ckpt", weights_only=True)
    ewc = EWC(10.0, mode, load=path)
    trainer = Trainer(**QUIET, max_epochs=3, callbacks=[ewc])
    trainer.fit(resumed, loader(1), ckpt_path="stopped.ckpt", weights_only=True)
    assert ewc.active is not None and trainer.global_step == 12
    assert all(torch.equal(t, weights(model)[name]) for name, t in weights(resumed).items())


def test_resuming_a_task_is_not_held_by_that_task() -> None:
    torch.manual_seed(5)
    model, ewc = Net(), EWC(1e6)
    trainer = fit(model, 0, ewc)
    assert ewc.memory is not None
    trainer.save_checkpoint("a.ckpt")
    longer = Trainer(**QUIET, max_epochs=5, callbacks=[ewc])
    longer.fit(Net(), loader(0), ckpt_path="a.ckpt", weights_only=True)
    assert ewc.active is None and longer.global_step == 20
    assert len(ewc.memory.tasks) == 1


def test_one_instance_serves_two_trainers_and_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = learnt()
    ewc = EWC(10.0, load=path)
    optimizers: list[Any] = []

    class Keep(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            optimizers.extend(trainer.optimizers)

    twin = copy.deepcopy(model)
    fit(model, 1, ewc, Keep())
    fit(twin, 1, ewc, Keep())
    assert all(torch.equal(t, weights(model)[name]) for name, t in weights(twin).items())

    class Fail(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("meant to fail")

    with pytest.raises(RuntimeError, match="meant to fail"):
        fit(twin, 1, ewc, Keep(), Fail())
    assert len(optimizers) == 3
    for optimizer in optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not [hook for hook in optimizer._optimizer_step_post_hooks.values() if "EWC" in repr(hook)]
    pickle.loads(pickle.dumps(ewc))


class Thaw(Callback):
    """Opens the body in the second epoch."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.body.requires_grad_(False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.body.requires_grad_(trainer.current_epoch >= 1)
        if trainer.current_epoch == 0:
            for p in pl_module.body.parameters():
                p.grad = None


@pytest.mark.parametrize("mode", ["proximal", "gradient"])
def test_frozen_blocks_are_untouched_and_held_once_they_open(mode: Any) -> None:
    model, path = learnt()
    with torch.no_grad():
        model.body[0].weight += 0.5
    seen: list[Tensor] = []

    class See(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            seen.append(pl_module.body[0].weight.detach().clone())
            assert trainer.current_epoch > 0 or pl_module.body[0].weight.grad is None

    before = model.body[0].weight.detach().clone()
    fit(model, 1, Thaw(), EWC(50.0, mode, load=path), See(), max_epochs=2)
    assert all(torch.equal(t, before) for t in seen[:4]) and not torch.equal(seen[4], before)


def test_frozen_parameters_get_no_fisher() -> None:
    model = Net()
    model.body.requires_grad_(False)
    fit(model, 0, EWC(save="a.safetensors"))
    assert set(load_memory(Path("a.safetensors")).fisher) == {"head.weight", "head.bias"}


def test_l_bfgs_is_held_by_the_proximal_step_and_its_line_search_refused() -> None:
    model, path = learnt()
    model.optimizer = lambda groups: torch.optim.LBFGS(
        [p for group in groups for p in group["params"]], lr=0.1, max_iter=3, line_search_fn="strong_wolfe"
    )
    with pytest.raises(ValueError, match="L-BFGS's line search compares losses.*mode proximal"):
        fit(copy.deepcopy(model), 1, EWC(load=path, mode="gradient"))
    free = copy.deepcopy(model)
    start = weights(model)
    fit(model, 1, EWC(1e4, load=path))
    fit(free, 1)
    far = [sum(float((t - start[name]).square().sum()) for name, t in weights(net).items()) for net in (model, free)]
    assert far[0] < 0.5 * far[1]


def test_training_is_the_same_with_and_without_taking_a_fisher() -> None:
    ends = []
    for callbacks in ([], [EWC()]):
        torch.manual_seed(5)
        random.seed(5)
        model = Net(dropout=0.3)
        Trainer(**QUIET, max_epochs=2, callbacks=callbacks).fit(model, DataLoader(Noisy(), 16, shuffle=True))
        ends.append((weights(model), float(torch.rand(())), random.random()))
    assert all(torch.equal(t, ends[1][0][name]) for name, t in ends[0][0].items())
    assert ends[0][1:] == ends[1][1:]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(task(0))


def test_what_would_fail_at_the_end_is_refused_before_the_first_step() -> None:
    class Captions(Net):
        def logits(self, batch: Any) -> Tensor:
            return self(batch[0]).unsqueeze(1)

    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[EWC()])
    with pytest.raises(ValueError, match=r"expected logits of shape \(batch, classes\).*\(2, 1, 3\)"):
        trainer.fit(Captions(), loader(0))
    assert trainer.global_step == 0

    class Detached(Net):
        def logits(self, batch: Any) -> Tensor:
            return self(batch[0]).detach()

    with pytest.raises(ValueError, match="the logits depend on no trained parameter; is there a no_grad"):
        fit(Detached(), 0, EWC())
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[EWC()])
    with pytest.raises(TypeError, match="samples of one DataLoader over a data set with a length, received DataLoader"):
        trainer.fit(Net(), DataLoader(Stream(), 16))
    assert trainer.global_step == 0

    class Unlabelled(EWC):
        def labels(self, batch: Any) -> None:
            return None

    with pytest.raises(ValueError, match="the empirical Fisher needs true labels"):
        fit(Net(), 0, Unlabelled(estimator="empirical"))


@pytest.mark.slow
def test_a_compiled_part_has_the_same_names_and_fisher() -> None:
    model, path = learnt()
    compiled = copy.deepcopy(model)
    compiled.body = torch.compile(compiled.body, backend="eager")  # type: ignore[assignment]
    ewc = EWC(load=path, consolidate=True, strength=0.0)
    plain = EWC(load=path, consolidate=True, strength=0.0)
    fit(compiled, 1, ewc)
    fit(model, 1, plain)
    assert ewc.memory is not None and plain.memory is not None
    assert largest_difference(ewc.memory.fisher, plain.memory.fisher) < 1e-4


def test_strategies_that_split_parameters_are_refused() -> None:
    trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(RuntimeError, match="EWC needs whole parameters, and FSDPStrategy splits them"):
        EWC().setup(trainer, Net(), "fit")  # type: ignore[arg-type]


def test_what_is_held_is_said(caplog: pytest.LogCaptureFixture) -> None:
    _, path = learnt()
    with caplog.at_level(logging.INFO, "callbacks.ewc"):
        fit(Net(), 1, EWC(7.0, load=path, exclude=["^head"], consolidate=True))
    assert "8 numbers" not in caplog.text
    assert (
        "EWC: 6 tensors with 416 parameters are held at task 1, proximal, strength 7; free: head.weight, head.bias"
        in caplog.text
    )
    assert "EWC: Fisher of 64 samples (exact)" in caplog.text


def test_logged_only_in_steps_that_log() -> None:
    model, path = learnt()
    steps: list[bool] = []

    class Spy(EWC):
        def on_before_optimizer_step(self, *args: Any) -> None:
            super().on_before_optimizer_step(*args)
            steps.append(self._penalty is not None)

    fit(model, 1, Spy(load=path), log_every_n_steps=3, max_epochs=2)
    assert steps == [False, False, True, False, False, True, False, False]


# Two ranks


class Ranks(Callback):
    """Writes each rank's weights."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        torch.save(weights(pl_module), f"rank{trainer.global_rank}.pt")


def two_ranks(model: LightningModule, which: int, *callbacks: Callback, **kwargs: Any) -> None:
    options = {**QUIET, "devices": 2, "strategy": "ddp_fork", "max_epochs": 2}
    Trainer(**{**options, "callbacks": list(callbacks), **kwargs}).fit(model, loader(which, 8))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["exact", "signs"])
@pytest.mark.parametrize("samples", [33, None])
def test_fisher_is_the_same_over_two_ranks(estimator: Any, samples: int | None) -> None:
    model = still()
    settings = {"samples": samples, "estimator": estimator}
    fit(copy.deepcopy(model), 0, EWC(save="one.safetensors", **settings))
    two_ranks(model, 0, EWC(save="two.safetensors", **settings))
    one, two = load_memory(Path("one.safetensors")), load_memory(Path("two.safetensors"))
    assert one.tasks[0]["samples"] == two.tasks[0]["samples"] == (samples or 64)
    assert largest_difference(two.fisher, one.fisher) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["proximal", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_ranks_stay_equal(mode: Any, accumulate: int) -> None:
    _, path = learnt()
    torch.manual_seed(6)
    two_ranks(Net(), 1, EWC(30.0, mode, load=path, consolidate=True), Ranks(), accumulate_grad_batches=accumulate)
    one, two = torch.load("rank0.pt"), torch.load("rank1.pt")
    assert all(torch.equal(t, two[name]) for name, t in one.items())
    assert len(load_memory(Path("fisher.safetensors")).tasks) == 2
