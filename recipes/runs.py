"""A run's folder: its config, what a checkpoint in it knows, and what a resumed run finds there."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

log = logging.getLogger(__name__)


class SaveRunConfig(SaveConfigCallback):
    """Writes the run's complete config into its folder, as one to start a new run from.

    Args:
        parser: As in Lightning, and so is `config`.
        config: The parsed configuration.
        folder: The run's folder.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, folder: Path) -> None:
        config = config.clone()
        config["ckpt_path"] = None  # else whoever starts from this config would go on from that checkpoint
        super().__init__(parser, config)
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Too early: what is refused before the first batch should leave no folder behind."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write on the first rank; a resumed run's config replaces the one before."""
        if trainer.is_global_zero and not self.already_saved:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, self.folder / "config.yaml", skip_none=False, overwrite=True)
            self.already_saved = True

    on_validation_start = on_test_start = on_predict_start = on_train_start


def run_of_checkpoint(path: str | None) -> Path | None:
    """The folder of the run that wrote a checkpoint, if the checkpoint still lies in it."""
    folder = Path(path).parent.parent if path else None
    return folder if folder and (folder / "config.yaml").is_file() else None


def with_config_of_checkpoint(args: list[str]) -> list[str]:
    """Where only a checkpoint is given, its run's config goes in front of the other arguments."""
    if any(a in ("-c", "--config") or a.startswith("--config=") for a in args):
        return args
    for position, word in enumerate(args):
        path = word.removeprefix("--ckpt_path=") if "=" in word else args[position + 1 : position + 2]
        if word.split("=")[0] == "--ckpt_path" and path:
            run = run_of_checkpoint(path if isinstance(path, str) else path[0])
            if run:
                log.info("config: %s, of the run that wrote the checkpoint", run / "config.yaml")
                return [args[0], "--config", str(run / "config.yaml"), *args[1:]]
    return args


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, read without running any code in it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds a pickle of more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}: --ckpt_path must name a .ckpt file, runs/.../best.ckpt for one")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        reason = str(error).splitlines()[0]
        raise ValueError(f"checkpoint {path} cannot be read safely, as tensors and plain values: {reason}") from error
    return content


def with_weights_of(net: Any, checkpoint: str | Path) -> Any:
    """A model of transformers like the recipe's `net`, with the weights that it had in a checkpoint."""
    state = {k: v for k, v in load_checkpoint(checkpoint)["state_dict"].items() if k.startswith("net.")}
    saved = type(net)(copy.deepcopy(net.config))
    saved.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    return saved


def keep_metrics(folder: Path) -> None:
    """Put the metrics of a run that is resumed aside: Lightning's CSV logger would delete them."""
    metrics = folder / "metrics.csv"
    if metrics.is_file() and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        earlier = len(list(folder.glob("metrics.part*.csv")))
        metrics.rename(folder / f"metrics.part{earlier + 1}.csv")
