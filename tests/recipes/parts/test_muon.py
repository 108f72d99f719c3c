"""Muon for matrices and AdamW for the rest are as the two apart."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import torch
from torch import nn
from torch.optim import AdamW, Muon

from recipes.parts.muon import MuonWithAdamW
from recipes.parts.optim import build_optimizer
from recipes.parts.param_groups import describe, param_groups
from tests.recipes.parts.nets import LAYERS, SLOW, Net, group_of, loss_of, take_steps


def test_muon_gets_hidden_matrices_and_equals_the_two_optimisers_apart() -> None:
    net = Net()
    hidden = [
        name for name, _ in net.named_parameters() if name.endswith(("proj_weight", "proj.weight", "hidden.weight"))
    ]
    twin = copy.deepcopy(net)
    optimizer = build_optimizer(
        partial(MuonWithAdamW, lr=0.02, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3),
        param_groups(net, LAYERS, weight_decay=None),
    )
    assert {n for n, p in net.named_parameters() if group_of(net, optimizer, n)["muon"]} == set(hidden)
    assert [row.name for row in describe(optimizer)][:4] == ["stem", "stem/no_decay", "block1", "block1/no_decay"]

    matrices = [p for n, p in twin.named_parameters() if n in hidden]
    free = {id(p) for g in param_groups(twin, LAYERS, weight_decay=None) if "weight_decay" in g for p in g["params"]}
    rest = [p for n, p in twin.named_parameters() if n not in hidden]
    apart = [
        Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        AdamW([p for p in rest if id(p) not in free], lr=0.02, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3),
        AdamW([p for p in rest if id(p) in free], lr=0.02, weight_decay=0.0, betas=(0.8, 0.9), eps=1e-3),
    ]
    for _ in range(4):
        take_steps(net, optimizer, 1)
        for part in apart:
            part.zero_grad()
        loss_of(twin).backward()
        for part in apart:
            part.step()
    for (name, one), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name, rtol=1e-4, atol=1e-5)


def test_muon_divides_a_group_that_holds_both() -> None:
    net = Net()
    groups = param_groups(net, LAYERS, weight_decay=None, decay_norms_and_biases=True, **SLOW)
    optimizer = build_optimizer(partial(MuonWithAdamW, lr=0.01), groups)
    rows = {row.name: row.lr for row in describe(optimizer)}
    assert rows["block1"] == rows["block1/adamw"] == 0.0025
    assert not group_of(net, optimizer, "head.weight")["muon"]
    assert not group_of(net, optimizer, "embed.weight")["muon"]
    plain = MuonWithAdamW(nn.Linear(3, 3).parameters())
    assert [(group["muon"], len(group["params"])) for group in plain.param_groups] == [(True, 1), (False, 1)]


def test_a_pickled_muon_keeps_groups_and_state() -> None:
    net = Net()
    optimizer = build_optimizer(MuonWithAdamW, param_groups(net, LAYERS, weight_decay=None))
    take_steps(net, optimizer, 2)
    untouched = net
    net, optimizer = pickle.loads(pickle.dumps((net, optimizer)))
    before = copy.deepcopy(net.state_dict())
    take_steps(net, optimizer, 1)
    assert all(not torch.equal(before[name], p) for name, p in net.named_parameters())
    assert len(optimizer.state) == len(list(net.parameters()))
    assert torch.equal(untouched.hidden.weight, before["hidden.weight"])
