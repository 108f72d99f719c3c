"""Make the weights that vision/quickstart starts from, and write down how good they are.

    python -m benchmarks.quickstart_weights

Trains vision/quickstart_pretrain, takes the backbone out of its best checkpoint, and writes
recipes/weights/digits_0_4_resnet8.safetensors.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from benchmarks.measure import write_result
from recipes.cli.early import WEIGHTS
from recipes.parts.checkpoints import load_checkpoint
from recipes.vision import main

NAME = "digits_0_4_resnet8"

cli = main(["fit", "--test", "--config", "vision/quickstart_pretrain", "--trainer.accelerator=cpu"])
best = load_checkpoint(cli.trainer.checkpoint_callback.best_model_path)["state_dict"]
backbone = {key.removeprefix("backbone."): value.contiguous() for key, value in best.items() if "backbone." in key}
target = WEIGHTS / f"{NAME}.safetensors"
target.parent.mkdir(exist_ok=True)
save_file(
    backbone, target, metadata={"backbone": "resnet8", "data": "digits 0-4, scikit-learn", "licence": "Apache-2.0"}
)
target.chmod(0o644)
write_result(
    "quickstart_pretrain",
    {
        "test_accuracy": float(cli.trainer.callback_metrics["test/accuracy"]),
        "tensors": len(backbone),
        "bytes": target.stat().st_size,
        "config": Path("vision/quickstart_pretrain").as_posix(),
    },
)
