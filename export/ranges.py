"""What the activations of a graph range over, from real examples in one pass and constant memory."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

from potstill.export.histogram import Histogram
from potstill.export.net import floats, open_model
from potstill.validate.encoder import Inputs
from potstill.validate.errors import InputError

AVERAGING = 0.01  # weight of the newest batch in a moving average, from the hundredth batch on
REDUCTIONS = ("ReduceMin", "ReduceMax", "ReduceSum")  # the sum tells of NaN, which the others pass over


class Seen:
    """What is kept of one activation: a few numbers, and a histogram if one is wanted.

    Attributes:
        low: least value of all.
        high: greatest value of all.
        mean_low: moving average over batches of each batch's least value.
        mean_high: of each batch's greatest value.
        histogram: of all values; None where none was wanted.
    """

    def __init__(self, binned: bool) -> None:
        self.low, self.high = np.inf, -np.inf
        self.mean_low, self.mean_high = 0.0, 0.0
        self.histogram = Histogram() if binned else None
        self._batches = 0

    def add(self, low: float, high: float, values: NDArray[np.float32] | None) -> None:
        """Take in one batch with its least and greatest value.

        The averages are the mean of the first hundred batches and then exponential with `AVERAGING`, the constant of
        torch and ONNX Runtime (Krishnamoorthi 2018, section 3); from the first batch on that constant would leave a
        few batches' average at the first one.
        """
        self._batches += 1
        newest = max(AVERAGING, 1 / self._batches)
        self.mean_low += newest * (low - self.mean_low)
        self.mean_high += newest * (high - self.mean_high)
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.histogram is not None and values is not None:
            self.histogram.add(values, low, high)


def float_tensors(path: Path) -> list[str]:
    """Names of the activations that a graph holds as float32, its inputs and outputs too."""
    return floats(load_model_with_shape_infer(path))


def observe(path: Path, batches: Iterable[Inputs], binned: Collection[str] = ()) -> dict[str, Seen]:
    """Run a float graph over batches, once each, and keep what its activations range over.

    Least and greatest values are found inside the graph; only the tensors to be binned leave it, for as long as a batch
    takes. So memory does not grow with the number of batches.

    Args:
        path: the graph.
        batches: what the graph's inputs are fed, by name.
        binned: the activations to make a histogram of.

    Returns:
        what was seen of each float32 activation, by name; one that was empty in every batch is left out.

    Raises:
        InputError: there are no batches, one does not fit the graph, or an activation is not finite.
    """
    model = load_model_with_shape_infer(path)
    names, kept = floats(model), set(binned)
    session = _watching(model, names, [name for name in names if name in kept])
    seen = {name: Seen(name in kept) for name in names}
    count = 0
    for count, inputs in enumerate(batches, start=1):
        _take_in(session, inputs, count, seen)
    if not count:
        raise InputError("there are no calibration examples: ranges need at least one batch")
    return {name: one for name, one in seen.items() if one.low <= one.high}


def _take_in(session: Any, inputs: Inputs, count: int, seen: Mapping[str, Seen]) -> None:
    """Run one batch and keep what is to be kept of it; its activations end here."""
    try:
        outputs = iter(session.run(None, inputs))
    except (onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, ValueError) as error:
        raise InputError(f"calibration batch {count} does not fit the graph: {str(error).splitlines()[0]}") from error
    ends = [[float(next(outputs)) for _ in REDUCTIONS] for _ in seen]
    for (name, one), (low, high, total) in zip(seen.items(), ends, strict=True):
        values = None if one.histogram is None else next(outputs)
        if low > high:
            continue  # it is empty
        if not np.isfinite([low, high]).all() or np.isnan(total):
            raise InputError(
                f"the activation {name!r} is not finite on calibration batch {count}: ranges need finite numbers; "
                "look for an overflow in the model, or give other calibration examples"
            )
        one.add(low, high, values)


def _watching(model: onnx.ModelProto, names: list[str], kept: list[str]) -> Any:
    """A session of a graph that gives the reductions of some activations, and some whole ones after them."""
    del model.graph.output[:]
    for i, name in enumerate(names):
        for op in REDUCTIONS:
            out = f"potstill.{op}.{i}"
            model.graph.node.append(helper.make_node(op, [name], [out], keepdims=0))
            model.graph.output.append(helper.make_tensor_value_info(out, TensorProto.FLOAT, []))
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in kept)
    return open_model(model)
