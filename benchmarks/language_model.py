"""Language models: what distillation gives, what 4 bits cost, and how fast a package writes.

    perplexity_ratio        distilled over trained alone, the same cut and budget, mean of 3 seeds, with its interval
                            by a bootstrap over seeds and texts. Teacher and texts: stories260k (260,000 weights,
                            TinyStories), and, but for QUICK, the Python teacher below
    size_ratio, int4        bytes of the int4 package over those of the weights in float16, and its perplexity over
                            float's, of a Llama that learned Python from the standard library's own source (5.5 M
                            weights; 30 minutes, QUICK: 2), judged by `potstill export` on files it never saw
    decode_bandwidth_ratio  of a Llama of 246 M random weights in 4 bits, with all cores: constants read for a token by
                            the median time of a token, over what as many threads read from memory in that process;
                            one thread stands beside, and but for QUICK larger blocks and 8 bits

`QUICK=1` takes 10 minutes on 2 cores. Prints tables; the last line is JSON, also in `results/language-model.json` (or
`language-model-quick.json`). The stories need the real data: POTSTILL_DATA; without it that part is left out, and said.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from language_model_speed import FORMATS, decoding
from language_model_students import Case, students
from provenance import provenance

from potstill.pipeline.cli import call
from potstill.validate.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("POTSTILL_DATA", ROOT.parent / "shared" / "data"))
QUICK = os.environ.get("QUICK") == "1"
MINUTES, TARGET = (2 if QUICK else 30), "laptop-x86-vnni"


def taught(folder: Path) -> Path:
    """The Python teacher and its texts, made once and kept in `runs/`."""
    if not (folder / "teacher" / "model.safetensors").is_file():
        script = ROOT / "examples" / "language-model" / "teacher.py"
        subprocess.run([sys.executable, script, "--out", folder, "--minutes", str(MINUTES)], check=True)
    return folder


def cases(python: Path) -> list[Case]:
    """The teachers and the budgets of their students."""
    found = []
    if (stories := DATA / "stories260k").is_dir():
        budget = {"epochs": 1 if QUICK else 2, "batch_size": 16, "learning_rate": 3e-3}
        texts = (stories / "train.jsonl", stories / "eval.jsonl")
        found.append(
            Case("stories260k", stories / "checkpoint", *texts, {"layers": 2}, budget, *((1200, 60) if QUICK else ()))
        )
    else:
        print(f"no stories at {DATA}; set POTSTILL_DATA", file=sys.stderr)
    if not QUICK:
        budget = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3}
        texts = (python / "train.jsonl", python / "eval.jsonl")
        found.append(Case("python", python / "teacher", *texts, {"layers": 2}, budget, learned=1500, texts=200))
    return found


def in_four_bits(python: Path, work: Path) -> dict[str, Any]:
    """The int4 package of the Python teacher: its size by float16's, and its scorecard."""
    for part, files in (("train", 60), ("eval", 6)):
        lines = (python / f"{part}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (work / f"{part}.jsonl").write_text("".join(lines[:files]), encoding="utf-8")
    words = ["export", str(python / "teacher"), "--task", "text-generation", "--eval", str(work / "eval.jsonl")]
    words += ["--calibrate", str(work / "train.jsonl"), "--target", TARGET, "--max-length", "256", "--search-time", "0"]
    if code := call([*words, "--out", str(work / "run")]):
        raise SystemExit(code)
    ledger = read_json(work / "run" / "ledger.json")
    teacher, package = ledger["entries"][0], ledger["entries"][-1]
    return {
        "size_ratio": package["size_bytes"] / (2 * teacher["parameters"]),
        "size_bytes": package["size_bytes"],
        "weights": teacher["parameters"],
        "formats": package["what"],
        "perplexity": package["scorecard"]["perplexity"],
    }


def main() -> None:
    """Measure, print, and end with a line of JSON."""
    started, console = time.monotonic(), Console(width=120)
    python = taught(ROOT / "runs" / f"python-teacher-{MINUTES}")
    found = {case.name: students(case) for case in cases(python)}
    with tempfile.TemporaryDirectory() as name:
        four = in_four_bits(python, Path(name))
    speed = decoding(FORMATS[:1] if QUICK else FORMATS)
    table = Table(title="Perplexity, 3 seeds: the same cut and budget alone and distilled", title_justify="left")
    for heading in ("", "teacher", "alone", "distilled", "ratio, 95 % interval", "weights"):
        table.add_column(heading)
    for case, one in found.items():
        seeds = [", ".join(f"{value:.3f}" for value in one[arm]) for arm in ("alone", "distilled")]
        low, high = one["interval"]
        ratio = f"{one['ratio']:.4f} [{low:.4f}, {high:.4f}]"
        table.add_row(case, f"{one['teacher']:.3f}", *seeds, ratio, f"{one['size_ratio']:.0%} of the teacher's")
    console.print(table)
    console.print(f"int4: {four['size_ratio']:.3f} of float16, perplexity × {four['perplexity']['ratio']:.4f}")
    for one in speed["rows"]:
        console.print(
            f"{one['bits']} bits in blocks of {one['block']}, {one['threads']} thread(s): "
            f"{one['decode_tokens_per_s']:.1f} tokens/s, {one['of_bandwidth']:.0%} of {one['read_gb_s']:.1f} GB/s; "
            f"a prompt's {one['prompt_tokens_per_s']:.0f}"
        )
    shipped = {"bits": 4, "block": 32, "threads": speed["cores"]}
    (reached,) = (one["of_bandwidth"] for one in speed["rows"] if shipped.items() <= one.items())
    record = {
        "perplexity_ratio": {case: [one["ratio"], *one["interval"]] for case, one in found.items()},
        "size_ratio": four["size_ratio"],
        "decode_bandwidth_ratio": reached,
        "students": found, "int4": four, "speed": speed, "quick": QUICK, "teacher_minutes": MINUTES,
        "minutes": (time.monotonic() - started) / 60, **provenance(),
    }  # fmt: skip
    write_json(ROOT / "benchmarks" / "results" / f"language-model{'-quick' if QUICK else ''}.json", record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
