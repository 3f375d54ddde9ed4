"""The rounding against ONNX Runtime's own, its gradient and the folding against their formulas."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from potstill.validate.fake_quant import INT32, Formats, fake_quantize, folded, weight_scale


def in_onnxruntime(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int) -> np.ndarray:
    """DequantizeLinear(QuantizeLinear(x)), nothing optimised."""
    steps, back = (
        helper.make_node(op, [first, "scale", "zero"], [out], axis=axis)
        for op, first, out in (("QuantizeLinear", "x", "q"), ("DequantizeLinear", "q", "y"))
    )
    graph = helper.make_graph(
        [steps, back],
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(zero, "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    y: np.ndarray = session.run(None, {"x": x})[0]
    return y


def hard_values(scale: float) -> np.ndarray:
    """Ties on both sides of zero, values far out of range, the neighbours of ties, and random ones."""
    ties = ((np.arange(-400, 400) + 0.5) * np.float32(scale)).astype(np.float32)
    far = np.float32([-1e6, 1e6, 0.0, -0.0, 1e-30])
    near = np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))
    noise = np.random.default_rng(0).normal(scale=100 * scale, size=5000).astype(np.float32)
    return np.concatenate([ties, far, *near, noise])


@pytest.mark.parametrize("scale", [0.5, 0.1, 0.0123456, 3e-5, 7.0])
@pytest.mark.parametrize(
    ("zero", "kind"), [(0, np.uint8), (3, np.uint8), (128, np.uint8), (255, np.uint8), (0, np.int8), (-128, np.int8)]
)
def test_the_rounding_is_onnx_runtimes_to_the_bit(scale: float, zero: int, kind: Any) -> None:
    x, limits = hard_values(scale), np.iinfo(kind)
    ours = fake_quantize(
        torch.from_numpy(x), torch.tensor(scale), torch.tensor(float(zero)), int(limits.min), int(limits.max)
    )
    theirs = in_onnxruntime(x, np.array(scale, dtype=np.float32), np.array(zero, dtype=kind), axis=0)
    np.testing.assert_array_equal(ours.numpy(), theirs)


def test_the_rounding_by_channel_is_onnx_runtimes_to_the_bit() -> None:
    scale = np.float32([0.5, 0.013, 1e-4])
    x = np.stack([hard_values(float(one)) for one in scale])
    ours = fake_quantize(torch.from_numpy(x), torch.from_numpy(scale)[:, None], torch.zeros(3, 1), -128, 127)
    np.testing.assert_array_equal(ours.numpy(), in_onnxruntime(x, scale, np.zeros(3, dtype=np.int8), axis=0))


def test_the_gradient_goes_straight_through_inside_the_range_only() -> None:
    x = torch.linspace(-3, 3, 1001, dtype=torch.float64, requires_grad=True)
    upstream = torch.linspace(1, 2, 1001, dtype=torch.float64)
    fake_quantize(x, torch.tensor(0.01).double(), torch.tensor(100.0).double(), 0, 255).backward(upstream)
    steps = np.rint(x.detach().numpy() / np.float64(np.float32(0.01))) + 100
    expected = upstream.numpy() * ((steps >= 0) & (steps <= 255))
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), expected)
    assert 0 < (expected == 0).sum() < 1001


@pytest.mark.parametrize("reach", [(-1.3, 2.7), (0.0, 6.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)])
@pytest.mark.parametrize("activation", ["uint8", "int8"])
def test_scales_and_zero_points_are_onnx_runtimes(reach: tuple[float, float], activation: Any) -> None:
    from onnxruntime.quantization.quant_utils import compute_scale_zp

    scale, zero = Formats(activation).parameters(*reach)
    least, greatest = (np.uint8(0), np.uint8(255)) if activation == "uint8" else (np.int8(-127), np.int8(127))
    theirs_zero, theirs = compute_scale_zp(
        np.float32(reach[0]), np.float32(reach[1]), least, greatest, symmetric=activation == "int8"
    )
    if reach != (0.0, 0.0):
        assert scale == pytest.approx(float(theirs), rel=1e-6)
    assert scale > 0
    assert zero == theirs_zero


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_folded_batch_norm_computes_the_same(bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 6, 3, bias=bias).double(), nn.BatchNorm2d(6, affine=affine).double().eval()
    for tensor in [*norm.buffers(), *norm.parameters()]:
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.2, 3)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    ours = torch.conv2d(x, *folded(conv.weight, conv.bias, norm))
    torch.testing.assert_close(ours, norm(conv(x)), rtol=1e-12, atol=1e-12)


def test_a_weight_fills_its_range_by_channel_and_a_dead_one_leaves_room_for_its_bias() -> None:
    weight = torch.tensor([[1.0, -2.54], [0.0, 0.0]])
    scale = weight_scale(weight, torch.tensor([1.0, 5.0]), torch.tensor(1e-3), 127)
    assert scale[0] == pytest.approx(0.02)
    assert 5.0 / (1e-3 * float(scale[1])) <= INT32


def test_a_reduced_range_leaves_weights_seven_bits() -> None:
    assert (Formats().greatest_weight, Formats(reduce_range=True).greatest_weight) == (127, 64)
