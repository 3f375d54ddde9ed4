"""Each rewrite gives the numbers that ONNX Runtime gives of the graph before it, and leaves alone what it must."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from potstill.export.rewrites import suit
from potstill.targets.coverage import estimated
from potstill.targets.target import load_target

SHAPE = (1, 6, 4)
X = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
IN_ORDER = np.stack(np.unravel_index(np.arange(24), SHAPE), axis=-1).reshape(2, 12, 3)


def graph(path: Path, nodes: list[onnx.NodeProto], **held: Any) -> Path:
    """A graph from x (1, 6, 4) to y."""
    body = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()],
    )
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def node(operator: str, inputs: str, output: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], name=f"the_{operator}", **attributes)


def outcome(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": X})[0]


def operators(path: Path) -> list[str]:
    return [one.op_type for one in onnx.load(str(path)).graph.node]


def masked(fill: float) -> tuple[list[onnx.NodeProto], dict[str, Any]]:
    """Softmax with the first column masked, guarded against NaN as torch writes it."""
    nodes = [
        node("Add", "x mask", "a"),
        node("Softmax", "a", "s", axis=-1),
        node("IsNaN", "s", "n"),
        node("Where", "n zero s"),
    ]
    return nodes, {"mask": np.array([fill, 0, 0, 0], dtype=np.float32), "zero": np.float32(0)}


def masked_twice(fill: np.floating[Any], operator: str = "Add") -> tuple[list[onnx.NodeProto], dict[str, Any]]:
    """Every column masked twice by finite numbers that overflow together: without the guard every row is NaN."""
    nodes, held = masked(0)
    mask = helper.make_node("Where", ["under", "fill", "zero"], ["m"], name="the_mask")
    both = helper.make_node(operator, ["m", "m"], ["both"], name="both_masks")
    before = [node("Less", "x top", "under"), mask, both, node("Add", "x both", "a")]
    del held["mask"]
    return before + nodes[1:], held | {"fill": fill, "top": np.float32(99)}


CASES: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], list[str]]] = {
    "the first token": ([node("Gather", "x i", axis=1)], {"i": np.int64(0)}, ["Slice", "Squeeze"]),
    "the last token": ([node("Gather", "x i", axis=-2)], {"i": np.int64(-1)}, ["Slice", "Squeeze"]),
    "in order": ([node("GatherND", "x i")], {"i": IN_ORDER}, ["Reshape"]),
    "padded behind": ([node("Pad", "x p")], {"p": np.array([0, 0, 0, 0, 2, 0])}, ["Concat"]),
    "padded on both sides": (
        [node("Pad", "x p v")], {"p": np.array([0, 0, 1, 0, 0, 3]), "v": np.float32(7)}, ["Concat"],
    ),
    "safe softmax": (*masked(-1e9), ["Add", "Softmax", "Identity"]),
    "the least mask": (*masked(float(np.finfo(np.float32).min)), ["Add", "Softmax", "Identity"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_rewrite_computes_the_same_and_core_ml_takes_it_in_one_partition(tmp_path: Path, name: str) -> None:
    nodes, held, expected = CASES[name]
    path, target = graph(tmp_path / "m.onnx", nodes, **held), load_target("phone-iphone")
    before = outcome(path)
    assert suit(path, target) == {nodes[-1].op_type: 1}
    assert operators(path) == expected
    np.testing.assert_array_equal(outcome(path), before)
    found = estimated(path, target)
    assert found
    assert (found.left, found.partitions) == ((), 1)


@pytest.mark.parametrize(
    ("nodes", "held"),
    [
        ([node("Gather", "x i", axis=1)], {"i": np.array([0, 2])}),
        ([node("GatherND", "x i")], {"i": IN_ORDER[::-1].copy()}),
        ([node("GatherND", "x i")], {"i": IN_ORDER[..., :2].copy()}),
        ([node("GatherND", "x i", batch_dims=1)], {"i": np.zeros((1, 3, 1), dtype=np.int64)}),
        ([node("Pad", "x p")], {"p": np.array([0, 1, 1, 0, 0, 0])}),
        ([node("Pad", "x p")], {"p": np.array([0, -1, 0, 0, 0, 0])}),
        ([node("Pad", "x p", mode="edge")], {"p": np.array([0, 1, 0, 0, 0, 0])}),
        masked(-np.inf),
        masked(np.nan),
        masked_twice(np.finfo(np.float32).min),
        masked_twice(np.finfo(np.float32).min, "Mul"),
        ([node("IsNaN", "x", "n"), node("Where", "n zero x")], {"zero": np.float32(0)}),
    ],
)
def test_what_a_rewrite_would_change_stays(tmp_path: Path, nodes: list[onnx.NodeProto], held: dict[str, Any]) -> None:
    path = graph(tmp_path / "m.onnx", nodes, **held)
    before = outcome(path)
    assert suit(path, load_target("phone-iphone")) == {}
    assert operators(path) == [one.op_type for one in nodes]
    np.testing.assert_array_equal(outcome(path), before)


def test_each_provider_has_its_own_rewrites(tmp_path: Path) -> None:
    path = graph(tmp_path / "m.onnx", [node("GatherND", "x i", "g"), node("Gather", "g j")], i=IN_ORDER, j=np.int64(1))
    kept = path.read_bytes()
    assert suit(path, load_target("laptop-x86-vnni")) == {}
    assert path.read_bytes() == kept
    assert suit(path, load_target("phone-snapdragon-v75")) == {"GatherND": 1}
    assert operators(path) == ["Reshape", "Gather"]


def test_a_sum_before_a_layer_norm_is_not_fused_on_a_cpu(tmp_path: Path) -> None:
    """ONNX Runtime fuses the Add into SkipLayerNormalization, and leaves the Sum alone; the numbers are the same."""
    nodes = [
        node("Mul", "x half", "m"),
        node("Add", "x m", "a"),
        node("LayerNormalization", "a scale bias", "l", axis=-1),
        helper.make_node("Add", ["l", "bias"], ["y"], name="the_last"),
    ]
    held = {"half": np.float32(0.5), "scale": np.full(4, 2, dtype=np.float32), "bias": np.ones(4, dtype=np.float32)}
    before = graph(tmp_path / "before.onnx", nodes, **held)
    after = graph(tmp_path / "after.onnx", nodes, **held)
    assert suit(after, load_target("laptop-x86-vnni")) == {"Add": 1}
    assert operators(after) == ["Mul", "Sum", "LayerNormalization", "Add"]
    np.testing.assert_allclose(outcome(after), outcome(before), rtol=1e-6, atol=1e-6)
    fused = {}
    for path in (before, after):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        fused[path.stem] = "SkipLayerNormalization" in operators(tmp_path / "optimised.onnx")
    assert fused == {"before": True, "after": False}
