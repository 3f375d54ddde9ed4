"""torch to ONNX, checked against torch on real examples.

Shapes: B examples in a batch, C classes.
"""

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from potstill.export.adopt import adopted
from potstill.export.modules import modules_beside, write_modules
from potstill.export.untraced import why_not
from potstill.validate.data import Examples
from potstill.validate.encoder import Encoder
from potstill.validate.errors import InputError, PotstillError
from potstill.validate.onnx_file import OnnxModule
from potstill.validate.predictor import OnnxPredictor
from potstill.validate.quantized import FakeQuantized
from potstill.validate.task import LogitsOf, Model
from potstill.validate.units import counted

PARITY = 1e-4  # of the largest logit; a float32 export of these models agrees to about 1e-6
QDQ_PARITY = 5e-2  # the same for integers: a sum that torch rounds up, integer kernels may round down
PROTOBUF_LIMIT = 2**31 - 1  # bytes that one protobuf file can hold


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime is from torch on the same examples.

    Attributes:
        max_difference: largest absolute difference of a logit.
        tolerance: what was allowed: `PARITY` (`QDQ_PARITY` for integers) times the largest absolute logit or 1.
        examples: how many were compared.
    """

    max_difference: float
    tolerance: float
    examples: int


def export_graph(model: Model, examples: Examples, path: Path, opset: int) -> Parity:
    """Write an ONNX graph with a dynamic batch (and sequence), and compare it with torch.

    By `torch.onnx.export(dynamo=True)`; traced with two examples. Names of files and source lines of this
    machine, which the exporter leaves in the graph, are removed; which module each node is of goes into
    `<stem>.modules.json`. Weights past 2 GB go to `<name>.data`. The graph is
    float32; that of a model with fake quantisation holds its integers (QDQ). An ONNX file's own graph is taken,
    and compared with the file.

    Args:
        model: what to export.
        examples: real examples, at least two, to trace and to compare with.
        path: the `.onnx` file to write.
        opset: of the ONNX standard.

    Raises:
        InputError: the model has an operator or control flow that cannot be exported, which the message names, or it
            cannot be had in that opset.
        PotstillError: torch and ONNX Runtime disagree.
    """
    if isinstance(model.module, OnnxModule):
        save_model(adopted(model.module, model.encode, examples.rows([0, 1]), opset), path)
        tidy(path, model)
        return check_parity(model, path, examples)
    model.module.cpu().eval()
    inputs = tuple(model.batch(examples.rows([0, 1]), torch.device("cpu")))
    recurrent = any(isinstance(part, torch.nn.RNNBase) for part in model.module.modules())
    try:
        in_integers = model.module.as_qdq(inputs) if isinstance(model.module, FakeQuantized) else nullcontext()
        with warnings.catch_warnings(), in_integers:
            warnings.simplefilter("ignore")
            (_scripted if recurrent else _exported)(model, inputs, path, opset)
    except torch.onnx.errors.OnnxExporterError as error:
        raise InputError(f"{model.checkpoint} cannot be exported to ONNX: {why_not(model.core, error)}") from error
    tidy(path, model)
    _check_opset(model, path, opset)
    _check_axes(model, path)
    return check_parity(model, path, examples)


def _exported(model: Model, inputs: tuple[torch.Tensor, ...], path: Path, opset: int) -> None:
    """Write a graph by torch.export."""
    axes = {axis: torch.export.Dim(name) for axis, name in model.encode.axes.items()}
    shapes: Any = tuple(axes for _ in inputs)
    if isinstance(model.module, LogitsOf | FakeQuantized):  # it takes *inputs: one variadic parameter
        shapes = (shapes,)
    program = torch.onnx.export(
        model.module,
        inputs,
        input_names=list(model.input_names),
        output_names=[model.output],
        dynamic_shapes=shapes,
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(str(path), external_data=True)


def _scripted(model: Model, inputs: tuple[torch.Tensor, ...], path: Path, opset: int) -> None:
    """Write a graph by TorchScript: torch.export unrolls a recurrent layer over the tokens of the traced example."""
    torch.onnx.export(
        model.module,
        inputs,
        str(path),
        input_names=list(model.input_names),
        output_names=[model.output],
        dynamic_axes={name: dict(model.encode.axes) for name in model.input_names},
        opset_version=opset,
        dynamo=False,
    )


def _check_opset(model: Model, path: Path, opset: int) -> None:
    """Refuse a graph in another opset: torch writes 18 or newer, and its converter gives up without an error."""
    (found,) = (one.version for one in onnx.load(str(path), load_external_data=False).opset_import if not one.domain)
    if found != opset:
        raise InputError(
            f"{model.checkpoint} cannot be exported in opset {opset}: an operator of it is not there in this form, and "
            f"the graph stayed in opset {found}; let the target's model.opset be {found} or more"
        )


def _check_axes(model: Model, path: Path) -> None:
    """Refuse a graph in which a size that must be free is fixed to that of the traced examples."""
    for value in onnx.load(str(path), load_external_data=False).graph.input:
        dims = value.type.tensor_type.shape.dim
        fixed = [name for axis, name in model.encode.axes.items() if not dims[axis].dim_param]
        if fixed:
            raise InputError(
                f"{model.checkpoint} cannot be exported to ONNX: its {value.name} would have a fixed {fixed[0]}; "
                "look for a loop over it, or for a size taken as a plain number"
            )


def tidy(path: Path, model: Model | None = None) -> None:
    """Remove traces of this machine from a graph; of a `model`, what the exporter says of modules goes beside it.

    The weights go into one file with it where they fit.
    """
    graph = onnx.load(str(path))
    if model:
        write_modules(graph, model, modules_beside(path))
    for node in graph.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in [*graph.graph.value_info, *graph.graph.input, *graph.graph.output]:
        value.ClearField("metadata_props")
    graph.ClearField("metadata_props")
    graph.producer_name, graph.producer_version = "potstill", ""
    save_model(graph, path)


def data_file(path: Path) -> Path:
    """Where the weights of a model lie that is too large for one file."""
    return path.with_name(f"{path.name}.data")


def model_bytes(path: Path) -> int:
    """Size of a model: of its file, and of that with its weights where there is one."""
    return sum(part.stat().st_size for part in (path, data_file(path)) if part.is_file())


def too_large(path: Path) -> bool:
    """Whether a model does not fit into one file; 16 MiB are left for what is not weights."""
    return model_bytes(path) > PROTOBUF_LIMIT - 2**24


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model as one file, or with its weights in `data_file` when they pass the limit of protobuf.

    The weights of a large model are no longer in `model` afterwards.
    """
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > PROTOBUF_LIMIT - 2**24
    data_file(path).unlink(missing_ok=True)  # onnx would write behind what is there
    onnx.save(model, str(path), save_as_external_data=large, location=data_file(path).name if large else None)


