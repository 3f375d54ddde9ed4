"""What a profile on a device catches, how far it repeats, and what it costs beside the runs that it is asked for.

    trap         `potstill export` for a CPU with VNNI and one with AVX2 alone, no gate; then `potstill profile
                 --accuracy` of both under an emulated Haswell. The file for VNNI must end with 3 and say "saturation",
                 the one for AVX2 with 0. Accuracy there and here, with the interval of the difference, and agreement
    arm          the package for an ARM64 phone, judged in the same way as its Cortex-A76
    arm_instructions_repeat    the range of the median count of instructions over separate processes, as a share
    overhead_seconds    `potstill profile --runs 200 --json` here: seconds from the start of the process to its end,
                 less 200 medians; the median of the repeats
    bare         the profile's median over that of a bare loop of onnxruntime on the same file and input: processes in
                 turn, the order by chance; median of the rounds' ratios with its 95 % interval (sign test)

Models: CIFAR-10's ResNet-56 and a 3-layer student of SST-2 (see formats_models.py), on examples drawn by seed; without
data a ViT on digits. One thread. `QUICK=1` takes fewer examples and repeats. ARM64 needs the folder that
targets/arm64_root.sh fills. Prints sentences; the last line is JSON, also in `results/devices.json`.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import formats_models
import numpy as np
from formats_models import DATA, ROOT, Case
from provenance import provenance

from potstill.targets.measurement import median_interval
from potstill.targets.qemu import emulator_of
from potstill.targets.request import read_package
from potstill.targets.target import load_target
from potstill.validate.errors import InputError
from potstill.validate.files import write_json

QUICK = os.environ.get("QUICK") == "1"
EXAMPLES = 200 if QUICK else 800
ARM_EXAMPLES = 60 if QUICK else 200
COUNTS = 3  # processes whose instructions are compared
REPEATS, RUNS = (5, 200) if QUICK else (9, 200)  # of the overhead
ROUNDS = 10 if QUICK else 30  # of the profile and the bare loop
VNNI, AVX2, PHONE = "laptop-x86-vnni", "laptop-x86-avx2", "phone-arm64-dotprod"
POTSTILL = (sys.executable, "-m", "potstill.pipeline.cli")


def export(case: Case, targets: list[str], examples: int, folder: Path) -> Path:
    """Packages of a model for some targets, judged on some of its examples; the folder they are in."""
    out = folder / f"{case.name}-{'-'.join(targets)}"
    asked = [word for target in targets for word in ("--target", target)]
    case = replace(case, judge=str(some(Path(case.judge), examples, folder)))
    words = [*POTSTILL, "export", *case.words, *asked, "--out", str(out), "--emulate-time", "0"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / "packages"


def some(source: Path, count: int, folder: Path) -> Path:
    """A file or folder with some of the examples of another, drawn by seed; a folder is taken whole."""
    if source.is_dir():
        return source
    chosen = folder / f"{source.stem}-{count}{source.suffix}"
    if source.suffix == ".npz":
        with np.load(source) as arrays:
            index = np.random.default_rng(0).permutation(len(arrays["y"]))[:count]
            np.savez(chosen, **{name: array[index] for name, array in arrays.items()})
        return chosen
    with source.open(newline="") as file:
        head, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    with chosen.open("w") as into:
        drawn = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:count]]
        into.writelines("\t".join(row) + "\n" for row in [head, *drawn])
    return chosen


def profiled(package: Path, *more: str) -> dict[str, Any]:
    """What `potstill profile --json` says of a package, its exit code and what it took."""
    started = time.perf_counter()
    words = [*POTSTILL, "profile", str(package), "--json", *more]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stderr
    return {**json.loads(done.stdout), "exit_code": done.returncode, "seconds": time.perf_counter() - started}


def judged(package: Path, on: str) -> dict[str, Any]:
    """A package's answers on an emulated CPU, beside those of the same file here."""
    found = profiled(package, "--on", on, "--accuracy")
    emulated, verdict = found["accuracy"]["emulated"], found["accuracy"]["verdict"]
    card = emulated["apart"]
    return {
        "package": package.name,
        "cpu": emulated["cpu"],
        "n": card["examples"],
        "exit_code": found["exit_code"],
        "passed": verdict["passed"],
        "saturation": "saturation" in verdict["reason"],
        "agreement_with_here": card["agreement"],
        "sqnr_db": emulated["sqnr_db"],
        "least_db": emulated["least_db"],
        "accuracy_there": card["value"],
        "accuracy_here": card["teacher_value"],
        "change_points": 100 * card["difference"],
        "interval_points": [100 * card["difference_interval"][end] for end in ("low", "high")],
        "instructions": found["measurement"]["instructions"],
        "seconds": found["seconds"],
        "reason": verdict["reason"],
    }


