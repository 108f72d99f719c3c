"""A page that shows how a fit went and how good its result is; the same facts as JSON.

The page is a function of `report.json`, whose keys are:

    version      1, the version of this layout
    title        what was trained on what
    facts        what the program around the callback adds, plain values by name: model, commands, doctor, ...
    config       the text of config.yaml in the folder; none where there is none
    class_names  in the order of the labels
    split        test or val: whose samples the rest is about; none where a net's outputs are no classes
    evaluation   of `callbacks.evaluation.evaluation`: accuracy and macro F1 with 95 % intervals, loss, majority class,
                 scores per class, confusion matrix, worst pairs, calibration
    start        accuracy of the nearest class centre on the features of before the fit, and on how many samples
    metrics      every number that the module logged for that split
    curves       points {step, loss}; validations {step, epoch, metrics}; rates {step, lr per group}; groups
    phases       {step, open: groups that train from there on}
    mistakes     the surest wrong answers: {name, label, predicted, probability, picture, saliency, pieces}
    uncertain    the least certain right ones, the same
    data         counts per split, digest of the split, what was skipped
    cost         seconds of the fit, samples per second while training, most memory in GB, device, precision
    versions     of Python and the libraries
"""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import logging
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import __version__ as lightning_version
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn

from .evaluation import class_centres, evaluation, nearest_centre
from .outputs import Outputs, Predictions, classified, gathered, load_predictions, save_predictions

log = logging.getLogger(__name__)

VERSION = 1
MOST_POINTS = 1000  # of a curve; beyond, every second one is dropped
START_SHARE = 0.03  # of a fit's samples are looked at before it, at most
BATCH = 32  # samples looked at together, outside of the loops


