"""Which nodes of a file a target's provider takes, and which go to the CPU.

Compiled: the provider's own compiler has said so. Estimated: from the list of operators that ONNX Runtime ships, read
by its own `mobile_helpers.usability_checker`, which splits a graph as the runtime does. One is never called the other.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import onnx
from pydantic.dataclasses import dataclass

from potstill.targets.operator_lists import OperatorList, list_for
from potstill.targets.target import Target
from potstill.targets.work import COUNTED, multiply_adds, name_of
from potstill.validate.errors import InputError
from potstill.validate.session import CPU
from potstill.validate.units import counted

ON_CPU = (CPU, "wasm")  # onnxruntime-web's WebAssembly runs the kernels of the CPU provider


@dataclass(frozen=True)
class Left:
    """A node that goes to the CPU: its name or its first output's, its operator, and why, as what said so says it."""

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
        work_left: share of the multiply-adds that these do, of one golden sample; None where unknown.
    """

    kind: Literal["compiled", "estimated", "unknown"]
    provider: str
    source: str
    nodes: int | None = None
    partitions: int | None = None
    left: tuple[Left, ...] = ()
    work_left: float | None = None

    @property
    def nodes_left(self) -> float | None:
        """Share of the nodes that go to the CPU; None where unknown."""
        return None if self.nodes is None else len(self.left) / max(self.nodes, 1)

    def in_words(self) -> str:
        """One sentence: how many nodes the provider takes in how many parts, and what is left, by operator."""
        if self.nodes is None or self.partitions is None:
            return f"Which nodes {self.provider} takes is unknown: {self.source}."
        taken = f"{self.nodes - len(self.left)} of {counted(self.nodes, 'node')}"
        parts = counted(self.partitions, "partition")
        told = f"{self.kind.capitalize()}: {self.provider} takes {taken} in {parts}"
        operators = Counter(one.operator for one in self.left)
        to_cpu = ", ".join(f"{count} {operator}" for operator, count in operators.most_common())
        work = "" if self.work_left is None else f", with {self.work_left:.1%} of the multiply-adds"
        return f"{told}; to the CPU go {to_cpu}{work} ({self.source})." if self.left else f"{told} ({self.source})."


def estimated(path: Path, target: Target) -> Coverage | None:
    """What can be said of a file without its target's provider; None where the CPU provider is the first one.

    By a list of operators where there is one, and by those notes in it that a graph can answer; else unknown.
    """
    provider = target.runtime.providers[0]
    if provider in ON_CPU:
        return None
    listed = list_for(target)
    return Coverage("unknown", provider, listed) if isinstance(listed, str) else _by_list(path, provider, listed)


def weighed(coverage: Coverage | None, path: Path, feeds: Mapping[str, Any]) -> Coverage | None:
    """A coverage with the share of the work that leaves, of one example; unknown where the file does not run here."""
    if coverage is None or coverage.nodes is None:
        return coverage
    try:
        return by_work(coverage, multiply_adds(path, feeds))
    except InputError:
        return coverage


def by_work(coverage: Coverage, work: Mapping[str, int]) -> Coverage:
    """A coverage with the share of the multiply-adds that leaves; `work` has them by the names of nodes."""
    if any(one.operator in COUNTED and one.name not in work for one in coverage.left):
        return coverage  # a compiler names it otherwise
    left = sum(work.get(one.name, 0) for one in coverage.left)
    return replace(coverage, work_left=left / max(sum(work.values()), 1))


def _by_list(path: Path, provider: str, listed: OperatorList) -> Coverage:
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.tools.mobile_helpers import usability_checker as tool

    model = ONNXModel(onnx.load(str(path), load_external_data=False))
    model.topological_sort()  # the float16 converter leaves a cast behind what reads it, and the checker wants order
    del model.model.graph.value_info[:]  # the same converter leaves types there from before it
    graph = onnx.shape_inference.infer_shapes(model.model).graph
    refused = listed.of(model.model, graph)
    reasons: dict[str, str] = {}  # by a node's first output

    class Checker:
        """What `check_partitioning` asks of each node."""

        def is_op_supported(self, node: onnx.NodeProto) -> bool:
            why = refused(node)
            if why:
                reasons[node.output[0]] = why
            return not why

    found = tool.check_partitioning(graph, Checker(), listed.fixed_shapes, listed.most_dimensions)
    taken = {node.output[0] for group in found.supported_groups for node in group}
    shape = f"an input of no fixed shape or over {listed.most_dimensions}-D"
    left = tuple(
        Left(name_of(node), node.op_type, reasons.get(node.output[0], shape))
        for node in graph.node
        if node.output[0] not in taken
    )
    source = f"{listed.source}; not run on a device"
    return Coverage("estimated", provider, source, len(graph.node), found.num_partitions, left)