def check_parity(model: Model, path: Path, examples: Examples, most: int = 16) -> Parity:
    """Compare torch with ONNX Runtime on up to `most` examples, one by one and then in one padded batch.

    Raises:
        PotstillError: a logit differs by more than the tolerance.
    """
    session = OnnxPredictor(path, model.encode, path.name)
    worst, largest = 0.0, 1.0
    count = min(most, len(examples))
    alone = isinstance(model.module, OnnxModule) and model.module.one_by_one
    for indices in [*([i] for i in range(count)), *([] if alone else [list(range(count))])]:
        rows = examples.rows(indices)
        with torch.inference_mode():
            ours: NDArray[np.float32] = model.module(*model.batch(rows, torch.device("cpu"))).numpy()
        worst = max(worst, float(np.nan_to_num(np.abs(session.run(model.encode(rows)) - ours), nan=np.inf).max()))
        largest = max(largest, float(np.abs(ours).max()))
    share = QDQ_PARITY if isinstance(model.module, FakeQuantized) else PARITY
    parity = Parity(worst, share * largest, count)
    source = "the file" if isinstance(model.module, OnnxModule) else "torch"
    if not worst <= parity.tolerance:
        raise PotstillError(
            f"the ONNX graph of {model.checkpoint} does not compute what {source} does: a logit differs by "
            f"{worst:.2g} on {counted(count, 'example')}, allowed is {parity.tolerance:.2g}; nothing was written"
        )
    return parity


def fix_shapes(path: Path, out: Path, encode: Encoder, sequence: int | None) -> None:
    """Write the graph with a batch of one and, where there is a sequence, its length fixed.

    Raises:
        InputError: the graph has a sequence and no length was given.
    """
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    model = onnx.load(str(path))
    for name in encode.axes.values():
        if name == "sequence" and sequence is None:
            raise InputError("the target takes fixed shapes: say data.max_length")
        make_dim_param_fixed(model.graph, name, 1 if name == "batch" else sequence)
    save_model(model, out)
