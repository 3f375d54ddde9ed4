"""What calibration costs, against ONNX Runtime's `quantize_static`: the same graph, examples and batches of 16.

    memory       peak resident memory of a process that calibrates with 64 and with 4,096 examples; theirs keeps every
                 activation for a histogram, so it gets 128 at most there
    time         seconds of the whole call (calibrate, quantise and write) for each example, with 1,024 examples
                 (histograms of theirs: 128), less what 64 examples cost: what one more example costs

Each figure is of a process of its own, in turn; of 3 the median peak and the least time: other work only adds to it.
Graph: ResNet-56 for CIFAR-10, trained where `POTSTILL_DATA` holds it, else with random weights and random pixels. Both
sides use one thread. Prints a table; the last line is JSON, also in `results/calibration.json`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("POTSTILL_DATA", ROOT.parent / "shared" / "data")) / "cifar10"
REPEATS, FEW, MORE, MANY, KEPT = 3, 64, 1024, 4096, 128
THEIRS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
OURS = ("minmax", "entropy", "percentile", "mse")
Plan = tuple[str, str, int]


def pixels(count: int) -> NDArray[Any]:
    """Images (count, 32, 32, 3), as bytes."""
    path = DATA / "train_jpeg.npz"
    if path.is_file():
        with np.load(path) as archive:
            return np.array(archive["x"][:count])
    return np.random.default_rng(0).integers(0, 256, size=(count, 32, 32, 3), dtype=np.uint8)


class Feed:
    """Batches of 16 as `quantize_static` takes them."""

    def __init__(self, x: NDArray[Any]) -> None:
        self._batches = ({"x": x[i : i + 16].astype(np.float32)} for i in range(0, len(x), 16))

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """The next one."""
        return next(self._batches, None)


def work(side: str, method: str, graph: Path, count: int) -> None:
    """Quantise the graph as one side does it, and print the seconds and the peak of memory in MB."""
    one_thread()
    x, out = pixels(count), graph.with_name("out.onnx")
    call = (ours if side == "ours" else theirs)(graph, out, method, x)
    before, started = peak_mb(), time.perf_counter()
    call()
    print(json.dumps({"seconds": time.perf_counter() - started, "peak_mb": peak_mb(), "before_mb": before}))


def peak_mb() -> float:
    """Most resident memory of this process so far, in 10^6 bytes; getrusage counts what its starter held too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def one_thread() -> None:
    """Make every session of ONNX Runtime in this process compute on one thread."""
    whole = onnxruntime.InferenceSession

    def session(path: Any, sess_options: Any = None, **other: Any) -> Any:
        options = sess_options or onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return whole(path, options, **other)

    onnxruntime.InferenceSession = session


def ours(graph: Path, out: Path, method: str, x: NDArray[Any]) -> Any:
    """Our call."""
    from potstill.export import calibrate
    from potstill.export.quantize import quantize
    from potstill.targets.target import Scheme
    from potstill.validate.data import Arrays, Examples
    from potstill.validate.encoder import ArrayEncoder

    calibrate.CALIBRATION_EXAMPLES = calibrate.POOL = len(x)
    labels = np.zeros(len(x), dtype=np.int64)
    examples = Examples("benchmark", Arrays({"x": x}), labels, None, "benchmark")
    scheme = Scheme.model_validate(
        {"method": "static", "activation": "uint8", "weight": "int8", "per_channel": True, "why": "benchmark"}
        | {"calibration": method}
    )
    return lambda: quantize(graph, out, scheme, examples, ArrayEncoder(), 0)


def theirs(graph: Path, out: Path, method: str, x: NDArray[Any]) -> Any:
    """The call of ONNX Runtime."""
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    import potstill.export.quantize  # the same modules in memory

    assert potstill.export.quantize
    return lambda: quantize_static(
        str(graph),
        str(out),
        Feed(x),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[THEIRS[method]],
    )