class Report(Callback):
    """Writes `report.html` and `report.json`, and each sample's logits, when a fit or a test ends.

    Works with any classifier: logits and labels are those that `validation_step` and `test_step` return under the keys
    `logits` and `label`; else the last output of the module's own `forward` is taken with the batch's labels. Where
    neither gives a class per sample, the page has curves and metrics only. After a fit the page is about the validation
    samples as they were at the best epoch by the checkpoint's metric, or at the last; after a test about the test's,
    and the temperature of its calibration is the one of the validation samples.

    More is shown where it is offered: `datamodule.class_names`; `datamodule.sample_names(split)(index)`, with `index`
    in outputs or batch; `datamodule.batch(split, rows)`, for pictures of the worst mistakes, with
    `module.saliency(batch, classes)` for what they hang on; `module.embed(batch)`, features whose nearest class centre
    before the fit is what its result is compared with.

    Predictions of all ranks are gathered, and held in memory: 4 bytes per sample and class. A curve keeps 500 to 1,000
    points. A resumed fit goes on with what its checkpoint knows.

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
            "points": [], "every": 1, "validations": [], "rates": [], "groups": [], "phases": [], "start": {},
            "seconds": 0.0, "samples": 0, "best": None, "trained": None,
        }  # fmt: skip
        self._parts: list[Outputs] = []
        self._output: Tensor | None = None
        self._open: tuple[bool, ...] = ()
        self._since = 0.0

    # What is noted while training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new fit starts from an empty page."""
        if stage == "fit":
            self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the features of before the fit; note the groups."""
        if trainer.global_step == 0 and trainer.is_global_zero:
            self.progress["start"] = self._start(trainer, pl_module)
        self._groups = grouped(trainer.optimizers[0].param_groups) if trainer.optimizers else {}
        self.progress["groups"] = list(self._groups)
        self._since = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note which groups train, where that has changed, and their rates, which a warm-up holds until the step."""
        now = tuple(any(p.requires_grad for p in params) for params, _ in self._groups.values())
        if now != self._open:
            self._open = now
            phases, names = self.progress["phases"], list(self._groups)
            opened = [name for name, is_open in zip(names, now, strict=True) if is_open]
            if not phases or phases[-1]["open"] != opened:
                phases.append({"step": trainer.global_step, "open": opened})
        if self._is_due(trainer, trainer.global_step, "rates"):
            rates = [float(group["lr"]) for _, group in self._groups.values()]
            self.progress["rates"].append({"step": trainer.global_step, "lr": rates})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss, every so many steps."""
        self.progress["samples"] += samples_of(batch) * trainer.world_size
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and self._is_due(trainer, trainer.global_step, "points"):
            value = float(loss.detach()) * trainer.accumulate_grad_batches  # Lightning has divided it
            self.progress["points"].append({"step": trainer.global_step, "loss": value})

    def _is_due(self, trainer: Trainer, step: int, curve: str) -> bool:
        points = self.progress[curve]
        if len(points) >= MOST_POINTS:
            del points[1::2]
            self.progress["every"] *= 2
        every = self.progress["every"] * max(1, min(trainer.log_every_n_steps, 10))  # type: ignore[attr-defined]
        return step % every == 0 and not (points and points[-1]["step"] == step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page about the validation samples."""
        self._stop_clock()
        self.progress["trained"] = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        if not getattr(trainer, "fast_dev_run", False):
            self._write(trainer, pl_module, "val", self._kept(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is of a fit that is stopped by hand."""
        self._unhook()
        stopped = isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit"
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
        if isinstance(output, Tensor) and output.ndim == 2 and output.is_floating_point():
            self._output = output

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
        found = classified(outputs, batch, self._output)
        self._output = None
        if found is not None and not trainer.sanity_checking and dataloader_idx == 0:
            self._parts.append(found)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metrics; keep the predictions of the best epoch."""
        self._unhook()
        if trainer.sanity_checking:
            return
        metrics = logged(trainer)
        made = gathered(self._parts, trainer.world_size)
        self._parts = []
        if trainer.state.fn == "fit":
            note = {"step": trainer.global_step, "epoch": trainer.current_epoch, "metrics": metrics}
            self.progress["validations"].append(note)
            monitor, mode = monitored(trainer)
            score = metrics.get(monitor or "")
            best = self.progress["best"]
            worse = best is not None and score is not None and best["score"] is not None
            if worse and (score <= best["score"] if mode == "max" else score >= best["score"]):
                made = None
            else:
                self.progress["best"] = {"monitor": monitor, "score": score, **note}
            self._since = time.monotonic()
        if trainer.is_global_zero and made is not None:
            save_predictions(
                self._place(trainer) / "predictions" / "val.safetensors", self._named(trainer, "val", made)
            )
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module, "val", self._kept(trainer))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page about the test samples."""
        self._unhook()
        made = gathered(self._parts, trainer.world_size)
        self._parts = []
        split = "test" if "test" in getattr(trainer.datamodule, "splits", ("test",)) else "val"  # type: ignore[attr-defined]
        found = None
        if trainer.is_global_zero and made is not None:
            found = self._named(trainer, split, made)
            save_predictions(self._place(trainer) / "predictions" / "test.safetensors", found)
        self._write(trainer, pl_module, split, found, tested=True)

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _named(self, trainer: Trainer, split: str, made: Outputs) -> Predictions:
        data: Any = getattr(trainer, "datamodule", None)
        logits, labels, index = made
        if not hasattr(data, "sample_names") or len(index) == 0 or int(index[0]) < 0:
            return Predictions(logits, labels, index, [])
        name = data.sample_names(split)
        return Predictions(logits, labels, index, [name(row) for row in index.tolist()])

    def _kept(self, trainer: Trainer) -> Predictions | None:
        path = self._place(trainer) / "predictions" / "val.safetensors"
        return load_predictions(path) if trainer.is_global_zero and path.is_file() else None

    def _place(self, trainer: Trainer) -> Path:
        return self.folder or Path(trainer.log_dir or trainer.default_root_dir)

    # What is looked at outside of the loops

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Accuracy of the nearest class centre with the features that the fit starts from, by split."""
        data: Any = getattr(trainer, "datamodule", None)
        offered = hasattr(pl_module, "embed") and hasattr(data, "batch") and "train" in getattr(data, "splits", ())
        if not offered or (trainer.world_size > 1 and "DDP" not in type(trainer.strategy).__name__):
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
            found = {}
            for split in ("val", "test"):
                if split in data.splits:
                    truth = data.splits[split].labels
                    rows = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))[:most].sort().values
                    guesses = nearest_centre(self._embedded(trainer, pl_module, split, rows), centres)
                    found[split] = {"accuracy": float((guesses == truth[rows]).double().mean()), "samples": len(rows)}
        return found

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
        self, trainer: Trainer, pl_module: LightningModule, split: str, found: Predictions
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
        out = {}
        for kind, places in chosen.items():
            out[kind] = [
                {
                    "name": found.names[place] if found.names else str(int(found.rows[place])),
                    "label": int(found.labels[place]),
                    "predicted": int(predicted[place]),
                    "probability": float(sure[place]),
                }
                for place in places.tolist()
            ]
            if hasattr(trainer.datamodule, "batch") and found.names and len(places):  # type: ignore[attr-defined]
                shown = self._looked_at(trainer, pl_module, split, found.rows[places].tolist(), predicted[places])
                for item, more in zip(out[kind], shown, strict=True):
                    item |= more
        return out

    def _looked_at(
        self, trainer: Trainer, pl_module: Any, split: str, rows: list[int], classes: Tensor
    ) -> list[dict[str, Any]]:
        """For each row its picture, and what the class that was predicted hangs on."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with aside(trainer, pl_module), torch.inference_mode(False), torch.enable_grad():
            batch, weights = self._moved(trainer, split, rows), None
            if hasattr(pl_module, "saliency"):  # a clone, for a tensor made in inference mode takes part in no gradient
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
        tested: bool = False,
    ) -> None:
        if not trainer.is_global_zero:
            return
        started, folder = time.monotonic(), self._place(trainer)
        config = folder / "config.yaml"  # where LightningCLI writes one
        data: Any = getattr(trainer, "datamodule", None)
        report: dict[str, Any] = {
            "version": VERSION,
            "title": self.facts.get("title", type(pl_module).__name__),
            "facts": self.facts,
            "config": config.read_text(encoding="utf-8") if config.is_file() else None,
            "class_names": [str(name) for name in getattr(data, "class_names", None) or ()],
            "split": "test" if tested else "val",
            "evaluation": None,
            "start": self.progress["start"].get(split),
            "metrics": self.progress["best"]["metrics"] if not tested and self.progress["best"] else logged(trainer),
            "curves": {key: self.progress[key] for key in ("points", "validations", "rates", "groups")},
            "phases": self.progress["phases"],
            "best": self.progress["best"],
            "mistakes": [],
            "uncertain": [],
            "data": describe_data(data),
            "cost": self._cost(trainer, pl_module),
            "versions": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "lightning": lightning_version,
            },
        }
        if found is not None and len(found.labels):
            held_out = self._kept(trainer) if tested else None
            report["evaluation"] = evaluation(
                found.logits, found.labels, held_out=(held_out.logits, held_out.labels) if held_out else None
            )
            if not report["class_names"]:
                report["class_names"] = [str(number) for number in range(found.logits.shape[1])]
            report |= self._gallery(trainer, pl_module, split, found)
        write_page(report, folder)
        show_in_tensorboard(trainer, report)
        log.info("report: %s, made in %.1f s", folder / "report.html", time.monotonic() - started)

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
        return copy.deepcopy(self.progress)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; a test of the checkpoint after the fit that wrote it knows more than the checkpoint."""
        if not self.progress["validations"]:
            self.progress = copy.deepcopy(state_dict)


