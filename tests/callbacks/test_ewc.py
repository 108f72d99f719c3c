from __future__ import annotations

import copy
import json
import logging
import math
import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from callbacks.ewc.callback import EWC
from callbacks.ewc.fisher import fisher_diagonal, score_vectors
from callbacks.ewc.memory import Memory, load_memory, save_memory
from callbacks.ewc.penalty import add_penalty_gradient_, merge, penalty, proximal_step_
from callbacks.ewc.samples import choose_samples, dataset_labels, labels_of, logits_of

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative to the largest number of each tensor; what is zero but for rounding counts as zero."""
    assert one.keys() == other.keys()
    floor = 1e-10 * max(float(t.abs().max()) for t in other.values())
    return max(float((one[n] - other[n]).abs().max() / (other[n].abs().max() + floor)) for n in one)


# The Fisher: right


def regression(classes: int = 4, width: int = 6) -> tuple[nn.Linear, Tensor, dict[str, Tensor]]:
    """A softmax regression, its inputs, and the diagonal of its Fisher in closed form."""
    model = nn.Linear(width, classes)
    x = torch.randn(64, width)
    p = model(x).detach().softmax(1)
    spread = p * (1 - p)  # E (1[y = k] - p_k)^2
    return model, x, {"weight": spread.T @ x.square() / len(x), "bias": spread.mean(0)}


@pytest.mark.parametrize("way", ["layers", "loop", "vmap"])
@pytest.mark.parametrize("classes", [2, 4, 10])
def test_fisher_is_the_analytic_one_of_a_softmax_regression(way: Any, classes: int) -> None:
    model, x, expected = regression(classes)
    found, count = fisher_diagonal(model, x.split(16), dict(model.named_parameters()), module=model, way=way)
    assert count == 64
    assert largest_difference(found, expected) < 1e-5


@pytest.mark.parametrize("sure", [0.0, 60.0])
def test_vectors_of_exact_have_the_scores_covariance_also_where_the_model_is_sure(sure: float) -> None:
    z = torch.randn(5, 7, dtype=torch.float64)
    z[:, 2] += sure
    p = z.softmax(1)
    v = torch.stack(list(score_vectors(z, "exact")))
    assert len(v) == 6  # one backward pass fewer than classes
    others = torch.stack([p[:, torch.arange(7) != k].sum(1) for k in range(7)], 1)  # 1 - p would round to 0
    expected = -p.unsqueeze(2) * p.unsqueeze(1)
    expected.diagonal(dim1=1, dim2=2).copy_(p * others)
    torch.testing.assert_close(torch.einsum("sbi,sbj->bij", v, v), expected, rtol=1e-9, atol=1e-40)


@pytest.mark.parametrize("estimator", ["exact", "signs"])
def test_fisher_does_not_depend_on_the_batch_size(estimator: Any) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5))
    model[1].running_mean.normal_()
    x = torch.randn(64, 2, 6, 6)
    found = [
        fisher_diagonal(
            model, x.split(size), dict(model.named_parameters()), module=model, estimator=estimator, draws=2
        )[0]
        for size in (1, 8, 64, 24)
    ]
    assert all(largest_difference(other, found[0]) < 1e-5 for other in found[1:])
    batch_gradient = torch.autograd.grad(model(x).log_softmax(1)[:, 0].mean(), model[0].weight)[0].square()
    assert batch_gradient.sum() < 0.5 * found[0]["0.weight"].sum()  # what squaring a batch's gradient would give


@pytest.mark.parametrize("estimator", ["exact", "signs"])
def test_classes_that_are_masked_out_do_no_harm(estimator: Any) -> None:
    z = torch.randn(4, 6)
    few = torch.stack(list(score_vectors(z[:, 1:4], estimator, positions=range(4))))
    z[:, [0, 4, 5]] = -math.inf
    v = torch.stack(list(score_vectors(z, estimator, positions=range(4))))
    assert v[:, :, [0, 4, 5]].eq(0).all() and torch.isfinite(v).all()
    if estimator == "exact":
        spread, expected = (torch.einsum("sbi,sbj->bij", t, t) for t in (v[:, :, 1:4], few))
        torch.testing.assert_close(spread, expected)


class ChannelNorm(nn.LayerNorm):
    """Over the channels of maps, as in ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Zoo(nn.Module):
    """One of everything: each kind of layer, a tied weight, a layer called twice, parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.wide = nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2))
        self.same = nn.Conv2d(12, 12, 3, padding="same", groups=3)
        self.point = nn.Conv2d(12, 8, 1)
        self.again, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.gn = nn.GroupNorm(2, 8)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.cn = ChannelNorm(8)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Parameter(torch.randn(13, 8))
        self.gain = nn.Parameter(torch.randn(8))
        self.words = nn.Embedding(11, 8, padding_idx=3)
        self.positions = nn.Embedding(5, 8)
        self.tied = nn.Linear(8, 11)
        self.tied.weight = self.words.weight
        self.ln = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4, bias=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = F.silu(self.bn(self.stem(batch["image"])), inplace=True)
        x = F.silu(self.wide(F.silu(self.depthwise(x))))
        x = self.gn(self.point(torch.tanh(self.same(x)))) * self.scale
        for _ in range(2):
            x = torch.tanh(self.cn(self.norm(self.again(x))))
        x = self.line(x.flatten(2)).transpose(1, 2)  # (batch, positions, 8)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        x = self.gain * (x + self.places)
        words = self.words(batch["words"]) + self.positions(torch.arange(batch["words"].shape[1]))
        tied = self.tied(words).softmax(-1) @ torch.linspace(0, 1, 11)
        x = self.ln(x + F.scaled_dot_product_attention(x, x, x))
        x = self.rms(x + F.scaled_dot_product_attention(x, words, words))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(x.mean(1)) + tied.mean(1, keepdim=True) * torch.arange(4)


def zoo() -> tuple[Zoo, list[dict[str, Tensor]]]:
    torch.manual_seed(3)
    net = Zoo().eval()
    net.bn.running_mean.normal_()
    net.bn.running_var.uniform_(0.5, 2)
    words = torch.randint(0, 11, (12, 5))
    words[:, 0], words[0] = 3, 5  # padding; a word five times
    whole = {"image": torch.randn(12, 3, 12, 12), "words": words}
    return net, [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 7), slice(7, 12))]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap of attention
def test_all_ways_agree_on_every_kind_of_layer() -> None:
    net, batches = zoo()
    parameters = dict(net.named_parameters())
    found = {
        way: fisher_diagonal(net, batches, parameters, module=net, way=way)[0]  # type: ignore[arg-type]
        for way in ("loop", "layers", "vmap")
    }
    assert found["loop"]["unused.weight"].eq(0).all()
    assert all(found["loop"][name].gt(0).any() for name in parameters if not name.startswith("unused"))
    assert largest_difference(found["layers"], found["loop"]) < 1e-5
    assert largest_difference(found["vmap"], found["loop"]) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("kernel", [1, 3, (5, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions_tap_by_tap(size: int, kernel: Any, stride: int, dilation: int) -> None:
    net = nn.Sequential(nn.Conv2d(70, 3, kernel, stride, padding=4, dilation=dilation), nn.Tanh(), nn.Flatten())
    x = torch.randn(4, 70, size, size) / 8
    parameters = dict(net.named_parameters())
    ways = [
        fisher_diagonal(net, [x], parameters, module=net, estimator="signs", way=way)[0] for way in ("layers", "loop")
    ]  # type: ignore[arg-type]
    assert largest_difference(*ways) < 1e-5


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


def test_draws_are_unbiased_and_seeded() -> None:
    model, x, expected = regression()

    def run(seed: int) -> dict[str, Tensor]:
        return fisher_diagonal(
            model, [x], dict(model.named_parameters()), module=model, estimator="signs", seed=seed, way="layers"
        )[0]

    many = torch.stack([run(seed)["weight"] for seed in range(300)])
    error = (many.mean(0) - expected["weight"]) / (many.std(0) / math.sqrt(300))
    assert error.abs().max() < 4.5  # standard errors, 24 numbers
    assert (many.mean(0) / expected["weight"] - 1).abs().max() < 0.1
    assert torch.equal(run(7)["weight"], run(7)["weight"])
    assert not torch.equal(run(7)["weight"], run(8)["weight"])


def test_draws_follow_the_position_of_a_sample_not_its_batch_or_rank() -> None:
    model, x, _ = regression()
    named = dict(model.named_parameters())
    whole, _ = fisher_diagonal(model, [x], named, module=model, estimator="signs", positions=range(64))
    parts = [
        fisher_diagonal(model, x[r::2].split(8), named, module=model, estimator="signs", positions=range(r, 64, 2))[0]
        for r in range(2)
    ]
    joined = {name: (parts[0][name] + parts[1][name]) / 2 for name in whole}
    assert largest_difference(joined, whole) < 1e-5


def test_more_draws_come_nearer_on_a_model_that_is_sure() -> None:
    model, x, _ = regression(10, 20)
    with torch.no_grad():
        model.weight *= 8
    named = dict(model.named_parameters())
    exact = fisher_diagonal(model, [x], named, module=model)[0]["weight"]

    def error(draws: int) -> float:
        runs = [
            fisher_diagonal(model, [x], named, module=model, estimator="signs", draws=draws, seed=seed, way="layers")[0]
            for seed in range(10)
        ]
        return sum(float((run["weight"] - exact).norm()) for run in runs)

    assert error(8) < 0.6 * error(1)


def test_many_classes_are_not_expanded_one_by_one() -> None:
    model, x, _ = regression(11)
    named = dict(model.named_parameters())
    auto, signs = (
        fisher_diagonal(model, [x], named, module=model, estimator=estimator)[0]["weight"]  # type: ignore[arg-type]
        for estimator in ("auto", "signs")
    )
    assert torch.equal(auto, signs)


def test_empirical_only_by_choice() -> None:
    model, x, _ = regression()
    named = dict(model.named_parameters())
    y = model(x).argmax(1)

    def run(estimator: Any, labels: Tensor) -> Tensor:
        return fisher_diagonal(
            lambda b: model(b[0]), [(x, labels)], named, module=model, labels=lambda b: b[1], estimator=estimator
        )[0]["weight"]

    assert torch.equal(run("auto", y), run("auto", y.flip(0)))
    scores = F.one_hot(y, 4) - model(x).detach().softmax(1)
    torch.testing.assert_close(run("empirical", y), scores.square().T @ x.square() / 64)
    with pytest.raises(ValueError, match="the empirical Fisher needs true labels"):
        fisher_diagonal(model, [x], named, module=model, estimator="empirical")


@pytest.mark.parametrize("way", ["layers", "loop", "vmap"])
def test_padding_does_not_count(way: Any) -> None:
    model, x, _ = regression()
    named = dict(model.named_parameters())
    y = torch.zeros(64, dtype=torch.long)
    y[40:] = -100
    run = lambda *batch: fisher_diagonal(  # noqa: E731
        lambda b: model(b[0]), [batch], named, module=model, labels=lambda b: b[1], way=way
    )
    padded, count = run(x, y)
    assert count == 40
    assert largest_difference(padded, run(x[:40], y[:40])[0]) < 1e-6
    nothing, count = run(x, torch.full((64,), -100))
    assert count == 0 and all(t.eq(0).all() for t in nothing.values())


def test_evaluation_mode_float32_and_no_trace() -> None:
    seen: list[tuple[bool, bool, torch.dtype]] = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            seen.append((self.training, torch.is_autocast_enabled("cpu"), out.dtype))
            return out

    net = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.9), Spy(6, 3)).train()
    net[0].eval()
    before = copy.deepcopy(net.state_dict())
    net[2].weight.grad = torch.ones(3, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, _ = fisher_diagonal(net, [torch.randn(8, 6)], dict(net.named_parameters()), module=net)
    assert set(seen) == {(False, False, torch.float32)}
    assert [part.training for part in net] == [False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net[2].weight.grad.eq(1).all() and net[2].bias.grad is None
    assert found["2.weight"].gt(0).all()


def test_sixteen_bit_weights_are_widened_meanwhile() -> None:
    model, x, _ = regression()
    expected = fisher_diagonal(model, [x], dict(model.named_parameters()), module=model)[0]
    model.bfloat16()
    before = copy.deepcopy(model.state_dict())
    found = fisher_diagonal(model, [x], dict(model.named_parameters()), module=model)[0]
    assert found["weight"].dtype == torch.float32
    assert largest_difference(found, expected) < 0.05
    assert all(
        value.dtype == torch.bfloat16 and torch.equal(value, before[n]) for n, value in model.state_dict().items()
    )


def test_what_is_no_classifier_is_refused() -> None:
    model = nn.Linear(3, 1)
    named = dict(model.named_parameters())
    with pytest.raises(
        ValueError, match=r"expected logits of shape \(batch, classes\) with 2 classes or more.*\(2, 1\)"
    ):
        fisher_diagonal(model, [torch.randn(4, 3)], named, module=model)
    with pytest.raises(ValueError, match="received dict"):
        fisher_diagonal(lambda b: {}, [torch.randn(4, 3)], named, module=model)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="no tensor of the batch, a SimpleNamespace, has its samples in the first"):
        fisher_diagonal(lambda b: torch.zeros(4, 2), [SimpleNamespace()], named, module=model)


# The penalty


def quadratic() -> tuple[dict[str, nn.Parameter], dict[str, Tensor], dict[str, Tensor]]:
    parameters = {
        "a": nn.Parameter(torch.randn(5, 3)),
        "b": nn.Parameter(torch.randn(4)),
        "free": nn.Parameter(torch.ones(2)),
    }
    anchor = {"a": torch.randn(5, 3), "b": torch.randn(4)}
    fisher = {"a": torch.rand(5, 3), "b": torch.rand(4)}
    return parameters, anchor, fisher


def test_penalty_has_its_half_and_its_gradient_is_autograds() -> None:
    parameters, anchor, fisher = quadratic()
    value = penalty(parameters, anchor, fisher, 3.0)
    by_hand = sum(float((fisher[n] * (parameters[n].detach() - anchor[n]).square()).sum()) for n in fisher)
    assert value.item() == pytest.approx(1.5 * by_hand)
    expected = torch.autograd.grad(value, [parameters["a"], parameters["b"]])
    parameters["a"].grad = torch.ones(5, 3)
    add_penalty_gradient_(parameters, anchor, fisher, 3.0)
    assert parameters["b"].grad is not None and parameters["free"].grad is None
    torch.testing.assert_close(parameters["a"].grad, 1 + expected[0])
    torch.testing.assert_close(parameters["b"].grad, expected[1])


def test_large_and_channels_last_tensors_too() -> None:
    big = nn.Parameter(torch.randn(600, 1000))  # more than a block
    last = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    parameters = {"big": big, "last": last}
    anchor, fisher = (
        {name: make(p).contiguous() for name, p in parameters.items()} for make in (torch.zeros_like, torch.rand_like)
    )
    add_penalty_gradient_(parameters, anchor, fisher, 2.0)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    proximal_step_(parameters, anchor, fisher, {"big": 0.5, "last": torch.tensor(2.0)})
    for name, c in (("big", 0.5), ("last", 2.0)):
        torch.testing.assert_close(parameters[name].grad, 2 * fisher[name] * before[name])
        torch.testing.assert_close(parameters[name].detach(), before[name] / (1 + c * fisher[name]))


def test_proximal_step_is_the_implicit_one_at_any_coefficient() -> None:
    parameters, anchor, fisher = quadratic()
    fisher["a"][0] = 0
    before = {name: p.detach().clone() for name, p in parameters.items()}
    proximal_step_(parameters, anchor, fisher, {"a": 0.7, "b": 1e30, "free": 1.0})
    expected = (before["a"] + 0.7 * fisher["a"] * anchor["a"]) / (1 + 0.7 * fisher["a"])
    torch.testing.assert_close(parameters["a"].detach(), expected)
    assert torch.equal(parameters["a"][0], before["a"][0])  # no Fisher, no hold
    torch.testing.assert_close(parameters["b"].detach(), anchor["b"])
    assert torch.equal(parameters["free"], before["free"])
    after = parameters["a"].detach().clone()
    proximal_step_(parameters, anchor, fisher, {"a": 0.0})
    assert torch.equal(parameters["a"], after)


def test_frozen_parameters_are_left_alone() -> None:
    parameters, anchor, fisher = quadratic()
    parameters["a"].requires_grad_(False)
    before = parameters["a"].clone()
    add_penalty_gradient_(parameters, anchor, fisher, 1.0)
    proximal_step_(parameters, anchor, fisher, {"a": 1.0, "b": 1.0})
    assert parameters["a"].grad is None and torch.equal(parameters["a"], before)


def test_a_sparse_gradient_is_refused() -> None:
    words = nn.Embedding(5, 2, sparse=True)
    words(torch.tensor([1])).sum().backward()
    table = {"weight": torch.ones(5, 2)}
    with pytest.raises(RuntimeError, match="weight has a sparse gradient.*mode proximal"):
        add_penalty_gradient_({"weight": words.weight}, table, table, 1.0)


def test_merged_tasks_are_the_sum_of_their_penalties() -> None:
    parameters, anchor, fisher = quadratic()
    _, anchor2, fisher2 = quadratic()
    fisher["a"][0], fisher2["a"][0] = 0, 0
    del fisher2["b"], anchor2["b"]
    merged, centre, constant = merge((fisher, anchor), (fisher2, anchor2))
    expected = penalty(parameters, anchor, fisher, 2.0) + penalty(parameters, anchor2, fisher2, 2.0)
    torch.testing.assert_close(penalty(parameters, centre, merged, 2.0) + constant, expected)
    online, newest, constant = merge((fisher, anchor), (fisher2, anchor2), decay=0.5)
    torch.testing.assert_close(online["a"], 0.5 * fisher["a"] + fisher2["a"])
    torch.testing.assert_close(online["b"], 0.5 * fisher["b"])
    assert torch.equal(newest["a"], anchor2["a"]) and torch.equal(newest["b"], anchor["b"]) and constant == 0


# Samples


def test_samples_are_stratified_seeded_and_nested() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[torch.randperm(100)]
    chosen = choose_samples(labels, 100, 20, seed=1)
    assert chosen == sorted(set(chosen)) and len(chosen) == 20
    assert torch.bincount(labels[chosen]).tolist() == [12, 6, 2]
    assert chosen == choose_samples(labels.tolist(), 100, 20, seed=1) != choose_samples(labels, 100, 20, seed=2)
    assert set(chosen) < set(choose_samples(labels, 100, 40, seed=1))
    assert choose_samples(None, 100, 200, seed=1) == choose_samples(labels, 100, None, seed=1) == list(range(100))
    unknown = choose_samples(None, 100, 20, seed=1)
    assert len(set(unknown)) == 20 and unknown != list(range(20))


def test_labels_of_data_sets() -> None:
    data = TensorDataset(torch.randn(6, 2))
    assert dataset_labels(data) is None
    data.targets = [0, 1, 2, 0, 1, 2]  # type: ignore[attr-defined]
    assert dataset_labels(data).tolist() == [0, 1, 2, 0, 1, 2]  # type: ignore[union-attr]
    assert dataset_labels(Subset(data, [5, 0])).tolist() == [2, 0]  # type: ignore[union-attr]
    data.targets = ["a"] * 6  # type: ignore[attr-defined]
    assert dataset_labels(data) is None


def test_logits_and_labels_of_the_usual_batches() -> None:
    x, y = torch.randn(3, 2), torch.tensor([0, 1, 2])
    doubled = type("Doubled", (nn.Module,), {"forward": lambda self, x: 2 * x})()
    assert torch.equal(logits_of(doubled, (x, y)), 2 * x) and torch.equal(logits_of(doubled, [x, y]), 2 * x)
    assert torch.equal(logits_of(doubled, x), 2 * x) and torch.equal(
        logits_of(doubled, {"image": x, "label": y}), 2 * x
    )
    text = type(
        "Text", (nn.Module,), {"forward": lambda self, input_ids, attention_mask: SimpleNamespace(logits=3 * input_ids)}
    )()
    batch = {"input_ids": x, "attention_mask": x, "labels": y, "index": y}
    assert torch.equal(logits_of(text, batch), 3 * x)
    layer = nn.Module()
    layer.logits, layer.forward = nn.Linear(2, 3), doubled.forward  # a part of that name is not the method
    assert torch.equal(logits_of(layer, x), 2 * x)
    own = type("Own", (nn.Module,), {"logits": lambda self, batch: batch["anything"]})()
    assert torch.equal(logits_of(own, {"anything": x}), x)
    for found in (labels_of((x, y)), labels_of(batch), labels_of({"label": y})):
        assert found is y
    assert labels_of(x) is None and labels_of((x, x)) is None
    with pytest.raises(
        TypeError, match=r"does not know how Doubled computes logits of a dict with audio.*logits\(batch\)"
    ):
        logits_of(doubled, {"audio": x})
    with pytest.raises(TypeError, match="returned a tuple without logits"):
        logits_of(type("Pair", (nn.Module,), {"forward": lambda self, x: (x, x)})(), x)


# The callback


class Net(LightningModule):
    """A small classifier with BatchNorm and dropout, a head of its own and two parameter groups."""

    def __init__(
        self,
        rate: float = 0.1,
        dropout: float = 0.0,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        classes: int = 3,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 16), nn.BatchNorm1d(16)
        )
        self.head = nn.Linear(16, classes)
        self.rate, self.optimizer = rate, optimizer
        self.seen: list[dict[str, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [{"params": self.body.parameters(), "lr": self.rate / 2}, {"params": self.head.parameters()}]
        return self.optimizer(groups) if self.optimizer else torch.optim.SGD(groups, lr=self.rate)


def task(which: int, samples: int = 64, classes: int = 3) -> TensorDataset:
    """Blobs whose classes lie elsewhere in each task."""
    generator = torch.Generator().manual_seed(which)
    centres = 2 * torch.randn(classes, 6, generator=generator)
    y = torch.arange(samples) % classes
    data = TensorDataset(centres[y] + torch.randn(samples, 6, generator=generator), y)
    data.targets = y  # type: ignore[attr-defined]
    return data


def loader(which: int, batch_size: int = 16, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(task(which), batch_size, **kwargs)


def fit(model: LightningModule, which: int, *callbacks: Callback, batch_size: int = 16, **kwargs: Any) -> Trainer:
    trainer = Trainer(**{**QUIET, "max_epochs": 3, "callbacks": list(callbacks), "log_every_n_steps": 1, **kwargs})
    trainer.fit(model, loader(which, batch_size))
    return trainer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def learnt(path: str = "a.safetensors", **kwargs: Any) -> tuple[Net, Path]:
    """A net after task A, and its Fisher."""
    torch.manual_seed(5)
    model = Net()
    fit(model, 0, EWC(save=path, **kwargs))
    return model, Path(path)


def test_the_file_holds_fisher_anchor_and_how_they_were_made() -> None:
    model, path = learnt(samples=40, task="blobs")
    memory = load_memory(path)
    assert memory.tasks == [
        {
            "name": "blobs",
            "samples": 40,
            "estimator": "exact",
            "draws": 1,
            "normalised": False,
            "mean": pytest.approx(float(torch.cat([t.flatten() for t in memory.fisher.values()]).mean())),
        }
    ]
    assert all(torch.equal(t, memory.anchor[name]) for name, t in weights(model).items())
    data = task(0)
    chosen = choose_samples(data.targets, 64, 40, 0)  # type: ignore[attr-defined]
    expected, _ = fisher_diagonal(model, [data.tensors[0][chosen]], dict(model.named_parameters()), module=model)
    assert largest_difference(memory.fisher, expected) < 1e-5
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "ewc-fisher 1"
    assert not list(Path().glob("*.part"))


@pytest.mark.parametrize("mode", ["proximal", "gradient"])
def test_another_trainer_goes_on_from_the_file_and_the_penalty_is_not_zero(mode: Any) -> None:
    model, path = learnt()
    start, free = weights(model), copy.deepcopy(model)
    values: list[float] = []

    class Read(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            values.append(float(trainer.callback_metrics["ewc/penalty"]))
            memory = ewc.active
            assert memory is not None and float(trainer.callback_metrics["ewc/ratio"]) == pytest.approx(
                values[-1] / float(args[1]["loss"]), rel=1e-5
            )

    ewc = EWC(strength=50.0, mode=mode, load=path)
    fit(model, 1, ewc, Read())
    fit(free, 1)
    assert values[0] == 0 and min(values[1:]) > 0
    memory = load_memory(path)
    moved, moved_freely = (float(penalty(weights(net), start, memory.fisher, 1.0)) for net in (model, free))
    assert 0 < moved < 0.5 * moved_freely


def manual(
    model: Net, ewc: Callable[[dict[str, nn.Parameter], float], None], when: str, steps: int = 12
) -> dict[str, Tensor]:
    """The same training by hand."""
    model = copy.deepcopy(model).train()
    optimizer = model.configure_optimizers()
    batches = list(loader(1))
    for step in range(steps):
        loss = model.training_step(batches[step % len(batches)], 0)
        optimizer.zero_grad()
        loss.backward()
        for at in ("gradient", "update"):
            if at == "update":
                optimizer.step()
            if at == when:
                ewc(dict(model.named_parameters()), 0.1)
    return weights(model)


def test_gradient_mode_is_the_penalty_everyone_writes() -> None:
    model, path = learnt()
    memory, start = load_memory(path), copy.deepcopy(model)

    def add(parameters: dict[str, nn.Parameter], rate: float) -> None:
        penalty(parameters, memory.anchor, memory.fisher, 20.0).backward()

    fit(model, 1, EWC(20.0, "gradient", load=path))
    for name, t in manual(start, add, "gradient").items():
        torch.testing.assert_close(model.get_parameter(name).detach(), t, rtol=1e-4, atol=1e-6)


def test_proximal_mode_follows_the_rate_of_each_group() -> None:
    model, path = learnt()
    memory, start = load_memory(path), copy.deepcopy(model)

    def pull(parameters: dict[str, nn.Parameter], rate: float) -> None:
        with torch.no_grad():
            for name, p in parameters.items():
                c = 20.0 * (rate if name.startswith("head") else rate / 2)
                p.copy_((p + c * memory.fisher[name] * memory.anchor[name]) / (1 + c * memory.fisher[name]))

    fit(model, 1, EWC(20.0, load=path))
    for name, t in manual(start, pull, "update").items():
        torch.testing.assert_close(model.get_parameter(name).detach(), t, rtol=1e-4, atol=1e-6)


class Ramp(Callback):
    """As a warm-up does: scales rates before the update and puts them back before others' hooks run after it."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def scale(optimizer: Any, *args: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] *= 0.25

        def restore(optimizer: Any, *args: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] /= 0.25

        trainer.optimizers[0].register_step_pre_hook(scale)
        trainer.optimizers[0].register_step_post_hook(restore)


