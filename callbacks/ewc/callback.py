"""Elastic weight consolidation: learn a new task while the weights that mattered to the old ones are held.

The maths lies in `penalty` and `fisher`, as functions for any loop; here is the callback.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from . import low_rank
from .fisher import NO_LABELS, Estimator, choose_estimator, fisher_diagonal
from .memory import Memory, check_fisher, load_memory, save_memory
from .messages import did_you_mean, say, some
from .penalty import add_penalty_gradient_, merge, penalty, proximal_step_
from .per_sample import check_logits, evaluating
from .samples import fisher_batches, labels_of, logits_of, preserve_state


class EWC(Callback):
    """Holds the weights that mattered to earlier tasks while a new one is learnt.

    At the end of a fit the diagonal Fisher information of its task is taken, with the weights of the last step, and
    kept with these weights, the anchor. In later fits the penalty

        strength / 2 * sum F (theta - theta*)^2

    pulls the weights back: in the mode `proximal` by an implicit step after each update of the optimiser, which
    diverges at no strength; in the mode `gradient` by its gradient, once per optimiser step and before clipping,
    which diverges where lr * strength * F exceeds 2 (a warning says so). Both follow each group's learning rate as it
    is, warm-up included, leave frozen parameters alone and are the same on all ranks.

    One instance serves a sequence of fits in one process. Between processes, `save` writes the Fisher and `load`
    reads it; the data of the old task is not needed. Several tasks cost what one costs: the sum of their penalties is
    one quadratic, which a file holds, so the next fit loads the newest file only. A resumed fit needs no file: its
    checkpoint has everything. Not held: buffers, such as BatchNorm's statistics; parameters that were frozen when the
    Fisher was taken; those that `exclude` names, such as a head whose classes change.

    The Fisher is taken over a subset of the training samples: of `trainer.datamodule.fisher_dataloader()` where it
    exists (a DataLoader with the transforms of evaluation: all samples on every rank, not shuffled), else of the
    training loader's data set, with its transforms, whose random numbers are fixed per sample; batch transfer hooks
    run as in validation. It is the same for every batch size and number of ranks. A first batch is tried before
    training, so that a model whose logits cannot be found is refused in time; `logits` and `labels` may be overridden.

    Runs on: fit (start, before optimiser steps or after them, end of batch and of training). Touches: gradients or
    weights, `ewc/penalty` and `ewc/ratio` (penalty to loss) in steps that log, one file.

    Args:
        strength: Weight of the penalty. In the mode `proximal` 1e3 to 1e6 is worth a try with SGD; Adam's steps do not
            shrink with their gradient and need far more.
        mode: `proximal` or `gradient`.
        load: Files to start from, each of other tasks.
        save: Where to write the Fisher; `fisher.safetensors` in the trainer's log folder if not given.
        consolidate: Whether to take the Fisher at the end. If not given: unless files are loaded and none is saved.
        samples: Training samples to take the Fisher of, each class by its share; None for all.
        estimator: See `fisher_diagonal`; `sampled`, of old configs, is taken as `signs`.
        draws: Backward passes per sample, for the estimator `signs`.
        exclude: Regular expressions, searched for in names: parameters that are not held.
        normalise: Whether to divide each task's Fisher by its mean, which makes strengths comparable.
        online_decay: None holds each task at its own anchor. A number from 0 to 1 holds all at the newest one, with
            the older Fishers multiplied by it once per task.
        task: Name of the task for the file and the log.
        seed: Of the subset and all draws.

    Raises:
        ValueError: A Fisher that is zero everywhere, not finite or of other parameters; a pattern without a match.
        TypeError: Logits or data that cannot be found.
        RuntimeError: FSDP and DeepSpeed, which split parameters.

    Sources: Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796. Online: Schwarz et al. 2018,
    https://arxiv.org/abs/1805.06370.

    Example:
        >>> Trainer(callbacks=[EWC(save="a.safetensors")]).fit(model, data_a)
        >>> Trainer(callbacks=[EWC(load="a.safetensors", exclude=["^head"])]).fit(model, data_b)
    """

    def __init__(
        self,
        strength: float = 1e4,
        mode: Literal["proximal", "gradient"] = "proximal",
        load: str | Path | Sequence[str | Path] = (),
        save: str | Path | None = None,
        consolidate: bool | None = None,
        samples: int | None = 1000,
        estimator: Estimator | Literal["sampled"] = "auto",
        draws: int = 1,
        exclude: Sequence[str] = (),
        normalise: bool = False,
        online_decay: float | None = None,
        task: str | None = None,
        seed: int = 0,
    ) -> None:
        if estimator == "sampled":
            rank_zero_warn("EWC's estimator 'sampled' is no longer there; 'signs' takes its place: write that")
            estimator = "signs"
        _check("strength", strength, 0 <= strength < float("inf"), "a number of at least 0")
        _check("mode", mode, mode in ("proximal", "gradient"), "proximal or gradient")
        _check("samples", samples, samples is None or samples > 0, "1 or more, or none for all")
        _check("estimator", estimator, estimator in get_args(Estimator), f"one of {', '.join(get_args(Estimator))}")
        _check("draws", draws, draws > 0, "1 or more")
        _check("online_decay", online_decay, online_decay is None or 0 < online_decay <= 1, "above 0 and at most 1")
        self.strength, self.mode, self.samples, self.estimator, self.draws = strength, mode, samples, estimator, draws
        self.load = [Path(load)] if isinstance(load, (str, Path)) else [Path(path) for path in load]
        self.save = None if save is None else Path(save)
        self.consolidate = (save is not None or not self.load) if consolidate is None else consolidate
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.normalise, self.online_decay, self.task, self.seed = normalise, online_decay, task, seed
        self.memory: Memory | None = None  # of the tasks before the next fit
        self.active: Memory | None = None  # what the current fit is held by
        self._hooks: list[Any] = []
        self._names: dict[int, str] = {}
        self._low_rank: low_rank.Layers = {}
        self._lrs: dict[int, Any] = {}  # of parameter groups, in the current step
        self._penalty: Tensor | None = None
        self._classes = 0

    def logits(self, pl_module: LightningModule, batch: Any) -> Tensor:
        """Logits `(batch, classes)`; override it for a module that `logits_of` does not know."""
        return logits_of(pl_module, batch)

    def labels(self, batch: Any) -> Tensor | None:
        """True labels `(batch,)`; samples labelled -100 are ignored."""
        return labels_of(batch)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; forget the last fit's run, but not its task."""
        if stage != "fit":
            return
        if is_kind(trainer.strategy, "FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
            name = type(trainer.strategy).__name__
            raise RuntimeError(f"EWC needs whole parameters, and {name} splits them; use ddp or one device")
        self.active = self._penalty = None

    def state_dict(self) -> dict[str, Any]:
        """What this fit is held by."""
        return dict(vars(self.active or Memory({}, {}, [])))  # never empty: Lightning would neither save nor restore it

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what the checkpoint's fit was held by, whatever has been learnt since."""
        self.memory = Memory(**state_dict) if state_dict["tasks"] else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the files; match names and shapes."""
        if self.memory is None and self.load:
            self.memory = self._load()
        names = {name: p.shape for name, p in _parameters(pl_module).items()}
        known = set(names) | set(self.memory.fisher if self.memory else ())
        for pattern in self.exclude:
            if not any(re.search(pattern, name) for name in known):
                raise ValueError(f"exclude: {pattern!r} matches no parameter" + did_you_mean(pattern, known))
        if self.memory is None:
            return
        for table in (self.memory.fisher, self.memory.anchor):
            for name in [name for name in table if self._excluded(name)]:
                del table[name]
        owner = type(pl_module).__name__
        for name, t in self.memory.fisher.items():
            if name not in names:
                raise ValueError(
                    f"the Fisher has {name!r}, which {owner} lacks{did_you_mean(name, names)}; "
                    f"if it is meant to be new, exclude it: exclude: ['^{re.escape(name)}$']"
                )
            if t.shape != names[name]:
                raise ValueError(
                    f"{name} has shape {tuple(names[name])} in {owner} and {tuple(t.shape)} in the Fisher, perhaps of "
                    "other classes; exclude what has changed, such as the head: "
                    f"exclude: ['^{name.rpartition('.')[0] or name}']"
                )
        if not self.memory.fisher:
            raise ValueError(f"exclude: {self.exclude} leaves nothing of the Fisher to hold; exclude fewer parameters")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the anchors to the parameters' devices, hook the optimisers, try a first batch of the Fisher."""
        parameters = _parameters(pl_module)
        self._remove_hooks()
        if self.memory is not None:
            self.active = self.memory
            for table in (self.active.fisher, self.active.anchor):
                for name, t in table.items():  # in the parameter's type and memory layout
                    p = parameters[name]
                    if (t.device, t.dtype, t.stride()) != (p.device, p.dtype, p.stride()):
                        table[name] = torch.empty_like(p, requires_grad=False).copy_(t)
            self._names = {id(parameters[name]): name for name in self.active.fisher}
            low = low_rank.low_rank_layers(pl_module)
            self._low_rank = {name: low[name] for name in self.active.fisher if name in low}
            untuned: set[nn.Parameter] = getattr(pl_module, "untuned", set())
            if not self._low_rank and all(parameters[name] in untuned for name in self.active.fisher):
                raise ValueError(
                    "EWC: the weights of the Fisher are frozen, and of adapters beside them it holds LoRA only"
                )
            for optimizer in trainer.optimizers:
                optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # else gradients come scaled
                if self.mode == "proximal":
                    self._hooks.append(optimizer.register_step_pre_hook(self._read_lrs))
                    self._hooks.append(optimizer.register_step_post_hook(self._pull))
                elif optimizer.param_groups[0].get("line_search_fn"):
                    raise ValueError(
                        "L-BFGS's line search compares losses, and the penalty is not in them; use EWC's mode proximal"
                    )
            self._announce(trainer, self.active, {n: p for n, p in parameters.items() if p.requires_grad})
        if self.consolidate:  # what would fail after training fails here
            with preserve_state(trainer, pl_module.device), evaluating(pl_module):
                for batch in fisher_batches(trainer, pl_module, 2 * trainer.world_size, self.seed)[0]:
                    self._classes = check_logits(self.logits(pl_module, batch)).shape[1]
                    if self.estimator == "empirical" and self.labels(batch) is None:
                        raise ValueError(NO_LABELS)

    def _announce(self, trainer: Trainer, memory: Memory, trained: Mapping[str, nn.Parameter]) -> None:
        """Log what is held; warn where the mode gradient would diverge."""
        if trainer.is_global_zero:
            numbers, tasks = sum(t.numel() for t in memory.fisher.values()), [task["name"] for task in memory.tasks]
            through = {p for layer in self._low_rank.values() for p in low_rank.matrices(layer)}
            free = some([n for n, p in trained.items() if n not in memory.fisher and p not in through]) or "none"
            held = f"{len(memory.fisher)} tensors with {numbers:,} parameters are held at {', '.join(tasks)}"
            say("EWC: %s, %s, strength %g; free: %s", held, self.mode, self.strength, free)
        if self.mode == "gradient":
            # Schedules write the highest learning rate that a group will get into it.
            steps = {
                name: max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
                * self.strength
                * float(memory.fisher[name].max())
                for optimizer in trainer.optimizers
                for name, _, group in self._held(optimizer)
            }
            name = max(steps, key=lambda name: steps[name], default="")
            if steps and steps[name] > 2:
                rank_zero_warn(
                    f"EWC: lr * strength * F reaches {steps[name]:.3g} in {name}; gradient descent on the penalty "
                    f"diverges above 2. Use mode proximal, or a strength below {self.strength * 2 / steps[name]:.2g}"
                )

    def _held(self, optimizer: Optimizer) -> list[tuple[str, nn.Parameter, dict[str, Any]]]:
        """Name, parameter and group of what is held, of one optimiser."""
        pairs = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        return [(self._names[id(p)], p, group) for p, group in pairs if id(p) in self._names]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Value of the penalty in steps that log; its gradient in the mode gradient."""
        if (memory := self.active) is None:
            return
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0:
            with torch.no_grad():
                theta = {
                    **_parameters(pl_module),
                    **{n: low_rank.effective_weight(m) for n, m in self._low_rank.items()},
                }
                value = penalty(theta, memory.anchor, memory.fisher, self.strength)
                self._penalty = value + self.strength / 2 * memory.constant
        if self.mode == "gradient":
            mine = {name: p for name, p, _ in self._held(optimizer)}
            add_penalty_gradient_(mine, memory.anchor, memory.fisher, self.strength)
            low_rank.add_low_rank_gradient_(self._low_rank, memory.anchor, memory.fisher, self.strength)

    def _read_lrs(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The learning rates of this step: another hook may restore its own before ours runs after it."""
        for group in optimizer.param_groups:
            self._lrs[id(group)] = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]

    def _pull(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The proximal step."""
        memory, held = cast(Memory, self.active), self._held(optimizer)
        coefficients = {name: self._lrs[id(group)] * self.strength for name, _, group in held}
        proximal_step_({name: p for name, p, _ in held}, memory.anchor, memory.fisher, coefficients)
        rates = {id(p): self._lrs[id(group)] for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self._low_rank.items():
            lr = rates.get(id(low_rank.matrices(layer)[1]), 0.0)  # 0 where another optimiser has it
            low_rank.low_rank_proximal_step_(layer, memory.anchor[name], memory.fisher[name], lr * self.strength)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log."""
        if self._penalty is None:
            return
        pl_module.log("ewc/penalty", self._penalty)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):  # Lightning has divided it
            pl_module.log("ewc/ratio", self._penalty / (loss * trainer.accumulate_grad_batches))
        self._penalty = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the Fisher, with the weights as they are after the last step."""
        self._remove_hooks()
        if not self.consolidate:
            return
        started = time.monotonic()
        self.memory = self._joined(self.active, self._take(trainer, pl_module))
        path = self.save or Path(trainer.log_dir or trainer.default_root_dir) / "fisher.safetensors"
        if trainer.is_global_zero:
            save_memory(path, self.memory)
            say("EWC: Fisher of %(samples)d samples (%(estimator)s)", self.memory.tasks[-1])
            say("EWC: took %.1f s; saved to %s", time.monotonic() - started, path)
        trainer.strategy.barrier("Fisher saved")

    def _take(self, trainer: Trainer, pl_module: LightningModule) -> Memory:
        """Fisher and anchor of the task that has just been learnt."""
        named = _parameters(pl_module).items()
        parameters = {name: p for name, p in named if p.requires_grad and not self._excluded(name)}
        if not parameters:
            raise ValueError("EWC: every parameter is frozen or excluded, so there is nothing to take a Fisher of")
        with preserve_state(trainer, pl_module.device):
            batches, positions = fisher_batches(trainer, pl_module, self.samples, self.seed)
            mean, counted = fisher_diagonal(
                functools.partial(self.logits, pl_module),
                batches,
                parameters,
                module=pl_module,
                labels=self.labels,
                positions=positions,
                estimator=self.estimator,
                draws=self.draws,
                seed=self.seed,
            )
        add = functools.partial(trainer.strategy.reduce, reduce_op="sum")
        samples = int(cast(Tensor, add(torch.tensor(counted, device=pl_module.device))))
        fisher = {name: cast(Tensor, add(t * counted)) / max(samples, 1) for name, t in mean.items()}
        check_fisher(fisher, f"EWC, after {samples} samples")
        average = sum(float(t.sum(dtype=torch.float64)) for t in fisher.values())
        average /= sum(t.numel() for t in fisher.values())
        if self.normalise:
            fisher = {name: t / average for name, t in fisher.items()}
        task = {
            "name": self.task or f"task {len(self.active.tasks) + 1 if self.active else 1}",
            "samples": samples,
            "estimator": choose_estimator(self.estimator, self._classes),
            "draws": self.draws,
            "normalised": self.normalise,
            "mean": average,
        }
        return Memory(fisher, {name: p.detach().clone() for name, p in parameters.items()}, [task])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_hooks()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove_hooks()
        for memory in (self.memory, self.active):
            for table in (memory.fisher, memory.anchor) if memory else ():
                table.update({name: t.cpu() for name, t in table.items()})

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _excluded(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.exclude)

    def _load(self) -> Memory:
        """All files as one."""
        joined: Memory | None = None
        for path in self.load:
            memory = load_memory(path)
            for task in memory.tasks:
                if task["normalised"] != self.normalise:
                    raise ValueError(
                        f"{path}: the Fisher of {task['name']!r} was taken with normalise={task['normalised']}, and "
                        f"this EWC has normalise={self.normalise}; make them equal. A strength s on the normalised "
                        f"Fisher is s / {task['mean']:.3g} on the other"
                    )
                if joined and task in joined.tasks:
                    raise ValueError(
                        f"{path} holds {task['name']!r}, as another of the loaded files does; load the newest only"
                    )
            joined = self._joined(joined, memory)
        return cast(Memory, joined)

    def _joined(self, old: Memory | None, new: Memory) -> Memory:
        if old is None:
            return new
        fisher, anchor, constant = merge((old.fisher, old.anchor), (new.fisher, new.anchor), self.online_decay)
        constant = constant + old.constant + new.constant if self.online_decay is None else 0.0
        return Memory(fisher, anchor, old.tasks + new.tasks, constant)


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, each once; a part that is compiled or has adapters is named as if it were not."""
    return {low_rank.plain_name(name): p for name, p in module.named_parameters()}


def _check(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise ValueError(f"{name} must be {expected}; received {value!r}")


def is_kind(thing: Any, *names: str) -> bool:
    """Whether it is of one of these classes or derived from one, in lightning or in pytorch_lightning."""
    return any(kind.__name__ in names for kind in thing.__class__.__mro__)
