"""Which labels are doubtful: what the other samples say of each, and when that is reason to look."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..sampling.splits import hold_out

BLOCK = 512  # samples compared with all others at a time
MANY = 200_000  # texts, above which a linear model of them takes too long


def label_suspects(
    probabilities: Tensor, labels: Tensor, doubt: float = 1 / 3, enough: float = 0.8
) -> list[tuple[int, int]]:
    """Samples whose labels are probably wrong, by confident learning (Northcutt et al. 2021,
    https://arxiv.org/abs/1911.00068).

    A sample is rather of another class where that is as probable as it is, on average, for samples labelled so. Since
    a weak model is sure of much that is wrong, the other class must also be more probable than all the rest together,
    and the sample's own much less (`doubt`) than for samples that share its label.

    Args:
        probabilities: By a model that has not seen the sample's own label, `(n, classes)`.
        labels: `(n,)`.
        doubt: Share of its class's average below which a label is doubtful.
        enough: Probability of another class that suffices where the average is higher.

    Returns:
        Index and the class that it rather is, the clearest first.
    """
    own = probabilities.gather(1, labels[:, None]).squeeze(1)
    counts = torch.bincount(labels, minlength=probabilities.shape[1])
    usual = torch.zeros(probabilities.shape[1]).index_add_(0, labels, own) / counts.clamp(min=1)
    sure = (probabilities >= usual.clamp(max=enough)) & (probabilities > 0.5)
    rather = probabilities.where(sure, torch.zeros(())).argmax(1)
    is_suspect = sure.any(1) & (rather != labels) & (own < doubt * usual[labels])
    clearness = probabilities.gather(1, rather[:, None]).squeeze(1) - own
    rows = is_suspect.nonzero().flatten()
    rows = rows[clearness[rows].argsort(descending=True, stable=True)]
    return list(zip(rows.tolist(), rather[rows].tolist(), strict=True))


def text_suspects(data: Any) -> list[list[str]] | str:
    """Training texts that a linear model on their tokens takes for another class: text, class, rather.

    The model is plain: TF-IDF and logistic regression need no weights, take seconds, and find as many wrong labels as
    the features of a sentence encoder do. The clearest come first; a string says why nothing could be found out.
    """
    part, names = data.splits["train"], data.class_names
    if data.problem_type != "single_label_classification":
        return "labels were not looked at: this takes texts of one class each"
    if len(part) > MANY:
        return f"labels were not looked at: there are more than {MANY:,} texts"
    try:
        found = label_suspects(cross_validated_probabilities(tf_idf(data), part.labels, len(names)), part.labels)
    except ValueError as error:  # too few for folds
        return f"labels were not looked at: {' '.join(str(error).split())}"
    return [[" ".join(part.text(i).split()), names[int(part.labels[i])], names[rather]] for i, rather in found]


def tf_idf(data: Any) -> Any:
    """TF-IDF of the training texts' tokens, a sparse matrix: the tokenizer knows words in any language."""
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import TfidfTransformer

    part = data.splits["train"]
    tokens = data.tokens(part.table)
    found = [tokens.read(part.row(index))[0] for index in range(len(part))]
    ends, columns = np.cumsum([0, *map(len, found)]), np.concatenate(found)
    counts = csr_array((np.ones(len(columns)), columns, ends), shape=(len(part), len(data.tokenizer)))
    counts.sum_duplicates()
    return TfidfTransformer(sublinear_tf=True).fit_transform(counts)


def cross_validated_probabilities(features: Any, labels: Tensor, classes: int, folds: int = 5) -> Tensor:
    """Probabilities of each sample's classes by logistic regression on the other folds, `(n, classes)`.

    Features `(n, width)` may be sparse; fewer samples than folds are a ValueError.
    """
    from sklearn.linear_model import LogisticRegression

    out = torch.zeros(len(labels), classes)
    for fold in tqdm(range(folds), desc="labels", unit=" folds", disable=len(labels) < 2048):
        rest, told = (rows.numpy() for rows in hold_out(labels, 0.0, (fold, folds), 0))
        seen = labels[rest].unique()  # type: ignore[no-untyped-call]
        if len(seen) > 1:  # what all others are tells nothing
            fitted = LogisticRegression(max_iter=1000).fit(features[rest], labels[rest].numpy())
            found = torch.from_numpy(fitted.predict_proba(features[told])).float()
            out[torch.from_numpy(told)[:, None], seen] = found
    return out


def neighbour_probabilities(features: Tensor, labels: Tensor, classes: int, neighbours: int = 20) -> Tensor:
    """Share of each class among the nearest neighbours of features `(n, width)`, itself excluded, `(n, classes)`."""
    values = torch.nn.functional.normalize(features.float(), dim=1)
    neighbours = min(neighbours, len(values) - 1)
    out = torch.zeros(len(values), classes)
    for start in range(0, len(values), BLOCK) if neighbours > 0 else ():
        near = values[start : start + BLOCK] @ values.T
        near[torch.arange(len(near)), torch.arange(start, start + len(near))] = -2
        index = near.topk(neighbours).indices
        out[start : start + BLOCK].scatter_add_(1, labels[index], torch.full(index.shape, 1 / neighbours))
    return out
