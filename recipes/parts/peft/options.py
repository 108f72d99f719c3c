"""How a frozen net is adapted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Method: TypeAlias = Literal["lora", "dora", "ia3", "adapter", "prompt", "prefix"]
Start: TypeAlias = Literal["default", "orthogonal", "pissa"]
VIRTUAL = ("prompt", "prefix")  # tokens that no text has
LOW_RANK = ("lora", "dora")
MERGEABLE = (*LOW_RANK, "ia3")


@dataclass(frozen=True)
class Peft:
    """How a frozen net is adapted.

    Args:
        method: `lora`, a product of two thin matrices beside each weight (Hu et al. 2021,
            https://arxiv.org/abs/2106.09685); `dora`, the same with a length per output (Liu et al. 2024,
            https://arxiv.org/abs/2402.09353); `ia3`, a factor per channel (Liu et al. 2022,
            https://arxiv.org/abs/2205.05638); `adapter`, a bottleneck after each block (Houlsby et al. 2019,
            https://arxiv.org/abs/1902.00751; Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247); of texts also
            `prompt`, learnt tokens in front of each text (Lester et al. 2021, https://arxiv.org/abs/2104.08691), and
            `prefix`, learnt keys and values in each attention (Li & Liang 2021, https://arxiv.org/abs/2101.00190;
            Liu et al. 2022, https://arxiv.org/abs/2110.07602).
        rank: Of the two matrices; of adapters, the width of the bottleneck.
        alpha: LoRA's product is scaled by alpha / rank.
        dropout: Probability of dropping an input of the two matrices, or of a bottleneck.
        targets: `attention`: its projections; `all`: every linear layer and convolution of the blocks; or patterns,
            searched for in the layers' names. By default, what suits the method.
        start: Of LoRA's matrices: `default`, the product is 0; `orthogonal`, the same from orthogonal rows;
            `pissa`, the weight's first singular vectors, and the rest stays frozen (Meng et al. 2024,
            https://arxiv.org/abs/2404.02948).
        rank_stabilised: Scale by alpha / sqrt(rank), as rsLoRA does (Kalajdzievski 2023,
            https://arxiv.org/abs/2312.03732).
        tokens: Length of a prompt or a prefix.
        train: Patterns, searched for in names, of parameters that train as they are: `norm`, for one.

    Raises:
        ValueError: A value out of range, or one that the method does not know.
    """

    method: Method
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Literal["attention", "all"] | list[str] | None = None
    start: Start = "default"
    rank_stabilised: bool = False
    tokens: int = 20
    train: list[str] | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"peft.method must be one of {', '.join(get_args(Method))}; received {self.method!r}")
        if self.rank < 1 or self.tokens < 1:
            raise ValueError(f"peft.rank and peft.tokens must be 1 or more; received {self.rank} and {self.tokens}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"peft.dropout must be at least 0 and below 1; received {self.dropout:g}")
        low_rank = self.method in LOW_RANK
        if (self.start != "default" or self.rank_stabilised) and not low_rank:
            raise ValueError(f"peft.start and peft.rank_stabilised are of lora and dora, not of {self.method}")
        if self.dropout and self.method not in (*LOW_RANK, "adapter"):
            raise ValueError(f"peft.dropout is of lora, dora and adapter, not of {self.method}")
        if self.targets is not None and self.method in VIRTUAL:
            raise ValueError(f"peft.targets: {self.method} adapts no layers; leave it out")
        if self.start == "pissa" and self.method == "dora":
            raise ValueError("peft.start pissa is of lora: dora's lengths are those of the weight as it was")
