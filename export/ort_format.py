"""A model in ONNX Runtime's own format, and the operators that a reduced build of the runtime must have for it."""

import contextlib
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from potstill.export.graph import data_file
from potstill.export.net import Net
from potstill.validate.encoder import Inputs
from potstill.validate.errors import InputError, PotstillError
from potstill.validate.session import open_session

ORT, OPERATORS = "model.ort", "required_operators_and_types.config"


def write_ort(path: Path, arch: str, inputs: Sequence[Inputs], tolerance: float) -> None:
    """Write `model.ort` and the required operators and types beside a model, and compare it with the model.

    In the style "Runtime": only what holds on any processor is optimised ahead, so that nothing of this machine's
    layouts is in the file. Source: ONNX Runtime, docs/performance/model-optimizations/ort-format-models.md.

    Args:
        path: the `.onnx` file.
        arch: of the target's processor; on arm64 int8 activations are let be.
        inputs: of the model, by name, to compare on.
        tolerance: of the largest output, that the two may differ by.

    Raises:
        InputError: the model's weights do not fit into one file.
        PotstillError: the two files disagree.
    """
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    if data_file(path).is_file():
        raise InputError(
            f"{path.name} is larger than 2 GB, which an .ort file cannot be; leave out the target's model.ort"
        )
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".ort.") as folder:
        whole = Path(folder) / "source" / path.name
        whole.parent.mkdir()
        onnx.save(_with_zero_points(path), whole)
        with contextlib.redirect_stdout(io.StringIO()):
            convert_onnx_models_to_ort(
                whole,
                Path(folder),
                [OptimizationStyle.Runtime],
                target_platform="arm" if arch == "arm64" else "amd64",
                enable_type_reduction=True,
            )
        (made,), (operators,) = Path(folder).glob("*.ort"), Path(folder).glob("*.config")
        made.replace(path.with_name(ORT))
        operators.replace(path.with_name(OPERATORS))
    ours, theirs = (open_session(file) for file in (path, path.with_name(ORT)))
    for one in inputs:
        expected, found = (np.asarray(session.run(None, one)[0]) for session in (ours, theirs))
        worst, most = float(np.abs(found - expected).max()), tolerance * float(np.abs(expected).max())
        if not worst <= most:
            raise PotstillError(
                f"{ORT} does not compute what {path.name} does: an output differs by {worst:.2g}, allowed is {most:.2g}"
            )


def _with_zero_points(path: Path) -> onnx.ModelProto:
    """The model with a zero point for each DequantizeLinear of a constant, as ONNX Runtime's converter needs it.

    Without one the file that it writes does not open (ONNX Runtime 1.31.1).
    """
    net = Net.read(path)
    for node in net.model.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 2 and node.input[0] in net.tensors:
            shape, kind = net.tensors[node.input[1]].dims, net.tensors[node.input[0]].data_type
            zero = np.zeros(shape, dtype=helper.tensor_dtype_to_np_dtype(kind))
            node.input.append(net.hold(f"{node.output[0]}_zero_point", zero))
    return net.model
