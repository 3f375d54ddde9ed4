"""Who makes a file and how: a command for each side, run in a process of its own, and what it cost.

potstill        `potstill export` for one target: graph, file, scorecard, profile
onnxruntime     see formats_peers.py; from the float graph that `potstill` exports
optimum         see formats_peers.py; by the Python of `.venv-optimum`
olive           `olive auto-opt` and `olive optimize`, its two automatic paths, with `--precision int8` for the CPU
                provider; of `.venv-olive`. A module of one's own goes in as the float graph
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from formats_models import ROOT, Case

LIMIT_S = 900
OURS = ("potstill laptop-x86-vnni", "potstill laptop-x86-avx2")
PLAIN = "onnxruntime U8S8 per channel"  # what the documentation says for x86 with VNNI
OFFLINE = {
    "OMP_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "OLIVE_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}


@dataclass(frozen=True)
class Given:
    """What every side starts from: the checkpoint, its float graph, and the inputs that calibrate (an .npz)."""

    case: Case
    graph: Path
    calibrate: Path


@dataclass(frozen=True)
class Made:
    """A file and what it cost; without a file, why there is none."""

    path: Path | None
    seconds: float
    cpu_seconds: float
    peak_mb: float
    why: str = ""


def sides(case: Case, *, quick: bool) -> list[str]:
    """The sides that are compared on a case, ours first."""
    if case.weights:
        others = [PLAIN, "optimum avx512_vnni static", "olive auto-opt"]
        more = ["onnxruntime defaults", "optimum avx2 static", "olive optimize"]
    else:
        others = [PLAIN, "onnxruntime dynamic", "optimum avx512_vnni dynamic", "olive auto-opt"]
        more = ["onnxruntime defaults", "optimum avx2 dynamic", "optimum avx512_vnni static", "optimum avx2 static"]
        more += ["olive optimize"]
    return [*OURS, *others, *([] if quick else more)]


def make(side: str, given: Given, folder: Path) -> Made:
    """Let a side make its file in an empty folder."""
    folder.mkdir(parents=True)
    command, place, file = _command(side, given, folder)
    if not Path(command[0]).is_file():
        return Made(None, 0.0, 0.0, 0.0, f"no {command[0]}: make bench-formats installs it")
    cost = cost_of(command, place, folder / "log.txt")
    found = file if file.is_file() else None
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    stopped = f"stopped after {LIMIT_S} s" if cost["code"] == 124 else f"exit code {cost['code']:.0f}"
    why = "" if found else f"{stopped}: {_complaint(lines)}"
    return Made(found, cost["seconds"], cost["cpu_seconds"], cost["peak_mb"], why)


def cost_of(command: list[str], place: Path, log: Path) -> dict[str, float]:
    """Seconds, peak of memory and exit code of a command that is run in a folder; see cost_of.py."""
    words = [sys.executable, str(Path(__file__).with_name("cost_of.py")), str(LIMIT_S), *command]
    with log.open("wb") as told:
        done = subprocess.run(
            words, cwd=place, env=os.environ | OFFLINE, stdout=subprocess.PIPE, stderr=told, check=True
        )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _command(side: str, given: Given, folder: Path) -> tuple[list[str], Path, Path]:
    """The words, the folder to run them in, and the file that they will have made."""
    case, (who, _, way), out = given.case, side.partition(" "), folder / "out"
    checkpoint = None if case.weights else case.checkpoint
    if who == "potstill":
        return export_words(case, [way], out), ROOT, out / "packages" / way / "model.onnx"
    if who == "olive":
        program, source = ROOT / ".venv-olive" / "bin" / "olive", checkpoint or str(given.graph)
        words = [str(program), way, "-m", source, *(["-t", case.task] if checkpoint else []), "-o", str(out)]
        words += ["--precision", "int8", "--device", "cpu", "--provider", "CPUExecutionProvider"]
        return words, folder, out / "model.onnx"
    python = sys.executable if who == "onnxruntime" else str(ROOT / ".venv-optimum" / "bin" / "python")
    setting = {"side": side, "graph": str(given.graph), "checkpoint": checkpoint, "task": case.task}
    setting |= {"calibrate": str(given.calibrate), "folder": str(folder), "out": str(folder / "model.onnx")}
    (folder / "setting.json").write_text(json.dumps(setting))
    worker = str(Path(__file__).with_name("formats_peers.py"))
    return [python, worker, str(folder / "setting.json")], folder, folder / "model.onnx"


def export_words(case: Case, targets: list[str], out: Path) -> list[str]:
    """The command line of our export."""
    asked = [word for target in targets for word in ("--target", target)]
    return [sys.executable, "-m", "potstill.pipeline.cli", "export", *case.words, *asked, "--out", str(out)]


def _complaint(lines: list[str]) -> str:
    """The line of a log that names the error: the last that begins like one, else the last."""
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Fail", "InvalidGraph"))]
    return (named or lines)[-1][:300]
