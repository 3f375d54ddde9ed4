"""What the search for nodes to leave in float finds on a depthwise net, and what it costs.

The net of `search_train.py`, itself the teacher, is exported with a gate of 1pp for three number formats: those of
the target laptop-x86-vnni, and the same with one scale for each weight tensor, not each channel, in 8 and in 7 bits.

    plain, kept     points of accuracy lost on 1,000 test images, without and with the search
    in float        weighted nodes, and what was repaired before
    int8            share of the multiply-adds of weighted nodes in integers after the search
    seconds         of the search; timer: around it, the ranking, every try and every evaluation included
    float, plain, kept ms    median of `potstill profile`, one thread, timed in turn
    rank            Spearman's correlation of the ranking's costs with the truth: each node alone in integers, in a
                    graph of its own, on 512 examples that the ranking did not see

Data: CIFAR-10 in $POTSTILL_DATA/cifar10. Prints a table; the last line is JSON, also in `results/search.json`.

    python benchmarks/search.py depthwise.safetensors
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime
from provenance import provenance
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from potstill.export.net import Net
from potstill.export.package import read_package
from potstill.export.quantize import prepare, quantize
from potstill.export.sensitivity import end_of, sensitivities
from potstill.pipeline.ledger import Ledger
from potstill.pipeline.lineage import record as lineage
from potstill.pipeline.recipe import build_recipe
from potstill.pipeline.stages import STAGES
from potstill.pipeline.walk import walk
from potstill.targets.target import load_target, target_names
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import load_examples
from potstill.validate.files import write_json
from potstill.validate.metrics import divergences
from potstill.validate.task import TASKS

FACTORY = "examples.cifar10.model:depthwise"
CHANGES: dict[str, dict[str, bool]] = {
    "per-channel": {},
    "per-tensor": {"per_channel": False},
    "per-tensor-7-bit": {"per_channel": False, "reduce_range": True},
}
STATES = ("plain", "kept")


def target_file(folder: Path, name: str) -> Path:
    """A target like laptop-x86-vnni with other weights."""
    path = folder / f"{name}.yaml"
    convolution = {"convolution": CHANGES[name]} if CHANGES[name] else {}
    parts: dict[str, Any] = {"id": name, "title": name, "extends": "laptop-x86-vnni"}
    path.write_text(json.dumps(parts | ({"quantize": convolution} if convolution else {})))
    return path


def run(folder: Path, data: Path, weights: Path, name: str, seconds: str) -> tuple[Ledger, Path]:
    """An export for one target, with or without a search."""
    mapping: dict[str, Any] = {
        "task": "module",
        "teacher": {"checkpoint": FACTORY, "weights": str(weights)},
        "data": {"eval": str(data / "test.npz"), "calibrate": str(data / "train_lossless.npz")},
        "gate": {"max_drop": "1pp"},
        "targets": [str(target_file(folder, name))],
        "search": {"time": seconds},
        "profile": {"threads": 1},
    }
    recipe = build_recipe(mapping, stage_types=STAGES, target_names=target_names(), base=Path.cwd())
    out = folder / f"{name}-{seconds}"
    return walk(recipe, out, quiet=True)[0], out / "packages" / name


def rank(folder: Path, data: Path, weights: Path, name: str) -> float:
    """How the ranking agrees with the truth."""
    calibrate = load_examples(str(data / "train_lossless.npz"), ("x",), {})
    model = TASKS["module"].load(Checkpoint(FACTORY, weights), example=calibrate.rows([0]))
    scheme = load_target(str(target_file(folder, name))).quantize.convolution
    graph = next((folder / f"{name}-0").glob("stages/graph-*/model.onnx"))
    prepared, plain, one = (folder / f"{part}.onnx" for part in ("prepared", "plain", "one"))
    prepare(graph, prepared)
    ranges = folder / f"{name}.ranges.json"
    quantize(graph, plain, scheme, calibrate, model.encode, 0, ranges=ranges)
    ranked = sensitivities(prepared, plain, model, calibrate.take(range(32), "ranked"))
    ties, x = Net.read(prepared), model.encode(calibrate.rows(range(32, 544)))["x"]
    nodes = {node.name: node for node in ties.model.graph.node}
    float_ = onnxruntime.InferenceSession(prepared).run(None, {"x": x})[0]
    truth = []
    for node in ranked:
        own = {node.node, ties.made_by[end_of(ties, nodes[node.node])].name}
        left = [other for other in nodes if other not in own]
        quantize(graph, one, scheme, calibrate, model.encode, 0, keep_float=left, ranges=ranges)
        truth.append(divergences(float_, onnxruntime.InferenceSession(one).run(None, {"x": x})[0]).mean())
    return float(spearmanr([node.cost for node in ranked], truth)[0])


def measure(folder: Path, data: Path, weights: Path, name: str) -> dict[str, Any]:
    """The figures of one scheme."""
    plain, _ = run(folder, data, weights, name, "0")
    kept, package = run(folder, data, weights, name, "10min")
    search = read_package(package).search
    verdicts = [ledger.entries[-1].verdict for ledger in (plain, kept)]
    figures: dict[str, Any] = {
        "scheme": plain.entries[-1].what,
        "teacher": kept.entries[0].scorecard.value,
        "plain_points": 100 * plain.entries[-1].scorecard.difference,
        "kept_points": 100 * kept.entries[-1].scorecard.difference,
        "plain_passed": bool(verdicts[0] and verdicts[0].passed),
        "kept_passed": bool(verdicts[1] and verdicts[1].passed),
        "plain_bytes": plain.entries[-1].size_bytes,
        "kept_bytes": kept.entries[-1].size_bytes,
        "float_ms": kept.latency_ms("teacher"),
        "plain_ms": plain.latency_ms(name),
        "kept_ms": kept.latency_ms(name),
        "rank": rank(folder, data, weights, name),
    }
    if search:
        figures |= {
            "int8_share": search.int8_share,
            "repairs": search.repairs,
            "left": [one.module for one in search.left],
            "weighted": search.weighted,
            "tries": len(search.tries),
            "judged": search.judged,
            "seconds": search.seconds,
        }
    return figures


def row(name: str, figures: dict[str, Any]) -> list[str]:
    """A row of the table."""
    outcomes = [f"{figures[f'{one}_points']:+.1f} {'pass' if figures[f'{one}_passed'] else 'fail'}" for one in STATES]
    latency = " / ".join(f"{figures[f'{one}_ms']:.3g}" for one in ("float", *STATES))
    shown = [name, *outcomes]
    if "tries" in figures:
        left = ", ".join([f"{len(figures['left'])} of {figures['weighted']}", *figures["repairs"]])
        shown += [f"{figures['int8_share']:.1%}", left, f"{figures['tries']} ({figures['judged']})"]
        shown += [f"{figures['seconds']:.0f}"]
    else:
        shown += ["100%", "–", "–", "–"]
    return [*shown, latency, f"{figures['rank']:.2f}"]


def main() -> None:
    """Measure, print, and end with a line of JSON."""
    data, weights = Path(os.environ["POTSTILL_DATA"]) / "cifar10", Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as name:
        found = {scheme: measure(Path(name), data, weights, scheme) for scheme in CHANGES}
    machine = lineage.machine()
    table = Table(title=f"{machine['cpu']}, {machine['cores']} cores", title_justify="left")
    headings = (
        "weights",
        "plain, pp",
        "kept, pp",
        "int8",
        "in float",
        "tries (judged)",
        "s",
        "float / plain / kept ms",
    )
    for heading in (*headings, "rank"):
        table.add_column(heading)
    for scheme, figures in found.items():
        table.add_row(*row(scheme, figures))
    Console(width=140).print(table)
    record = {"search": found} | provenance()
    write_json(Path(__file__).parent / "results" / "search.json", record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
