"""Which nodes of a file a target's provider takes, and which go to the CPU.

Compiled: the provider's own compiler has said so. Estimated: from the list of operators that ONNX Runtime ships, read
by its own `mobile_helpers.usability_checker`, which splits a graph as the runtime does. One is never called the other.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import onnx
from pydantic.dataclasses import dataclass

from potstill.targets.target import Target

COREML = "CoreMLExecutionProvider"
_LIST = "coreml_supported_mlprogram_ops.md"
_TYPOS = {"ai.onnx:ArgMax", "ai.onnx:ReduceSum"}  # listed as Argmax, and with a dot, which the checker passes over
_MOST_DIMENSIONS = 5
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


@dataclass(frozen=True)
class Left:
    """A node that goes to the CPU: its name, its operator, and why in the words of what said so."""

    name: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Where the nodes of a file will run.

    Attributes:
        kind: `compiled` by the provider's own compiler; `estimated` from a list of operators; `unknown`.
        provider: that the target wants first.
        source: what the figures come from, or why there are none.
        nodes: compiled, of the graph as the provider sees it; estimated, of the file; None where unknown.
        partitions: parts that the provider takes, each a change of device; None where unknown.
        left: the nodes that go to the CPU.
    """

    kind: Literal["compiled", "estimated", "unknown"]
    provider: str
    source: str
    nodes: int | None = None
    partitions: int | None = None
    left: tuple[Left, ...] = ()

    def in_words(self) -> str:
        """One sentence: how many nodes the provider takes in how many parts, and what is left, by operator."""
        if self.nodes is None or self.partitions is None:
            return f"Which nodes {self.provider} takes is unknown: {self.source}."
        taken = f"{self.nodes - len(self.left)} of {self.nodes} nodes"
        parts = "1 partition" if self.partitions == 1 else f"{self.partitions} partitions"
        told = f"{self.kind.capitalize()}: {self.provider} takes {taken} in {parts}"
        counted = Counter(one.operator for one in self.left)
        to_cpu = ", ".join(f"{count} {operator}" for operator, count in counted.most_common())
        return f"{told}; to the CPU go {to_cpu} ({self.source})." if self.left else f"{told} ({self.source})."


def estimated(path: Path, target: Target) -> Coverage | None:
    """What can be said of a file without its target's provider; None where the CPU provider is the first one.

    Core ML: by its list of operators, and by those notes in it that a graph can answer. Any other: unknown.
    """
    provider = target.runtime.providers[0]
    if provider == "CPUExecutionProvider":
        return None
    if provider != COREML:
        return Coverage("unknown", provider, "this machine has neither the provider nor a list of its operators")
    return _coreml(path)


def _coreml(path: Path) -> Coverage:
    import onnxruntime
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.tools.mobile_helpers import usability_checker as tool

    model = ONNXModel(onnx.load(str(path), load_external_data=False))
    model.topological_sort()  # the float16 converter leaves a cast behind what reads it, and the checker wants order
    del model.model.graph.value_info[:]  # the same converter leaves types there from before it
    graph = onnx.shape_inference.infer_shapes(model.model).graph
    noted = _Notes(graph)
    reasons: dict[str, str] = {}  # by a node's first output

    class Checker(tool._SupportedOpsChecker):  # type: ignore[misc]
        """The shipped list with its two typing errors mended, and the notes that a graph can answer."""

        def is_op_supported(self, node: onnx.NodeProto) -> bool:
            name = f"{node.domain or 'ai.onnx'}:{node.op_type}"
            listed = super().is_op_supported(node) or name in _TYPOS
            why = noted(node) if listed else "not in the list of operators"
            if why:
                reasons[node.output[0]] = why
            return not why

    checker = Checker(Path(tool.__file__).with_name(_LIST))
    found = tool.check_partitioning(graph, checker, True, _MOST_DIMENSIONS)
    taken = {node.output[0] for group in found.supported_groups for node in group}
    left = tuple(
        Left(
            node.name,
            node.op_type,
            reasons.get(node.output[0], f"an input of no fixed shape or over {_MOST_DIMENSIONS}-D"),
        )
        for node in graph.node
        if node.output[0] not in taken
    )
    source = f"ONNX Runtime {onnxruntime.__version__}, {_LIST}; not run on a device"
    return Coverage("estimated", COREML, source, len(graph.node), found.num_partitions, left)


class _Notes:
    """The notes of the list that are about constants and element types, asked of a graph's nodes."""

    def __init__(self, graph: Any) -> None:
        self._constant = {tensor.name for tensor in graph.initializer}
        values = [*graph.input, *graph.output, *graph.value_info]
        self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._checks: dict[str, Callable[[list[str]], str]] = {
            "Gemm": lambda names: self._held(names[1:2], "input B is not constant"),
            "Conv": lambda names: self._held(names[2:], "its bias is not constant"),
            "ConvTranspose": lambda names: self._held(names[1:], "its weight or bias is not constant"),
            "Slice": lambda names: self._held(names[1:], "starts, ends, axes or steps are not constant"),
            "Split": lambda names: self._held(names[1:], "its split is not constant"),
            "Pow": lambda names: self._typed(names, _FLOATS[:1], "an input is not float32"),
            "Where": lambda names: self._typed(names[1:], _FLOATS, "what it chooses from is not float"),
        }

    def __call__(self, node: onnx.NodeProto) -> str:
        """What keeps a listed node from being taken; "" if nothing is known to."""
        check = self._checks.get(node.op_type)
        return check([name for name in node.input if name]) if check else ""

    def _held(self, names: list[str], why: str) -> str:
        return "" if self._constant.issuperset(names) else why

    def _typed(self, names: list[str], types: tuple[int, ...], why: str) -> str:
        return "" if all(self._types.get(name) in types for name in names) else why