def trap(packages: Path) -> dict[str, dict[str, Any]]:
    """The file for VNNI and the one for AVX2, both on an AVX2 CPU."""
    found = {"for_vnni": judged(packages / VNNI, f"emulate://{AVX2}"), "for_avx2": judged(packages / AVX2, "emulate")}
    for one in found.values():
        say(f"{one['package']}: exit code {one['exit_code']}: {one['reason']}")
    return found


def caught(found: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the one failed for saturation, and the other passed."""
    bad, good = found["for_vnni"], found["for_avx2"]
    return bad["exit_code"] == 3 and bad["saturation"] and good["exit_code"] == 0


def arm(case: Case, folder: Path) -> dict[str, Any]:
    """A phone's package as its CPU, and the instructions of a run in separate processes."""
    package = export(case, [PHONE], ARM_EXAMPLES, folder) / PHONE
    found = judged(package, "emulate")
    say(f"{found['package']}: exit code {found['exit_code']}: {found['reason']}")
    counts = [found["instructions"]["median"]]
    counts += [profiled(package, "--on", "emulate")["measurement"]["instructions"]["median"] for _ in range(COUNTS - 1)]
    return found | {"counts": counts, "repeat": (max(counts) - min(counts)) / statistics.median(counts)}


def overhead(package: Path) -> list[float]:
    """Seconds of a profile beyond the runs asked for; what is not those runs, the warm-up too, is overhead."""
    found = [profiled(package, "--runs", str(RUNS), "--threads", "1") for _ in range(REPEATS)]
    return [one["seconds"] - RUNS * one["measurement"]["median_ms"] / 1e3 for one in found]


def beside_bare(package: Path, folder: Path) -> dict[str, Any]:
    """The median of a profile over that of a bare loop, round by round."""
    opened, inputs = read_package(package), folder / "inputs.npz"
    arrays = {
        name: np.fromfile(one["file"], dtype=one["dtype"]).reshape(one["shape"]) for name, one in opened.inputs.items()
    }
    np.savez(inputs, **arrays)
    bare = [sys.executable, str(Path(__file__).with_name("bare_loop.py")), str(opened.model), str(inputs), str(RUNS)]

    def of_bare() -> float:
        return float(subprocess.run(bare, capture_output=True, text=True, check=True).stdout)

    def of_ours() -> float:
        words = ("--runs", str(RUNS), "--threads", "1")
        return float(profiled(package, *words)["measurement"]["median_ms"])

    rng, rounds = np.random.default_rng(0), list[tuple[float, float]]()
    for _ in range(ROUNDS):
        times: dict[int, float] = {which: (of_ours, of_bare)[which]() for which in rng.permutation(2).tolist()}
        rounds.append((times[0], times[1]))
    ratios = [ours / theirs for ours, theirs in rounds]
    return {
        "ratio": statistics.median(ratios),
        "interval": median_interval(ratios),
        "ours_ms": statistics.median(ours for ours, _ in rounds),
        "bare_ms": statistics.median(theirs for _, theirs in rounds),
        "rounds": ROUNDS,
    }


def emulates(target: str) -> bool:
    """Whether a target's CPU is emulated here; says why not."""
    try:
        emulator_of(load_target(target))
    except InputError as error:
        say(f"skipped, {target}: {error}")
        return False
    return True


def say(what: str) -> None:
    """What is being done, on standard error."""
    print(time.strftime("%H:%M:%S"), what, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, print, and end with a line of JSON."""
    names = ("resnet56", "sst2-student")
    if not DATA.is_dir():
        say(f"skipped, for want of data in {DATA} (POTSTILL_DATA): {' and '.join(names)}; a ViT on digits instead")
        names = ("vit",)
    cases = [formats_models.case(name, quick=QUICK) for name in names]
    record: dict[str, Any] = {"trap": {}, "arm": None, "arm_instructions_repeat": None}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say(f"{names[0]}: a profile's own cost, and the bare loop")
        packages = {case.name: export(case, [VNNI, AVX2], EXAMPLES, folder) for case in cases}
        first = packages[names[0]] / VNNI
        spent = overhead(first)
        record |= {"overhead_seconds": statistics.median(spent), "overhead_each": spent}
        record["bare"] = beside_bare(first, folder)
        if emulates(AVX2):
            record["trap"] = {case: trap(place) for case, place in packages.items()}
        if emulates(PHONE):
            record["arm"] = arm(cases[0], folder)
            record["arm_instructions_repeat"] = record["arm"]["repeat"]
    record["holds"] = {
        "trap": all(map(caught, record["trap"].values())) if record["trap"] else None,
        "arm": record["arm"]["exit_code"] == 0 and record["arm"]["repeat"] <= 1e-3 if record["arm"] else None,
        "overhead": record["overhead_seconds"] < 3,
        "bare": abs(record["bare"]["ratio"] - 1) <= 0.05,
    }
    record |= {"quick": QUICK} | provenance()
    if names[0] != "vit":
        write_json(ROOT / "benchmarks" / "results" / f"devices{'-quick' if QUICK else ''}.json", record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
