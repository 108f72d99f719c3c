"""How much each of several tasks counts: weights of their losses, or of their gradients where these meet.

A net's heads learn of their own task alone. What they share, the trunk, gets a sum of the tasks' gradients, and there
one task may drown another, or undo what it learns. What can be done about that is a function of the Gramian, the
products of the tasks' gradients with each other: `gram` computes it, `Branch` applies the weights that follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

BalanceKind: TypeAlias = Literal["fixed", "uncertainty", "gradnorm", "upgrad", "mgda", "dual_proj", "aligned_mtl"]
WEIGHTINGS = {  # by TorchJD
    "upgrad": "UPGradWeighting",
    "mgda": "MGDAWeighting",
    "dual_proj": "DualProjWeighting",
    "aligned_mtl": "AlignedMTLWeighting",
}
RATE_POWER = 1.0  # how much faster a task is to learn that lags behind: GradNorm's alpha, 0.12 to 1.5 in its paper
SMOOTHING = 0.9  # of the norms of gradients, which differ from batch to batch


class Branch(torch.autograd.Function):
    """The identity, whose gradient is scaled: where a head is joined to the trunk."""

    @staticmethod
    def forward(ctx: Any, shared: Tensor, weights: Tensor, task: int) -> Tensor:  # type: ignore[override]
        """Shared features of any shape, as they are; `weights` `(tasks,)` are read in the backward pass."""
        ctx.weights, ctx.task = weights, task
        return shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """The task's gradient, by its weight."""
        return slope * ctx.weights[ctx.task].to(slope.dtype), None, None


def rows(losses: Sequence[Tensor], parameters: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """The gradient of each loss at the shared parameters, `(tasks, their number)`, float32.

    Args:
        losses: Scalars.
        parameters: Shared by the tasks, or by some.
        scale: Losses are multiplied by it first, and gradients divided: fp16 loses small ones.
    """
    found = []
    for loss in losses:
        slopes = torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(slopes, parameters, strict=True)
        flat = [p.new_zeros(p.numel()) if slope is None else slope.reshape(-1) for slope, p in pairs]
        found.append(torch.cat([part.float() for part in flat]) / scale)
    return torch.stack(found)


def cosines(gram: Tensor) -> Tensor:
    """Of the angles between the tasks' gradients, `(tasks, tasks)`; 0 where one is 0."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    return gram / (norms[:, None] * norms).clamp(min=torch.finfo(gram.dtype).tiny)


class TaskWeights(nn.Module):
    """Weights of tasks, by a rule.

    - `fixed`: losses, by hand.
    - `uncertainty`: losses, each by a variance that is learnt. Kendall et al. 2018, https://arxiv.org/abs/1705.07115
    - `gradnorm`: gradients at the trunk, to like length, longer where a task lags behind. A closed form of what Chen et
      al. 2018, https://arxiv.org/abs/1711.02257, learn by a step of its own.
    - `upgrad`: gradients at the trunk, so that no task is made worse. Quinton & Rey 2024,
      https://arxiv.org/abs/2406.16232
    - `mgda`, `dual_proj`, `aligned_mtl`: the same by other rules; see TorchJD's documentation.

    Args:
        names: Of the tasks.
        squared: Whether each one's loss is a squared error, in which the variance counts half.
        how: The rule.
        fixed: Factors on the losses, which the rule begins from.

    Raises:
        ValueError: A rule that is not known; a factor that is not above 0.
        ImportError: A rule of TorchJD's, and it is not installed.
    """

    def __init__(
        self, names: Sequence[str], squared: Sequence[bool], how: BalanceKind = "fixed", fixed: Sequence[float] = ()
    ) -> None:
        super().__init__()
        if how not in ("fixed", "uncertainty", "gradnorm", *WEIGHTINGS):
            raise ValueError(
                f"model.balance {how!r} is not known; expected fixed, uncertainty, gradnorm, {', '.join(WEIGHTINGS)}"
            )
        factors = list(fixed) or [1.0] * len(names)
        wrong = [name for name, factor in zip(names, factors, strict=True) if not factor > 0]
        if wrong:
            raise ValueError(f"model.heads.{wrong[0]}.weight must be above 0: leave a head out to leave its task out")
        self.names, self.how = list(names), how
        self.register_buffer("fixed", torch.tensor(factors), persistent=False)
        self.register_buffer("halves", torch.where(torch.tensor(list(squared)), 0.5, 1.0), persistent=False)
        self.register_buffer("branches", torch.ones(len(names)), persistent=False)  # of the step that is going on
        self.log_variances = nn.Parameter(torch.zeros(len(names))) if how == "uncertainty" else None
        if how == "gradnorm":
            self.register_buffer("norms", torch.zeros(len(names)))
            self.register_buffer("first", torch.zeros(len(names)))
        self.weighting: Callable[[Tensor], Tensor] | None = weighting(how) if how in WEIGHTINGS else None

    fixed: Tensor
    halves: Tensor
    branches: Tensor
    norms: Tensor
    first: Tensor

    @property
    def needs_gram(self) -> bool:
        """Whether each step needs the products of the tasks' gradients."""
        return self.how == "gradnorm" or self.weighting is not None

    def total(self, losses: Tensor) -> Tensor:
        """The step's loss, of the tasks' `(tasks,)`."""
        weighted = losses * self.fixed
        if self.log_variances is None:
            return weighted.sum()
        return (weighted * self.halves * torch.exp(-self.log_variances) + self.log_variances / 2).sum()

    def now(self) -> Tensor:
        """What each task's loss, or at the trunk its gradient, is multiplied by, `(tasks,)`."""
        if self.log_variances is not None:
            return self.fixed * self.halves * torch.exp(-self.log_variances.detach())
        return self.fixed * self.branches

    def start(self) -> None:
        """Gradients count as they are, until `balance` says otherwise."""
        self.branches = torch.ones_like(self.branches)

    @torch.no_grad()
    def balance(self, gram: Tensor, losses: Tensor) -> None:
        """Set the weights of the backward pass to come; where a gradient is not finite, all count as they are.

        Args:
            gram: Of the tasks' gradients, each by its fixed factor, `(tasks, tasks)`.
            losses: `(tasks,)`.
        """
        if not gram.isfinite().all():  # under fp16 the step is left out, and may not be remembered
            return
        if self.weighting is not None:
            self.branches.copy_(self.weighting(gram) * len(gram))
            return
        norms = gram.diagonal().clamp(min=0).sqrt()
        begun = self.first > 0
        self.norms.copy_(torch.where(self.norms > 0, SMOOTHING * self.norms + (1 - SMOOTHING) * norms, norms))
        self.first.copy_(torch.where(begun, self.first, losses))
        seen = (self.norms > 0) & (self.first > 0)  # a task without a label so far has neither
        if not seen.any():
            return
        pace = torch.where(seen, losses / self.first, 0)
        pace = (pace / pace[seen].mean().clamp(min=1e-12)).clamp(min=1e-3) ** RATE_POWER
        wanted = torch.where(seen, pace * self.norms[seen].mean() / self.norms, 0)
        self.branches.copy_(torch.where(seen, wanted * seen.sum() / wanted.sum(), 1))


def weighting(how: str) -> Callable[[Tensor], Tensor]:
    """TorchJD's function from a Gramian to weights that add up to about 1."""
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ImportError(f'model.balance {how} needs TorchJD: pip install "finetuning-recipes[multitask]"') from error
    found: Callable[[Tensor], Tensor] = getattr(aggregation, WEIGHTINGS[how])()
    return found
