"""Why torch could not write a model as ONNX: which operator or line, in which of the user's modules."""

import linecache
import os
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from potstill.validate.errors import told

DATA_DEPENDENT = ("GuardOnDataDependentSymNode", "DataDependentOutputException")  # of torch's private modules
TORCH = f"{Path(torch.__file__).parent}{os.sep}"


def why_not(model: nn.Module, error: BaseException) -> str:
    """What stands in the way, where, and what to do, in one clause.

    The place is read from the frames that the error passed through: a frame of the exporter holds the node that has no
    ONNX form, with the modules around it in `nn_module_stack`; frames of `forward` hold the modules themselves.

    Args:
        model: the user's own module.
        error: what `torch.onnx.export` raised.
    """
    chain = [error]
    while chain[-1].__cause__:
        chain.append(chain[-1].__cause__)
    cause = chain[-1]
    frames = [at for one in chain for at in traceback.walk_tb(one.__traceback__)]
    nodes = [frame.f_locals["node"] for frame, _ in frames if isinstance(frame.f_locals.get("node"), fx.Node)]
    if nodes and "No ONNX function found" in str(cause):
        operator = str(nodes[-1].target).removesuffix(".default")
        return (
            f"the operator {operator} {_around(model, nodes[-1])} has no ONNX form; write it with other operators, or "
            "compute it outside of the model"
        )
    where = _place(model, frames)
    if type(cause).__name__ in DATA_DEPENDENT:
        return (
            f"what it does next is data-dependent {where}; choose by torch.where, which computes both sides, or decide "
            "outside of the model"
        )
    return f"{told(cause, lines=3)}{f' ({where})' if where else ''}"


def _around(model: nn.Module, node: fx.Node) -> str:
    """The innermost of the user's modules around a node, and the line that called it."""
    paths, path, kind = dict(model.named_modules()), "", type(model).__name__
    for inner, its_type in node.meta.get("nn_module_stack", {}).values():
        inner = inner if inner in paths else inner.removeprefix("model.")  # `LogitsOf` is around it
        if inner and inner in paths:
            path, kind = inner, str(its_type).rpartition(".")[2]
    lines = [line for line in str(node.meta.get("stack_trace", "")).splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if TORCH not in line]
    return f"of {_named(path, kind)}" + (f", {_line(own[-1])}," if own else "")


def _line(text: str) -> str:
    """`File "/a/net.py", line 8, in forward` as `net.py line 8`."""
    parts = text.split('"')
    return f"{Path(parts[1]).name} line {parts[2].split(',')[1].split()[-1]}"


def _place(model: nn.Module, frames: list[tuple[FrameType, int]]) -> str:
    """The innermost line of the user's own code, and the module it is in; nothing where no frame is in a module."""
    paths = {id(part): path for path, part in model.named_modules()}
    found = ""
    for frame, line in frames:
        owner: Any = frame.f_locals.get("self")
        if id(owner) in paths and not frame.f_code.co_filename.startswith(TORCH):
            file = Path(frame.f_code.co_filename)
            source = linecache.getline(str(file), line).strip()
            found = f"in {_named(paths[id(owner)], type(owner).__name__)}, {file.name} line {line}: `{source}`"
    return found


def _named(path: str, kind: str) -> str:
    return f"{path} ({kind})" if path else kind
