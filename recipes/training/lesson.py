"""What a student learns from its teacher in a step, and how much that counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..parts.blocks import Watch
from ..parts.distillation import distillation_loss, feature_loss, projection
from ..parts.losses import labelled


class Lesson:
    """A teacher's answers, and features of its blocks, as a loss beside that on the labels.

    Args:
        teacher: Of `deploy.teacher`.
        student: A recipe's module; it gets a projection for each block that is matched.
        batch: To learn the features' shapes from.
        weight: Of the answers in the loss, 0 to 1; the labels have the rest.
        temperature: At which answers are compared.
        match: Block of the student -> block of the teacher.
        match_weight: Of the features' loss, which is added.

    Raises:
        ValueError: A number out of range; a block that is not there, or whose features can't be matched.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        batch: Mapping[str, Tensor],
        *,
        weight: float,
        temperature: float,
        match: Mapping[str, str] | None,
        match_weight: float,
    ) -> None:
        if not 0 <= weight <= 1 or temperature <= 0 or match_weight < 0:
            raise ValueError(
                "model.teacher_weight must be 0 to 1, temperature above 0, match_weight 0 or more; received "
                f"{weight:g}, {temperature:g} and {match_weight:g}"
            )
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self.match, self.match_weight = dict(match or {}), match_weight
        if not self.match:
            return
        self.watch = Watch(student, student.layer_groups(), list(self.match), "model.match_blocks")
        was, _ = student.training, student.eval()
        with torch.no_grad():
            student.logits(batch)
            teacher.logits({**batch, "index": torch.zeros(1, dtype=torch.long)})
        student.train(was)
        for mine, its in self.match.items():
            student.projections[mine] = projection(self.watch.outputs[mine], teacher.watch.outputs[its])

    def begin(self, trainer: Any, device: torch.device) -> None:
        """The teacher meets the data; its answers are computed once where they stay the same: by the first rank."""
        folder = Path(trainer.default_root_dir) / "runs" / "features"
        self.teacher.meet(trainer.datamodule)
        self.teacher.to(device)
        if trainer.is_global_zero:
            self.teacher.answer_once(trainer.datamodule, folder)
        trainer.strategy.barrier("answers of the teacher")
        if not trainer.is_global_zero:
            self.teacher.answer_once(trainer.datamodule, folder)

    def losses(self, student: Any, logits: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """How far a batch's answers are from the teacher's, `teacher_loss`, and its features, `match_loss`."""
        label, weights = batch["label"], student.class_weights
        counts = labelled(label) if weights is None else labelled(label) * weights[label.clamp(min=0)]
        problem = getattr(student, "problem_type", "single_label_classification")
        told = self.teacher.logits(batch)
        if problem == "regression":
            told = student.standard(told)  # as its own are
        found = {
            "teacher_loss": distillation_loss(logits, told, counts, problem_type=problem, temperature=self.temperature)
        }
        if self.match:
            pairs = [
                (student.projections[mine](self.watch.outputs.pop(mine)), self.teacher.watch.outputs[its])
                for mine, its in self.match.items()
            ]
            each = [feature_loss(mine, its, batch.get("attention_mask")) for mine, its in pairs]
            found["match_loss"] = torch.stack(each).mean()
        return found

    def whole(self, loss: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
        """The step's loss, of that on the labels and the others."""
        taught = (1 - self.weight) * loss + self.weight * losses["teacher_loss"]
        return taught + self.match_weight * losses["match_loss"] if self.match else taught
