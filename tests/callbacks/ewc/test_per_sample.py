"""Per-sample gradients of nets that are no chain of layers."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from callbacks.ewc.fisher import fisher_diagonal
from tests.callbacks.ewc.conftest import largest_difference


@pytest.mark.parametrize(
    "family", ["Bert", "Albert", "DistilBert"]
)  # positions by number; layers called again and again
def test_ways_agree_on_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if family == "DistilBert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    if family == "Albert":
        sizes["embedding_size"] = 8
    config = getattr(transformers, f"{family}Config")(vocab_size=50, max_position_embeddings=12, num_labels=3, **sizes)
    net = getattr(transformers, f"{family}ForSequenceClassification")(config)
    mask = torch.ones(6, 9, dtype=torch.long)
    mask[2, 5:] = 0
    batch = {"input_ids": torch.randint(1, 50, (6, 9)), "attention_mask": mask}
    ways = [
        fisher_diagonal(lambda b: net(**b).logits, [batch], dict(net.named_parameters()), module=net, way=way)[0]  # type: ignore[arg-type]
        for way in ("layers", "loop")
    ]
    assert largest_difference(*ways) < 1e-5


class Odd(nn.Module):
    """What no rule for layers covers: a weight that is a product of two, and a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 5))
        self.rnn = nn.GRU(5, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x @ self.a.mm(self.b))[0][:, -1])


def test_what_no_layer_accounts_for_goes_one_by_one_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    net, x = Odd(), torch.randn(8, 3, 6)
    parameters = dict(net.named_parameters())
    with caplog.at_level(logging.INFO, "callbacks.ewc"):
        found = fisher_diagonal(net, x.split(4), parameters, module=net)[0]
    assert "no known layer accounts for a, b, rnn.bias_hh_l0" in caplog.text
    expected = fisher_diagonal(net, x.split(4), parameters, module=net, way="loop")[0]
    assert largest_difference(found, expected) < 1e-6
    with pytest.raises(ValueError, match="no known layer accounts for a, b, rnn.*use way='loop'"):
        fisher_diagonal(net, x.split(4), parameters, module=net, way="layers")


def test_a_batch_that_goes_another_way_through_the_net_counts_too() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) if x[0, 0] > 0 else x @ (2 * self.weight).T

    net, x = Fork(), torch.randn(8, 5)
    x[:, 0] = torch.tensor([1.0] * 4 + [-1.0] * 4)
    ways = [
        fisher_diagonal(net, x.split(4), dict(net.named_parameters()), module=net, way=way)[0]
        for way in ("auto", "loop")
    ]  # type: ignore[arg-type]
    assert largest_difference(*ways) < 1e-5


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap of attention
@pytest.mark.parametrize("batch_first", [True, False])
def test_nets_that_torch_calls_past_their_modules_go_one_by_one(
    batch_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=batch_first)
    net = nn.Sequential(encoder, nn.Linear(8, 3))

    def logits(batch: Tensor) -> Tensor:
        return net(batch).mean(1) if batch_first else net(batch.transpose(0, 1)).mean(0)

    x = torch.randn(9, 6, 8)  # 9 samples of 6 positions: 9 x 6 rows can be read either way
    with caplog.at_level(logging.INFO, "callbacks.ewc"):
        ways = [
            fisher_diagonal(logits, x.split(6), dict(net.named_parameters()), module=net, way=way)[0]  # type: ignore[arg-type]
            for way in ("loop", "auto", "vmap")
        ]
    assert all(largest_difference(way, ways[0]) < 1e-5 for way in ways[1:])
    assert "no known layer accounts for 0.self_attn.in_proj_bias" in caplog.text


class Turning(nn.Module):
    """Calls its layers otherwise where the first number of a batch is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.places = nn.Linear(5, 5), nn.Linear(5, 3), nn.Parameter(torch.randn(1, 5))

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0] > 0:
            return self.second(self.first(x) + self.places)
        return F.linear(self.first(self.first(x)), self.second.weight) + self.places.view(1, 5)[:, :3]


def test_a_batch_that_calls_other_layers_than_the_first_counts_too() -> None:
    net, x = Turning(), torch.randn(12, 5)
    x[:, 0] = torch.tensor([1.0] * 4 + [-1.0] * 4 + [1.0] * 4)
    before = list(net._parameters.items())
    named = dict(net.named_parameters())
    ways = [fisher_diagonal(net, x.split(4), named, module=net, way=way)[0] for way in ("layers", "loop")]  # type: ignore[arg-type]
    assert largest_difference(*ways) < 1e-5
    assert all(a is b for (_, a), (_, b) in zip(net._parameters.items(), before, strict=True))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
