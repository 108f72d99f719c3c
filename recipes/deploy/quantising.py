"""An exported ONNX model in 8 bits: calibrated on images, dynamic for encoders of texts, by onnxruntime."""

from __future__ import annotations

import functools
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .restored import Restored

Inputs = dict[str, np.ndarray[Any, Any]]  # name of an input of the graph -> a batch
CALIBRATION_IMAGES = 256
BATCH = 32


class Setting(NamedTuple):
    """A way of calibration; the next is tried where one costs too much.

    Attributes:
        name: For tables.
        percentile: Of the activations that the range holds; None, all of them.
        whole: Kinds of nodes that stay in float32: convolutions of a channel each, for one.
    """

    name: str
    percentile: float | None = None
    whole: tuple[str, ...] = ()


SETTINGS = (
    Setting("int8"),
    Setting("int8, 99.99 % of the range", 99.99),
    Setting("int8, depthwise layers whole", None, ("depthwise",)),
    Setting("int8, depthwise, first and last layers whole", 99.99, ("depthwise", "ends")),
)


@functools.cache
def has_vnni() -> bool:
    """Whether this processor has instructions for products of 8-bit numbers: VNNI, or ARM's dot product."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    return any(word in flags for word in ("avx512_vnni", "avx_vnni", "asimddp")) or platform.machine() == "arm64"


def quantise(source: Path, target: Path, calibration: Callable[[], Iterable[Inputs]] | None, setting: Setting) -> None:
    """Write a model in 8 bits: weights by channel, activations by the range that they have in calibration.

    Without VNNI weights have 7 bits: sums of 8-bit products overflow there.

    Args:
        source: An ONNX model in float32.
        target: The file to write.
        calibration: Batches of inputs; None for ranges that are found anew in every call, as suits encoders.
        setting: Of the calibration.

    Raises:
        ImportError: onnxruntime or onnx is missing.
        ValueError: onnxruntime can't quantise this graph.
    """
    try:
        import onnx
        from onnxruntime import quantization as q
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise ImportError('8 bits need more packages: pip install "finetuning-recipes[export]"') from error
    options: dict[str, Any] = {"per_channel": True, "reduce_range": not has_vnni()}
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.onnx"
        try:
            quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
            if calibration is None:
                q.quantize_dynamic(ready, target, weight_type=q.QuantType.QInt8, **options)
            else:
                graph = onnx.load(str(ready)).graph
                method = q.CalibrationMethod.MinMax if setting.percentile is None else q.CalibrationMethod.Percentile
                extra = {} if setting.percentile is None else {"CalibPercentile": setting.percentile}
                q.quantize_static(
                    ready,
                    target,
                    _reader(q, calibration()),
                    quant_format=q.QuantFormat.QDQ,
                    activation_type=q.QuantType.QUInt8,
                    weight_type=q.QuantType.QInt8,
                    calibrate_method=method,
                    nodes_to_exclude=whole_nodes(graph, setting.whole),
                    extra_options=extra,
                    **options,
                )
        except Exception as error:  # onnxruntime raises half a dozen kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"onnxruntime can't quantise this net: {reason}") from error


def _reader(q: Any, batches: Iterable[Inputs]) -> Any:
    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> Inputs | None:
            return next(self.batches, None)

    return Reader()


def whole_nodes(graph: Any, kinds: Sequence[str]) -> list[str]:
    """Names of the nodes that stay in float32.

    Args:
        graph: Of an ONNX model.
        kinds: `depthwise`, convolutions with as many groups as channels; `ends`, the first and the last layer.
    """
    weights = {one.name: one for one in graph.initializer}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    chosen = []
    for place, node in enumerate(layers):
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        weight = weights.get(node.input[1]) if len(node.input) > 1 else None
        is_depthwise = groups > 1 and weight is not None and weight.dims[1] == 1
        is_end = place in (0, len(layers) - 1)
        if ("depthwise" in kinds and is_depthwise) or ("ends" in kinds and is_end):
            chosen.append(node.name)
    return chosen


def session(file: Path, threads: int = 0) -> Any:
    """A session of onnxruntime on the processor; with 0 threads, one for each core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def inputs_of(batch: Mapping[str, Any], names: Iterable[str]) -> Inputs:
    """A batch of a data module as the inputs of an exported graph."""
    given = {"images": batch["image"]} if "image" in batch else batch
    return {name: np.ascontiguousarray(given[name].cpu().numpy()) for name in names}


def answer_of(file: Path) -> Callable[[Mapping[str, Any]], Tensor]:
    """What an exported model answers to batches of a data module: logits, `(batch, classes)`."""
    opened = session(file)
    names = [one.name for one in opened.get_inputs()]
    return lambda batch: torch.from_numpy(opened.run(["logits"], inputs_of(batch, names))[0])


def calibration_of(net: Restored, data: Any) -> Callable[[], Iterable[Inputs]] | None:
    """Training images as in evaluation, drawn evenly; None for texts."""
    if net.recipe != "vision":
        return None
    count = len(data.splits["train"].labels)
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES].tolist()

    def batches() -> Iterable[Inputs]:
        for start in range(0, len(rows), BATCH):
            batch = data.on_after_batch_transfer(data.batch("train", rows[start : start + BATCH]), 0)
            yield inputs_of(batch, ["images"])

    return batches
