"""GPTQ against the step that it is made of, in float64, and against what ONNX Runtime computes with its integers."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from potstill.export import gptq
from potstill.export.gptq import DAMPING, packed, rounded
from potstill.validate.session import open_session

RNG = np.random.default_rng(0)
HIGH, WIDE, SIZE = 40, 6, 16  # 40 is no whole number of blocks
MIXED = RNG.normal(size=(HIGH, HIGH))
X = RNG.normal(size=(300, HIGH)) @ MIXED  # inputs that hang together, so that errors can be made good
WEIGHT = RNG.normal(size=(HIGH, WIDE))
HESSIAN = X.T @ X


def by_elimination(weight: NDArray[Any], hessian: NDArray[Any], size: int) -> NDArray[Any]:
    """Optimal Brain Quantization in a fixed order (Frantar 2022, eq. 2 and 3): no Cholesky factor, no blocks."""
    left, out = weight.astype(np.float64).copy(), np.zeros_like(weight, dtype=np.float64)
    inverse = np.linalg.inv(hessian + np.eye(len(hessian)) * DAMPING * np.trace(hessian) / len(hessian))
    for i in range(len(left)):
        if i % size == 0:
            block = left[i : i + size]
            scale = np.float32(np.take_along_axis(block, np.abs(block).argmax(axis=0)[None], 0)[0] / -8)
        out[i] = np.clip(np.rint(left[i] / scale), -8, 7) * scale
        left[i:] -= np.outer(inverse[i:, i], (left[i] - out[i]) / inverse[i, i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return out


def spread(whole: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float64]:
    return whole * np.repeat(scales.astype(np.float64), SIZE, axis=0)[: len(whole)]


def test_it_is_the_step_of_the_paper_all_the_way() -> None:
    found = spread(*rounded(WEIGHT, HESSIAN, SIZE))
    np.testing.assert_allclose(found, by_elimination(WEIGHT, HESSIAN, SIZE), rtol=1e-6)


def test_inputs_that_do_not_hang_together_leave_the_nearest() -> None:
    nearest, _ = rounded(WEIGHT, np.eye(HIGH), SIZE)
    whole, scales = rounded(WEIGHT, np.zeros((HIGH, HIGH)), SIZE)  # an input that is never there
    assert (whole == nearest).all()
    assert (np.abs(spread(whole, scales) - WEIGHT) <= np.abs(np.repeat(scales, SIZE, 0)[:HIGH]) * 1.001).all()
    found, zeros = rounded(np.zeros((HIGH, 2)), HESSIAN, SIZE)
    assert not found.any()
    assert not zeros.any()


def test_the_product_is_nearer_than_with_the_nearest() -> None:
    near, other = (spread(*rounded(WEIGHT, hessian, SIZE)) for hessian in (HESSIAN, np.eye(HIGH)))
    mine, theirs = (float(np.square(X @ (WEIGHT - one)).mean()) for one in (near, other))
    assert mine < theirs / 2


def test_onnxruntime_multiplies_by_these_integers(tmp_path: Path) -> None:
    whole, scales = rounded(WEIGHT, HESSIAN, SIZE)
    weights = [numpy_helper.from_array(packed(whole, SIZE), "b"), numpy_helper.from_array(scales.T.copy(), "s")]
    how = {"K": HIGH, "N": WIDE, "bits": 4, "block_size": SIZE, "domain": "com.microsoft"}
    node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], **how)
    x, y = helper.make_tensor_value_info("x", 1, [None, HIGH]), helper.make_tensor_value_info("y", 1, [None, WIDE])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "one", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "one.onnx")
    (found,) = open_session(tmp_path / "one.onnx").run(None, {"x": np.eye(HIGH, dtype=np.float32)})
    np.testing.assert_allclose(found, spread(whole, scales), atol=1e-6)


def test_hessians_come_in_groups_that_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "MEMORY", 8 * (3**2 + 4**2))
    assert gptq._within_memory({"a": 3, "b": 4, "c": 1, "d": 9, "e": 2}) == [["a", "b"], ["c"], ["d"], ["e"]]