def test_a_warm_up_counts_in_the_proximal_step() -> None:
    model, path = learnt()
    slow, ramped = copy.deepcopy(model), copy.deepcopy(model)
    slow.rate = 0.025
    fit(slow, 1, EWC(100.0, load=path))
    fit(ramped, 1, Ramp(), EWC(100.0, load=path))
    assert all(torch.equal(t, weights(slow)[name]) for name, t in weights(ramped).items())


def test_proximal_survives_a_strength_at_which_gradient_explodes() -> None:
    model, path = learnt()
    exploding = copy.deepcopy(model)
    start = weights(model)
    fit(model, 1, EWC(1e12, load=path))
    memory = load_memory(path)
    held = weights(model)
    far = max(float(((held[n] - start[n]).abs() * (memory.fisher[n] > 1e-6)).max()) for n in held)
    assert far < 1e-3
    with pytest.warns(UserWarning, match=r"rate \* strength \* F reaches .*e\+.* diverges above 2. Take mode proximal"):
        fit(exploding, 1, EWC(1e12, "gradient", load=path))
    gone = weights(exploding)
    assert (
        not all(torch.isfinite(t).all() for t in gone.values())
        or max(float(t.abs().max()) for t in gone.values()) > 1e6
    )


def test_no_warning_where_gradient_mode_is_stable(recwarn: pytest.WarningsRecorder) -> None:
    model, path = learnt()
    fit(model, 1, EWC(1.0, "gradient", load=path))
    assert not [w for w in recwarn if "diverges" in str(w.message)]


