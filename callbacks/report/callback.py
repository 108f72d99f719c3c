"""The callback that records a fit and writes its report when it ends."""

from __future__ import annotations

import copy
import logging
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import __version__ as lightning_version
from torch import Tensor, nn

from . import facts
from .facts import number_or_none, warn_on_error
from .gallery import section, start_accuracy
from .outputs import (
    Outputs,
    Predictions,
    find_outputs,
    gather_names,
    gather_outputs,
    load_predictions,
    save_predictions,
)
from .page import show_in_tensorboard, write_page

log = logging.getLogger(__name__)

VERSION = 1
MOST_POINTS = 1000  # of a curve; beyond, every second one is dropped


class Report(Callback):
    """Writes `report.html` and `report.json`, and each sample's logits, when a fit or a test ends.

    Works with any classifier, of one label per sample or several, and with scores: logits and labels are those that
    `validation_step` and `test_step` return under the keys `logits` and `label`; else the last output of the module's
    own `forward` with the batch's labels. Labels are integers for classes; floats, 0 or 1 and as many as logits, for
    several labels; floats, one of each, for scores. Of several tasks the steps return such a pair for each name under
    `tasks`, and the page has a section for each. Else the page has curves and metrics only. After a fit the page
    is about the validation predictions of the best epoch by the checkpoint's metric, or of the last; after a test
    about the test's, with the temperature and the thresholds of the validation samples.

    More is shown where it is offered: `datamodule.class_names`; `datamodule.sample_names(split)(index)`, with `index`
    in outputs or batch; `datamodule.batch(split, rows)`, for images of the worst mistakes, with
    `module.saliency(batch, classes)` for what they depend on; `module.embed(batch)`, features whose nearest class
    centre before the fit is the baseline.

    Predictions of all ranks are gathered, and held in memory: 4 bytes per sample and class. Where batches have no
    `index`, samples that pad a rank's last batch count twice, and samples are numbered rank by rank. Only the first of
    several validation loaders counts, unless they are of several tasks. A curve keeps 500 to 1,000 points. A resumed
    fit goes on from its checkpoint. What fails, an image or the page, is omitted with a warning; the run goes on.

    Runs on: fit, validate, test. Touches: files in its folder; figures of TensorBoard; no weights, no random numbers.

    Args:
        folder: Where the files go; the trainer's log folder if not given.
        start_samples: Samples of each split, at most, to evaluate the features before the fit on; never more than 3 %
            of the samples that the fit will see; 0 to skip it.
        shown: How many mistakes, and how many uncertain answers, to show.

    Example:
        >>> Trainer(callbacks=[Report("runs/mine")]).fit(model, data)
    """

    def __init__(self, folder: str | Path | None = None, start_samples: int = 1000, shown: int = 12) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.start_samples, self.shown = start_samples, shown
        self.facts: dict[str, Any] = {}  # whoever runs the trainer may add to the page
        self._hook: Any = None
        self._reset()

    def _reset(self) -> None:
        self.progress: dict[str, Any] = {
            "points": [], "rates": [], "every": {"points": 1, "rates": 1}, "validations": [], "groups": [],
            "phases": [], "start": {}, "seconds": 0.0, "samples": 0, "best": None, "trained": None,
        }  # fmt: skip
        self._parts: dict[str, list[Outputs]] = {}  # by task; of one without a name, its is empty
        self._newest: dict[str, Predictions] = {}
        self._output: Tensor | None = None
        self._last: Tensor | None = None
        self._groups: dict[str, tuple[list[nn.Parameter], dict[str, Any]]] = {}
        self._open: tuple[bool, ...] = ()
        self._since = 0.0

    # Recorded during training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new fit starts from an empty page."""
        self._place = self.folder or Path(trainer.log_dir or trainer.default_root_dir)  # ranks ask together
        self._idle = bool(getattr(trainer, "fast_dev_run", False))
        if stage == "fit":
            self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the features before the fit."""
        if trainer.global_step == 0 and trainer.is_global_zero and not self._idle:
            for file in (self._place / "predictions").glob("val*.safetensors"):  # an earlier run's
                file.unlink()
            with warn_on_error("the accuracy before the fit"):
                self.progress["start"] = start_accuracy(trainer, pl_module, self.start_samples)
        self._since = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record which groups train, where that has changed, and their learning rates, which a warm-up has scaled."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if sum(len(params) for params, _ in self._groups.values()) != sum(len(group["params"]) for group in groups):
            self._groups = facts.groups_by_block(groups)  # at the start, and where somebody adds a group
            self.progress["groups"] = list(self._groups)
        now, opens = tuple(any(p.requires_grad for p in params) for params, _ in self._groups.values()), False
        if now != self._open:
            self._open = now
            training = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            self.progress["trained"] = max(self.progress["trained"] or 0, training)
            opened = [name for name, is_open in zip(self._groups, now, strict=True) if is_open]
            if not self.progress["phases"] or self.progress["phases"][-1]["open"] != opened:
                self.progress["phases"].append({"step": trainer.global_step, "open": opened})
                opens = True
        if self._is_due(trainer, "rates", 1, opens):
            lrs = {name: number_or_none(group.get("lr")) for name, (_, group) in self._groups.items()}
            self.progress["rates"].append({"step": trainer.global_step, "lr": lrs})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss, every so many steps."""
        self.progress["samples"] += facts.batch_size(batch) * trainer.world_size
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self._last = loss.detach() if isinstance(loss, Tensor) and loss.numel() == 1 else None
        often = max(1, min(trainer.log_every_n_steps, 10))  # type: ignore[attr-defined]
        if not self.progress["points"] or self._is_due(trainer, "points", often):
            self._record_loss(trainer)

    def _record_loss(self, trainer: Trainer) -> None:
        points = self.progress["points"]
        if self._last is not None and not (points and points[-1]["step"] == trainer.global_step):
            value = float(self._last) * trainer.accumulate_grad_batches  # Lightning has divided it
            points.append({"step": trainer.global_step, "loss": number_or_none(value)})

    def _is_due(self, trainer: Trainer, curve: str, often: int, now: bool = False) -> bool:
        points = self.progress[curve]
        if len(points) >= MOST_POINTS:
            del points[1::2]
            self.progress["every"][curve] *= 2
        due = now or trainer.global_step % (self.progress["every"][curve] * often) == 0
        return due and not (points and points[-1]["step"] == trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page about the validation samples."""
        self._stop_clock()
        self._record_loss(trainer)
        if trainer.is_global_zero:
            best = self.progress["best"]
            now = best is not None and best["step"] == trainer.global_step  # the weights are those of the best epoch
            self._write(trainer, pl_module, "val", self._best_predictions(self._newest), explained=now)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the report of a fit that is stopped by hand or by its cluster."""
        self._unhook()
        by_hand = isinstance(exception, KeyboardInterrupt) or type(exception).__name__ == "SIGTERMException"
        stopped = by_hand and trainer.state.fn == "fit"
        if stopped and self.progress["validations"] and trainer.world_size == 1:
            self.on_train_end(trainer, pl_module)

    def _stop_clock(self) -> None:
        if self._since:
            self.progress["seconds"] += time.monotonic() - self._since
        self._since = 0.0

    # Predictions of a split

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect from here on; validation's time is not training's."""
        self._stop_clock()
        self._parts = {}
        self._hook = self._hook or pl_module.register_forward_hook(self._keep_output)

    on_test_start = on_validation_start

    def _keep_output(self, module: nn.Module, args: Any, output: Any) -> None:
        output = getattr(output, "logits", output)
        if isinstance(output, Tensor) and output.ndim in (1, 2) and output.is_floating_point():
            self._output = output[:, None] if output.ndim == 1 else output

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect a batch."""
        known = getattr(getattr(trainer, "datamodule", None), "num_classes", None)
        tasks = outputs.get("tasks") if isinstance(outputs, Mapping) else None
        found = (
            {"": find_outputs(outputs, batch, self._output, known)}
            if tasks is None
            else {name: find_outputs({**one, "index": outputs.get("index")}, None, None) for name, one in tasks.items()}
        )
        self._output = None
        for name, part in found.items():
            if part is not None and not trainer.sanity_checking and (dataloader_idx == 0 or tasks is not None):
                self._parts.setdefault(name, []).append(part)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics; keep the predictions of the best epoch."""
        self._unhook()
        if trainer.sanity_checking:
            return
        found = self._gathered(trainer, "val")
        if trainer.state.fn == "validate" and trainer.is_global_zero:
            self._write(trainer, pl_module, "val", found)
            return
        metrics = facts.logged_metrics(trainer)
        validation = {"step": trainer.global_step, "epoch": trainer.current_epoch, "metrics": metrics}
        self.progress["validations"].append(validation)
        monitor, mode = facts.monitored_metric(trainer)
        score, best = metrics.get(monitor or ""), self.progress["best"]
        if best is None or facts.is_better(score, best["score"], mode):
            self.progress["best"] = {"monitor": monitor, "mode": mode, "score": score, **validation}
            if not self._idle:
                with warn_on_error("the validation's predictions"):
                    for name, one in found.items():
                        save_predictions(self._file("val", name), one, trainer.global_step)
        self._newest = found
        self._since = time.monotonic()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page about the test samples, or where there are none, about the validation samples."""
        self._unhook()
        splits = getattr(getattr(trainer, "datamodule", None), "splits", None)
        split = "val" if isinstance(splits, Mapping) and "val" in splits and "test" not in splits else "test"
        found = self._gathered(trainer, split)
        if trainer.is_global_zero:
            held_out = self._best_predictions(dict.fromkeys(found)) if split == "test" else {}
            self._write(trainer, pl_module, split, found, held_out=held_out)

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _gathered(self, trainer: Trainer, split: str) -> dict[str, Predictions]:
        """What all ranks collected, by task, with the samples' names; on the first rank alone."""
        found: dict[str, Predictions] = {}
        for task in gather_names(self._parts, trainer.world_size):
            made = gather_outputs(self._parts.get(task, []), trainer.world_size)
            if made is not None and trainer.is_global_zero:
                one = self._named(trainer, split, made, task)
                found |= {task: one} if one is not None else {}
        self._parts = {}
        return found

    def _named(self, trainer: Trainer, split: str, made: Outputs, task: str) -> Predictions | None:
        data: Any = getattr(trainer, "datamodule", None)
        names: list[str] = []
        if callable(getattr(data, "sample_names", None)) and len(made[2]) and int(made[2].min()) >= 0:
            with warn_on_error("the samples' names"):
                name = data.sample_names(split)
                names = [str(name(row)) for row in made[2].tolist()]
        found = Predictions(*made, names)
        yes_or_no = found.kind == "scores" and bool(torch.isin(found.labels, torch.tensor([0.0, 1.0])).all())
        if yes_or_no and not task and getattr(trainer.lightning_module, "problem_type", None) != "regression":
            log.info("report: labels are 0 and 1 and there is one output: it may be a score or a logit")
            return None
        return found

    def _file(self, split: str, task: str) -> Path:
        return self._place / "predictions" / f"{split}{f'.{task}' if task else ''}.safetensors"

    def _best_predictions(self, newest: Mapping[str, Predictions | None]) -> dict[str, Predictions]:
        """The validation's predictions at this fit's best epoch, by task; the newest where there are none."""
        best = self.progress["best"]
        found: dict[str, Predictions] = {}
        for task, one in newest.items():
            file = self._file("val", task)
            kept = (load_predictions(file, best["step"]) if best and file.is_file() else None) or one
            if kept is not None:
                found[task] = kept
        return found

    # Writing

    def _write(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        split: str,
        found: dict[str, Predictions],
        *,
        held_out: Mapping[str, Predictions] | None = None,
        explained: bool = True,
    ) -> None:
        """Write the page; an error in it costs the page, or a part of it, and never the run."""
        if self._idle:
            return
        started, fitted = time.monotonic(), trainer.state.fn == "fit"
        with warn_on_error("the report"):
            data: Any = getattr(trainer, "datamodule", None)
            config = self._place / "config.yaml"  # where LightningCLI writes one
            best, start, described = self.progress["best"], self.progress["start"], facts.describe_data(data)
            metrics = best["metrics"] if fitted and best else facts.logged_metrics(trainer)
            chose = split == "val" and bool(best and best["monitor"])
            described["without_numbers"] = 0
            parts: dict[str, dict[str, Any]] = {}
            for task, one in found.items():
                finite = one.logits.isfinite().all(1)
                described["without_numbers"] += int((~finite).sum())
                one = one.part(finite)
                if not fitted:
                    save_predictions(self._file(split, task), one, None)
                other = (held_out or {}).get(task)
                given = None if other is None else (other.logits, other.labels)
                parts[task] = {
                    "class_names": facts.names_of_classes(data, one, task),
                    "split": split,
                    "chose": chose,
                    "start": start.get(split) if start.get("digest") == described["digest"] and not task else None,
                    "metrics": {name: value for name, value in metrics.items() if not task or f"/{task}/" in name},
                    **section(
                        trainer, pl_module, split, one, self.shown, held_out=given, explained=explained, task=task
                    ),
                }
            own = parts.pop("", None) or {
                "class_names": [] if parts else facts.names_of_classes(data, None),
                "split": split,
                "chose": chose,
                "start": None,
                "metrics": metrics,
                **section(trainer, pl_module, split, None, 0),
            }
            report: dict[str, Any] = {
                "version": VERSION,
                "title": self.facts.get("title", type(pl_module).__name__),
                "facts": {k: facts.runnable_commands(v) if k == "commands" else v for k, v in self.facts.items()},
                "config": config.read_text(encoding="utf-8") if config.is_file() else None,
                **own,
                "tasks": parts,
                "curves": {key: self.progress[key] for key in ("points", "validations", "rates", "groups")},
                "phases": self.progress["phases"],
                "best": best,
                "data": described,
                "cost": self._cost(trainer, pl_module),
                "versions": {
                    "python": platform.python_version(),
                    "torch": str(torch.__version__),
                    "lightning": lightning_version,
                },
            }
            report = facts.as_json(report)
            write_page(report, self._place)
            with warn_on_error("TensorBoard's figures"):
                show_in_tensorboard(trainer, report)
            log.info("report: %s, written in %.1f s", self._place / "report.html", time.monotonic() - started)

    def _cost(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        seconds, samples = self.progress["seconds"], self.progress["samples"]
        on_gpu = pl_module.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else facts.peak_memory()
        return {
            "seconds": round(seconds, 1),
            "samples_per_second": round(samples / seconds, 1) if seconds else None,
            "memory_gb": round(peak / 2**30, 2),
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "devices": trainer.world_size,
            "precision": str(trainer.precision),
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "trained": self.progress["trained"],
        }

    def state_dict(self) -> dict[str, Any]:
        """What was recorded so far."""
        running = time.monotonic() - self._since if self._since else 0.0
        return copy.deepcopy(self.progress | {"seconds": self.progress["seconds"] + running})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; a test of the checkpoint after the fit that wrote it knows more than the checkpoint."""
        if not self.progress["validations"]:
            known = copy.deepcopy(state_dict)
            if not isinstance(known.get("every", {}), dict):  # of a checkpoint from before curves had their own
                known["every"] = dict.fromkeys(("points", "rates"), known["every"])
            self.progress |= known
