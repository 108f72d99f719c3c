"""A page that shows how a fit went and how good its result is; the same facts as JSON.

The page is a function of `report.json`, whose keys are:

    version      1, the version of this layout
    title        what was trained on what
    facts        what the program around the callback adds, plain values by name: model, commands, doctor, ...
    config       the text of config.yaml in the folder; none where there is none
    class_names  in the order of the labels
    split        test or val: whose samples the rest is about
    chose        whether these samples chose the checkpoint
    evaluation   of `callbacks.evaluation.evaluation`: accuracy and macro F1 with 95 % intervals, loss, majority class,
                 scores per class, confusion matrix, worst pairs, calibration; none where outputs are no classes
    labels       of `label_evaluation`, where a sample has several: F1 with intervals, scores and curves per label
    scores       of `score_evaluation`, where a number is predicted: rank correlation and errors with intervals, points
    start        accuracy of the nearest class centre on the features of before the fit, and on how many samples
    metrics      every number that the module logged for that split
    curves       points {step, loss}; validations {step, epoch, metrics}; rates {step, lr per group}; groups
    phases       {step, open: groups that train from there on}
    best         the validation whose predictions are kept: {monitor, mode, score, step, epoch, metrics}
    mistakes     the surest wrong answers: {name, label, predicted, probability, picture, saliency, pieces}
    uncertain    the least certain right ones, the same
    furthest     scores that are furthest off: {name, label, predicted}
    data         counts per split, digest of the split, what was skipped or has no finite logits
    cost         seconds of the fit, samples per second while training, most memory in GB, device, precision
    versions     of Python and the libraries
"""

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

from .evaluation import class_centres, evaluation, label_evaluation, nearest_centre, score_evaluation
from .facts import (
    aside,
    describe_data,
    existing,
    grouped,
    is_better,
    logged,
    monitored,
    names_of_classes,
    number_or_none,
    peak_memory,
    plain,
    sample_name,
    samples_of,
    shortened,
    spared,
    spread,
    training_mean,
)
from .figures import as_uri
from .outputs import Outputs, Predictions, classified, gathered, load_predictions, save_predictions
from .page import show_in_tensorboard, write_page

log = logging.getLogger(__name__)

VERSION = 1
MOST_POINTS = 1000  # of a curve; beyond, every second one is dropped
START_SHARE = 0.03  # of a fit's samples are looked at before it, at most
LONGEST_NAME = 500  # characters of a sample's name that the page shows
BATCH = 32  # samples looked at together, outside of the loops


