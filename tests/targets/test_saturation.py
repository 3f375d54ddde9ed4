"""Which files overflow without VNNI: by ONNX Runtime's own quantisers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from potstill.targets.saturation import Saturation, saturation
from potstill.targets.target import load_target

AVX2, VNNI, PHONE = (load_target(name) for name in ("laptop-x86-avx2", "laptop-x86-vnni", "phone-arm64-dotprod"))
LAYERS = 3


@pytest.fixture
def graph(make_package: Callable[..., Path]) -> Path:
    return make_package(width=32, layers=LAYERS) / "model.onnx"


class One(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.rows = iter([{"x0": np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)}])

    def get_next(self) -> Any:
        return next(self.rows, None)


def static(graph: Path, **options: Any) -> Path:
    out = graph.with_name("quantized.onnx")
    quantize_static(
        graph, out, One(), **{"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, **options}
    )
    return out


def dynamic(graph: Path, **options: Any) -> Path:
    out = graph.with_name("quantized.onnx")
    quantize_dynamic(graph, out, **options)
    return out


@pytest.mark.parametrize(
    ("make", "options", "full"),
    [
        (static, {}, LAYERS),
        (static, {"per_channel": True}, LAYERS),
        (static, {"activation_type": QuantType.QInt8}, LAYERS),  # which x86 turns into uint8
        (static, {"quant_format": QuantFormat.QOperator}, LAYERS),
        (static, {"reduce_range": True}, 0),
        (static, {"weight_type": QuantType.QUInt8}, 0),
        (static, {"activation_type": QuantType.QUInt16}, 0),
        (dynamic, {}, LAYERS),
        (dynamic, {"reduce_range": True}, 0),
        (dynamic, {"weight_type": QuantType.QUInt8}, 0),
    ],
)
def test_what_overflows(graph: Path, make: Any, options: Any, full: int) -> None:
    found = saturation(make(graph, **options), AVX2)
    assert found == (Saturation(full, LAYERS) if full else None)


def test_only_a_cpu_without_vnni_saturates(graph: Path) -> None:
    file = static(graph)
    assert saturation(file, VNNI) is None
    assert saturation(file, PHONE) is None
    assert saturation(graph, AVX2) is None  # in float


def test_weights_of_seven_bits_are_told_from_those_of_eight(tmp_path: Path) -> None:
    """The instruction's definition: neighbours' products in 16 bits; 2 · 255 · 64 stays, 2 · 255 · 65 does not."""
    assert 2 * 255 * 64 < 2**15 <= 2 * 255 * 65
    weights = [np.full((4, 2), value, np.int8) for value in (64, -64, 65, -65, -128)]
    nodes = [helper.make_node("MatMulInteger", ["x", f"w{i}"], [f"y{i}"]) for i in range(5)]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "products",
            [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 4])],
            [helper.make_tensor_value_info("y0", TensorProto.INT32, [1, 2])],
            [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
        )
    )
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    found = saturation(tmp_path / "m.onnx", AVX2)
    assert found == Saturation(3, 5)
    assert found.in_words(AVX2) == (
        "saturation: 3 of its 5 int8 products have weights of all 8 bits, and this CPU, "
        "without avx512_vnni and avx_vnni, adds two neighbours in 16 bits, where they overflow"
    )
