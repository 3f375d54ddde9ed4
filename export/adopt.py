"""An ONNX file that a user brings, as the float graph that packages are made of."""

import onnx
from onnx import external_data_helper, inliner, version_converter
from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

from potstill.validate.encoder import Encoder
from potstill.validate.errors import InputError, told
from potstill.validate.examples import Rows
from potstill.validate.onnx_file import OnnxModule, opset_of

LEAST_OPSET = 13  # the first whose QuantizeLinear has scales per channel


def adopted(core: OnnxModule, encode: Encoder, rows: Rows, opset: int) -> onnx.ModelProto:
    """The graph of a file with its functions inlined, one output, and the axes named as Potstill names them.

    Constants that nodes hold become initializers, where the quantisers look for weights.

    Args:
        core: the file.
        encode: what feeds it; its `axes` stay free where the file leaves them free, all others become fixed.
        rows: real examples, whose sizes those others get.
        opset: to bring an older file to, one below `LEAST_OPSET`; newer ones stay as they are.

    Raises:
        InputError: its opset is too old and cannot be converted.
    """
    model = inliner.inline_local_functions(onnx.load(str(core.path), load_external_data=False))  # 2 GB at most
    external_data_helper.load_external_data_for_model(model, str(core.path.parent))
    if core.opset < LEAST_OPSET:
        try:
            model = version_converter.convert_version(model, opset)
        except Exception as error:  # the converter raises RuntimeError and its own errors, which have no base
            raise InputError(
                f"{core.path.name} is of opset {core.opset}, and at least {LEAST_OPSET} is needed for integers per "
                f"channel; it cannot be converted ({told(error)}): export it again"
            ) from error
    kept = [value for value in model.graph.output if value.name == core.output]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    arrays = encode(rows)
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim if value.name in core.inputs else ()):
            if dim.HasField("dim_value"):
                continue
            if axis in encode.axes:
                _rename(model.graph, dim, encode.axes[axis])
            elif dim.dim_param:
                make_dim_param_fixed(model.graph, dim.dim_param, arrays[value.name].shape[axis])
            else:
                dim.dim_value = arrays[value.name].shape[axis]
    _lift(model.graph)
    assert opset_of(model) >= LEAST_OPSET
    return model


def _lift(graph: onnx.GraphProto) -> None:
    """Turn nodes that hold a tensor into initializers of the name of their output."""
    ends, kept = {value.name for value in graph.output}, list[onnx.NodeProto]()
    for node in graph.node:
        held = [one.t for one in node.attribute if one.name == "value"] if node.op_type == "Constant" else []
        if held and node.output[0] not in ends:
            held[0].name = node.output[0]
            graph.initializer.append(held[0])
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _rename(graph: onnx.GraphProto, dim: onnx.TensorShapeProto.Dimension, name: str) -> None:
    """Give a free dimension another name, wherever the graph speaks of it."""
    old, dim.dim_param = dim.dim_param, name
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for other in value.type.tensor_type.shape.dim:
            if old and other.dim_param == old:
                other.dim_param = name
