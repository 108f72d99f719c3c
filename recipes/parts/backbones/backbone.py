"""A net without its classifier: features, ordered blocks, and what must be known to use it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..blocks import Fusion, over_places
from ..spelling import nearest_name

RGB = tuple[float, float, float]
Blocks = dict[str, list[str]]


class BackboneFacts(NamedTuple):
    """What is known of a backbone without building it.

    Attributes:
        input_size: Side in pixels of the square images it is meant for.
        min_size: Smallest side in pixels it takes.
        mean: Mean per channel that its weights expect to be subtracted from pixel values in [0, 1].
        std: Standard deviation per channel that its weights expect the difference to be divided by.
        licence: Licence of its published weights.
        source: Link to the paper, or to the page of the weights.
        multiple_of: The side must be a multiple of this many pixels.
        fixed_size: Whether the side is fixed when the net is built; else it takes any from `min_size` on.
    """

    input_size: int
    min_size: int
    mean: RGB
    std: RGB
    licence: str
    source: str
    multiple_of: int = 1
    fixed_size: bool = False


class Backbone(nn.Module):
    """A net without its classifier, and what one must know to fine-tune it.

    The facts of most use are attributes of their own: `input_size`, `min_size`, `mean`, `std`.

    Args:
        net: The net, mapping `(batch, 3, height, width)` to `(batch, width)`.
        name: Name it was built from.
        facts: What is known of it; `input_size` is the side in pixels it was built for.
        width: Number of features.
        blocks: Ordered, input to output: name -> dotted paths inside this module of submodules or parameters.
            Every parameter, and every module with buffers, lies in exactly one block.
        head: Names of the classifiers taken off `net`: a state dict of the whole net has keys below them.
        aux_widths: Number of features of each auxiliary branch, in order of depth.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str,
        facts: BackboneFacts,
        width: int,
        blocks: Blocks,
        head: tuple[str, ...] = (),
        aux_widths: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.net = net
        self.name = name
        self.facts = facts
        self.width = width
        self.blocks = blocks
        self.head = head
        self.aux_widths = aux_widths
        self.input_size, self.min_size = facts.input_size, facts.min_size
        self.mean, self.std = facts.mean, facts.std
        self.fusion: Fusion | None = None

    def fuse(self, names: Sequence[str]) -> None:
        """Give more features: the named blocks' outputs, averaged over places, after the net's own.

        Raises:
            ValueError: There is no such block.
        """
        image = torch.zeros(1, 3, self.input_size, self.input_size)
        self.fusion = Fusion(self, self.blocks, names, lambda: self.net(image))
        self.width += self.fusion.width

    def forward(self, images: Tensor) -> Tensor:
        """Images `(batch, 3, height, width)` to features `(batch, width)`.

        Raises:
            ValueError: The images have another number of dimensions or channels, or a size it does not take.
        """
        return self.forward_aux(images)[0]

    def forward_aux(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features, and those of the auxiliary branches, each for a classifier of its own.

        Auxiliary branches run only in training mode and where built with `aux=True`; else the list is empty.

        Args:
            images: `(batch, 3, height, width)`.

        Returns:
            Features `(batch, width)`, and one tensor `(batch, aux_width)` for each of `aux_widths`.

        Raises:
            ValueError: As in `forward`.
        """
        if not torch.compiler.is_compiling():
            self._check(images)
        features, aux = self.net(images), []
        if isinstance(features, tuple):  # torchvision's order: the net's output, then the branches, deepest first
            features, *aux = features
        if self.fusion is not None:
            features = self.fusion.join(features, over_places)
        return features, aux[::-1]

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            expected = "images (batch, 3, height, width)"
            raise ValueError(f"backbone {self.name!r} expects {expected}; received {tuple(images.shape)}")
        height, width = images.shape[2:]
        if self.facts.fixed_size and not height == width == self.input_size:
            raise ValueError(
                f"backbone {self.name!r} was built for images of {self.input_size} px; received "
                f"{height} x {width}: resize them, or build it with their image_size"
            )
        if min(height, width) < self.min_size:
            minimum = f"takes images of {self.min_size} px and more"
            raise ValueError(f"backbone {self.name!r} {minimum}; received {height} x {width}")


def has_state(module: nn.Module) -> bool:
    """Whether it has parameters or buffers."""
    return any(True for _ in chain(module.parameters(), module.buffers()))


def unknown(name: str, known: Iterable[str]) -> str:
    """What to say of a backbone's name that is not among those known."""
    nearest = nearest_name(name, known)
    guess = f"did you mean {nearest!r}? " if nearest else ""
    return f"backbone {name!r} is not known; {guess}python -m recipes ls backbones lists them."


def check_multiple(name: str, image_size: int, patch: int) -> None:
    """Refuse a size that patches don't fill."""
    remainder = image_size % patch
    if remainder:
        below = image_size - remainder
        raise ValueError(
            f"backbone {name!r} needs an image_size that is a multiple of {patch}; received "
            f"{image_size}, between {below} and {below + patch}"
        )


def patch_of(net: nn.Module, image_size: int, facts: BackboneFacts) -> int:
    """Side in pixels of the patches that a net cuts an image into, where it leaves out what makes none; else 1.

    At the size that it was trained at, a border is unseen in training, too.
    """
    first = next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)
    padded = any(getattr(module, "dynamic_img_pad", False) for module in net.modules())
    if first is None or padded or image_size == facts.input_size or first.padding not in ((0, 0), "valid"):
        return 1
    return int(first.stride[0]) if first.stride == first.kernel_size else 1
