"""Where the time of a run goes, and its memory: from the profile that ONNX Runtime writes.

Source: ONNX Runtime, docs/performance/tune-performance/profiling-tools.md; the memory's arguments are those of 1.31.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
from pydantic.dataclasses import dataclass

from potstill.validate.errors import PotstillError

_STRICT = pydantic.ConfigDict(extra="forbid")
_END = "_kernel_time"
Event = dict[str, Any]


@dataclass(frozen=True, config=_STRICT)
class Operator:
    """One operator type on one provider: its nodes after fusion and its share of the time of a run."""

    operator: str
    provider: str
    count: int
    share: float


@dataclass(frozen=True, config=_STRICT)
class Node:
    """One node after fusion, in the order of the run, and its share of a run's time."""

    name: str
    operator: str
    provider: str
    share: float


@dataclass(frozen=True, config=_STRICT)
class Profile:
    """One profiled session. Shares are of the time of its quicker runs, a half; `unattributed` is what no node has.

    In the slower ones another program may have taken the processor from whichever node ran.

    `activations_mb` is how far a run takes ONNX Runtime's own allocator at most beyond what it holds before; None
    where its version does not say.
    """

    operators: list[Operator]
    nodes: list[Node]
    unattributed: float
    activations_mb: float | None


def read_profile(path: Path) -> Profile:
    """The profile in a file; the first run is left out.

    Raises:
        PotstillError: it is no profile of two runs or more.
    """
    try:
        events: list[Event] = json.loads(path.read_text(encoding="utf-8"))
        return _profile(events)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PotstillError(f"the device gave no profile of its operators: {type(error).__name__}: {error}") from None


def _profile(events: Sequence[Event]) -> Profile:
    runs = sorted((e for e in events if e.get("name") == "model_run"), key=lambda e: e["ts"])[1:]
    start = runs[0]["ts"]
    every = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_END) and e["ts"] >= start]
    quick = sorted(runs, key=lambda run: run["dur"])[: (len(runs) + 1) // 2]
    nodes = [e for run in quick for e in every if run["ts"] <= e["ts"] < run["ts"] + run["dur"]]
    nodes.sort(key=lambda e: (e["ts"], -e["dur"]))
    total = sum(run["dur"] for run in quick) or 1
    micros: Counter[tuple[str, str]] = Counter()
    single: Counter[tuple[str, str, str]] = Counter()
    kinds = [(node["args"]["op_name"], node["args"].get("provider", "unknown")) for node in nodes]
    for node, kind, own in zip(nodes, kinds, _own_times(nodes), strict=True):
        micros[kind] += own
        single[(node["name"].removesuffix(_END), *kind)] += own
    counts = Counter(kinds)
    return Profile(
        operators=[
            Operator(*kind, round(counts[kind] / len(quick)), spent / total) for kind, spent in micros.most_common()
        ],
        nodes=[Node(*one, spent / total) for one, spent in single.items()],
        unattributed=1 - sum(micros.values()) / total,
        activations_mb=_activations_mb([node["args"] for node in every]),
    )


def _own_times(nodes: Sequence[Event]) -> list[int]:
    """The time in µs of each node without that of the nodes in its subgraphs; nodes are in order of their start."""
    own = [node["dur"] for node in nodes]
    holders: list[int] = []
    for index, node in enumerate(nodes):
        while holders and node["ts"] + node["dur"] > nodes[holders[-1]]["ts"] + nodes[holders[-1]]["dur"]:
            holders.pop()
        if holders:
            own[holders[-1]] -= node["dur"]
        holders.append(index)
    return own


def _activations_mb(arguments: Sequence[Mapping[str, str]]) -> float | None:
    known = [one for one in arguments if "mem_in_use_peak" in one]
    if not known:
        return None
    rest = min(int(one["mem_bytes_in_use"]) - int(one["mem_in_use_delta"]) for one in known)
    return (max(int(one["mem_in_use_peak"]) for one in known) - rest) / 1e6
