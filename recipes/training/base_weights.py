"""Frozen weights that a checkpoint leaves out: they can be loaded again from where they came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..parts.features import digest_of
from ..parts.peft import follow_start
from ..parts.peft.targets import is_inside


class Base:
    """The pretrained part of a net, recognised by a hash when it is loaded again.

    Made before the net is adapted, while its weights are as they were loaded.

    Args:
        net: With its pretrained weights.
        path: Where it is in the module that is saved.
        source: Where they came from; None where they can't be loaded again, and checkpoints are whole.
        new: Names and paths in `net` that no weights were loaded for.
    """

    def __init__(self, net: nn.Module, path: str, source: str | None, new: Iterable[str] = ()) -> None:
        self.net, self.path, self.source, self.new = net, path, source, tuple(new)
        loaded = {k: v for k, v in net.state_dict().items() if not any(is_inside(k, name) for name in self.new)}
        self.loaded = {p for n, p in net.named_parameters() if n in loaded}
        self.digest = digest_of(loaded) if source is not None else ""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """What was loaded, by the module's names; of a net that is not adapted."""
        for name, value in self.net.state_dict().items():
            if not any(is_inside(name, path) for path in self.new):
                yield f"{self.path}.{name}", value

    def leave_out(
        self, state: dict[str, Tensor], frozen: set[nn.Parameter], still: set[nn.Module]
    ) -> dict[str, Tensor]:
        """A state of the whole module without what was loaded and stays as it is.

        Args:
            state: By the module's names.
            frozen: Parameters that are frozen for the whole fit.
            still: Modules whose statistics don't change.
        """
        frozen, out = frozen & self.loaded, set[str]()
        for path, module in self.net.named_modules(remove_duplicate=False):
            own = dict(module.named_parameters(recurse=False))
            names = [name for name, parameter in own.items() if parameter in frozen]
            if module in still or (own and len(names) == len(own)):
                names += [name for name, _ in module.named_buffers(recurse=False)]
            out |= {".".join(filter(None, (self.path, path, name))) for name in names}
        return {name: value for name, value in state.items() if name not in out}

    def complete(self, checkpoint: dict[str, Any], module: nn.Module) -> None:
        """Put into a checkpoint's state what it left out.

        Raises:
            ValueError: It was trained beside other weights.
        """
        facts = checkpoint.get("recipe", {}).get("base")
        if facts is None:
            return
        if facts["digest"] != self.digest:
            raise ValueError(
                f"the checkpoint holds only what was trained beside the weights {facts['source']}, and these are "
                f"others, of {self.source or 'nowhere'}"
            )
        state: dict[str, Tensor] = checkpoint["state_dict"]
        follow_start(self.net, {k.removeprefix(f"{self.path}."): v for k, v in state.items()})
        checkpoint["state_dict"] = {**module.state_dict(), **state}