# The maths and the files, usable without a Trainer


def spread(labels: Tensor, most: int) -> Tensor:
    """Rows of at most so many samples, as equally many of each class as there are; `(n,)`, ascending."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    seen: dict[int, int] = {}
    turn = []
    for label in labels[order].tolist():
        turn.append(seen.get(label, 0))
        seen[label] = turn[-1] + 1
    return order[torch.tensor(turn).argsort(stable=True)[:most]].sort().values


def grouped(groups: Sequence[dict[str, Any]]) -> dict[str, tuple[list[nn.Parameter], dict[str, Any]]]:
    """Parameters and first group of each block; `body/no_decay` belongs to `body`."""
    found: dict[str, tuple[list[nn.Parameter], dict[str, Any]]] = {}
    for number, group in enumerate(groups):
        name = str(group.get("name", f"group {number}")).split("/")[0]
        found.setdefault(name, ([], group))[0].extend(group["params"])
    return found


def samples_of(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 0)


def logged(trainer: Trainer) -> dict[str, float]:
    """Every number that the module has logged, without those of single classes."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "accuracy_of/" not in name}


def monitored(trainer: Trainer) -> tuple[str | None, str]:
    """The metric that the first checkpoint callback with one goes by, and whether it is to rise."""
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "monitor", None):
            return callback.monitor, getattr(callback, "mode", "min")  # type: ignore[attr-defined]
    return None, "min"


