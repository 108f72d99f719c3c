"""What one training step costs beyond the net: logging, metrics, bar and callbacks of the quickstart.

    python -m benchmarks.overhead

The quickstart's own model and batches, one thread, in fp32 and in bf16. After each epoch under Trainer.fit, with all
that the command line adds, comes the same epoch by hand in the same precision: loading, augmentation, forward, loss,
backward, clipping, update. The overhead is the median over epochs of the difference, in CPU milliseconds per step.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback

import recipes.cli.defaults
from benchmarks.measure import write_result
from recipes.parts.optim import build_optimizer
from recipes.vision import VisionClassifier, main

EPOCHS, WARM_UP = 60, 5
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


class Clock(Callback):
    """CPU seconds of the batches of each epoch, validation not included, and of the same epoch by hand."""

    def __init__(self, bf16: bool) -> None:
        self.bf16 = bf16
        self.recipe: list[float] = []
        self.bare: list[float] = []
        self.model: Any = VisionClassifier(5, "resnet8", image_size=8).train()
        adamw = functools.partial(torch.optim.AdamW, lr=0.01)
        self.optimizer = build_optimizer(adamw, self.model.param_groups())

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = time.process_time()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.recipe.append(time.process_time() - self.started)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        loader = trainer.datamodule.train_dataloader()
        loader.sampler.set_epoch(trainer.current_epoch)
        started = time.process_time()
        for batch in loader:
            batch = trainer.datamodule.on_after_batch_transfer(batch, 0)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = self.model.loss(self.model(batch["image"]), batch["label"])
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        self.bare.append(time.process_time() - started)


def measured(precision: str) -> dict[str, Any]:
    """Milliseconds per step with the recipe, by hand, and their difference."""
    clock = Clock(bf16=precision == "bf16")
    defaults = recipes.cli.defaults.default_callbacks
    recipes.cli.defaults.default_callbacks = lambda *a, **k: [*defaults(*a, **k), clock]  # type: ignore
    try:
        how = [
            f"--trainer.max_epochs={EPOCHS}",
            "--trainer.accelerator=cpu",
            f"--trainer.precision={PRECISIONS[precision]}",
        ]
        cli = main(["fit", "--config", "vision/quickstart", *how, *sys.argv[1:]])
    finally:
        recipes.cli.defaults.default_callbacks = defaults  # type: ignore
    steps = cli.trainer.num_training_batches
    recipe, bare = ([s / steps * 1e3 for s in seconds[WARM_UP:]] for seconds in (clock.recipe, clock.bare))
    differences = sorted(one - other for one, other in zip(recipe, bare, strict=True))
    return {
        "recipe_ms_per_step": round(statistics.median(recipe), 2),
        "bare_ms_per_step": round(statistics.median(bare), 2),
        "overhead_ms_per_step": round(statistics.median(differences), 2),
        "quartiles_ms": [round(differences[len(differences) * q // 4], 2) for q in (1, 3)],
        "epochs": len(differences),
    }


def run() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    write_result("overhead", {precision: measured(precision) for precision in PRECISIONS})


if __name__ == "__main__":
    run()
