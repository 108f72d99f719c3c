"""ONNX models in 8 bits answer nearly as in float32, or the reason is said; chosen nodes stay whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from recipes.deploy.quantising import SETTINGS, Setting, answer_of, has_vnni, inputs_of, quantise, whole_nodes  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    file = tmp_path_factory.mktemp("model") / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=99)
    program = torch.onnx.export(
        net.eval(), (torch.rand(2, 3, 8, 8),), dynamo=True, input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: batch},), verbose=False,
    )  # fmt: skip
    assert program is not None
    program.save(file)
    return file


def images(count: int = 8) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {"images": torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).numpy()}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda one: one.name)
def test_answers_are_nearly_the_same(setting: Setting, model: Path, tmp_path: Path) -> None:
    quantise(model, tmp_path / "small.onnx", lambda: [images(), images()], setting)
    batch = {"image": torch.from_numpy(images()["images"])}
    exact, small = answer_of(model)(batch), answer_of(tmp_path / "small.onnx")(batch)
    assert (exact - small).abs().max() < 0.1 * exact.abs().max()
    kinds = {node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node}
    assert "ends" in setting.whole or ("QuantizeLinear" in kinds and not torch.equal(exact, small))


def test_chosen_nodes_stay_whole(model: Path) -> None:
    graph = onnx.load(model).graph
    layers = [node.name for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert whole_nodes(graph, ()) == []
    assert whole_nodes(graph, ("depthwise",)) == [layers[1]]
    assert whole_nodes(graph, ("depthwise", "ends")) == layers


def test_what_is_no_graph_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"none")
    with pytest.raises(ValueError, match="onnxruntime can't quantise this net"):
        quantise(tmp_path / "model.onnx", tmp_path / "small.onnx", None, SETTINGS[0])


def test_inputs_are_those_that_the_graph_asks_for() -> None:
    batch = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "attention_mask": torch.ones(2, 3),
        "label": torch.ones(2),
    }
    assert set(inputs_of(batch, ["input_ids", "attention_mask"])) == {"input_ids", "attention_mask"}
    assert isinstance(has_vnni(), bool)
