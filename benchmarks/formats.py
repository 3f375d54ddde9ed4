"""Our packages against files that others make of the same checkpoints, and what calibration, search and export cost.

    rows         for each model and side: accuracy and agreement with the float graph on the evaluation set, one example
                 at a time; size; latency here (one thread, batch of 1, all sides in turn in one process; timer: around
                 `session.run` alone; median); accuracy and its change under an emulated Haswell (AVX2 without VNNI);
                 seconds and peak memory of the process that made the file, from start to end. Ours begins with the
                 checkpoint and ends judged and timed; onnxruntime begins with the float graph. Then whether ours is at
                 or above the best of the others, and why not
    avx2         points lost under Haswell beside what is lost here, by our AVX2 package and by the plain file
    calibration_memory_ratio    peak of a process that calibrates with 4,096 examples over that with 64; and
                 milliseconds for one more example, ours over quantize_static's: see calibration.py
    search       the depthwise net with one scale for each weight tensor, where plain int8 fails 1pp: see search.py
    export_seconds    `potstill export` of the SST-2 student for one, two and three targets, start to packages

`QUICK=1` takes three models, fewer sides, examples and repeats. Prints tables; the last line is JSON, also in
`results/formats.json`. With names of models, only their rows are measured and nothing is written.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import calibration
import formats_models
import formats_sides
import numpy as np
import onnxruntime
import search
import torch
from formats_models import DATA, ROOT, Case
from formats_sides import OURS, PLAIN, Given, Made, make, sides
from formats_tables import print_rest, print_rows
from formats_verdict import File, verdict
from numpy.typing import NDArray
from provenance import provenance

from potstill.export.graph import export_graph
from potstill.targets.qemu import emulator_of
from potstill.targets.target import load_target
from potstill.targets.wire import EmulatedPredictor
from potstill.validate.errors import InputError
from potstill.validate.files import write_json
from potstill.validate.metrics import most_likely
from potstill.validate.predictor import OnnxPredictor

QUICK = os.environ.get("QUICK") == "1"
NAMES = ("sst2-student", "depthwise", "vit") if QUICK else tuple(formats_models.CASES)
ROUNDS, RUNS = (10, 10) if QUICK else (50, 10)  # of all sides; of a side in a round
EMULATED, OF_PAIR = (25, 100) if QUICK else (100, 400)  # examples: for each side; for the two of `avx2`
TARGETS = ("laptop-x86-vnni", "laptop-x86-avx2", "phone-arm64-dotprod")
FLOAT, AVX2, OPSET = "float", "laptop-x86-avx2", 20
Logits = NDArray[np.float32]


def row(case: Case, folder: Path) -> dict[str, Any]:
    """All sides on one model."""
    given, labels = start(case, folder / case.name), case.material.eval.labels
    made = {FLOAT: Made(given.graph, 0.0, 0.0, 0.0)}
    for side in sides(case, quick=QUICK):
        say(f"{case.name}: {side}")
        made[side] = make(side, given, folder / case.name / side.replace(" ", "-"))
    logits = answers(case, made)
    files = {side: path for side in logits if (path := made[side].path)}
    said = {side: most_likely(one) for side, one in logits.items()}
    ms, elsewhere = in_turn(case, files), as_avx2(case, files)
    found = {side: File(side, said[side] == labels, ms[side], size_of(path)) for side, path in files.items()}
    figures: dict[str, dict[str, Any]] = {side: cost(one) for side, one in made.items()}
    for side, one in made.items():
        figures[side] |= (
            {"why": one.why}
            if side not in files
            else {
                "accuracy": found[side].accuracy,
                "agreement": float((said[side] == said[FLOAT]).mean()),
                "bytes": found[side].size,
                "ms": ms[side],
                "avx2": compared(elsewhere[side], logits[side], labels),
            }
        )
    others = [one for side, one in found.items() if side not in (FLOAT, *OURS)]
    return {
        "model": case.name,
        "n": len(labels),
        "sides": figures,
        "verdict": vars(verdict(found[OURS[0]], others, found[FLOAT])),
    }


def start(case: Case, folder: Path) -> Given:
    """Write the float graph and the inputs that calibrate."""
    folder.mkdir()
    model, given = case.material.teacher, Given(case, folder / "float.onnx", folder / "inputs.npz")
    export_graph(model, case.material.samples, given.graph, OPSET)
    inputs = [model.encode(case.calibration.rows([i])) for i in range(len(case.calibration))]
    arrays: dict[str, Any] = {f"{i}/{name}": array for i, one in enumerate(inputs) for name, array in one.items()}
    np.savez(given.calibrate, **arrays)
    return given


def answers(case: Case, made: dict[str, Made]) -> dict[str, Logits]:
    """Logits of each file on the evaluation set, one thread; a file that does not run gets the reason in `made`.

    Raises:
        AssertionError: there is no package of ours. What ONNX Runtime raises where the float graph or it does not run.
    """
    model, examples, found = case.material.teacher, case.material.eval, dict[str, Logits]()
    for side, one in made.items():
        assert one.path or side not in OURS, f"{side} made no package: {one.why}"
        try:
            if one.path:
                predictor = OnnxPredictor(one.path, model.encode, side, read=model.read, threads=1)
                found[side] = predictor(examples.rows(range(len(examples))))
        except Exception as error:
            if side in (FLOAT, *OURS):
                raise
            made[side] = replace(one, why=f"its file does not run: {str(error)[:300]}")
    return found


def size_of(path: Path) -> int:
    """Bytes of a model file and of its external data."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


def cost(made: Made) -> dict[str, float]:
    """What making a file cost."""
    return {name: getattr(made, name) for name in ("seconds", "cpu_seconds", "peak_mb")}


