"""A trained net made smaller: channels or hidden units cut out, and the run that lets it recover."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ..parts.backbones.small_resnet import SmallResNet
from ..parts.checkpoints import load_checkpoint
from ..parts.encoders import encoder_blocks
from ..parts.pruning import Numbers, changes, cut_channels, numbers_of, pack_zeros
from .mixing import End, in_any, write_run
from .restored import Restored

FREEZERS = ("Freeze", "GradualUnfreezing")  # callbacks that have no place in the recovery of a whole net


def example(net: Restored, count: int = 2) -> Callable[[nn.Module], Any]:
    """Calls a module with samples like the net's own: images at its size, or texts of its length."""
    if net.recipe == "vision":
        images = torch.rand(count, 3, net.image_size, net.image_size, generator=torch.Generator().manual_seed(0))
        return lambda model: model(images)
    length = min(net.max_length, 64)
    ids = torch.randint(5, len(net.tokenizer), (count, length), generator=torch.Generator().manual_seed(0))
    return lambda model: model(input_ids=ids, attention_mask=torch.ones_like(ids))


def cut(net: Restored, share: float) -> Numbers:
    """Cut channels, of encoders the hidden units of their feed-forward layers, out of a net in place.

    Args:
        net: Without adapters.
        share: Of the multiplications that go.

    Returns:
        The sizes that changed.

    Raises:
        ValueError: The net can't be cut, or not by so much.
    """
    model, before = net.model, numbers_of(net.model)
    groups = model.layer_groups()
    last = [m for path, m in model.named_modules() if in_any(path, groups["head"]) and isinstance(m, nn.Linear)]
    if net.recipe == "vision":
        cut_channels(model, example(net), share, kept=[*last, *streams(model)])
        with torch.no_grad():
            images = torch.zeros(1, 3, net.image_size, net.image_size)
            model.backbone.width = model.backbone(images).shape[1]
    else:
        hidden = feed_forward(model.net)
        cut_channels(model, example(net), share, only=hidden)
        widths = {layer.out_features for layer in hidden}
        name = next((key for key in ("intermediate_size", "hidden_dim") if hasattr(model.net.config, key)), None)
        if len(widths) == 1 and name:
            setattr(model.net.config, name, widths.pop())  # so that plain transformers opens it
    return changes(model, before)


def streams(model: nn.Module) -> list[nn.Module]:
    """Layers whose outputs small ResNets add to a padded copy of their input: no tool follows that."""
    return [
        layer
        for net in model.modules()
        if isinstance(net, SmallResNet)
        for path, layer in net.named_modules()
        if path == "conv1" or path.endswith(".conv2")
    ]


def feed_forward(net: Any) -> list[nn.Linear]:
    """The first layer of each feed-forward block of an encoder: known by its width.

    Raises:
        ValueError: There is none.
    """
    config = net.config
    width = getattr(config, "intermediate_size", getattr(config, "hidden_dim", None))
    inside = [path for name, paths in encoder_blocks(net).items() if name != "head" for path in paths]
    found = [
        m
        for path, m in net.named_modules()
        if isinstance(m, nn.Linear) and in_any(path, inside) and m.out_features in (width, 2 * (width or 0))
        if m.in_features != m.out_features
    ]
    if not found:
        raise ValueError(f"no feed-forward layer of {type(net).__name__} is known, whose hidden units could be cut")
    return found


@dataclass(frozen=True)
class Recovery:
    """A run in which a net that lost a part of itself, or is about to, trains on.

    Args:
        main: Of the recipe.
        epochs: How long it takes.
        sizes: Of a net that was cut.
        facts: Of a net that was cut: what its module says of itself.
        callbacks: More callbacks, as in a config.
        lr_factor: On the learning rates.
    """

    main: Callable[[list[str]], Any]
    epochs: int
    sizes: Numbers = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[dict[str, Any]] = ()
    lr_factor: float = 1.0

    def run(self, end: End, weights: Callable[[], Mapping[str, Tensor]], folder: Path) -> Path:
        """Train on, in a run of its own; returns its best checkpoint. What was killed goes on.

        Args:
            end: Whose config and data the run has.
            weights: Gives those to begin with.
            folder: Of the run.
        """
        best, last, done = (folder / "checkpoints" / name for name in ("best.ckpt", "last.ckpt", "done"))
        if not done.is_file():
            start = folder / "checkpoints" / "start.ckpt"
            if not start.is_file():
                write_run(end, weights(), folder, facts={**self.facts, "sizes": self.sizes}, name=start.name)
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            text = yaml.safe_dump(self.applied(config), sort_keys=False)
            (folder / "config.yaml").write_text(text, encoding="utf-8")
            going = last if last.is_file() else start
            try:
                self.main(["fit", f"--ckpt_path={going}", "--quiet"])
            except SystemExit as stop:
                if stop.code:  # else it had finished, and was killed before it could say so
                    raise
            pack(best)
            start.unlink(missing_ok=True)
            done.touch()
        return best

    def applied(self, config: dict[str, Any]) -> dict[str, Any]:
        """A run's config with these changes; what froze a part of the net is gone, and nothing pretrained is loaded."""
        trainer, model = config["trainer"], config["model"]
        own = {callback["class_path"] for callback in self.callbacks}
        given = trainer.get("callbacks") or []
        kept = [c for c in given if c["class_path"].rpartition(".")[2] not in FREEZERS and c["class_path"] not in own]
        trainer |= {"callbacks": [*kept, *self.callbacks], "max_epochs": self.epochs, "max_steps": -1}
        away = {"weights": None, "pretrained": False, "lr_limit": None, "teacher": None, "match_blocks": None}
        model |= {"lr_factor": self.lr_factor, **{key: value for key, value in away.items() if key in model}}
        return config


def pack(checkpoint: Path) -> None:
    """Save a checkpoint again, so that zeros take no room; nothing of the optimiser."""
    content = load_checkpoint(checkpoint)
    content["state_dict"], content["packed"] = pack_zeros(content["state_dict"])
    beside = checkpoint.with_suffix(".part")
    torch.save(content | {"optimizer_states": []}, beside)
    beside.replace(checkpoint)