@contextmanager
def aside(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Evaluate for a moment: random numbers, modes and the trainer's stage are as before afterwards."""
    modes = {module: module.training for module in pl_module.modules()}
    stage, device = trainer.state.stage, pl_module.device
    trainer.state.stage = RunningStage.VALIDATING
    pl_module.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        trainer.state.stage = stage
        for module, mode in modes.items():
            module.training = mode


def peak_memory() -> int:
    """The most bytes that this process has held in memory; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)


def describe_data(data: Any) -> dict[str, Any]:
    """Counts per split, a digest of which sample is in which, and what was skipped, as far as the data module says."""
    state = data.state_dict() if data is not None else {}
    rows = {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in sorted(state.get("split_rows", {}).items())
    }
    counts = state.get("counts", {})
    digest = hashlib.sha256(json.dumps([counts, rows, state.get("class_names")], default=str).encode()).hexdigest()
    splits = getattr(data, "splits", {})
    return {
        "counts": {name: count for name, count in counts.items() if name != "predict"},
        "digest": digest[:12] if counts else None,
        "seed": state.get("seed"),
        "skipped": sorted(getattr(data, "skipped", ())),
        "skipped_rows": sum(getattr(part, "skipped", 0) for part in splits.values()) if splits else 0,
    }


def as_uri(image: Tensor, weights: Tensor | None = None, side: int = 128) -> str:
    """A picture `(3, height, width)` in [0, 1] as a JPEG in a data address; with weights, heat over its grey."""
    import matplotlib
    import matplotlib.image

    image = image.detach().float().cpu().clamp(0, 1)
    if max(image.shape[1:]) > side:
        scale = side / max(image.shape[1:])
        image = nn.functional.interpolate(image[None], scale_factor=scale, mode="area")[0]
    pixels = image.expand(3, -1, -1).permute(1, 2, 0)
    if weights is not None:
        heat = nn.functional.interpolate(weights.detach().float().cpu()[None, None], pixels.shape[:2], mode="bilinear")
        colours = torch.from_numpy(matplotlib.colormaps["inferno"](heat[0, 0].numpy()))[..., :3].float()
        pixels = 0.4 * pixels.mean(2, keepdim=True) + 0.6 * colours
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels.clamp(0, 1).numpy(), format="jpeg", pil_kwargs={"quality": 80})
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_page(report: Mapping[str, Any], folder: Path) -> None:
    """Write `report.json`, and `report.html` from it."""
    from .page import render

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    for name, content in (("report.json", text), ("report.html", render(json.loads(text)))):
        (folder / name).write_text(f"{content}\n", encoding="utf-8", errors="backslashreplace")


def show_in_tensorboard(trainer: Trainer, report: Mapping[str, Any]) -> None:
    """The confusion matrix and the table of classes, where there is a TensorBoard."""
    from .page import class_rows, confusion_figure

    for logger in trainer.loggers:
        board: Any = getattr(logger, "experiment", None)
        if report["evaluation"] and hasattr(board, "add_figure"):
            board.add_figure(f"{report['split']}/confusion", confusion_figure(report), trainer.global_step)
            rows = [f"|{'|'.join(map(str, row.values()))}|" for row in class_rows(report)]
            table = "\n".join(["|class|precision|recall|F1|samples|", "|---|---|---|---|---|", *rows])
            board.add_text(f"{report['split']}/classes", table, trainer.global_step)
