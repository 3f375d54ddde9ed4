"""A package against a target without the device: what its files say, by rules, lists and one run on this CPU.

All of it is estimated: nothing of it was seen on the device.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
from onnx import TensorProto
from pydantic import TypeAdapter

from potstill.targets.coverage import ON_CPU, Coverage, by_work, estimated
from potstill.targets.fallback import LIMIT, in_words, judge_fallback
from potstill.targets.request import Package
from potstill.targets.saturation import overflows, saturation
from potstill.targets.target import Target
from potstill.targets.work import multiply_adds
from potstill.validate.errors import InputError
from potstill.validate.external_data import read_graph
from potstill.validate.files import read_json
from potstill.validate.units import PARSERS

Outcome = Literal["holds", "broken", "not checked"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its name, what came of it, and a sentence with what to do where it is broken."""

    what: str
    outcome: Outcome
    told: str


@dataclass(frozen=True)
class StaticCheck:
    """What is known of a package on a target without the device.

    Attributes:
        target: its name.
        findings: in the order of size, opset, shapes, types, operators, fallback.
        coverage: which nodes its first provider takes; None where that is the CPU's.
        kind: of every figure in it but the coverage's, which has its own.
    """

    target: str
    findings: tuple[Finding, ...]
    coverage: Coverage | None
    kind: Literal["estimated"] = "estimated"

    @property
    def broken(self) -> list[Finding]:
        """What the target does not take."""
        return [one for one in self.findings if one.outcome == "broken"]


def static_check(package: Package, target: Target, max_fallback: float | None = None) -> StaticCheck:
    """Look at a package as a target would take it.

    Args:
        package: to look at; it may have been made for another target.
        target: whose limits, shapes, numbers and operators are held against it.
        max_fallback: the largest share of nodes and of multiply-adds that may leave the target's first provider; the
            target's own `max_fallback` holds too. With a limit, what cannot be known counts as broken.
    """
    model, coverage = read_graph(package.model), _coverage(package, target)
    work, operators = _operators(package, model, target)
    coverage = by_work(coverage, work) if coverage and coverage.nodes is not None and work is not None else coverage
    own = target.model.max_fallback
    limits = [one for one in (max_fallback, PARSERS[LIMIT](own) if own else None) if one is not None]
    findings = (
        _size(package, target),
        _opset(model, target),
        _shapes(model, target),
        _types(model, package.model, target),
        operators,
        _fallback(coverage, min(limits, default=None)),
    )
    return StaticCheck(target.id, findings, coverage)


def _coverage(package: Package, target: Target) -> Coverage | None:
    """What the compiler said when the package was made for this target, else what a list says."""
    kept = read_json(package.folder / "manifest.json").get("coverage")
    if kept and kept.get("kind") == "compiled" and package.target.id == target.id:
        return TypeAdapter(Coverage).validate_python(kept)
    return estimated(package.model, target)


def _size(package: Package, target: Target) -> Finding:
    other = package.folder / "model.ort"
    size = max(package.file_mb, other.stat().st_size / 1e6 if other.is_file() else 0)
    most, told = target.model.max_file_mb, f"the model takes {size:.3g} MB"
    if most is None:
        return Finding("size", "holds", f"{told}; {target.id} has no limit")
    if size <= most:
        return Finding("size", "holds", f"{told}, limit {most} MB")
    told = f"{told}, and {target.id} takes at most {most} MB; cut a smaller student or choose a scheme of fewer bits"
    return Finding("size", "broken", told)


def _opset(model: onnx.ModelProto, target: Target) -> Finding:
    own = max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=0)
    wish = target.model.opset
    if wish is None:
        return Finding("opset", "holds", f"opset {own}; {target.id} has no wish")
    if own <= wish:
        return Finding("opset", "holds", f"opset {own}, wanted up to {wish}")
    return Finding("opset", "broken", f"opset {own}, and {target.id} wants {wish}; export for this target")


def _shapes(model: onnx.ModelProto, target: Target) -> Finding:
    held = {tensor.name for tensor in model.graph.initializer}
    free: dict[str, list[str]] = {}
    for one in model.graph.input:
        dims = [dim.dim_param or "?" for dim in one.type.tensor_type.shape.dim if not dim.HasField("dim_value")]
        if dims and one.name not in held:
            free[one.name] = dims
    told = "; ".join(f"{name} is free in {', '.join(dims)}" for name, dims in free.items())
    told = told or "all inputs have fixed shapes"
    if target.model.shapes == "static" and free:
        return Finding("shapes", "broken", f"{told}, and {target.id} wants fixed shapes; export for this target")
    return Finding("shapes", "holds", told)


def _types(model: onnx.ModelProto, path: Path, target: Target) -> Finding:
    """The element types of the constants, and whether int8 sums can overflow on the target's CPU."""
    counted = Counter(TensorProto.DataType.Name(one.data_type).lower() for one in model.graph.initializer)
    told = f"constants: {', '.join(f'{count} {name}' for name, count in counted.most_common())}"
    if not overflows(target):
        return Finding("types", "holds", told)
    found = saturation(path, target)
    if found is None:
        return Finding("types", "holds", f"{told}; no int8 sum can overflow without VNNI")
    told = f"{found.in_words(target)}; export for {target.id}, whose scheme leaves room"
    return Finding("types", "broken", told)


def _operators(package: Package, model: onnx.ModelProto, target: Target) -> tuple[dict[str, int] | None, Finding]:
    """Whether ONNX Runtime's CPU provider, which takes what others leave, runs the file here; its work by node."""
    import onnxruntime

    try:
        work = multiply_adds(package.model, package.feeds())
    except InputError as error:
        return None, Finding("operators", "broken", f"{error}; export the model again")
    told = f"all {len(model.graph.node)} nodes run on the CPU provider of ONNX Runtime {onnxruntime.__version__}"
    if target.runtime.name != "onnxruntime":
        told = f"{told}, whose kernels {target.runtime.name} is built of"
    elif target.runtime.providers[0] not in ON_CPU:
        told = f"{told}, which takes what {target.runtime.providers[0]} leaves"
    return work, Finding("operators", "holds", told)


def _fallback(coverage: Coverage | None, limit: float | None) -> Finding:
    """What leaves the target's first provider, held against a limit where there is one."""
    if limit is not None:
        check = judge_fallback(coverage, limit, strict=True)
        return Finding("fallback", "holds" if check.passed else "broken", check.reason)
    if coverage is None:
        return Finding("fallback", "holds", "the target's first provider is that of the CPU: nothing leaves it")
    if coverage.nodes is None:
        return Finding("fallback", "not checked", coverage.in_words())
    return Finding("fallback", "holds", f"{in_words(coverage)}. {coverage.in_words()}")
