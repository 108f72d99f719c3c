"""Ten epochs of a linear probe: features computed in every epoch, and once.

    python -m benchmarks.features

A frozen ResNet-18 of random weights at 64 px on 1,200 pictures in memory, without augmentation, through the recipe's
command line; CPU seconds of the whole fit, the computing of the features included, start-up and parsing not.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.measure import write_result
from benchmarks.training import write_pictures
from recipes.vision import VisionCLI, main


def fit(root: str, *options: str) -> tuple[float, dict[str, float]]:
    """Seconds and metrics of one probe."""
    run = VisionCLI._run_subcommand
    seconds = []

    def timed(self: VisionCLI, subcommand: str) -> None:
        started = time.process_time()
        run(self, subcommand)
        seconds.append(time.process_time() - started)

    VisionCLI._run_subcommand = timed  # type: ignore[method-assign]
    cli = main(
        [
            *("fit", "--test", "--config", "vision/folder_resnet50", "--model.backbone=resnet18"),
            *("--model.weights=null", "--model.image_size=64", "--data.augment=none"),
            *("--trainer.callbacks+=Freeze", "--trainer.callbacks.train_last_blocks=1"),
            *(f"--data.root={root}", "--trainer.max_epochs=10", f"--trainer.default_root_dir={root}-runs"),
            *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.precision=32-true"),
            *options,
        ]
    )
    VisionCLI._run_subcommand = run  # type: ignore[method-assign]
    return seconds[0], {k: float(v) for k, v in cli.trainer.callback_metrics.items()}


def run() -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as folder:
        root = str(Path(folder) / "pictures")
        write_pictures(Path(root))
        recomputed, first = fit(root)
        stored, second = fit(root, "--feature_views=1")
        again, _ = fit(root, "--feature_views=1")
    differences = [abs(first[key] - second[key]) for key in first if key.startswith("test/")]
    write_result(
        "features",
        {
            "recomputed_cpu_s": round(recomputed, 2),
            "stored_cpu_s": round(stored, 2),
            "stored_again_cpu_s": round(again, 2),
            "ratio": round(recomputed / stored, 2),
            "largest_difference_of_test_metrics": max(differences),
        },
    )


if __name__ == "__main__":
    run()
