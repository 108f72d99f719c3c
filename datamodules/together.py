"""Several data sets at once, each with tasks of its own: a batch holds samples of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.nn import functional as F

from .labels.tasks import Task, label_facts
from .labels.values import IGNORED
from .sampling.draws import Batch

KINDS = {"multi_label_classification": "multi_label", "regression": "regression"}  # of data with one label


class Together(LightningDataModule):
    """Data modules of images, or of texts, that are trained on together.

    Contents, licence, source: the members'. A member with one label a sample is a task of the member's name; one with
    `tasks` brings these. A training batch has each member's batch in it, and a label of another member's task is not
    known of a sample; validation, test and prediction go through the members one after the other.

    Args:
        members: Name -> data module. Each has its own batch size, which says how much of a batch it is, its own
            augmentation and its own split.
        mode: How long an epoch is: `max_size_cycle`, until the largest member is through, while the others begin
            again; `min_size`, until the smallest is.
        image_size: Of all images, where a member says none; a recipe's CLI fills in the backbone's.

    Raises:
        ValueError: No member; two tasks of one name; a member that predicts nothing.
    """

    def __init__(
        self,
        members: dict[str, LightningDataModule],
        mode: Literal["max_size_cycle", "min_size"] = "max_size_cycle",
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        if not members:
            raise ValueError("data.members is empty: name data modules, such as {pets: {class_path: OxfordPets}}")
        self.members: dict[str, Any] = members
        self.mode, self.image_size = mode, image_size

    @property
    def tasks(self) -> dict[str, Task]:
        """Those of all members; known before `setup`."""
        found: dict[str, Task] = {}
        for name in self.members:
            for task, what in self.tasks_of(name).items():
                if task in found:
                    raise ValueError(f"data.members: {task!r} is a task of two of them; predictions need two names")
                found[task] = what
        return found

    def tasks_of(self, name: str) -> dict[str, Task]:
        """A member's."""
        member = self.members[name]
        if hasattr(member, "tasks"):
            return dict(member.tasks)
        kind: Any = KINDS.get(getattr(member, "problem_type", ""), "classification")
        return {name: Task(kind, () if kind == "regression" else tuple(member.class_names))}

    @property
    def batch_size(self) -> int:
        """Samples of a training batch, all members together."""
        return sum(int(member.batch_size) for member in self.members.values())

    @property
    def tokenizer_name(self) -> str | None:
        """Of the texts; all members have the same."""
        return next((member.tokenizer_name for member in self.members.values()), None)

    @tokenizer_name.setter
    def tokenizer_name(self, name: str) -> None:
        for member in self.members.values():
            member.tokenizer_name = name

    @property
    def max_length(self) -> int:
        """Tokens of the longest text that any member gives."""
        return max(int(member.max_length) for member in self.members.values())

    def prepare_data(self) -> None:
        for member in self.members.values():
            member.trainer = self.trainer
            member.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        for member in self.members.values():
            member.trainer = self.trainer
            if getattr(member, "image_size", 0) is None:
                member.image_size = self.image_size
            member.setup(stage or "fit")

    @property
    def splits(self) -> dict[str, Any]:
        """Split -> the members' samples, one after the other; empty before `setup`."""
        names = {split for member in self.members.values() for split in member.splits}
        return {
            split: SimpleNamespace(labels=torch.zeros(sum(self.counts(split).values()), dtype=torch.long))
            for split in sorted(names)
        }

    def counts(self, split: str) -> dict[str, int]:
        """Samples of each member in a split, of those that have it; a member without a test is tested on validation."""
        found = {}
        for name, member in self.members.items():
            known = member.splits if split in member.splits or split != "test" else {"test": member.splits["val"]}
            if split in known:
                found[name] = len(known[split].labels)
        return found

    def sample_names(self, split: str) -> Callable[[int], str]:
        """Names by the index of `on_after_batch_transfer`, which begin with the member's."""
        counts = self.counts(split)

        def name_of(index: int) -> str:
            for name, count in counts.items():
                if index < count:
                    return f"{name}: {self.members[name].sample_names(split)(index)}"
                index -= count
            raise IndexError(index)

        return name_of

    @property
    def label_facts(self) -> dict[str, dict[str, float]]:
        """As of images with several labels: the shares are those of a whole batch."""
        found = {}
        for name, member in self.members.items():
            facts = getattr(member, "label_facts", None)
            if facts is None:
                facts = label_facts(self.tasks_of(name), {name: member.splits["train"].labels})
            for task, one in facts.items():
                found[task] = {**one, "known": one["known"] * member.batch_size / self.batch_size}
        return found

    def train_dataloader(self) -> CombinedLoader:
        return CombinedLoader({name: member.train_dataloader() for name, member in self.members.items()}, self.mode)

    def val_dataloader(self) -> CombinedLoader:
        return self._one_after_the_other("val_dataloader", "val")

    def test_dataloader(self) -> CombinedLoader:
        return self._one_after_the_other("test_dataloader", "test")

    def predict_dataloader(self) -> CombinedLoader:
        return self._one_after_the_other("predict_dataloader", "predict")

    def _one_after_the_other(self, hook: str, split: str) -> CombinedLoader:
        loaders = {name: getattr(self.members[name], hook)() for name in self.counts(split)}
        return CombinedLoader(loaders, "sequential")

    def planned_steps(self, samples: int, world_size: int) -> int:
        """Batches of an epoch per rank."""
        counts = self.counts("train")
        steps = [count // int(self.members[name].batch_size) // world_size for name, count in counts.items()]
        return max(steps) if self.mode == "max_size_cycle" else min(steps)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Each member's own, and its labels by task; while training, all members' as one batch."""
        if set(batch) <= set(self.members):
            parts = [self._labelled(name, part, "train") for name, part in batch.items()]
            return merged(parts, self.tasks)
        trainer: Any = self.trainer
        split = {"validate": "val", "test": "test", "predict": "predict"}.get(trainer.state.fn, "val")
        return self._labelled(list(self.counts(split))[dataloader_idx], batch, split)

    def _labelled(self, name: str, batch: Batch, split: str) -> Batch:
        """A member's batch with labels of its tasks by name; of all other tasks they are not known."""
        batch = self.members[name].on_after_batch_transfer(batch, 0)
        if "labels" not in batch:
            batch["labels"] = {name: batch["label"]}
        counts = self.counts(split)
        before = list(counts)[: list(counts).index(name)]
        batch["index"] = batch["index"] + sum(counts[one] for one in before)
        return merged([batch], self.tasks)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint should tell: each member's."""
        return {"class_names": [], "members": {name: member.state_dict() for name, member in self.members.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, member in self.members.items():
            if name in state_dict["members"]:
                member.load_state_dict(state_dict["members"][name])


def merged(batches: list[Batch], tasks: Mapping[str, Task]) -> Batch:
    """Batches one below the other, texts padded to the longest; labels that a batch lacks are marked as not known."""
    found: Batch = {}
    for key in ("image", "input_ids", "attention_mask", "token_type_ids", "index", "label"):
        parts = [batch[key] for batch in batches if key in batch]
        if not parts:
            continue
        if key in ("input_ids", "attention_mask", "token_type_ids"):
            width = max(part.shape[1] for part in parts)
            parts = [F.pad(part, (0, width - part.shape[1])) for part in parts]
        found[key] = torch.cat(parts)
    if "image" in found:
        found["image"] = found["image"].contiguous(memory_format=torch.channels_last)
    found["labels"] = {
        name: torch.cat([labels_in(batch, name, task, found) for batch in batches]) for name, task in tasks.items()
    }
    return found


def labels_in(batch: Batch, name: str, task: Task, whole: Batch) -> torch.Tensor:
    """A task's labels in a batch; of another task's batch none is known."""
    if name in batch["labels"]:
        labels: torch.Tensor = batch["labels"][name]
        return labels.float() if task.kind in ("regression", "multi_label") else labels
    count, device = len(batch["index"]), batch["index"].device
    beyond: tuple[int, ...] = ()
    if task.kind == "multi_label":
        beyond = (task.outputs,)
    elif task.kind == "segmentation":
        beyond = tuple(whole["image"].shape[2:])
    if task.kind in ("regression", "multi_label"):
        return torch.full((count, *beyond), torch.nan, device=device)
    return torch.full((count, *beyond), IGNORED, device=device)