def test_penalty_is_added_once_under_accumulation_and_in_a_short_last_window() -> None:
    model, path = learnt()
    memory = load_memory(path)
    added: list[Tensor] = []

    class Spy(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            added.append(pl_module.body[0].weight.grad.clone())

    class Gradients(Spy):
        state_key = "before"

    with torch.no_grad():
        model.body[0].weight += 0.1
    fit(model, 1, Gradients(), EWC(50.0, "gradient", load=path), Spy(), accumulate_grad_batches=3, max_epochs=1)
    assert len(added) == 4  # two steps: three batches, and the one that is left
    expected = 50 * memory.fisher["body.0.weight"] * 0.1
    torch.testing.assert_close(added[1] - added[0], expected, rtol=1e-3, atol=1e-6)
    assert (added[3] - added[2]).norm() > 0.1 * expected.norm()


def test_the_ratio_is_to_the_whole_loss_under_accumulation() -> None:
    model, path = learnt()
    ratios: list[tuple[float, float]] = []

    class Read(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 3:
                metrics = trainer.callback_metrics
                ratios.append((float(metrics["ewc/ratio"]), float(metrics["ewc/penalty"] / (2 * outputs["loss"]))))

    fit(model, 1, EWC(10.0, load=path), Read(), accumulate_grad_batches=2, max_epochs=2)
    assert ratios[1][0] == pytest.approx(ratios[1][1], rel=1e-5) != 0


def test_clipping_counts_the_penalty() -> None:
    model, path = learnt()
    with torch.no_grad():
        model.body[0].weight += 1.0
    norms: list[float] = []

    class Spy(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            grads = [p.grad.norm() for p in pl_module.parameters()]
            norms.append(float(torch.stack(grads).norm()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, 1, EWC(1e4, "gradient", load=path), Spy(), gradient_clip_val=0.5, max_epochs=1)
    assert norms == pytest.approx([0.5] * len(norms), rel=1e-3)


@pytest.mark.parametrize("mode", ["proximal", "gradient"])
def test_a_fused_optimiser_under_a_scaler_sees_true_gradients(mode: Any) -> None:
    model, path = learnt()
    model.optimizer = lambda groups: torch.optim.SGD(groups, lr=0.1, fused=True)
    scaled = copy.deepcopy(model)
    fit(model, 1, EWC(20.0, mode, load=path))
    fit(scaled, 1, EWC(20.0, mode, load=path), plugins=[MixedPrecision("16-mixed", "cpu")])
    for name, t in weights(model).items():
        torch.testing.assert_close(scaled.get_parameter(name).detach(), t, rtol=0.02, atol=2e-3)


def test_a_step_that_the_scaler_skips_pulls_nothing() -> None:
    model, path = learnt()
    with torch.no_grad():
        model.body[0].weight += 0.5
    before = weights(model)

    class Overflow(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.head.weight.grad.fill_(math.inf)

    fit(model, 1, EWC(1e4, load=path), Overflow(), plugins=[MixedPrecision("16-mixed", "cpu")])
    assert all(torch.equal(t, before[name]) for name, t in weights(model).items())


def test_fisher_is_taken_in_float32_under_bf16_mixed() -> None:
    torch.manual_seed(5)
    model = Net(dropout=0.5)
    fit(model, 0, EWC(save="a.safetensors"), precision="bf16-mixed")
    expected, _ = fisher_diagonal(model, [task(0).tensors[0]], dict(model.named_parameters()), module=model)
    assert largest_difference(load_memory(Path("a.safetensors")).fisher, expected) < 1e-5


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precisions(precision: Any) -> None:
    torch.manual_seed(5)
    model = Net()
    ewc = EWC(1e3, samples=32)
    fit(model, 0, ewc, precision=precision)
    fit(model, 1, ewc, precision=precision)
    assert ewc.memory is not None and len(ewc.memory.tasks) == 2
    assert {t.dtype for t in ewc.memory.fisher.values()} <= {torch.float32, torch.float64}


def test_exclude_leaves_a_head_of_other_classes_free() -> None:
    _, path = learnt(exclude=["^head"])
    assert {name.split(".")[0] for name in load_memory(path).fisher} == {"body"}
    _, whole = learnt("whole.safetensors")
    model = Net(classes=5)
    trainer = Trainer(**QUIET, max_epochs=1)
    for source, exclude in ((path, ()), (whole, ["^head"])):
        ewc = EWC(load=source, exclude=exclude)
        trainer = Trainer(**QUIET, max_epochs=1, callbacks=[ewc])
        trainer.fit(model, DataLoader(task(1, classes=5), 16))
        assert ewc.active is not None and not any("head" in name for name in ewc.active.fisher)
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[EWC(load=whole)])
    with pytest.raises(ValueError, match=r"head.bias is \(5,\) in Net and \(3,\) in the Fisher.*exclude: \['\^head'\]"):
        trainer.fit(model, DataLoader(task(1, classes=5), 16))
    assert trainer.global_step == 0


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="exclude: '\\^haed' matches no parameter"):
        fit(Net(), 0, EWC(exclude=["^haed"]))
    with pytest.raises(ValueError, match="leaves nothing of the Fisher to hold"):
        fit(Net(), 0, EWC(load=learnt()[1], exclude=["."]))


def test_a_fisher_of_other_names_is_refused() -> None:
    _, path = learnt()
    memory = load_memory(path)
    for table in (memory.fisher, memory.anchor):
        table["body.0.wieght"] = table.pop("body.0.weight")
    save_memory(path, memory)
    with pytest.raises(ValueError, match="knows 'body.0.wieght', which Net lacks; did you mean 'body.0.weight'"):
        fit(Net(), 1, EWC(load=path))


def test_a_fisher_that_would_hold_nothing_or_break_everything_is_refused() -> None:
    _, path = learnt()
    for number, words in (
        (0.0, "is zero everywhere, so the penalty would hold nothing"),
        (math.nan, "not finite or below 0"),
    ):
        memory = load_memory(learnt()[1])
        memory.fisher = {name: torch.full_like(t, number) for name, t in memory.fisher.items()}
        save_memory(path, memory)
        with pytest.raises(ValueError, match=words):
            fit(Net(), 1, EWC(load=path))

    class Constant(Net):
        def logits(self, batch: Any) -> Tensor:
            return self(batch[0]).detach() + 0 * self.head.bias

    with pytest.raises(ValueError, match="after 64 samples: the Fisher is zero everywhere"):
        fit(Constant(), 0, EWC())


def test_files_that_are_none_are_refused() -> None:
    with pytest.raises(FileNotFoundError, match="no Fisher at gone.safetensors; a fit with EWC"):
        fit(Net(), 1, EWC(load="gone.safetensors"))
    Path("text.safetensors").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="text.safetensors is not a safetensors file"):
        fit(Net(), 1, EWC(load="text.safetensors"))
    save_file({"weight": torch.ones(1)}, "weights.safetensors")
    with pytest.raises(ValueError, match="weights.safetensors holds no Fisher of this kind"):
        fit(Net(), 1, EWC(load="weights.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strength": -1.0}, "strength must be a number of at least 0; received -1.0"),
        ({"strength": math.nan}, "strength must be"),
        ({"mode": "implicit"}, "mode must be proximal or gradient; received 'implicit'"),
        ({"samples": 0}, "samples must be 1 or more"),
        ({"estimator": "true"}, "estimator must be one of auto, exact, signs, empirical; received 'true'"),
        ({"draws": 0}, "draws must be 1 or more"),
        ({"online_decay": 1.5}, "online_decay must be above 0 and at most 1; received 1.5"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EWC(**arguments)


def test_an_old_configs_estimator_is_taken_as_signs() -> None:
    with pytest.warns(UserWarning, match="estimator 'sampled' is no longer there; 'signs' takes its place"):
        assert EWC(estimator="sampled", draws=2).estimator == "signs"


def test_three_tasks_in_one_process_with_separate_anchors() -> None:
    torch.manual_seed(0)
    model, ewc = Net(), EWC(10.0)
    fit(model, 0, ewc)
    first = copy.deepcopy(ewc.memory)
    fit(model, 1, ewc)
    second_anchor = weights(model)
    second_fisher, _ = fisher_diagonal(model, [task(1).tensors[0]], dict(model.named_parameters()), module=model)
    assert first is not None and ewc.memory is not None
    fit(model, 2, ewc)
    held = ewc.active
    assert held is not None and [t["name"] for t in held.tasks] == ["task 1", "task 2"]
    elsewhere = {name: torch.randn_like(t) for name, t in second_anchor.items()}
    expected = penalty(elsewhere, first.anchor, first.fisher, 1.0) + penalty(
        elsewhere, second_anchor, second_fisher, 1.0
    )
    found = penalty(elsewhere, held.anchor, held.fisher, 1.0) + held.constant / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert ewc.memory is not None and len(ewc.memory.tasks) == 3
    assert load_memory(Path("fisher.safetensors")).tasks == ewc.memory.tasks


def test_online_keeps_one_running_fisher_at_the_newest_anchor() -> None:
    model, ewc = Net(), EWC(10.0, online_decay=0.5)
    fit(model, 0, ewc)
    assert ewc.memory is not None
    first = copy.deepcopy(ewc.memory.fisher)
    fit(model, 1, ewc)
    second, _ = fisher_diagonal(model, [task(1).tensors[0]], dict(model.named_parameters()), module=model)
    for name, t in weights(model).items():
        torch.testing.assert_close(ewc.memory.fisher[name], 0.5 * first[name] + second[name], rtol=1e-4, atol=1e-9)
        assert torch.equal(ewc.memory.anchor[name], t)


def test_files_of_independent_tasks_add_up_and_the_same_task_twice_is_refused() -> None:
    _, a = learnt("a.safetensors", task="a")
    torch.manual_seed(9)
    other = Net()
    fit(other, 1, EWC(save="b.safetensors", task="b"))
    ewc = EWC(load=[a, "b.safetensors"])
    fit(Net(), 2, ewc)
    assert ewc.active is not None and [t["name"] for t in ewc.active.tasks] == ["a", "b"]
    one, two = load_memory(a), load_memory(Path("b.safetensors"))
    torch.testing.assert_close(ewc.active.fisher["head.bias"], one.fisher["head.bias"] + two.fisher["head.bias"])
    fit(Net(), 2, EWC(load=a, save="both.safetensors"))
    with pytest.raises(ValueError, match="both.safetensors holds 'a' as another of the loaded files does.*newest only"):
        fit(Net(), 2, EWC(load=[a, "both.safetensors"]))


def test_normalised_fishers_have_a_mean_of_one_and_do_not_mix() -> None:
    model, path = learnt(normalise=True)
    memory = load_memory(path)
    assert float(torch.cat([t.flatten() for t in memory.fisher.values()]).mean()) == pytest.approx(1, rel=1e-5)
    raw = load_memory(learnt("raw.safetensors")[1])
    assert memory.tasks[0]["normalised"] and memory.tasks[0]["mean"] == pytest.approx(raw.tasks[0]["mean"])
    with pytest.raises(
        ValueError, match="'task 1' was taken with normalise=True, and this is normalise=False; make them"
    ):
        fit(model, 1, EWC(load=path))


def test_loading_alone_takes_no_fisher_at_the_end() -> None:
    model, path = learnt()
    fit(model, 1, EWC(load=path))
    assert sorted(p.name for p in Path().glob("*.safetensors")) == ["a.safetensors"]
    fit(model, 1, EWC(load=path, consolidate=True))
    assert len(load_memory(Path("fisher.safetensors")).tasks) == 2
    fit(model, 1, EWC(consolidate=False))


def test_two_tensors_for_each_held_parameter_and_no_more() -> None:
    model, path = learnt()
    ewc = EWC(load=[path], consolidate=False)
    held: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            tensors: dict[int, Tensor] = {}

            def walk(value: Any) -> None:
                if isinstance(value, Tensor):
                    tensors[value.untyped_storage().data_ptr()] = value
                elif isinstance(value, Memory):
                    walk(vars(value))
                elif isinstance(value, dict):
                    for inner in value.values():
                        walk(inner)
                elif isinstance(value, (list, tuple)):
                    for inner in value:
                        walk(inner)

            walk(vars(ewc))
            held.append(sum(t.numel() for t in tensors.values()))

    fit(model, 1, ewc, Count())
    assert set(held) == {2 * sum(p.numel() for p in model.parameters())}


class Stop(Callback):
    """As if the run were killed at a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint("stopped.ckpt")
            trainer.should_stop = True
            trainer.limit_val_batches = 0


@pytest.mark.parametrize("mode", ["proximal", "gradient"])
@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_fit_needs_no_file_and_ends_as_the_uninterrupted_one(mode: Any, step: int) -> None:
    model, path = learnt()
    again, resumed = copy.deepcopy(model), Net()
    fit(model, 1, EWC(10.0, mode, load=path))
    fit(again, 1, EWC(10.0, mode, load=path), Stop(step))
    path.unlink()
    torch.load("stopped.ckpt", weights_only=True)
    ewc = EWC(10.0, mode, load=path)
    trainer = Trainer(**QUIET, max_epochs=3, callbacks=[ewc])
    trainer.fit(resumed, loader(1), ckpt_path="stopped.ckpt", weights_only=True)
    assert ewc.active is not None and trainer.global_step == 12
    assert all(torch.equal(t, weights(model)[name]) for name, t in weights(resumed).items())


def test_resuming_a_task_is_not_held_by_that_task() -> None:
    torch.manual_seed(5)
    model, ewc = Net(), EWC(1e6)
    trainer = fit(model, 0, ewc)
    assert ewc.memory is not None
    trainer.save_checkpoint("a.ckpt")
    longer = Trainer(**QUIET, max_epochs=5, callbacks=[ewc])
    longer.fit(Net(), loader(0), ckpt_path="a.ckpt", weights_only=True)
    assert ewc.active is None and longer.global_step == 20
    assert len(ewc.memory.tasks) == 1


def test_one_instance_serves_two_trainers_and_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = learnt()
    ewc = EWC(10.0, load=path)
    optimizers: list[Any] = []

    class Keep(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            optimizers.extend(trainer.optimizers)

    twin = copy.deepcopy(model)
    fit(model, 1, ewc, Keep())
    fit(twin, 1, ewc, Keep())
    assert all(torch.equal(t, weights(model)[name]) for name, t in weights(twin).items())

    class Fail(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("meant to fail")

    with pytest.raises(RuntimeError, match="meant to fail"):
        fit(twin, 1, ewc, Keep(), Fail())
    assert len(optimizers) == 3
    for optimizer in optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not [hook for hook in optimizer._optimizer_step_post_hooks.values() if "EWC" in repr(hook)]
    pickle.loads(pickle.dumps(ewc))


class Thaw(Callback):
    """Opens the body in the second epoch."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.body.requires_grad_(False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.body.requires_grad_(trainer.current_epoch >= 1)
        if trainer.current_epoch == 0:
            for p in pl_module.body.parameters():
                p.grad = None


@pytest.mark.parametrize("mode", ["proximal", "gradient"])
def test_frozen_blocks_are_untouched_and_held_once_they_open(mode: Any) -> None:
    model, path = learnt()
    with torch.no_grad():
        model.body[0].weight += 0.5
    seen: list[Tensor] = []

    class See(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            seen.append(pl_module.body[0].weight.detach().clone())
            assert trainer.current_epoch > 0 or pl_module.body[0].weight.grad is None

    before = model.body[0].weight.detach().clone()
    fit(model, 1, Thaw(), EWC(50.0, mode, load=path), See(), max_epochs=2)
    assert all(torch.equal(t, before) for t in seen[:4]) and not torch.equal(seen[4], before)


def test_frozen_parameters_get_no_fisher() -> None:
    model = Net()
    model.body.requires_grad_(False)
    fit(model, 0, EWC(save="a.safetensors"))
    assert set(load_memory(Path("a.safetensors")).fisher) == {"head.weight", "head.bias"}


def test_l_bfgs_is_held_by_the_proximal_step_and_its_line_search_refused() -> None:
    model, path = learnt()
    model.optimizer = lambda groups: torch.optim.LBFGS(
        [p for group in groups for p in group["params"]], lr=0.1, max_iter=3, line_search_fn="strong_wolfe"
    )
    with pytest.raises(ValueError, match="L-BFGS's line search compares losses.*mode proximal"):
        fit(copy.deepcopy(model), 1, EWC(load=path, mode="gradient"))
    free = copy.deepcopy(model)
    start = weights(model)
    fit(model, 1, EWC(1e4, load=path))
    fit(free, 1)
    far = [sum(float((t - start[name]).square().sum()) for name, t in weights(net).items()) for net in (model, free)]
    assert far[0] < 0.5 * far[1]


class Noisy(Dataset[Any]):
    """A transform that draws from torch's and Python's global generators."""

    def __init__(self) -> None:
        self.inner = task(0)
        self.targets = self.inner.targets  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        x, y = self.inner[index]
        return x + torch.randn(6) * random.random(), y


def still() -> Net:
    """A net that training leaves as it is."""
    torch.manual_seed(5)
    model = Net(rate=0.0)
    model.body[4].momentum = 0.0
    return model


def test_random_transforms_are_fixed_per_sample() -> None:
    found = []
    for batch_size, workers in ((8, 0), (64, 0), (64, 1)):
        ewc = EWC()
        data = DataLoader(Noisy(), batch_size, num_workers=workers)
        Trainer(**QUIET, max_epochs=1, callbacks=[ewc]).fit(still(), data)
        assert ewc.memory is not None
        found.append(ewc.memory.fisher)
    assert largest_difference(found[0], found[1]) < 1e-5 > largest_difference(found[0], found[2])


def test_training_is_the_same_with_and_without_taking_a_fisher() -> None:
    ends = []
    for callbacks in ([], [EWC()]):
        torch.manual_seed(5)
        random.seed(5)
        model = Net(dropout=0.3)
        Trainer(**QUIET, max_epochs=2, callbacks=callbacks).fit(model, DataLoader(Noisy(), 16, shuffle=True))
        ends.append((weights(model), float(torch.rand(())), random.random()))
    assert all(torch.equal(t, ends[1][0][name]) for name, t in ends[0][0].items())
    assert ends[0][1:] == ends[1][1:]


class Rows(Dataset[Any]):
    """Batches by keys of its own, as a sampler deals them out; single samples it knows not."""

    def __init__(self, evaluation: bool) -> None:
        self.inner, self.evaluation = task(0), evaluation
        self.labels = self.inner.targets  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.inner)

    def __getitems__(self, keys: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        assert all(kind == "row" for kind, _ in keys)
        rows = torch.tensor([row for _, row in keys])
        x = self.inner.tensors[0][rows]
        return {"image": x if self.evaluation else torch.full_like(x, torch.nan), "label": self.inner.tensors[1][rows]}


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(0)

    def fisher_dataloader(self) -> Any:
        return DataLoader(Rows(True), 16, sampler=[("row", r) for r in range(64)], collate_fn=lambda batch: batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not isinstance(batch, dict):
            return batch
        assert not self.trainer.training and self.trainer.validating
        return {**batch, "image": batch["image"] + 1}


def test_a_data_module_may_bring_its_own_samples_and_transfer_hooks() -> None:
    torch.manual_seed(5)
    model, ewc = Net(), EWC(samples=30)
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[ewc])
    trainer.fit(model, datamodule=Data())
    data = task(0)
    chosen = choose_samples(data.targets, 64, 30, 0)  # type: ignore[attr-defined]
    expected, _ = fisher_diagonal(model, [data.tensors[0][chosen] + 1], dict(model.named_parameters()), module=model)
    assert ewc.memory is not None and largest_difference(ewc.memory.fisher, expected) < 1e-5


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(task(0))


def test_what_would_fail_at_the_end_is_refused_before_the_first_step() -> None:
    class Captions(Net):
        def logits(self, batch: Any) -> Tensor:
            return self(batch[0]).unsqueeze(1)

    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[EWC()])
    with pytest.raises(ValueError, match=r"expected logits of shape \(batch, classes\).*\(2, 1, 3\)"):
        trainer.fit(Captions(), loader(0))
    assert trainer.global_step == 0

    class Detached(Net):
        def logits(self, batch: Any) -> Tensor:
            return self(batch[0]).detach()

    with pytest.raises(ValueError, match="the logits depend on no trained parameter; is there a no_grad"):
        fit(Detached(), 0, EWC())
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[EWC()])
    with pytest.raises(TypeError, match="samples of one DataLoader over a data set with a length, received DataLoader"):
        trainer.fit(Net(), DataLoader(Stream(), 16))
    assert trainer.global_step == 0

    class Unlabelled(EWC):
        def labels(self, batch: Any) -> None:
            return None

    with pytest.raises(ValueError, match="the empirical Fisher needs true labels"):
        fit(Net(), 0, Unlabelled(estimator="empirical"))


@pytest.mark.slow
def test_a_compiled_part_has_the_same_names_and_fisher() -> None:
    model, path = learnt()
    compiled = copy.deepcopy(model)
    compiled.body = torch.compile(compiled.body, backend="eager")  # type: ignore[assignment]
    ewc = EWC(load=path, consolidate=True, strength=0.0)
    plain = EWC(load=path, consolidate=True, strength=0.0)
    fit(compiled, 1, ewc)
    fit(model, 1, plain)
    assert ewc.memory is not None and plain.memory is not None
    assert largest_difference(ewc.memory.fisher, plain.memory.fisher) < 1e-4


def test_strategies_that_split_parameters_are_refused() -> None:
    trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(RuntimeError, match="EWC needs whole parameters, and FSDPStrategy splits them"):
        EWC().setup(trainer, Net(), "fit")  # type: ignore[arg-type]


def test_what_is_held_is_said(caplog: pytest.LogCaptureFixture) -> None:
    _, path = learnt()
    with caplog.at_level(logging.INFO, "callbacks.ewc"):
        fit(Net(), 1, EWC(7.0, load=path, exclude=["^head"], consolidate=True))
    assert "8 numbers" not in caplog.text
    assert (
        "EWC: 6 tensors with 416 parameters are held at task 1, proximal, strength 7; free: head.weight, head.bias"
        in caplog.text
    )
    assert "EWC: Fisher of 64 samples (exact)" in caplog.text


def test_logged_only_in_steps_that_log() -> None:
    model, path = learnt()
    steps: list[bool] = []

    class Spy(EWC):
        def on_before_optimizer_step(self, *args: Any) -> None:
            super().on_before_optimizer_step(*args)
            steps.append(self._penalty is not None)

    fit(model, 1, Spy(load=path), log_every_n_steps=3, max_epochs=2)
    assert steps == [False, False, True, False, False, True, False, False]


# Two ranks


class Ranks(Callback):
    """Writes each rank's weights."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        torch.save(weights(pl_module), f"rank{trainer.global_rank}.pt")


def two_ranks(model: LightningModule, which: int, *callbacks: Callback, **kwargs: Any) -> None:
    options = {**QUIET, "devices": 2, "strategy": "ddp_fork", "max_epochs": 2}
    Trainer(**{**options, "callbacks": list(callbacks), **kwargs}).fit(model, loader(which, 8))


@pytest.mark.parametrize("estimator", ["exact", "signs"])
@pytest.mark.parametrize("samples", [33, None])
def test_fisher_is_the_same_over_two_ranks(estimator: Any, samples: int | None) -> None:
    model = still()
    settings = {"samples": samples, "estimator": estimator}
    fit(copy.deepcopy(model), 0, EWC(save="one.safetensors", **settings))
    two_ranks(model, 0, EWC(save="two.safetensors", **settings))
    one, two = load_memory(Path("one.safetensors")), load_memory(Path("two.safetensors"))
    assert one.tasks[0]["samples"] == two.tasks[0]["samples"] == (samples or 64)
    assert largest_difference(two.fisher, one.fisher) < 1e-5


@pytest.mark.parametrize("mode", ["proximal", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_ranks_stay_equal(mode: Any, accumulate: int) -> None:
    _, path = learnt()
    torch.manual_seed(6)
    two_ranks(Net(), 1, EWC(30.0, mode, load=path, consolidate=True), Ranks(), accumulate_grad_batches=accumulate)
    one, two = torch.load("rank0.pt"), torch.load("rank1.pt")
    assert all(torch.equal(t, two[name]) for name, t in one.items())
    assert len(load_memory(Path("fisher.safetensors")).tasks) == 2


def test_file_names_and_shapes_are_in_its_header() -> None:
    _, path = learnt()
    assert set(load_file(path)) == {
        f"{kind}/{name}" for kind in ("fisher", "anchor") for name, _ in Net().named_parameters()
    }
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["tasks"])[0]["samples"] == 64
