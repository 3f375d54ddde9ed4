"""A package held against a target: each finding as it holds, as it is broken, and as it cannot be checked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from potstill.targets.request import read_package
from potstill.targets.static_check import Finding, StaticCheck, static_check
from potstill.targets.target import Target, load_target
from potstill.validate.files import read_json, write_json

MakePackage = Callable[..., Path]


def with_model(target: str, **changes: Any) -> Target:
    found = load_target(target)
    return found.model_copy(update={"model": found.model.model_copy(update=changes)})


def check(folder: Path, target: Target | str, limit: float | None = None) -> StaticCheck:
    return static_check(read_package(folder), load_target(target) if isinstance(target, str) else target, limit)


def finding(found: StaticCheck, what: str) -> Finding:
    return next(one for one in found.findings if one.what == what)


def integers(folder: Path, most: int, activation: str = "uint8", dtype: type = np.int8) -> Path:
    """Make the package's model a QDQ product with weights up to `most`."""
    weight: np.ndarray[Any, Any] = np.full((256, 4), most, dtype=dtype)
    zero, kind = np.zeros((), np.dtype(activation)), np.dtype(activation)
    held = {"w": weight, "s": np.float32(0.1), "z": zero, "wz": np.zeros((), dtype), "ws": np.float32(0.1)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x0", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], name="wd"),
        helper.make_node("MatMul", ["d", "wd"], ["y"], name="product"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", c]) for n, c in (("x0", 256), ("y", 4))]
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()]
    body = helper.make_graph(nodes, "made", ends[:1], ends[1:], constants)
    opset = 21 if kind.itemsize == 2 else 17
    onnx.save(
        helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), folder / "model.onnx"
    )
    return folder


def test_a_package_for_its_own_target_holds(make_package: MakePackage) -> None:
    found = check(make_package(), "laptop-x86-vnni")
    assert [one.what for one in found.findings] == ["size", "opset", "shapes", "types", "operators", "fallback"]
    assert {one.outcome for one in found.findings} == {"holds"}
    assert (found.kind, found.coverage, found.broken) == ("estimated", None, [])
    assert "all 8 nodes run on the CPU provider of ONNX Runtime 1." in finding(found, "operators").told


def test_size(make_package: MakePackage) -> None:
    folder = make_package()  # 4 matrices of 256 × 256 in float32
    assert finding(check(folder, with_model("phone-arm64", max_file_mb=2)), "size").told == (
        "the model takes 1.05 MB, limit 2 MB"
    )
    broken = finding(check(folder, with_model("phone-arm64", max_file_mb=1)), "size")
    assert (broken.outcome, broken.told) == (
        "broken",
        "the model takes 1.05 MB, and phone-arm64 takes at most 1 MB; cut a smaller student or choose "
        "a scheme of fewer bits",
    )
    (folder / "model.ort").write_bytes(bytes(3_000_000))  # it ships, too
    assert finding(check(folder, with_model("phone-arm64", max_file_mb=2)), "size").outcome == "broken"


def test_opset(make_package: MakePackage) -> None:
    folder = integers(make_package(), 5, "uint16")
    assert finding(check(folder, with_model("phone-arm64", opset=21)), "opset").told == "opset 21, wanted up to 21"
    broken = finding(check(folder, with_model("phone-arm64", opset=17)), "opset")
    assert (broken.outcome, broken.told) == ("broken", "opset 21, and phone-arm64 wants 17; export for this target")


