"""What a report looks at outside of Lightning's loops: the worst answers, the features before the fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from .evaluation import class_centres, evaluation, label_evaluation, nearest_centre, score_evaluation
from .facts import (
    balanced_subset,
    describe_data,
    preserve_state,
    sample_name,
    shortened,
    training_mean,
    warn_on_error,
)
from .figures import as_uri
from .outputs import Predictions

BATCH = 32  # samples of a forward pass
START_SHARE = 0.03  # of a fit's samples, at most, are evaluated before it
LONGEST_NAME = 500  # characters of a sample's name that the page shows


def start_accuracy(trainer: Trainer, pl_module: Any, most: int) -> dict[str, Any]:
    """Accuracy of the nearest class centre with the features that the fit starts from, by split.

    Args:
        trainer: At the start of a fit, with its data module.
        pl_module: Its `embed(batch)` gives features `(batch, width)`.
        most: Samples of each split, at most.

    Returns:
        `accuracy` and `samples` of `val` and `test`, and the data's `digest`; empty where it cannot be done.
    """
    data: Any = getattr(trainer, "datamodule", None)
    splits = getattr(data, "splits", None)
    offered = hasattr(pl_module, "embed") and hasattr(data, "batch") and isinstance(splits, Mapping)
    sharded = trainer.world_size > 1 and "DDP" not in type(trainer.strategy).__name__
    if not offered or "train" not in data.splits or sharded:
        return {}
    labels, classes = data.splits["train"].labels, data.num_classes
    batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches * trainer.world_size
    most = int(min(most, START_SHARE * batches * BATCH))
    if labels.ndim != 1 or labels.is_floating_point() or most < max(50, 5 * classes):
        return {}

    def features(split: str, rows: Tensor) -> Tensor:
        found = []
        for some in torch.split(rows, BATCH):
            batch = load_batch(trainer, split, some.tolist())
            with trainer.precision_plugin.forward_context():
                found.append(pl_module.embed(batch).float().cpu())
        return torch.cat(found)

    out: dict[str, Any] = {}
    with preserve_state(trainer, pl_module), torch.no_grad():
        rows = balanced_subset(labels, most)
        centres = class_centres(features("train", rows), labels[rows], classes)
        for split in (name for name in ("val", "test") if name in data.splits):
            truth = data.splits[split].labels
            rows = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))[:most].sort().values
            correct = nearest_centre(features(split, rows), centres) == truth[rows]
            out[split] = {"accuracy": float(correct.double().mean()), "samples": len(rows)}
    return out | {"digest": describe_data(data)["digest"]}


def gallery(
    trainer: Trainer, pl_module: LightningModule, split: str, found: Predictions, shown: int, *, explained: bool
) -> dict[str, list[dict[str, Any]]]:
    """The most confident mistakes and the least certain correct answers, with images where the data module has them."""
    confidence, predicted = found.logits.double().softmax(1).max(1)
    wrong = (predicted != found.labels).nonzero().flatten()
    correct = (predicted == found.labels).nonzero().flatten()
    chosen = {
        "mistakes": wrong[confidence[wrong].argsort(descending=True, stable=True)][:shown],
        "uncertain": correct[confidence[correct].argsort(stable=True)][:shown],
    }
    out, named = {}, with_short_names(found)
    for kind, places in chosen.items():
        out[kind] = [
            {
                "name": sample_name(named, place),
                "label": int(found.labels[place]),
                "predicted": int(predicted[place]),
                "probability": float(confidence[place]),
            }
            for place in places.tolist()
        ]
        if hasattr(getattr(trainer, "datamodule", None), "batch") and found.names and len(places):
            rows, classes = found.rows[places].tolist(), predicted[places] if explained else None
            with warn_on_error("the samples' images"):
                for item, more in zip(out[kind], illustrate(trainer, pl_module, split, rows, classes), strict=True):
                    item |= more
    return out


def section(
    trainer: Trainer,
    pl_module: LightningModule,
    split: str,
    found: Predictions | None,
    shown: int,
    *,
    held_out: tuple[Tensor, Tensor] | None = None,
    explained: bool = True,
    task: str = "",
) -> dict[str, Any]:
    """What a report says of one task's predictions; of none, that there is nothing to say.

    Args:
        trainer: Of the run.
        pl_module: Its module.
        split: Whose samples were predicted.
        found: The predictions.
        shown: How many mistakes, and how many uncertain answers.
        held_out: Logits and labels of others, for the temperature and the thresholds.
        explained: Whether the weights are those of these predictions, so that they can be asked what these depend on.
        task: Its name, of several.
    """
    out: dict[str, Any] = {"evaluation": None, "labels": None, "scores": None}
    out |= {"mistakes": [], "uncertain": [], "furthest": []}
    if found is None or not len(found.labels):
        return out
    if found.kind == "classes":
        out["evaluation"] = evaluation(found.logits, found.labels, held_out=held_out)
        return out | gallery(trainer, pl_module, split, found, shown, explained=explained)
    if found.kind == "labels":
        return out | {"labels": label_evaluation(found.logits, found.labels, held_out=held_out)}
    scores = found.logits[:, 0]
    mean = training_mean(getattr(trainer, "datamodule", None), task)
    out["scores"] = score_evaluation(scores, found.labels, mean=mean)
    return out | {"furthest": furthest(found, scores, shown)}


def furthest(found: Predictions, scores: Tensor, shown: int) -> list[dict[str, Any]]:
    """The samples whose predicted scores, `(n,)`, have the largest errors."""
    named, places = with_short_names(found), (scores - found.labels).abs().argsort(descending=True, stable=True)
    return [
        {"name": sample_name(named, place), "label": float(found.labels[place]), "predicted": float(scores[place])}
        for place in places[:shown].tolist()
    ]


def with_short_names(found: Predictions) -> Predictions:
    """The same, with names as the page shows them."""
    return found._replace(names=[name[:LONGEST_NAME] for name in shortened(found.names)])


def illustrate(
    trainer: Trainer, pl_module: Any, split: str, rows: list[int], classes: Tensor | None
) -> list[dict[str, Any]]:
    """For each row its image or words, and what its class depends on, where the module tells."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    with preserve_state(trainer, pl_module), torch.inference_mode(False), torch.enable_grad():
        batch, weights = load_batch(trainer, split, rows), None
        if classes is not None and hasattr(pl_module, "saliency"):
            with trainer.precision_plugin.forward_context():  # a clone: an inference tensor takes no gradient
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


def load_batch(trainer: Trainer, split: str, rows: list[int]) -> Any:
    """A batch of chosen rows, on the device and in the precision of the trainer."""
    batch = trainer.strategy.batch_to_device(trainer.datamodule.batch(split, rows))  # type: ignore[attr-defined]
    return trainer.precision_plugin.convert_input(batch)
