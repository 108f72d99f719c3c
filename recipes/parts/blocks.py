"""What blocks inside a net give: watched, and joined with its features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .spelling import did_you_mean


class Watch:
    """Keeps what blocks of a net gave in the last forward pass.

    Args:
        net: The net; images that it is given are square.
        groups: Its blocks, input to output: name -> dotted paths; a block's output is that of its last path.
        names: Those to watch.
        option: Whose names they are, for the message.

    Raises:
        ValueError: There is no such block.
    """

    def __init__(self, net: nn.Module, groups: Mapping[str, Sequence[str]], names: Sequence[str], option: str) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.hooks = []
        for name in names:
            if name not in groups:
                hint = f"{did_you_mean(name, list(groups))}; there are {', '.join(groups)}"
                raise ValueError(f"{option}: {type(net).__name__} has no block {name!r}{hint}")
            self.hooks.append(net.get_submodule(groups[name][-1]).register_forward_hook(self._keep(name)))

    def end(self) -> dict[str, Tensor]:
        """Watch no more; what the last forward pass gave."""
        for hook in self.hooks:
            hook.remove()
        return self.outputs

    def _keep(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else output
            last = found.ndim == 4 and found.shape[1] == found.shape[2] != found.shape[3]  # channels, as Swin has them
            self.outputs[name] = found.movedim(3, 1) if last else found

        return keep


class Fusion:
    """Joins a net's features with the outputs of its blocks: early ones know textures or words, late ones meanings.

    Each block's outputs are averaged over positions and brought to mean 0 and variance 1 over their channels. Hariharan
    et al. 2015, Hypercolumns, https://arxiv.org/abs/1411.5752; for probes of BERT, Devlin et al. 2019, section 5.3,
    https://arxiv.org/abs/1810.04805.

    Args:
        net: The net.
        groups: Its blocks.
        names: Those to join.
        run: Runs it once, to see how wide they are.
    """

    def __init__(
        self, net: nn.Module, groups: Mapping[str, Sequence[str]], names: Sequence[str], run: Callable[[], Any]
    ) -> None:
        self.watch = Watch(net, groups, names, "model.fuse_blocks")
        run_once(net, run)
        self.width = sum(out.shape[1 if out.ndim != 3 else 2] for out in self.watch.outputs.values())

    def join(self, features: Tensor, over: Callable[[Tensor], Tensor]) -> Tensor:
        """Features `(batch, width)` and what the blocks gave in the forward pass before.

        Args:
            features: The net's own.
            over: A block's output, `(batch, channels, height, width)` or `(batch, tokens, width)`, to its mean over
                positions.
        """
        means = [over(out) for out in self.watch.outputs.values()]
        self.watch.outputs.clear()
        return torch.cat([features, *(F.layer_norm(mean, mean.shape[1:]) for mean in means)], 1)


def run_once(net: nn.Module, run: Callable[[], Any]) -> None:
    """Run a net to see what it gives: in evaluation mode, without gradients, and leave it as it was."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    with torch.no_grad():
        run()
    for module, mode in modes.items():
        module.training = mode


def over_places(output: Tensor) -> Tensor:
    """The mean over places of a map or over tokens of an image, `(batch, channels)`."""
    if output.ndim == 4:
        return output.mean((2, 3))
    return output.mean(1) if output.ndim == 3 else output