def test_shapes(make_package: MakePackage) -> None:
    folder = make_package()
    assert finding(check(folder, "phone-arm64"), "shapes").told == "x0 is free in rows"
    broken = finding(check(folder, "laptop-directml"), "shapes")
    assert (broken.outcome, broken.told) == (
        "broken", "x0 is free in rows, and laptop-directml wants fixed shapes; export for this target"
    )  # fmt: skip
    model = onnx.load(folder / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    onnx.save(model, folder / "model.onnx")
    assert finding(check(folder, "laptop-directml"), "shapes").told == "all inputs have fixed shapes"


@pytest.mark.parametrize(
    ("most", "activation", "dtype", "target", "outcome"),
    [
        (127, "uint8", np.int8, "laptop-x86-avx2", "broken"),
        (-65, "uint8", np.int8, "laptop-x86-avx512", "broken"),
        (-128, "int8", np.int8, "laptop-x86-avx2", "broken"),  # ONNX Runtime turns S8S8 into U8S8 on x86
        (64, "uint8", np.int8, "laptop-x86-avx2", "holds"),
        (-64, "uint8", np.int8, "laptop-x86-avx2", "holds"),
        (255, "uint8", np.uint8, "laptop-x86-avx2", "holds"),
        (127, "uint16", np.int8, "laptop-x86-avx2", "holds"),
        (127, "uint8", np.int8, "laptop-x86-vnni", "holds"),
        (127, "uint8", np.int8, "phone-arm64", "holds"),
    ],
)
def test_sums_that_can_saturate(
    most: int, activation: str, dtype: type, target: str, outcome: str, make_package: MakePackage
) -> None:
    found = finding(check(integers(make_package(), most, activation, dtype), target), "types")
    assert found.outcome == outcome
    if outcome == "broken":
        assert "; export for laptop-x86-avx" in found.told
        assert "saturation: 1 of its 1 int8 products have weights of all 8 bits, and this CPU" in found.told


@pytest.mark.parametrize("weight", [-128, -65, -64, 0, 63, 64, 65, 127])
def test_a_pair_overflows_16_bits_just_where_it_is_said(weight: int, make_package: MakePackage) -> None:
    pair = 255 * weight + 255 * weight  # the largest that VPMADDUBSW adds (Intel's manual, volume 2)
    fits = np.iinfo(np.int16).min <= pair <= np.iinfo(np.int16).max
    found = finding(check(integers(make_package(), weight), "laptop-x86-avx2"), "types")
    assert (found.outcome == "holds") == fits


def test_exact_sums_do_not_saturate(make_package: MakePackage) -> None:
    target = load_target("laptop-x86-avx2")
    runtime = target.runtime.model_copy(update={"session_options": {"session.x64quantprecision": "1"}})
    target = target.model_copy(update={"runtime": runtime})
    assert finding(check(integers(make_package(), 127), target), "types").outcome == "holds"


def test_a_file_that_does_not_run_here(make_package: MakePackage) -> None:
    folder = make_package()
    model = onnx.load(folder / "model.onnx")
    model.graph.node[-1].op_type = "Odd"
    onnx.save(model, folder / "model.onnx")
    broken = finding(check(folder, "phone-arm64"), "operators")
    assert broken.outcome == "broken"
    assert "does not run on ONNX Runtime" in broken.told
    assert broken.told.endswith("; export the model again")


def test_what_leaves_is_counted_by_node_and_by_work(make_package: MakePackage) -> None:
    folder = make_package(layers=2)
    model = onnx.load(folder / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    model.graph.node[1].op_type = "Sign"  # listed nowhere
    onnx.save(model, folder / "model.onnx")
    found = check(folder, "phone-iphone")
    told = "25.0% of the nodes and 0.0% of the multiply-adds leave. Estimated: CoreMLExecutionProvider takes 3 of 4"
    assert finding(found, "fallback").told.startswith(told)
    assert finding(found, "fallback").outcome == "holds"
    assert finding(check(folder, "phone-iphone", 0.25), "fallback").outcome == "holds"
    broken = check(folder, "phone-iphone", 0.0)
    assert [one.what for one in broken.broken] == ["fallback"]
    assert "they are tanh0 (not in the list of operators)" in broken.broken[0].told
    assert check(folder, with_model("phone-iphone", max_fallback="0%"), 0.5).broken


def test_what_a_compiler_said_comes_first_for_its_own_target(make_package: MakePackage) -> None:
    folder = make_package(target="phone-snapdragon-v75")
    unknown = check(folder, "phone-snapdragon-v75")
    assert finding(unknown, "fallback").outcome == "not checked"
    assert finding(check(folder, "phone-snapdragon-v75", 0.5), "fallback").outcome == "broken"
    left = [{"name": "matmul0", "operator": "MatMul", "reason": "too large"}]
    kept = {"kind": "compiled", "provider": "QNN", "source": "a trace", "nodes": 8, "partitions": 1, "left": left}
    manifest = read_json(folder / "manifest.json") | {"coverage": kept}
    write_json(folder / "manifest.json", manifest)
    found = check(folder, "phone-snapdragon-v75")
    assert found.coverage
    assert (found.coverage.kind, found.coverage.nodes_left, found.coverage.work_left) == ("compiled", 0.125, 0.25)
    assert finding(check(folder, "phone-snapdragon-v79"), "fallback").outcome == "not checked"