def in_turn(case: Case, files: Mapping[str, Path]) -> dict[str, float]:
    """Median milliseconds of each file over the same evaluation examples, one thread, in turn."""
    model, examples, options = case.material.teacher, case.material.eval, onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    sessions = {side: onnxruntime.InferenceSession(path, options) for side, path in files.items()}
    inputs = [model.encode(examples.rows([i])) for i in some(len(examples), RUNS)]
    times, rng = {side: list[float]() for side in files}, np.random.default_rng(0)
    for turn in range(ROUNDS + 1):
        for side in rng.permutation(list(files)):  # no side always comes after the same other one
            session = sessions[side]
            names = [one.name for one in session.get_inputs()]
            for one in inputs:
                feed = {name: one[name] for name in names}
                started = time.perf_counter_ns()
                session.run(None, feed)
                if turn:  # the first one warms up
                    times[side].append((time.perf_counter_ns() - started) / 1e6)
    return {side: statistics.median(one) for side, one in times.items()}


def as_avx2(case: Case, files: Mapping[str, Path]) -> dict[str, Logits]:
    """Logits of each file on `some` evaluation examples as a CPU with AVX2 and without VNNI computes them."""
    model, examples, target = case.material.teacher, case.material.eval, load_target(AVX2)

    def emulated(side: str) -> Logits:
        index = some(len(examples), OF_PAIR if side in (OURS[1], PLAIN) else EMULATED)
        predictor = EmulatedPredictor(target, files[side], model.encode, side, read=model.read, timeout_s=3600)
        return predictor(examples.rows(index))

    say(f"{case.name}: emulated Haswell")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(files, pool.map(emulated, files), strict=True))


def compared(emulated: Logits, here: Logits, labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy under emulation, and its change in points from here on the same `n` examples."""
    n, index = len(emulated), some(len(labels), len(emulated))
    there, own = most_likely(emulated), most_likely(here[index])
    right, before = (float((one == labels[index]).mean()) for one in (there, own))
    agreement = float((there == own).mean())
    return {"n": n, "accuracy": right, "change_points": 100 * (right - before), "agreement_with_here": agreement}


def some(n: int, count: int) -> list[int]:
    """Up to `count` of n examples by chance, the same ones each time; a source may have them in order of class."""
    chosen: list[int] = np.random.default_rng(0).permutation(n)[:count].tolist()
    return chosen


def avx2(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By model: what Haswell changes of our AVX2 package, and of the plain file of the others."""
    kept = {"ours": OURS[1], "plain": PLAIN}
    return {
        one["model"]: {who: found["avx2"] for who, side in kept.items() if "avx2" in (found := one["sides"][side])}
        for one in rows
    }


def calibrating(folder: Path) -> dict[str, Any]:
    """The figures of calibration.py that are promised, of min-max."""
    say("calibration")
    few, more, many = calibration.FEW, calibration.MORE, calibration.MANY
    plans = [("ours", "minmax", few), ("ours", "minmax", more), ("ours", "minmax", many)]
    plans += [("theirs", "minmax", few), ("theirs", "minmax", more)]
    found = calibration.measure(calibration.prepare(folder), plans, 1 if QUICK else 3)
    each = {
        side: 1000
        * (found[f"{side} minmax {more}"]["seconds"] - found[f"{side} minmax {few}"]["seconds"])
        / (more - few)
        for side in ("ours", "theirs")
    }
    ratio = found[f"ours minmax {many}"]["peak_mb"] / found[f"ours minmax {few}"]["peak_mb"]
    return {"calibration_memory_ratio": ratio, "calibration_ms_per_sample": each, "calibration_runs": found}


def exporting(folder: Path) -> dict[str, dict[str, float]]:
    """What one, two and three packages of the SST-2 student cost, each time from nothing; QUICK: of three."""
    case, found = formats_models.case("sst2-student", quick=QUICK), {}
    for count in range(len(TARGETS) if QUICK else 1, len(TARGETS) + 1):
        say(f"export for {count} targets")
        words = formats_sides.export_words(case, list(TARGETS[:count]), folder / f"export-{count}")
        spent = formats_sides.cost_of(words, ROOT, folder / f"export-{count}.txt")
        assert spent["code"] == 0, (folder / f"export-{count}.txt").read_text()
        found[str(count)] = spent
    return found


def wanted() -> tuple[tuple[str, ...], bool]:
    """The models that are compared, and whether all figures are taken.

    Raises:
        SystemExit: nothing emulates a Haswell here.
    """
    try:
        emulator_of(load_target(AVX2))
    except InputError as error:
        raise SystemExit(f"the comparison runs each file as a CPU without VNNI does: {error}") from None
    names = tuple(sys.argv[1:]) or NAMES
    if DATA.is_dir():
        return names, names == NAMES
    say(f"skipped, for want of data in {DATA} (POTSTILL_DATA): all but the ViT")
    return ("vit",), False


def say(what: str) -> None:
    """What is being done, on standard error."""
    print(time.strftime("%H:%M:%S"), what, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, print, and end with a line of JSON."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))  # for the factories in examples/
    names, whole = wanted()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [row(formats_models.case(one, quick=QUICK), folder) for one in names]
        print_rows(rows)
        record: dict[str, Any] = {"rows": rows, "avx2": avx2(rows)}
        if whole:
            record |= calibrating(folder)
            say("search")
            weights = formats_models.case("depthwise", quick=QUICK).weights
            assert weights
            record["search"] = search.measure(folder, DATA / "cifar10", weights, "per-tensor")
            record["export_seconds"] = exporting(folder)
            print_rest(record)
            record |= {"quick": QUICK} | provenance()
            write_json(ROOT / "benchmarks" / "results" / f"formats{'-quick' if QUICK else ''}.json", record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