class Report(Callback):
    """Writes `report.html` and `report.json`, and each sample's logits, when a fit or a test ends.

    Works with any classifier, of one label a sample or several, and with scores: logits and labels are those that
    `validation_step` and `test_step` return under the keys `logits` and `label`; else the last output of the module's
    own `forward` is taken with the batch's labels. Labels are whole numbers for classes; floats, 0 or 1 and as many as
    logits, for several labels; floats, one of each, for scores. Else the page has curves and metrics only. After a fit
    the page is about the validation samples as they were at the best epoch by the checkpoint's metric, or at the last;
    after a test about the test's, and the temperature of its calibration, and thresholds, are the validation samples'.

    More is shown where it is offered: `datamodule.class_names`; `datamodule.sample_names(split)(index)`, with `index`
    in outputs or batch; `datamodule.batch(split, rows)`, for pictures of the worst mistakes, with
    `module.saliency(batch, classes)` for what they hang on; `module.embed(batch)`, features whose nearest class centre
    before the fit is what its result is compared with.

    Predictions of all ranks are gathered, and held in memory: 4 bytes per sample and class. Where batches have no
    `index`, samples that fill up a rank's last batch count twice, and samples are numbered as they came, rank by rank.
    Of several validation loaders the first is looked at. A curve keeps 500 to 1,000 points. A resumed fit goes on with
    what its checkpoint knows. What cannot be made, a picture or the page, is left out with a warning; the run goes on.

    Runs on: fit, validate, test. Touches: files in its folder; figures of TensorBoard; no weights, no random numbers.

    Args:
        folder: Where the files go; the trainer's log folder if not given.
        start_samples: Samples of each split that the features of before the fit are tried on, at most, and never more
            than 3 % of the samples that the fit will see; 0 for not at all.
        shown: How many mistakes, and how many uncertain answers, to show.

    Example:
        >>> Trainer(callbacks=[Report("runs/mine")]).fit(model, datamodule=data)  # doctest: +SKIP
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
        self._parts: list[Outputs] = []
        self._newest: Predictions | None = None
        self._output: Tensor | None = None
        self._last: Tensor | None = None
        self._groups: dict[str, tuple[list[nn.Parameter], dict[str, Any]]] = {}
        self._open: tuple[bool, ...] = ()
        self._since = 0.0

    # What is noted while training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new fit starts from an empty page."""
        self._place = self.folder or Path(trainer.log_dir or trainer.default_root_dir)  # ranks ask together
        self._idle = bool(getattr(trainer, "fast_dev_run", False))
        if stage == "fit":
            self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the features of before the fit."""
        if trainer.global_step == 0 and trainer.is_global_zero and not self._idle:
            self._kept_file.unlink(missing_ok=True)  # an earlier run's
            with spared("a look at the start"):
                self.progress["start"] = self._start(trainer, pl_module)
        self._since = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note which groups train, where that has changed, and their rates, which a warm-up holds until the step."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if sum(len(params) for params, _ in self._groups.values()) != sum(len(group["params"]) for group in groups):
            self._groups = grouped(groups)  # at the start, and where somebody adds a group
            self.progress["groups"] = list(self._groups)
        now, opens = tuple(any(p.requires_grad for p in params) for params, _ in self._groups.values()), False
        if now != self._open:
            self._open = now
            training = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            self.progress["trained"] = max(self.progress["trained"] or 0, training)  # some thaw again at the end
            opened = [name for name, is_open in zip(self._groups, now, strict=True) if is_open]
            if not self.progress["phases"] or self.progress["phases"][-1]["open"] != opened:
                self.progress["phases"].append({"step": trainer.global_step, "open": opened})
                opens = True
        if self._is_due(trainer, "rates", 1, opens):
            rates = {name: number_or_none(group.get("lr")) for name, (_, group) in self._groups.items()}
            self.progress["rates"].append({"step": trainer.global_step, "lr": rates})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss, every so many steps."""
        self.progress["samples"] += samples_of(batch) * trainer.world_size
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self._last = loss.detach() if isinstance(loss, Tensor) and loss.numel() == 1 else None
        often = max(1, min(trainer.log_every_n_steps, 10))  # type: ignore[attr-defined]
        if not self.progress["points"] or self._is_due(trainer, "points", often):
            self._note_loss(trainer)

    def _note_loss(self, trainer: Trainer) -> None:
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
        self._note_loss(trainer)
        if trainer.is_global_zero:
            best = self.progress["best"]
            now = best is not None and best["step"] == trainer.global_step  # the weights are those that answered
            self._write(trainer, pl_module, "val", self._kept() or self._newest, explained=now)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is of a fit that is stopped by hand or by its cluster."""
        self._unhook()
        by_hand = isinstance(exception, KeyboardInterrupt) or type(exception).__name__ == "SIGTERMException"
        stopped = by_hand and trainer.state.fn == "fit"
        if stopped and self.progress["validations"] and trainer.world_size == 1:
            self.on_train_end(trainer, pl_module)

    def _stop_clock(self) -> None:
        if self._since:
            self.progress["seconds"] += time.monotonic() - self._since
        self._since = 0.0

    # What a net says of the samples of a split

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect from here on; validation's time is not training's."""
        self._stop_clock()
        self._parts = []
        self._hook = self._hook or pl_module.register_forward_hook(self._seen)

    on_test_start = on_validation_start

    def _seen(self, module: nn.Module, args: Any, output: Any) -> None:
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
        found = classified(outputs, batch, self._output, known)
        self._output = None
        if found is not None and not trainer.sanity_checking and dataloader_idx == 0:
            self._parts.append(found)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metrics; keep the predictions of the best epoch."""
        self._unhook()
        if trainer.sanity_checking:
            return
        found = self._gathered(trainer, "val")
        if trainer.state.fn == "validate" and trainer.is_global_zero:
            self._write(trainer, pl_module, "val", found)
            return
        metrics = logged(trainer)
        note = {"step": trainer.global_step, "epoch": trainer.current_epoch, "metrics": metrics}
        self.progress["validations"].append(note)
        monitor, mode = monitored(trainer)
        score, best = metrics.get(monitor or ""), self.progress["best"]
        if best is None or is_better(score, best["score"], mode):
            self.progress["best"] = {"monitor": monitor, "mode": mode, "score": score, **note}
            if found is not None and not self._idle:
                with spared("the validation's predictions"):
                    save_predictions(self._kept_file, found, trainer.global_step)
        self._newest = found
        self._since = time.monotonic()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page about the test samples, or where there are none, about the validation's."""
        self._unhook()
        splits = getattr(getattr(trainer, "datamodule", None), "splits", None)
        split = "val" if isinstance(splits, Mapping) and "val" in splits and "test" not in splits else "test"
        found = self._gathered(trainer, split)
        if trainer.is_global_zero:
            self._write(trainer, pl_module, split, found, held_out=self._kept() if split == "test" else None)

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _gathered(self, trainer: Trainer, split: str) -> Predictions | None:
        """What all ranks collected, with the samples' names; on the first rank alone."""
        made, self._parts = gathered(self._parts, trainer.world_size), []
        if made is None or not trainer.is_global_zero:
            return None
        data: Any = getattr(trainer, "datamodule", None)
        names: list[str] = []
        if callable(getattr(data, "sample_names", None)) and len(made[2]) and int(made[2].min()) >= 0:
            with spared("the samples' names"):
                name = data.sample_names(split)
                names = [str(name(row)) for row in made[2].tolist()]
        found = Predictions(*made, names)
        yes_or_no = found.kind == "scores" and bool(torch.isin(found.labels, torch.tensor([0.0, 1.0])).all())
        if yes_or_no and getattr(trainer.lightning_module, "problem_type", None) != "regression":
            log.info("report: labels are 0 and 1 and there is one output: no telling if it is a score or a logit")
            return None
        return found

    @property
    def _kept_file(self) -> Path:
        return self._place / "predictions" / "val.safetensors"

    def _kept(self) -> Predictions | None:
        """The validation's predictions at this fit's best epoch."""
        best = self.progress["best"]
        return load_predictions(self._kept_file, best["step"]) if best and self._kept_file.is_file() else None

    # What is looked at outside of the loops

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Accuracy of the nearest class centre with the features that the fit starts from, by split."""
        data: Any = getattr(trainer, "datamodule", None)
        splits = getattr(data, "splits", None)
        offered = hasattr(pl_module, "embed") and hasattr(data, "batch") and isinstance(splits, Mapping)
        if (
            not offered
            or "train" not in data.splits
            or (trainer.world_size > 1 and "DDP" not in type(trainer.strategy).__name__)
        ):
            return {}
        labels, classes = data.splits["train"].labels, data.num_classes
        batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches * trainer.world_size
        seen = START_SHARE * batches * BATCH
        most = int(min(self.start_samples, seen))
        if labels.ndim != 1 or labels.is_floating_point() or most < max(50, 5 * classes):
            return {}
        rows = spread(labels, most)
        with aside(trainer, pl_module), torch.no_grad():
            centres = class_centres(self._embedded(trainer, pl_module, "train", rows), labels[rows], classes)
            found: dict[str, Any] = {}
            for split in ("val", "test"):
                if split in data.splits:
                    truth = data.splits[split].labels
                    rows = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))[:most].sort().values
                    guesses = nearest_centre(self._embedded(trainer, pl_module, split, rows), centres)
                    found[split] = {"accuracy": float((guesses == truth[rows]).double().mean()), "samples": len(rows)}
        return found | {"digest": describe_data(data)["digest"]}

    def _embedded(self, trainer: Trainer, pl_module: Any, split: str, rows: Tensor) -> Tensor:
        features = []
        for some in torch.split(rows, BATCH):
            batch = self._moved(trainer, split, some.tolist())
            with trainer.precision_plugin.forward_context():
                features.append(pl_module.embed(batch).float().cpu())
        return torch.cat(features)

    def _moved(self, trainer: Trainer, split: str, rows: list[int]) -> Any:
        batch = trainer.strategy.batch_to_device(trainer.datamodule.batch(split, rows))  # type: ignore[attr-defined]
        return trainer.precision_plugin.convert_input(batch)

    def _gallery(
        self, trainer: Trainer, pl_module: LightningModule, split: str, found: Predictions, explained: bool
    ) -> dict[str, list[dict[str, Any]]]:
        """The surest mistakes and the least certain right answers, with pictures where the data module gives them."""
        probabilities = found.logits.double().softmax(1)
        sure, predicted = probabilities.max(1)
        wrong = (predicted != found.labels).nonzero().flatten()
        right = (predicted == found.labels).nonzero().flatten()
        chosen = {
            "mistakes": wrong[sure[wrong].argsort(descending=True, stable=True)][: self.shown],
            "uncertain": right[sure[right].argsort(stable=True)][: self.shown],
        }
        out, names = {}, shortened(found.names)
        for kind, places in chosen.items():
            out[kind] = [
                {
                    "name": sample_name(found._replace(names=names), place)[:LONGEST_NAME],
                    "label": int(found.labels[place]),
                    "predicted": int(predicted[place]),
                    "probability": float(sure[place]),
                }
                for place in places.tolist()
            ]
            if hasattr(getattr(trainer, "datamodule", None), "batch") and found.names and len(places):
                rows, classes = found.rows[places].tolist(), predicted[places] if explained else None
                with spared("the samples' pictures"):
                    for item, more in zip(
                        out[kind], self._looked_at(trainer, pl_module, split, rows, classes), strict=True
                    ):
                        item |= more
        return out

    def _furthest(self, found: Predictions, said: Tensor) -> list[dict[str, Any]]:
        """The scores that are furthest off."""
        places = (said - found.labels).abs().argsort(descending=True, stable=True)[: self.shown].tolist()
        named = found._replace(names=shortened(found.names))
        return [
            {
                "name": sample_name(named, place)[:LONGEST_NAME],
                "label": float(found.labels[place]),
                "predicted": float(said[place]),
            }
            for place in places
        ]

    def _looked_at(
        self, trainer: Trainer, pl_module: Any, split: str, rows: list[int], classes: Tensor | None
    ) -> list[dict[str, Any]]:
        """For each row its picture, and what its class hangs on, where that is given."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with aside(trainer, pl_module), torch.inference_mode(False), torch.enable_grad():
            batch, weights = self._moved(trainer, split, rows), None
            if classes is not None and hasattr(
                pl_module, "saliency"
            ):  # a clone, for a tensor made in inference mode takes part in no gradient
                with trainer.precision_plugin.forward_context():
                    weights = pl_module.saliency(batch, classes.clone().to(pl_module.device))
        out: list[dict[str, Any]] = [{} for _ in rows]
        images = batch.get("image") if isinstance(batch, Mapping) else None
        pieces = data.pieces(batch) if hasattr(data, "pieces") else None
        for number, item in enumerate(out):
            if images is not None:
                item["picture"] = as_uri(images[number])
            if weights is not None and images is not None:
                item["saliency"] = as_uri(images[number], weights[number])
            elif weights is not None and pieces is not None:
                marks = [round(float(weight), 3) for weight in weights[number][: len(pieces[number])]]
                item["pieces"] = list(zip(pieces[number], marks, strict=True))
        return out

    # What is written

    def _write(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        split: str,
        found: Predictions | None,
        *,
        held_out: Predictions | None = None,
        explained: bool = True,
    ) -> None:
        """Make the page; what goes wrong with it costs the page, or a part of it, and never the run."""
        if self._idle:
            return
        started, fitted = time.monotonic(), trainer.state.fn == "fit"
        with spared("the report"):
            data: Any = getattr(trainer, "datamodule", None)
            config = self._place / "config.yaml"  # where LightningCLI writes one
            best, start, described = self.progress["best"], self.progress["start"], describe_data(data)
            report: dict[str, Any] = {
                "version": VERSION,
                "title": self.facts.get("title", type(pl_module).__name__),
                "facts": {key: existing(fact) if key == "commands" else fact for key, fact in self.facts.items()},
                "config": config.read_text(encoding="utf-8") if config.is_file() else None,
                "class_names": names_of_classes(data, found),
                "split": split,
                "chose": split == "val" and bool(best and best["monitor"]),
                "evaluation": None,
                "labels": None,
                "scores": None,
                "start": start.get(split) if start.get("digest") == described["digest"] else None,
                "metrics": best["metrics"] if fitted and best else logged(trainer),
                "curves": {key: self.progress[key] for key in ("points", "validations", "rates", "groups")},
                "phases": self.progress["phases"],
                "best": best,
                "mistakes": [],
                "uncertain": [],
                "furthest": [],
                "data": described,
                "cost": self._cost(trainer, pl_module),
                "versions": {
                    "python": platform.python_version(),
                    "torch": str(torch.__version__),
                    "lightning": lightning_version,
                },
            }
            if found is not None:
                finite = found.logits.isfinite().all(1)
                report["data"]["without_numbers"] = int((~finite).sum())
                found = found.part(finite)
                if not fitted:
                    save_predictions(self._place / "predictions" / f"{split}.safetensors", found, None)
            if found is not None and len(found.labels):
                other = None if held_out is None else (held_out.logits, held_out.labels)
                if found.kind == "classes":
                    report["evaluation"] = evaluation(found.logits, found.labels, held_out=other)
                    report |= self._gallery(trainer, pl_module, split, found, explained)
                elif found.kind == "labels":
                    report["labels"] = label_evaluation(found.logits, found.labels, held_out=other)
                else:
                    said = found.logits[:, 0]
                    report["scores"] = score_evaluation(said, found.labels, mean=training_mean(data))
                    report["furthest"] = self._furthest(found, said)
            report = plain(report)
            write_page(report, self._place)
            with spared("TensorBoard's pictures"):
                show_in_tensorboard(trainer, report)
            seconds = time.monotonic() - started
            log.info("report: %s, made in %.1f s", self._place / "report.html", seconds)

    def _cost(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        seconds, samples = self.progress["seconds"], self.progress["samples"]
        on_gpu = pl_module.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
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
        """What was noted so far."""
        running = time.monotonic() - self._since if self._since else 0.0
        return copy.deepcopy(self.progress | {"seconds": self.progress["seconds"] + running})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; a test of the checkpoint after the fit that wrote it knows more than the checkpoint."""
        if not self.progress["validations"]:
            known = copy.deepcopy(state_dict)
            if not isinstance(known.get("every", {}), dict):  # of a checkpoint from before curves had their own
                known["every"] = dict.fromkeys(("points", "rates"), known["every"])
            self.progress |= known