def prepare(folder: Path) -> Path:
    """ResNet-56 as a graph, ready for a static quantiser."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from potstill.export.graph import export_graph
    from potstill.validate.checkpoint import Checkpoint
    from potstill.validate.data import Arrays, Examples
    from potstill.validate.task import TASKS

    sys.path.insert(0, str(ROOT))
    weights = DATA / "resnet56-4bfd9763.th"
    examples = Examples("benchmark", Arrays({"x": pixels(16)}), np.arange(16) % 10, None, "benchmark")
    checkpoint = Checkpoint("examples.cifar10.model:resnet56", weights if weights.is_file() else None)
    model = TASKS["module"].load(checkpoint, example=examples.rows([0]))
    export_graph(model, examples, folder / "float.onnx", 20)
    quant_pre_process(str(folder / "float.onnx"), str(folder / "graph.onnx"), skip_symbolic_shape=True)
    return folder / "graph.onnx"


def plans() -> list[Plan]:
    """All that is measured: side, method, examples."""
    found = [("ours", method, count) for method in OURS for count in (FEW, MORE)]
    found += [("ours", method, MANY) for method in ("minmax", "entropy")]
    found += [("theirs", "minmax", count) for count in (FEW, MORE)]
    return found + [("theirs", method, count) for method in ("entropy", "percentile") for count in (FEW, KEPT)]


def measure(graph: Path, plans: Sequence[Plan], repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    """Least seconds and median peaks, by side and method and count."""
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeats):
        for side, method, count in plans:
            command = [sys.executable, __file__, side, method, str(graph), str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.setdefault(f"{side} {method} {count}", []).append(json.loads(done.stdout.splitlines()[-1]))
    return {
        key: {"seconds": min(one["seconds"] for one in runs)}
        | {name: statistics.median(one[name] for one in runs) for name in ("peak_mb", "before_mb")}
        for key, runs in found.items()
    }


def summary(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The ratios that are promised: memory of many over few examples, and our time of an example over theirs."""

    def each(side: str, method: str, count: int) -> float:
        more, few = found[f"{side} {method} {count}"], found[f"{side} {method} {FEW}"]
        return (more["seconds"] - few["seconds"]) / (count - FEW)

    def grown(key: str, count: int) -> float:
        return found[f"{key} {count}"]["peak_mb"] / found[f"{key} {FEW}"]["peak_mb"]

    times = {
        f"{side} {method}": each(side, method, KEPT if side == "theirs" and method != "minmax" else MORE)
        for side, method in [("ours", one) for one in OURS] + [("theirs", one) for one in THEIRS]
    }
    return {
        "calibration_memory_ratio": max(grown("ours minmax", MANY), grown("ours entropy", MANY)),
        "calibration_memory_ratio_minmax": grown("ours minmax", MANY),
        "calibration_memory_ratio_entropy": grown("ours entropy", MANY),
        "theirs_memory_ratio_minmax_64_to_1024": grown("theirs minmax", MORE),
        "theirs_memory_ratio_entropy_64_to_128": grown("theirs entropy", KEPT),
        "calibration_time_ratio": {one: times[f"ours {one}"] / times[f"theirs {one}"] for one in THEIRS},
        "calibration_ms_per_sample": {key: 1000 * value for key, value in times.items()},
    }


def main() -> None:
    """Measure, print, and end with a line of JSON."""
    from provenance import provenance
    from rich.console import Console
    from rich.table import Table

    from potstill.pipeline.lineage import record as lineage
    from potstill.validate.files import write_json

    with tempfile.TemporaryDirectory() as name:
        found = measure(prepare(Path(name)), plans())
    machine = lineage.machine()
    title = f"ResNet-56, {machine['cpu']}, 1 thread; of {REPEATS} processes each"
    table = Table(title=title, title_justify="left")
    for heading in ("side, method, examples", "seconds", "peak memory, MB", "before the call, MB"):
        table.add_column(heading)
    for key, one in found.items():
        table.add_row(key, f"{one['seconds']:.2f}", f"{one['peak_mb']:.0f}", f"{one['before_mb']:.0f}")
    Console().print(table)
    record = summary(found) | {"workload": "trained" if DATA.is_dir() else "random weights", "runs": found}
    record |= provenance()
    write_json(Path(__file__).parent / "results" / "calibration.json", record)
    print(json.dumps(record))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
