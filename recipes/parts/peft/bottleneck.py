"""Bottleneck adapters: two thin layers with a non-linearity between them, after a frozen one."""

from __future__ import annotations

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A frozen layer and what is added to its output: up(gelu(down(output))), which is 0 at the start.

    After the last layer of a transformer's block it is the adapter of Pfeiffer et al. 2021,
    https://arxiv.org/abs/2005.00247; with targets that name its attention's output, too, those of Houlsby et al. 2019,
    https://arxiv.org/abs/1902.00751; after a convolution, a residual adapter over channels, as in Rebuffi et al. 2018,
    https://arxiv.org/abs/1803.10082, with a bottleneck.

    Args:
        base_layer: Linear, or a convolution; it is not changed.
        width: Of the bottleneck.
        dropout: Probability of dropping an input of the bottleneck.
    """

    def __init__(self, base_layer: nn.Module, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base_layer
        if isinstance(base_layer, nn.Conv2d):
            self.adapter_down: nn.Module = nn.Conv2d(base_layer.out_channels, width, 1)
            self.adapter_up: nn.Module = nn.Conv2d(width, base_layer.out_channels, 1)
        else:
            assert isinstance(base_layer, nn.Linear)
            self.adapter_down = nn.Linear(base_layer.out_features, width)
            self.adapter_up = nn.Linear(width, base_layer.out_features)
        self.drop = nn.Dropout(dropout)
        nn.init.zeros_(self.adapter_up.weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.adapter_up.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """As the frozen layer's, plus what was learnt."""
        out: Tensor = self.base_layer(x)
        learnt: Tensor = self.adapter_up(nn.functional.gelu(self.adapter_down(self.drop(out))))
        return out + learnt
