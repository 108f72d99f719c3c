"""The diagonal of the Fisher information of a classifier."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .per_sample import Logits, Parameters, SquaredGradients, Way, evaluating, zeros_like

Estimator: TypeAlias = Literal["auto", "exact", "signs", "empirical"]
IGNORED = -100  # the label of a sample that is ignored, as in torch's losses
EXACT_CLASSES = 10  # up to so many classes the exact expectation is worth its backward passes
NO_LABELS = "the empirical Fisher needs true labels, and the batches bring none; take the estimator exact"


def fisher_diagonal(
    logits: Logits,
    batches: Iterable[Any],
    parameters: Parameters,
    *,
    module: nn.Module,
    labels: Callable[[Any], Tensor | None] = lambda batch: None,
    positions: Iterable[int] | None = None,
    estimator: Estimator = "auto",
    draws: int = 1,
    seed: int = 0,
    way: Way = "auto",
) -> tuple[dict[str, Tensor], int]:
    """Diagonal of a classifier's Fisher information: mean over samples of E[(d log p(y|x) / d theta)^2].

    Gradients are squared sample by sample, so the batch size has no influence. Modules are in evaluation mode, in
    float32 (or 64) and outside autocast during it; all is restored, and `.grad` is not touched.

    Args:
        logits: From a batch to logits `(batch, classes)`, through `module`.
        batches: Tensors in tuples, lists, dictionaries or alone, with the samples in their first dimension.
        parameters: Those to differentiate by, by name.
        module: All modules that take part.
        labels: From a batch to labels `(batch,)`; a sample labelled -100 is ignored.
        positions: A number for each sample, which seeds its draws; 0, 1, 2, ... if not given.
        estimator: `exact`: expectation over all classes, a backward pass for each but one. `signs`: over `draws`
            random combinations of all classes, with the same expectation. `empirical`: at the true labels, another
            quantity, which vanishes as the fit gets better (https://arxiv.org/abs/1905.12558). `auto`: exact up to 10
            classes, else signs.
        draws: Backward passes per sample, for `signs`.
        seed: Of the draws.
        way: How per-sample gradients are made; all agree. `layers`: whole batches, from the inputs of layers and
            the gradients of their outputs. `loop`: one sample at a time, for any model. `vmap`: by torch.func.
            `auto`: layers where these account for all parameters, as a trial on the first two samples tells; else
            vmap on a GPU and the loop on a CPU.

    Returns:
        The mean by name, zeros if nothing counted, and the number of samples that did.

    Raises:
        ValueError: No logits of shape (batch, classes); `empirical` without labels; `layers` does not account for
            a parameter.
        TypeError: Batches that cannot be cut into samples.
    """
    known: Tensor | None = None  # labels of the batch at hand
    numbered: list[int] = []

    def vectors(z: Tensor, rows: slice) -> Iterator[Tensor]:
        some = None if known is None else known[rows]
        return score_vectors(z, estimator, labels=some, positions=numbered[rows], draws=draws, seed=seed)

    numbers = iter(itertools.count() if positions is None else positions)
    count, squares = 0, None
    with evaluating(module):
        for batch in batches:
            squares = squares or SquaredGradients(logits, batch, parameters, module, way)
            size, known = squares.size(batch), labels(batch)
            if known is None and estimator == "empirical":
                raise ValueError(NO_LABELS)
            numbered = list(itertools.islice(numbers, size))
            squares.add(batch, vectors)
            count += size if known is None else int((known != IGNORED).sum())
    totals = squares.totals if squares else zeros_like(parameters)
    return {name: (total / max(count, 1)).contiguous() for name, total in totals.items()}, count


def choose_estimator(estimator: Estimator, classes: int) -> Estimator:
    """What `auto` means for a number of classes."""
    if estimator == "auto":
        return "exact" if classes <= EXACT_CLASSES else "signs"
    return estimator


def score_vectors(
    logits: Tensor,
    estimator: Estimator = "exact",
    *,
    labels: Tensor | None = None,
    positions: Sequence[int] = (),
    draws: int = 1,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Vectors v, one backward pass each, whose sum of v v^T is the Fisher information of the logits.

    That is diag(p) - p p^T, in expectation; the Fisher of the weights follows as the sum of the squared gradients
    of v . logits.

    * `exact` takes one vector fewer than classes: a choice among n classes is n - 1 choices, each between a class
      and those after it, which is the Cholesky factor of diag(p) - p p^T (Tanabe & Sagae 1992).
    * `signs` takes s - p sum(s) at s = sqrt(p) with random signs: all classes take part in each, so the variance is
      small (for diagonals in general: Bekas et al. 2007, https://doi.org/10.1016/j.apnum.2007.01.003).

    Arguments are those of `fisher_diagonal`, for logits `(batch, classes)`, with labels `(batch,)` and a position for
    each sample. Yields `(batch, classes)`, detached; zeros for ignored samples.
    """
    log_p = logits.detach().cpu().double().log_softmax(-1).clamp(min=-1e3)  # -inf would make differences of infinities
    counted = 1.0 if labels is None else (labels != IGNORED).unsqueeze(1).to(log_p)
    classes = log_p.shape[1]
    estimator = choose_estimator(estimator, classes)
    if estimator == "exact":
        rest = log_p.flip(1).logcumsumexp(1).flip(1)  # log of the sum of p from each class on
        for k in range(classes - 1):
            here, after = rest[:, k, None], rest[:, k + 1, None]
            column = -torch.exp(log_p + (log_p[:, k, None] - here - after) / 2)
            column[:, :k] = 0
            column[:, k] = torch.exp((log_p[:, k, None] + after - here) / 2).squeeze(1)
            yield (column * counted).to(logits)
        return
    p = log_p.exp()
    if estimator == "empirical":
        scores = [F.one_hot(cast(Tensor, labels).cpu().clamp(min=0), classes) - p]
    else:
        generators = [torch.Generator().manual_seed(random.Random(f"{seed} {at}").getrandbits(63)) for at in positions]
        signs = torch.stack([torch.randint(2, (draws, classes), generator=g) * 2 - 1 for g in generators], 1)
        mixed = p.sqrt() * signs  # (draws, batch, classes)
        scores = list(mixed - p * mixed.sum(2, keepdim=True))
    for score in scores:
        yield (score * counted / len(scores) ** 0.5).to(logits)
