"""Every parameter is in one named group, with the right decay."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from callbacks import layerwise_param_groups
from callbacks.unfreezing import blocks as unfreezing
from recipes.parts import param_groups as param_groups_file
from recipes.parts.optim import build_optimizer
from recipes.parts.param_groups import describe, param_groups, role
from tests.recipes.parts.nets import LAYERS, SLOW, Block, FancyRMSNorm, Net, timm_net, torchvision_net, transformers_net


def test_groups_of_every_kind_of_parameter() -> None:
    net = Net()
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups = param_groups(net, LAYERS, weight_decay=0.1, **SLOW)
    assert [(g["name"], g["lr_scale"], g["weight_decay"], sorted(names[p] for p in g["params"])) for g in groups] == [
        ("stem", 0.125, 0.1, ["conv.weight"]),
        ("stem/no_decay", 0.125, 0.0, ["bn.bias", "bn.weight", "embed.weight", "token"]),
        ("block1", 0.25, 0.1, ["blocks.0.attention.in_proj_weight", "blocks.0.attention.out_proj.weight"]),
        (
            "block1/no_decay",
            0.25,
            0.0,
            [
                "blocks.0.attention.in_proj_bias",
                "blocks.0.attention.out_proj.bias",
                "blocks.0.norm.bias",
                "blocks.0.norm.weight",
                "blocks.0.pos_bias",
            ],
        ),
        (
            "block2",
            0.5,
            0.1,
            ["blocks.1.attention.in_proj_weight", "blocks.1.attention.out_proj.weight", "hidden.weight"],
        ),
        (
            "block2/no_decay",
            0.5,
            0.0,
            [
                "blocks.1.attention.in_proj_bias",
                "blocks.1.attention.out_proj.bias",
                "blocks.1.norm.bias",
                "blocks.1.norm.weight",
                "blocks.1.pos_bias",
                "fancy.weight",
                "hidden.bias",
            ],
        ),
        ("head", 4.0, 0.1, ["head.weight"]),
        ("head/no_decay", 4.0, 0.0, ["head.bias"]),
    ]


def test_frozen_and_equal_valued_parameters_are_all_there_once() -> None:
    net = Net()
    for parameter in net.parameters():
        parameter.requires_grad_(False).fill_(1.0)
    listed = [p for group in param_groups(net, LAYERS, weight_decay=None) for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(list(net.parameters()))
    assert {id(p) for p in listed} == {id(p) for p in net.parameters()}


def test_tied_parameters_belong_to_the_first_layer_group_under_their_name_there() -> None:
    net = Net()
    tied_first = {"head": LAYERS["head"], **{name: paths for name, paths in LAYERS.items() if name != "head"}}
    for layers, expected in ((LAYERS, "stem/no_decay"), (tied_first, "head/no_decay")):
        groups = param_groups(net, layers, weight_decay=None)
        assert [g["name"] for g in groups if any(p is net.embed.weight for p in g["params"])] == [expected]
    with pytest.raises(ValueError, match="'tied' matches no parameter"):
        param_groups(net, LAYERS, weight_decay=None, lr_multipliers={"tied": 2.0})


def test_shared_modules_and_attributes_are_found_under_each_of_their_names() -> None:
    net = nn.Module()
    net.one = net.two = nn.Linear(2, 2)
    net.three = net.four = nn.Parameter(torch.ones(2, 2))
    groups = param_groups(net, {"body": ["two"], "head": ["four"]}, weight_decay=None)
    assert [(g["name"], len(g["params"])) for g in groups] == [
        ("body", 1),
        ("body/no_decay", 1),
        ("head/no_decay", 1),
    ]


def test_norms_and_biases_may_decay_but_embeddings_and_tokens_never() -> None:
    net = Net()
    groups = param_groups(net, LAYERS, weight_decay=0.1, decay_norms_and_biases=True)
    free = {id(p) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    tables = [net.embed.weight, net.token, net.blocks[0].pos_bias, net.blocks[1].pos_bias]
    assert free == {id(p) for p in tables}


def test_without_a_weight_decay_the_optimisers_own_holds() -> None:
    groups = param_groups(Net(), LAYERS, weight_decay=None)
    rows = describe(build_optimizer(partial(AdamW, lr=0.1, weight_decay=0.07), groups))
    assert {row.weight_decay for row in rows if "no_decay" not in row.name} == {0.07}
    assert {row.weight_decay for row in rows if "no_decay" in row.name} == {0.0}


def test_patterns_are_tried_in_order_and_divide_a_layer() -> None:
    net = Net()
    multipliers = {r"attention\.out": 3.0, "attention": 2.0, "block": 0.5}
    groups = param_groups(net, LAYERS, weight_decay=None, lr_multipliers=multipliers)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    block = net.blocks[0]
    assert scale[id(block.attention.out_proj.weight)] == 3.0
    assert scale[id(block.attention.in_proj_weight)] == 2.0
    assert scale[id(block.norm.weight)] == 0.5
    assert scale[id(net.hidden.weight)] == 1.0
    names = [g["name"] for g in groups]
    assert len(set(names)) == len(names)
    assert {"block1/x2", "block1/x3", "block1/x0.5/no_decay", "block2/no_decay", "head"} <= set(names)


@pytest.mark.parametrize(
    ("holder", "name", "expected"),
    [
        (nn.BatchNorm2d(3), "weight", "vector"),
        (nn.GroupNorm(1, 3), "weight", "vector"),
        (nn.InstanceNorm1d(3, affine=True), "weight", "vector"),
        (nn.RMSNorm((2, 3)), "weight", "vector"),
        (FancyRMSNorm(3), "weight", "vector"),
        (nn.Linear(3, 3), "bias", "vector"),
        (nn.Linear(3, 3), "weight", "weight"),
        (nn.Conv2d(3, 3, 3), "weight", "weight"),
        (nn.LSTM(3, 3), "weight_hh_l0", "weight"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", "weight"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)).parametrizations.weight, "original1", "weight"),
        (nn.EmbeddingBag(3, 3), "weight", "table"),
        (Block(4), "pos_bias", "table"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_roles_by_the_type_of_the_holder(holder: nn.Module, name: str, expected: str) -> None:
    assert role(holder, name, getattr(holder, name)) == expected


def test_a_position_table_in_a_module_of_its_own_is_known_by_its_name() -> None:
    holder = nn.Module()
    holder.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
    assert role(holder, "relative_position_bias_table", holder.relative_position_bias_table) == "table"


@pytest.mark.parametrize(
    ("layers", "options", "words"),
    [
        ({"all": ["blocks"]}, {}, r"in no layer group: token, embed.weight, .* and 6 more; add their paths"),
        (
            {**LAYERS, "head": ["head", "blocks.1"]},
            {},
            r"parameters in two layer groups: blocks.1.pos_bias, .* more; make",
        ),
        ({"stem": ["embd"], "head": [""]}, {}, "layer group 'stem' names 'embd'.* not in Net; did you mean 'embed'"),
        (LAYERS, {"lr_multipliers": {"^haed": 2.0}}, "'\\^haed' matches no parameter.*did you mean 'head'"),
        (LAYERS, {"lr_multipliers": {"head": 2.0, "head.bias": 3.0}}, "or none that an earlier pattern leaves"),
        (LAYERS, {"lr_multipliers": {"head": 0.0}}, "must be above 0; received 0"),
        (LAYERS, {"layer_decay": 0.0}, "layer_decay must be above 0; received 0"),
    ],
)
def test_groups_are_refused_early(layers: Any, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        param_groups(Net(), layers, weight_decay=None, **options)


def test_empty_groups_are_dropped_and_one_path_may_cover_everything() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    groups = param_groups(net, {"one": ["0"], "nothing": ["1"], "two": ["2"]}, weight_decay=None, layer_decay=0.5)
    assert [(g["name"], g["lr_scale"]) for g in groups] == [("one", 0.25), ("two", 1.0)]
    assert len(param_groups(net, {"all": [""]}, weight_decay=None)[0]["params"]) == 2


UNDECAYED: list[tuple[Any, str, list[str], list[str]]] = [  # builder, name, not decayed, decayed
    (torchvision_net, "vit_b_16", ["class_token", "encoder.pos_embedding", "encoder.ln.weight"], ["conv_proj.weight"]),
    (
        torchvision_net,
        "swin_v2_t",
        ["features.1.0.attn.logit_scale"],
        ["features.1.0.attn.cpb_mlp.0.weight", "features.1.0.attn.qkv.weight"],
    ),
    (torchvision_net, "swin_t", ["features.1.0.attn.relative_position_bias_table"], ["head.weight"]),
    (torchvision_net, "convnext_tiny", ["features.1.0.layer_scale"], ["features.1.0.block.0.weight"]),
    (timm_net, "deit_tiny_distilled_patch16_224", ["cls_token", "dist_token", "pos_embed"], ["head_dist.weight"]),
    (timm_net, "beit_base_patch16_224", ["blocks.0.gamma_1", "blocks.0.attn.relative_position_bias_table"], []),
    (timm_net, "vit_base_patch14_dinov2", ["blocks.0.ls1.gamma", "cls_token"], ["blocks.0.attn.qkv.weight"]),
    (timm_net, "fastvit_t8", ["stages.0.blocks.0.token_mixer.layer_scale.gamma"], ["head.fc.weight"]),
    (timm_net, "resmlp_12_224", ["blocks.0.norm1.alpha"], ["blocks.0.linear_tokens.weight"]),
    (timm_net, "halonet26t", ["stages.2.1.self_attn.pos_embed.height_rel"], ["stages.2.1.self_attn.kv.weight"]),
    (timm_net, "vit_so400m_patch14_siglip_224", ["attn_pool.latent"], ["attn_pool.kv.weight"]),
    (
        transformers_net,
        "bert",
        ["embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight", "embeddings.LayerNorm.weight"],
        ["encoder.layer.0.attention.self.query.weight", "pooler.dense.weight"],
    ),
    (transformers_net, "deberta-v2", ["embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight"], []),
    (transformers_net, "dinov2", ["embeddings.cls_token", "encoder.layer.0.layer_scale1.lambda1"], []),
    (transformers_net, "convnextv2", ["encoder.stages.0.layers.0.grn.weight"], []),
    (transformers_net, "t5", ["shared.weight", "encoder.block.0.layer.0.layer_norm.weight"], []),
    (transformers_net, "gpt2", ["wte.weight", "wpe.weight", "ln_f.weight"], ["h.0.attn.c_attn.weight"]),
    (transformers_net, "llama", ["embed_tokens.weight", "norm.weight"], ["layers.0.mlp.up_proj.weight"]),
    (transformers_net, "xlnet", ["layer.0.rel_attn.r_w_bias", "mask_emb"], ["layer.0.rel_attn.q"]),
    (transformers_net, "ibert", ["embeddings.word_embeddings.weight"], ["encoder.layer.0.attention.self.query.weight"]),
]


@pytest.mark.filterwarnings("ignore")  # of theirs
@pytest.mark.parametrize(
    ("build", "name", "undecayed", "decays"), UNDECAYED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_what_is_not_decayed_in_nets_of_all_libraries(
    build: Any, name: str, undecayed: list[str], decays: list[str]
) -> None:
    """Both the recipes' groups and those of the callback's file: class tokens, tables, scales, norms, embeddings."""
    with torch.device("meta"):
        net = build(name)
    ours = param_groups(net, {"all": [""]}, weight_decay=0.1)
    theirs = layerwise_param_groups(net, lr=1.0, weight_decay=0.1)
    free = [{p for g in groups if g["weight_decay"] == 0.0 for p in g["params"]} for groups in (ours, theirs)]
    assert free[0] == free[1]
    found = {path: parameter in free[0] for path, parameter in net.named_parameters(remove_duplicate=False)}
    assert all(found[path] for path in undecayed)
    assert not any(found[path] for path in decays)
    linear = {m.weight for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    tied = {m.weight for m in net.modules() if isinstance(m, nn.Embedding)}
    assert not free[0] & (linear - tied), "matrices decay"
    assert all(p in free[0] for p in net.parameters() if p.ndim < 2)


def test_the_rule_is_one_text() -> None:
    """The callback's file must be copyable alone, and the parts know no callback: so it is there twice."""
    assert inspect.getsource(unfreezing.role) == inspect.getsource(role)
    for name in ("NORM", "EMBEDDING", "TABLE", "LAYERS"):
        assert getattr(unfreezing, name) == getattr(param_groups_file, name)
