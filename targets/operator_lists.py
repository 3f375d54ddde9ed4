"""The lists of operators that providers take: those that come with onnxruntime and onnxruntime-web, and their notes.

Each list is read where it lies, so that it is that of the installed version; two typing errors in them are mended.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import onnx
import yaml
from packaging.version import Version

from potstill.targets.target import Target
from potstill.validate.files import cache_home, read_json

COREML = "CoreMLExecutionProvider"
NNAPI = "NnapiExecutionProvider"
WEBGPU = "webgpu"
TYPOS = {"ai.onnx:Argmax": "ai.onnx:ArgMax"}  # the other is a dot for a colon: ai.onnx.ReduceSum
ANY_RANK = 999
Versions = list[tuple[int, int]]
Refused = Callable[[onnx.NodeProto], str]


@dataclass(frozen=True)
class OperatorList:
    """What a provider takes.

    Attributes:
        source: the list and the version that it is of.
        operators: `domain:operator`, each with the versions (first, last) that are taken; None: all.
        notes: those of the list that a graph can answer; see `operator_notes.yaml`.
        fixed_shapes: whether every input must have one.
        most_dimensions: that an input may have.
    """

    source: str
    operators: dict[str, Versions | None]
    notes: dict[str, Any]
    fixed_shapes: bool
    most_dimensions: int = ANY_RANK

    def of(self, model: onnx.ModelProto, graph: Any) -> Refused:
        """What keeps a node of a model from being taken, "" if nothing is known to; `graph` has its inferred types."""
        opsets = {one.domain or "ai.onnx": one.version for one in model.opset_import}
        noted = _Notes(graph, self.notes)

        def refused(node: onnx.NodeProto) -> str:
            domain = node.domain or "ai.onnx"
            name = f"{domain}:{node.op_type}"
            if name not in self.operators:
                return "not in the list of operators"
            versions, own = self.operators[name], _since(node, opsets.get(domain, 1))
            if versions is not None and not any(first <= own <= last for first, last in versions):
                return f"version {own} of it is not in the list of operators"
            return noted(node)

        return refused


def list_for(target: Target, start: Path | None = None) -> OperatorList | str:
    """The list of operators of a target's first provider, or why there is none.

    Args:
        target: whose provider is asked for.
        start: where a `node_modules` with onnxruntime-web is looked for, and in the folders above; default: here.
    """
    provider = target.runtime.providers[0]
    if provider == COREML:
        form = target.runtime.provider_options.get(COREML, {}).get("ModelFormat", "NeuralNetwork")
        return _shipped(f"coreml_supported_{form.lower()}_ops.md", most_dimensions=5)
    if provider == NNAPI:
        return _shipped("nnapi_supported_ops.md")
    if provider == WEBGPU:
        return _webgpu(start or Path.cwd())
    return "this machine has neither the provider nor a list of its operators"


def _shipped(name: str, most_dimensions: int = ANY_RANK) -> OperatorList | str:
    """A list that comes with onnxruntime: rows `|domain:operator|note|`."""
    import onnxruntime

    file = Path(onnxruntime.__file__).parent / "tools" / "mobile_helpers" / name
    if not file.is_file():
        return f"ONNX Runtime {onnxruntime.__version__} comes without {name}"
    rows = re.findall(r"^\|([\w.]+)[:.](\w+)\|", file.read_text(encoding="utf-8"), flags=re.M)
    found = {f"{domain}:{operator}": None for domain, operator in rows}
    notes = yaml.safe_load(resources.files("potstill.targets").joinpath("operator_notes.yaml").read_text("utf-8"))
    return OperatorList(
        f"ONNX Runtime {onnxruntime.__version__}, {name}",
        {TYPOS.get(one, one): versions for one, versions in found.items()},
        notes.get(name, {}),
        fixed_shapes=True,
        most_dimensions=most_dimensions,
    )


def _webgpu(start: Path) -> OperatorList | str:
    """The list that comes with onnxruntime-web: rows `| operator | domain(versions); … | comments |`."""
    found_in = _web_list(start)
    if found_in is None:
        return "neither a node_modules here nor the cache has its list of operators; npm install onnxruntime-web"
    file, version = found_in
    text = file.read_text(encoding="utf-8")
    found: dict[str, Versions | None] = {}
    for operator, domains in re.findall(r"^\| (\w+) \| ([^|]+) \|", text, flags=re.M):
        for domain, versions in re.findall(r"([\w.]+)\(([\d,+\s-]+)\)", domains):
            found[f"{domain}:{operator}"] = [_range(one.strip()) for one in versions.split(",")]
    return OperatorList(f"onnxruntime-web {version}, webgpu-operators.md", found, {}, fixed_shapes=False)


def _web_list(start: Path) -> tuple[Path, str] | None:
    """WebGPU's list and its version: of a `node_modules` here or above, else the newest of the cache."""
    name = "webgpu-operators.md"
    for folder in (start, *start.resolve().parents):
        package = folder / "node_modules" / "onnxruntime-web"
        if (package / "docs" / name).is_file():
            return package / "docs" / name, read_json(package / "package.json")["version"]
    kept = {
        Version(file.parent.name.rpartition("-")[2]): file for file in cache_home().glob(f"onnxruntime-web-*/{name}")
    }
    return (kept[max(kept)], str(max(kept))) if kept else None


def _range(text: str) -> tuple[int, int]:
    """`7-12`, `13` or `14+`."""
    first, _, last = text.rstrip("+").partition("-")
    return int(first), int(last or (2**31 if text.endswith("+") else first))


def _since(node: onnx.NodeProto, opset: int) -> int:
    """The version of a node's operator in an opset; 1 of one that ONNX does not define."""
    try:
        return int(onnx.defs.get_schema(node.op_type, opset, node.domain).since_version)
    except onnx.defs.SchemaError:
        return 1


class _Notes:
    """The notes of a list that are about constants and element types, asked of a graph's nodes."""

    def __init__(self, graph: Any, notes: dict[str, Any]) -> None:
        self._held, self._typed = notes.get("constant", {}), notes.get("types", {})
        self._no_float16 = notes.get("no_float16", "")
        self._constant = {tensor.name for tensor in graph.initializer}
        values = [*graph.input, *graph.output, *graph.value_info]
        self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._types |= {tensor.name: tensor.data_type for tensor in graph.initializer}

    def __call__(self, node: onnx.NodeProto) -> str:
        """What keeps a listed node from being taken; "" if nothing is known to."""
        names = [name for name in node.input if name]
        if node.op_type in self._held:
            first, last, why = self._held[node.op_type]
            if not self._constant.issuperset(names[first:last]):
                return str(why)
        if node.op_type in self._typed:
            first, types, why = self._typed[node.op_type]
            wanted = [getattr(onnx.TensorProto, one) for one in types]
            if any(self._types.get(name) not in wanted for name in names[first:]):
                return str(why)
        halves = any(self._types.get(name) == onnx.TensorProto.FLOAT16 for name in names)
        return self._no_float16 if halves else ""
