"""Stop a run whose loss or gradients are infinite or NaN, and say where that begins."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

SMALL = 2**14  # elements of a tensor that costs next to nothing to check
ALL_EVERY = 10  # checks


class NonFiniteError(RuntimeError):
    """A loss, gradient, weight or input is infinite or not a number; the message says where and what to do."""


class Call(NamedTuple):
    """One call of a module's forward."""

    name: str
    module: nn.Module
    began: int
    inputs_finite: bool
    output_finite: bool
    largest_input: float

    def __str__(self) -> str:
        return f"{self.name or 'the module itself'} ({type(self.module).__name__})"


class Finding(NamedTuple):
    """What one rank has found, and how early in the step: the earliest of all ranks is reported."""

    position: int
    text: str


def sums(tensors: list[Tensor]) -> Tensor:
    """One number per tensor `(tensors,)`, finite if and only if all of the tensor is, in one cheap pass."""
    dense = [t._values() if t.is_sparse else t for t in tensors]
    if dense and dense[0].is_cuda:
        return torch.stack(torch._foreach_norm(dense, 1, dtype=torch.float32))  # one kernel for many tensors
    return torch.stack([t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in dense])


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in nested dictionaries, lists and tuples, with the path to each: `["image"][0]`."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value.detach()
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from tensors_in(item, f"{path}[{key!r}]".replace("'", '"'))


def is_finite(value: Any) -> bool:
    """Whether all tensors in nested dictionaries, lists and tuples are."""
    return all(bool(t.isfinite().all()) for _, t in tensors_in(value))


def trace(module: nn.Module, run: Callable[[], Any]) -> tuple[list[Call], Any]:
    """Calls `run` and records the calls of the module and all its submodules; buffers are restored.

    Returns:
        Calls in the order in which they ended, and what `run` returned, or the exception that ended it.
    """
    calls: list[Call] = []
    inside: list[tuple[int, bool, float]] = []
    buffers = {buffer: buffer.clone() for buffer in module.buffers()}

    def enter(part: nn.Module, args: Any, kwargs: Any) -> None:  # at the end, an in-place module has changed its input
        largest = [float(t.abs().max()) for _, t in tensors_in((args, kwargs)) if t.numel()]
        inside.append((len(calls) + len(inside), is_finite((args, kwargs)), max(largest, default=math.nan)))

    def leave(name: str, part: nn.Module, output: Any) -> None:
        began, finite, largest = inside.pop()
        calls.append(Call(name, part, began, finite, is_finite(output), largest))

    hooks: list[Any] = []
    for name, part in module.named_modules():
        hooks.append(part.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(part.register_forward_hook(lambda part, args, output, name=name: leave(name, part, output)))
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would not see the hooks
            result = run()
    except Exception as error:
        result = error
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)
    return calls, result


def find_in_batch(batch: Any) -> Finding | None:
    """The first entry of a batch that is NaN or +inf; -inf is usual in masks."""
    for path, tensor in tensors_in(batch):
        bad = tensor.isnan() | (tensor == math.inf)
        if bool(bad.any()):
            where = f"batch{path}"
            if tensor.ndim:
                row = int(bad.nonzero()[0, 0])
                index = batch.get("index") if isinstance(batch, Mapping) else None
                sample = f" (sample {index[row]})" if index is not None and len(index) == len(tensor) else ""
                where += f", row {row}{sample}"
            return Finding(-1, f"the input is not finite already: {where}; check the data and what prepares it")
    return None


def find_in_forward(calls: list[Call], loss: Any) -> Finding | None:
    """The first module with finite inputs and a non-finite output, or what comes nearest to it."""
    culprit = next((c for c in calls if c.inputs_finite and not c.output_finite), None)
    culprit = culprit or next((c for c in calls if not c.output_finite), None)
    if culprit is None:
        after = f", after {calls[-1]}" if calls else ""
        if isinstance(loss, Exception):
            return Finding(len(calls), f"running the batch again raised {loss!r}{after}")
        text = f"every module's output is finite, but not what training_step makes of it{after}"
        return None if is_finite(loss) else Finding(len(calls), text)
    own = [*culprit.module.named_parameters(recurse=False), *culprit.module.named_buffers(recurse=False)]
    broken = [f", because its {name} is not; an earlier step has broken it" for name, t in own if not is_finite(t)]
    text = f"the first module whose output is not finite is {culprit}{''.join(broken[:1])}"
    return Finding(calls.index(culprit), f"{text}; the largest number in its input was {culprit.largest_input:.3g}")


