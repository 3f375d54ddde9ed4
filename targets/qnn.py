"""A Snapdragon's NPU, simulated by onnxruntime-qnn: its arithmetic, and which nodes it takes; no times of it."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from potstill.targets.coverage import Coverage, Left
from potstill.targets.device import Kind, only_arithmetic
from potstill.targets.local import AGENT as THE_AGENT
from potstill.targets.local import Local
from potstill.targets.target import QNN, Target
from potstill.validate.errors import InputError, PotstillError
from potstill.validate.files import read_json

AGENT = THE_AGENT.with_name("qnn_agent.py")
TRACE = "qnn_op_trace.json"
REFUSED = "onnxruntime-qnn refused the graph: "  # qnn_agent.py says it


@dataclass(frozen=True)
class QnnSim:
    """The NPU of a target's chip, on this machine; see `Device`.

    Each request compiles its model anew, for the `soc_model` and `htp_arch` of the target.
    """

    target: Target
    where: str = "qnn-sim"
    kind: Kind = "emulated"

    def __post_init__(self) -> None:
        """Look for the simulator.

        Raises:
            InputError: the target's chip has no compiler, or it is not installed.
        """
        if self.target.model.compiler is None:
            raise InputError(
                f"{self.target.id} is not compiled by onnxruntime-qnn; qnn-sim wants a package for a Snapdragon's NPU, "
                "such as phone-snapdragon-v75"
            )
        if find_spec("onnxruntime_qnn") is None:
            raise InputError('onnxruntime-qnn, which simulates the NPU, is not installed; pip install "potstill[qnn]"')

    @property
    def version(self) -> str:
        """Of the simulator, with its name."""
        return f"onnxruntime-qnn {version('onnxruntime-qnn')}"

    def ask(self, request: Mapping[str, Any], *, timeout_s: float = 900) -> dict[str, Any]:
        """As of `Device`; `notes` of the reply say which nodes the NPU takes, and why not the others.

        Raises:
            InputError: what is asked for is a figure of time, or a second model.
            PotstillError: the compiler refused the graph, or took no node of it; the CPU never runs alone.
        """
        only_arithmetic(request, "a simulated NPU")
        with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
            reply = self._asked({**request, "trace_folder": Path(folder)}, timeout_s)
            result = reply["answer"] if "answer" in request else reply["models"][0]
            if not result["provider_nodes"].get(QNN):
                raise PotstillError(
                    f"onnxruntime-qnn took no node of the graph for {self.target.id}; check soc_model and htp_arch of "
                    "the target, and that the file has fixed shapes"
                )
            coverage = read_trace(Path(folder, TRACE), {**result, "assigned": result["provider_nodes"]})
        reply["machine"] |= {"cpu": f"{self.chip}, simulated", "cores": 1, "name": None}
        reply["versions"] |= result["versions"]
        reply["notes"] = [coverage.in_words(), *_reasons(coverage)]
        if "models" in request:  # what this machine's process used is none of the chip's
            result |= {"memory_method": "unavailable", "sensors": {}, "energy_uj": None}
        return reply

    @property
    def chip(self) -> str:
        """As its compiler names it."""
        options = self.target.runtime.provider_options[QNN]
        arch = f"Hexagon v{options['htp_arch']}, " if "htp_arch" in options else ""
        return f"{arch}soc_model {options['soc_model']}"

    def _asked(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The reply of the agent; the target's providers and their options are those of every model."""
        runtime = self.target.runtime
        given = {"providers": runtime.providers, "provider_options": runtime.provider_options}
        whole = dict(request)
        if "answer" in request:
            whole["answer"] = {**request["answer"], **given}
        else:
            whole["models"] = [{**one, **given} for one in request["models"]]
        try:
            return Local(program=AGENT).ask(whole, timeout_s=timeout_s)
        except PotstillError as error:
            _, refused, why = str(error).partition(REFUSED)
            if not refused:
                raise
            raise PotstillError(f"{REFUSED}{why}; export the package again for {self.target.id}") from None


def _reasons(coverage: Coverage) -> list[str]:
    """Why nodes are left: a sentence for each operator and reason, with the first of its nodes."""
    alike: dict[tuple[str, str], list[str]] = {}
    for one in coverage.left:
        alike.setdefault((one.operator, one.reason), []).append(one.name)
    return [
        f"{operator} {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
        for (operator, reason), names in alike.items()
    ]


def read_trace(path: Path, reply: Mapping[str, Any]) -> Coverage:
    """What `qnn_op_trace.json` says of each node, for all those that the session gave to the CPU.

    Args:
        path: of the trace, schema 2.
        reply: of the agent: `assigned` and `left` are what the session did.
    """
    trace = read_json(path)
    reasons = {one["node_name"]: one["reason"] for one in trace["unsupported_nodes"]}
    left = tuple(
        Left(one["name"], one["operator"], reasons.get(one["name"], "the compiler gives no reason"))
        for one in reply["left"]
    )
    source = f"onnxruntime-qnn {reply['versions']['onnxruntime-qnn']}, {TRACE}"
    nodes = sum(reply["assigned"].values())
    return Coverage("compiled", QNN, source, nodes, trace["summary"]["qnn_subgraphs"], left)
