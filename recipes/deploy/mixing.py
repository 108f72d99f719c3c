"""Finished nets whose weights are mixed: read one by one, measured, and written as a checkpoint like any other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from ..parts.checkpoints import is_whole, load_checkpoint, run_of_checkpoint
from ..parts.peft.targets import is_inside
from ..parts.soups import Weights, fill, remeasure_norms
from .restored import Restored, restore
from .variants import Answer, Held

TIED = (  # callbacks that keep weights, or the names of a run's files
    *("ModelCheckpoint", "EMA", "Interpolation", "WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"),
)
NORM_SAMPLES = 1024  # training images that BatchNorm's statistics are measured on anew


class End:
    """A finished net, of which nothing is in memory but the tensors that are asked for.

    Args:
        path: A checkpoint, or the folder of a run: its best.
        base: Where the weights are that a checkpoint of adapters leaves out.

    Raises:
        FileNotFoundError: There is no checkpoint.
    """

    def __init__(self, path: Path, base: str | None = None) -> None:
        best = path / "checkpoints" / "best.ckpt"
        self.path, self.base = (best if best.is_file() else path), base
        self.merged: Weights | None = None
        if not self.path.is_file():
            raise FileNotFoundError(f"no checkpoint {path}: give runs/.../best.ckpt, or the folder of a run with one")

    def restored(self) -> Restored:
        """The net, its adapters merged where plain weights can hold them."""
        found = restore(self.path, self.base)
        found.merge()
        return found

    def weights(self) -> Weights:
        """All of its weights, left in a file: the checkpoint, or a temporary one of what adapters are merged to."""
        if self.merged is not None:
            return self.merged
        content = load_checkpoint(self.path, mapped=True)
        if content["hyper_parameters"].get("peft") is None and is_whole(content):
            return content["state_dict"]  # type: ignore[no-any-return]
        with tempfile.TemporaryDirectory() as folder:  # what is mapped stays when its name is gone
            torch.save({"state_dict": self.restored().model.state_dict()}, f"{folder}/merged.ckpt")
            merged: Weights = load_checkpoint(f"{folder}/merged.ckpt", mapped=True)["state_dict"]
        self.merged = merged
        return merged


class Mixture:
    """A net that takes the weights of any mixture, and what answers with them.

    Args:
        net: Of the last end.
        heads: Other nets whose heads answer for some of the samples: name of the samples -> net.
        data: Whose training images BatchNorm is measured on.
        remeasured: Whether it is.
    """

    def __init__(self, net: Restored, heads: Mapping[str, Restored], data: Any, *, remeasured: bool) -> None:
        self.net, self.heads, self.data, self.remeasured = net, heads, data, remeasured
        self.apart = net.model.layer_groups()["head"]

    def make(self, weights: Iterable[tuple[str, Tensor]], *, remeasure: bool = True) -> Callable[[Held], Answer]:
        """Take weights; returns what answers for which samples.

        Args:
            weights: By the net's names.
            remeasure: Whether BatchNorm's statistics are a mixture's, and of no use.
        """
        model = self.net.model
        fill(model, weights)
        if self.remeasured and remeasure:
            remeasure_norms(model, self.images, model)
        trunk = {k: v for k, v in model.state_dict().items() if not in_any(k, self.apart)}
        for other in self.heads.values():
            fill(other.model, trunk.items())
        return lambda held: self.heads.get(held.name, self.net).model.logits  # type: ignore[no-any-return]

    def images(self) -> Iterator[Tensor]:
        """Training images as in training, the same each time."""
        loader = self.data.train_dataloader()
        for batch in islice(loader, -(-NORM_SAMPLES // self.data.batch_size)):
            yield self.data.on_after_batch_transfer(move_data_to_device(batch, self.net.model.device), 0)["image"]


def in_any(name: str, paths: Sequence[str]) -> bool:
    """Whether a name is one of the paths, or below one."""
    return any(is_inside(name, path) for path in paths)


def mixable(
    start: Weights, end: Weights, apart: Sequence[str], names: tuple[str, str], *, whole: bool = True
) -> list[str]:
    """Names of the tensors that two nets share.

    Args:
        start: Weights of one.
        end: Of the other.
        apart: Paths of what is left alone: the heads of other classes.
        names: What to call the nets in an error.
        whole: Whether the first holds all weights of its net; else it may lack some.

    Raises:
        ValueError: They are not of the same architecture.
    """
    for name in sorted(start.keys() | end.keys() if whole else start.keys()):
        shapes = [tuple(net[name].shape) if name in net else "not there" for net in (start, end)]
        if not in_any(name, apart) and shapes[0] != shapes[1]:
            raise ValueError(
                f"{names[0]} and {names[1]} are different nets, whose weights can't be mixed: {name} is {shapes[0]} in "
                f"one and {shapes[1]} in the other"
            )
    found = [name for name in end if name in start and not in_any(name, apart)]
    if not found:
        raise ValueError(f"{names[0]} and {names[1]} have no weight in common")
    return found


def norms_differ(nets: Iterable[Weights]) -> bool:
    """Whether BatchNorm's statistics are not the same in all of them; one net after the other."""
    others = iter(nets)
    first = next(others)
    means = [name for name in first if name.endswith("running_mean")]
    return any(name in other and not torch.equal(first[name], other[name]) for other in others for name in means)


def write_run(
    end: End, weights: Weights, folder: Path, *, facts: Mapping[str, Any] | None = None, name: str = "best.ckpt"
) -> Path:
    """A run's folder with a checkpoint that holds other weights, and nothing of the optimiser or of other weights.

    Args:
        end: Whose arguments, data and progress the checkpoint has, and whose config goes with it.
        weights: By the net's names; without adapters that were merged.
        folder: Of the run.
        facts: That the checkpoint says of its net beside what it said; then it begins afresh, without progress.
        name: Of the checkpoint.

    Returns:
        The checkpoint, which appears whole or not at all.
    """
    content = load_checkpoint(end.path, mapped=True)
    state, arguments = content["state_dict"], content["hyper_parameters"]
    plain: dict[str, Any] = {}  # what the net's arguments have to say no more
    if arguments.get("peft") is None or state.keys() - weights.keys():  # there are none, or they were merged
        plain = {"peft": None, "save_base": None}
        if arguments.get("peft") is not None:  # whose rate suits plain weights no more
            plain |= {"lr_factor": 1.0, "lr_limit": None}
        state = weights
        content["recipe"] = {key: fact for key, fact in content["recipe"].items() if key != "base"}
    content["hyper_parameters"] = arguments | {key: value for key, value in plain.items() if key in arguments}
    content["state_dict"] = {key: weights[key].detach().cpu().clone() for key in state}
    content["optimizer_states"] = []
    content["callbacks"] = {k: v for k, v in content["callbacks"].items() if not k.startswith(TIED)}
    if facts is not None:
        content["recipe"] = {**content["recipe"], **facts}
        content |= {"epoch": 0, "global_step": 0, "lr_schedulers": [], "callbacks": {}}
        content.pop("loops", None)
    if run := run_of_checkpoint(str(end.path)):
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        config["model"] |= {key: value for key, value in plain.items() if key in config["model"]}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    target = folder / "checkpoints" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".part")
    torch.save(content, beside)
    return beside.replace(target)