def find_in_gradients(calls: list[Call], finite: Mapping[str, bool]) -> Finding | None:
    """The first parameter in backward order whose gradient is not finite; `finite` is in order of registration."""
    order, bad = list(finite), [name for name in finite if not finite[name]]
    if not bad:
        return None
    last = {call.name: call for call in calls}
    began = {name: call.began for name, call in last.items()}  # a container begins before its parts
    first = max(bad, key=lambda name: (began.get(name.rpartition(".")[0], -1), order.index(name)))
    text = f"{len(bad)} of {len(order)} gradients are not finite, first in backward order that of {first}"
    call = last.get(first.rpartition(".")[0])
    if call is not None and call.inputs_finite:
        text += f"; the largest number in the input of {call} was {call.largest_input:.3g}"
    return Finding(0, text + ". Something after it may have an infinite slope, as sqrt and log have at 0")


class StopOnNonFinite(Callback):
    """Stops the run when the loss or a gradient is infinite or NaN, and names the first module where that begins.

    A check reads the loss and the gradients: on a GPU all, on a CPU those of small tensors, such as biases and norms,
    which any failure of a backward pass reaches, and every tenth time all. Only after a finding is the batch run
    forward again, with hooks on every module, in the same mode and with the same random numbers; BatchNorm's
    statistics are restored. The error names the step, the module, the largest number in its input and what to do; or
    the entry of the batch and its row; or the first parameter, in backward order, with such a gradient.

    On a CPU the run stops before the update. On a GPU nothing waits: the loss is read after its forward pass, also
    before the update; gradients are read in the next step, after the update, but before a checkpoint could save it.
    All ranks stop in the same step: two numbers are reduced per check, some 0.1 ms each, and the ranks run the batch
    again together.

    Under a float16 scaler infinite gradients are usual and such steps are skipped. There it takes more than `patience`
    checks in a row, or a scale below 1; a loss that is not finite stops at once.

    Runs on: start of batches, on_before_backward, on_after_backward, on_before_optimizer_step, after all others.
    Touches: nothing but its place in `trainer.callbacks`.

    Args:
        check_every_n_steps: Optimiser steps from one check to the next. In between, weights may break unseen, and then
            the first module says little.
        patience: Skipped steps in a row that still count as the scaler's search.

    Raises:
        NonFiniteError: A RuntimeError, when it happens.
        ValueError: Manual optimisation, or an argument out of range.

    Example:
        >>> Trainer(callbacks=[StopOnNonFinite()]).fit(model, data)
    """

    def __init__(self, check_every_n_steps: int = 1, patience: int = 20) -> None:
        if check_every_n_steps < 1 or patience < 0:
            raise ValueError(
                f"expected check_every_n_steps of 1 or more and patience of 0 or more, received {check_every_n_steps} "
                f"and {patience}"
            )
        self.check_every_n_steps, self.patience = check_every_n_steps, patience
        self.skipped = 0
        self._let_go()

    def _let_go(self) -> None:
        self._parameters: list[tuple[str, nn.Parameter]] = []
        self._batch: tuple[Any, int] | None = None
        self._random: tuple[Tensor, Tensor | None] | None = None
        self._loss: _Reading | None = None
        self._gradients: tuple[str, list[str], _Reading] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the previous fit; move behind all but checkpoints, in a new list: this one is being iterated."""
        if stage == "fit":
            self.skipped = 0
            self._let_go()
            others = [other for other in trainer.callbacks if other is not self]  # type: ignore[attr-defined]
            last = [other for other in others if _is(other, "Checkpoint")]
            trainer.callbacks = [*(o for o in others if o not in last), self, *last]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse manual optimisation; find the parameters: walking the modules costs more than a check."""
        if not pl_module.automatic_optimization:
            raise ValueError("StopOnNonFinite runs a batch again, which manual optimisation would train on; remove it")
        self._parameters = list(pl_module.named_parameters())

    def _checks(self, trainer: Trainer) -> bool:
        return trainer.global_step % self.check_every_n_steps == 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, and the random state that its forward pass begins with."""
        if self._checks(trainer):
            self._batch, device = (batch, batch_idx), pl_module.device
            self._random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check whether the loss is finite, on all ranks."""
        if self._checks(trainer):
            self._loss = _Reading(trainer, loss.detach())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the result: on a GPU the forward pass is over, while the backward pass may still run."""
        reading, self._loss = self._loss, None
        if reading is not None and reading.bad() and self._batch is not None:
            calls, loss = self._again(trainer, pl_module)  # on all ranks, since they may talk to each other in it
            finding = find_in_batch(self._batch[0]) or find_in_forward(calls, loss)
            self._stop(trainer, f"loss in {self._where(trainer)}", finding)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The same for the gradients; on a GPU the result is read in the next step."""
        self._settle(trainer, pl_module)
        if self._checks(trainer) and (gradients := self._present()):
            at_once = _reads_at_once(pl_module.device)
            if at_once and (trainer.global_step // self.check_every_n_steps) % ALL_EVERY:
                first = next(iter(gradients))
                gradients = {name: g for name, g in gradients.items() if name == first or g.numel() <= SMALL}
            reading = _Reading(trainer, sums(list(gradients.values())))
            self._gradients = self._where(trainer), list(gradients), reading
            if at_once:
                self._settle(trainer, pl_module)

    def _present(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self._parameters if p.requires_grad and p.grad is not None}

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._gradients is None:
            return
        (where, names, reading), self._gradients = self._gradients, None
        bad, values = reading.bad(), reading.values
        self.skipped = self.skipped + 1 if bad else 0
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        searches = scaler is not None and scaler.is_enabled() and self.skipped <= self.patience
        if not bad or (searches and scaler.get_scale() >= 1.0):  # type: ignore[union-attr]
            return
        if _reads_at_once(pl_module.device):  # all gradients are still there
            names, values = list(self._present()), sums(list(self._present().values()))
        finite = dict(zip(names, values.isfinite().tolist(), strict=True))
        self._stop(trainer, f"gradient in {where}", find_in_gradients(self._again(trainer, pl_module)[0], finite))

    def on_train_batch_end(self, *_: Any) -> None:
        """Let go of the batch."""
        self._batch = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop rather than save broken weights."""
        self._settle(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the last result."""
        self._settle(trainer, pl_module)
        self._let_go()

    def on_exception(self, *_: Any) -> None:
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """How many checks in a row have found a step that the scaler skips."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def _again(self, trainer: Trainer, pl_module: LightningModule) -> tuple[list[Call], Any]:
        """The training step of the kept batch once more, without logging."""
        if self._batch is None or self._random is None:
            return [], None
        step, (cpu, cuda) = pl_module.training_step, self._random
        arguments = self._batch[: max(len(inspect.signature(step).parameters), 1)]
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, pl_module.device)
        quiet = dict.fromkeys(("log", "log_dict"), lambda *_, **__: None)
        vars(pl_module).update(quiet)
        try:
            with trainer.precision_plugin.train_step_context():
                return trace(pl_module, lambda: step(*arguments))
        finally:
            for name in quiet:
                del vars(pl_module)[name]

    def _where(self, trainer: Trainer) -> str:
        batch = f", batch {self._batch[1]}" if self._batch else ""
        return f"step {trainer.global_step}, epoch {trainer.current_epoch}{batch}"

    def _stop(self, trainer: Trainer, what: str, finding: Finding | None) -> None:
        findings = [finding]
        if trainer.world_size > 1:
            findings = [None] * trainer.world_size
            torch.distributed.all_gather_object(findings, finding)
        found = [(f.position, rank, f.text) for rank, f in enumerate(findings) if f is not None]
        chance = "the same batch, run again, is finite, so it happens at random"
        position, rank, text = min(found, default=(0, 0, chance))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = f", loss scale {scaler.get_scale():g}, {self.skipped} skipped steps in a row" if scaler else ""
        loser = f", rank {rank}" if trainer.world_size > 1 and what.startswith("loss") else ""  # gradients are all one
        message = f"non-finite {what}{loser}{scale}: {text}"
        if position >= 0:
            message += ". Lower the learning rate, warm it up or clip gradients"
            message += ", or take bf16-mixed instead of float16" if scaler else ""
        raise NonFiniteError(message)


class _Reading:
    """Whether any value is not finite on any rank; a GPU is not waited for until `bad` is called."""

    def __init__(self, trainer: Trainer, values: Tensor) -> None:
        self.values = values
        self.flag = values.isfinite().all().logical_not().float()
        self.done = None
        if trainer.world_size > 1:
            torch.distributed.all_reduce(self.flag, torch.distributed.ReduceOp.MAX)
        if self.flag.is_cuda:
            self.flag = torch.empty((), pin_memory=True).copy_(self.flag, non_blocking=True)
            self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.done.record()

    def bad(self) -> bool:
        """Wait for the result."""
        if self.done is not None:
            self.done.synchronize()
        return bool(self.flag)


def _reads_at_once(device: torch.device) -> bool:
    return device.type != "cuda"


def _is(thing: Any, *names: str) -> bool:
    """Whether it is of one of these classes or derived from one, in lightning or in pytorch_lightning."""
    return any(kind.__name__ in names for kind in thing.__class__.__mro__)
