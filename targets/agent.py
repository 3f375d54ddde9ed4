"""Run ONNX models on this device: `python agent.py REQUEST.json` prints one line of JSON, the last of stdout.

This is the one file that runs on a device. It needs Python, numpy and onnxruntime, and nothing of Potstill.

To measure, the request holds `models` (each `path` and `inputs`: name to `file`, `dtype`, `shape`; raw little-endian),
`threads`, `warmup`, and `runs` or `seconds` with `min_runs` and `max_runs`; optional `providers`, `provider_options`,
`session_options`, `operators`, each also inside one model. Times are in ms, memory in MB (10^6 bytes).
One model is measured whole; several are only timed, in turns (A B C A B C), so that their ratios are fair.
`operators` is a file to make: ONNX Runtime's own profile of a second session, JSON in Chrome's trace format. `graph`
is another, of that session: the graph as it was optimised, without weights, made where the CPU's provider runs alone.
`throughput` lists numbers of threads, each tried for a second. `writes` has a decoder, a graph with past_key_values,
read `prompt` tokens and write `tokens` one by one, `rounds` times. `sustained` is a time in s under load; each second
is a line of JSON as it ends, too. `cores` are those that the process keeps to. `marks` tell an emulator that counts
instructions where the load, the first run and each timed run begin and end.

To answer, it holds `threads` and `answer`: `path`, `examples` (each: name to `dtype` and `shape`), and two files:
`inputs`, all their arrays, raw little-endian, one after the other as they are listed; and `outputs`, which is made in
the same way: of each example, run alone, the first output. The options of a session are those above. With `seconds`,
examples are answered in their order until that time is over, one at least.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # it is read when onnxruntime is imported

import ctypes
import gc
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime as ort

CPU = "CPUExecutionProvider"
PROFILED_RUNS = 20


def main() -> None:
    """Answer the request in the file that the command line names."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if request.get("cores"):
        keep_to(request["cores"])
    reply = answered(request) if "answer" in request else measured(request)
    reply |= {"machine": machine(), "threads": request["threads"]}
    reply["versions"] = {"onnxruntime": ort.__version__, "python": platform.python_version()}
    print("\n" + json.dumps(reply), flush=True)


def demand(given: dict[str, Any], keys: tuple[str, ...], what: str = "the request") -> None:
    """End with a sentence where a key is not there."""
    for key in keys:
        if key not in given:
            sys.exit(f"agent: {what} lacks {key!r}")


def measured(request: dict[str, Any]) -> dict[str, Any]:
    """The models of a request, measured or timed in turns."""
    demand(request, ("models", "threads", "warmup"))
    if "runs" not in request and not {"seconds", "min_runs", "max_runs"} <= set(request):
        sys.exit("agent: the request lacks 'runs', or 'seconds' with 'min_runs' and 'max_runs'")
    specs = [{**request, **model} for model in request["models"]]
    results = [measure(specs[0])] if len(specs) == 1 else take_turns(specs)
    return {"warmup": request["warmup"], "models": results}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """One model: timed with its memory, then profiled by operator where the request asks for it."""
    if spec.get("sustained"):
        return under_load(spec)
    result = time_one(spec)
    if spec.get("throughput"):
        result["throughput"] = {str(n): runs_per_second({**spec, "threads": n}) for n in spec["throughput"]}
    if spec.get("writes"):
        result["written"] = written(spec)
    return result | profile(spec) if spec.get("operators") else result


def time_one(spec: dict[str, Any]) -> dict[str, Any]:
    """Load, first run, warm-up, timed runs, and the peak of memory over them."""
    baseline = rss_mb()
    dropped = drop_from_page_cache(Path(spec["path"]))
    feeds = read_inputs(spec)
    reset = reset_peak()
    mark = marker(spec)
    load_ms, session = timed(lambda: open_session(spec), mark)
    first_ms, _ = timed(lambda: session.run(None, feeds), mark)
    before, start = sensors(), energy_uj()
    times = time_in_turns([session], [feeds], spec)[0]
    end, after = energy_uj(), sensors()
    peak, method = peak_mb(reset)
    return {
        **used(spec, session),
        "load_ms": load_ms,
        "page_cache_dropped": dropped,
        "first_run_ms": first_ms,
        "times_ms": times,
        "baseline_mb": baseline,
        "peak_memory_mb": max(peak - baseline, 0.0),
        "memory_method": method,
        "sensors": {"before": before, "after": after},
        "energy_uj": end - start if start is not None and end is not None and end > start else None,
    }


def under_load(spec: dict[str, Any]) -> dict[str, Any]:
    """Run without a pause: of each second, told as it ends, the runs, their median and p90, and the sensors then."""
    session, feeds = open_session(spec), read_inputs(spec)
    seconds: list[dict[str, Any]] = []
    start = time.perf_counter()
    while len(seconds) < spec["sustained"]:
        times: list[float] = []
        while not times or time.perf_counter() < start + len(seconds) + 1:
            times.append(timed(lambda: session.run(None, feeds))[0])
        median, p90 = np.percentile(times, [50, 90]).tolist()
        at = time.perf_counter() - start
        seconds.append({"at_s": at, "runs": len(times), "median_ms": median, "p90_ms": p90, **sensors()})
        print(json.dumps({"second": seconds[-1]}), flush=True)
    return {**used(spec, session), "seconds": seconds}


def runs_per_second(spec: dict[str, Any]) -> float:
    """Runs in a second, of one session, after the warm-up."""
    a_second = {**spec, "runs": None, "seconds": 1, "min_runs": 1, "max_runs": math.inf}
    (times,) = time_in_turns([open_session(spec)], [read_inputs(spec)], a_second)
    return 1e3 * len(times) / sum(times)


def written(spec: dict[str, Any]) -> dict[str, Any]:
    """A decoder's prompt and each token after it, timed; what its past takes; how fast so many threads read memory."""
    session, wish, start = open_session(spec), spec["writes"], read_inputs(spec)["input_ids"]
    puts, names = session.get_inputs(), [one.name for one in session.get_outputs()]
    sizes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    empty = {
        one.name: np.zeros([1, *(size if isinstance(size, int) else 0 for size in one.shape[1:])], sizes[one.type])
        for one in puts
        if one.name.startswith("past_key_values.")
    }
    prompts: list[float] = []
    steps: list[float] = []
    rates: list[float] = []
    for _ in range(wish["rounds"]):
        ids, past, seen = np.resize(start, (1, wish["prompt"])), empty, 0
        for step in range(wish["tokens"] + 1):
            end = seen + ids.shape[1]
            feeds = {"input_ids": ids, "attention_mask": np.ones((1, end), np.int64), **past}
            feeds["position_ids"] = np.arange(seen, end, dtype=np.int64)[None]
            took, found = timed(partial(session.run, None, {one.name: feeds[one.name] for one in puts}))
            named = dict(zip(names, found, strict=True))
            past = {name: named[name.replace("past_key_values.", "present.")] for name in past}
            ids, seen = named["logits"][:, -1:].argmax(-1).astype(np.int64), end
            (steps if step else prompts).append(took)
        rates += read_gb_s(spec["threads"])
    kept = sum(array.nbytes for array in past.values()) / 1e6
    median = float(np.median(rates))
    return {"prompts_ms": prompts, "steps_ms": steps, "past_mb": kept, "past_tokens": seen, "read_gb_s": median}


def read_gb_s(threads: int) -> list[float]:
    """The rates at which so many threads read memory, in 10^9 bytes a second: 5 passes over 256 MB."""
    parts = np.array_split(np.ones(2**26, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        return [2**28 / 1e6 / timed(lambda: list(pool.map(np.max, parts)))[0] for _ in range(5)]


def take_turns(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several models: one timed run of each in every round."""
    sessions = [open_session(spec) for spec in specs]
    feeds = [read_inputs(spec) for spec in specs]
    times = time_in_turns(sessions, feeds, specs[0])
    return [{**used(spec, session), "times_ms": own} for spec, session, own in zip(specs, sessions, times, strict=True)]


def time_in_turns(sessions: list[Any], feeds: list[Any], spec: dict[str, Any]) -> list[list[float]]:
    """Milliseconds of `session.run` alone, round after round; warm-up rounds are not in the list.

    Where models take turns, each turn starts with untimed runs for 5 ms, one at least: the model before it has
    filled the CPU's caches. Measured 2026-11 on an x86 server: a model of 4 MB after one of 207 MB took 0.38 ms in
    its first run, 0.28 ms in its second and 0.11 ms, its time when alone, after 2 ms of runs.
    """
    pairs, mark = list(zip(sessions, feeds, strict=True)), marker(spec)
    for _ in range(spec["warmup"]):
        for session, feed in pairs:
            session.run(None, feed)
    times: list[list[float]] = [[] for _ in pairs]
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    while not finished(len(times[0]), time.perf_counter() - start, spec):
        for own, (session, feed) in zip(times, pairs, strict=True):
            if len(pairs) > 1:
                refill_caches(session, feed)
            own.append(timed(partial(session.run, None, feed), mark)[0])
    gc.enable()
    return times


def refill_caches(session: Any, feed: Any) -> None:
    """Run untimed for 5 ms, once at least."""
    end = time.perf_counter() + 0.005
    session.run(None, feed)
    while time.perf_counter() < end:
        session.run(None, feed)


def finished(rounds: int, seconds: float, spec: dict[str, Any]) -> bool:
    """Whether the rounds are enough: exactly `runs`, or `seconds` within `min_runs` and `max_runs`."""
    if spec.get("runs") is not None:
        return rounds >= int(spec["runs"])
    return bool(rounds >= spec["max_runs"] or (rounds >= spec["min_runs"] and seconds >= spec["seconds"]))


def providers_here(spec: dict[str, Any]) -> list[str]:
    """The wanted providers that onnxruntime has here, or the CPU's where it has none of them."""
    present = ort.get_available_providers()
    return [name for name in spec.get("providers", [CPU]) if name in present] or [CPU]


def open_session(spec: dict[str, Any], entries: "dict[str, str] | None" = None, profile_prefix: str = "") -> Any:
    """A session with the threads and options of the request; `entries` are further session options."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = spec["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile_prefix:
        options.enable_profiling = True
        options.enable_mem_pattern = False  # so that it counts memory node by node
        options.profile_file_prefix = profile_prefix
        if spec.get("graph") and providers_here(spec) == [CPU]:  # what others compile cannot be written
            options.optimized_model_filepath = spec["graph"]
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    for key, value in {**spec.get("session_options", {}), **(entries or {})}.items():
        options.add_session_config_entry(key, str(value))
    given = spec.get("provider_options", {})
    choices = [(name, given.get(name, {})) for name in providers_here(spec)]
    return ort.InferenceSession(spec["path"], options, providers=choices, enable_fallback=0)


def used(spec: dict[str, Any], session: Any) -> dict[str, Any]:
    """The model's path, the providers of its session, and the wanted ones that it has not."""
    names = session.get_providers()
    missing = [name for name in spec.get("providers", [CPU]) if name not in names]
    return {"path": spec["path"], "providers": names, "missing_providers": missing}


def read_inputs(spec: dict[str, Any]) -> dict[str, Any]:
    """Arrays by input name, from raw little-endian files."""
    arrays = {}
    for name, entry in spec["inputs"].items():
        dtype = np.dtype(entry["dtype"])
        raw = np.fromfile(entry["file"], dtype=dtype.newbyteorder("<"))
        arrays[name] = raw.reshape(entry["shape"]).astype(dtype)
    return arrays


def timed(action: Any, mark: Any = int) -> tuple[float, Any]:
    """Milliseconds that a call took, and what it returned; marked at both ends."""
    mark(0)
    begin = time.perf_counter_ns()
    value = action()
    took = (time.perf_counter_ns() - begin) / 1e6
    mark(0)
    return took, value


def marker(spec: dict[str, Any]) -> Any:
    """A system call that fails and that an emulator sees, where the request asks for marks; else nothing."""
    return partial(ctypes.CDLL(None).getpriority, 0x5150) if spec.get("marks") else int


# Answers, for a judge elsewhere.


def answered(request: dict[str, Any]) -> dict[str, Any]:
    """Run each example alone and write its first output; `dtype` and `shape` of each."""
    demand(request, ("threads",))
    wanted = request["answer"]
    demand(wanted, ("path", "examples", "inputs", "outputs"), "the answer asked for")
    examples = [
        {name: array_of(entry, number) for name, entry in entries.items()}
        for number, entries in enumerate(wanted["examples"], start=1)
    ]
    if os.path.lexists(wanted["outputs"]):
        sys.exit(f"agent: {wanted['outputs']} is there already; outputs go into a new file")
    spec = {**request, **wanted}
    session = open_session(spec)
    names, outputs, end = [put.name for put in session.get_inputs()], [], math.inf
    if "seconds" in wanted:
        end = time.monotonic() + wanted["seconds"]
    with Path(wanted["inputs"]).open("rb") as given, Path(wanted["outputs"]).open("xb") as file:
        for number, entries in enumerate(examples, start=1):
            feeds = {name: read_next(given, *entry, number) for name, entry in entries.items()}
            demand(feeds, tuple(names), f"example {number}")
            output = session.run(None, {name: feeds[name] for name in names})[0]
            if not isinstance(output, np.ndarray) or output.dtype.kind not in "fiub":
                sys.exit("agent: the model's first output is no array of numbers")
            file.write(output.astype(output.dtype.newbyteorder("<")).tobytes())
            outputs.append({"dtype": output.dtype.name, "shape": output.shape})
            if time.monotonic() >= end:
                return {"answer": {**used(spec, session), "outputs": outputs}}
        if given.read(1):
            sys.exit(f"agent: {wanted['inputs']} holds more than its {len(outputs)} examples")
    return {"answer": {**used(spec, session), "outputs": outputs}}


def array_of(entry: dict[str, Any], number: int) -> "tuple[np.dtype[Any], list[int]]":
    """The type and the shape of an input, of numbers."""
    try:
        dtype, shape = np.dtype(entry["dtype"]), [int(size) for size in entry["shape"]]
    except (KeyError, TypeError, ValueError):
        sys.exit(f"agent: example {number} has an input without dtype and shape: {entry}")
    if dtype.kind not in "fiub" or min(shape, default=0) < 0:
        sys.exit(f"agent: example {number} has an input that is no array of numbers: {entry}")
    return dtype, shape


def read_next(file: Any, dtype: "np.dtype[Any]", shape: list[int], number: int) -> Any:
    """The next array of a raw little-endian file."""
    size = dtype.itemsize * math.prod(shape)
    raw = file.read(size)
    if len(raw) != size:
        sys.exit(f"agent: {file.name} ends within example {number}")
    return np.frombuffer(raw, dtype.newbyteorder("<")).reshape(shape).astype(dtype)


# Operators: their times come from a second session, since profiling slows a small model down.


def profile(spec: dict[str, Any]) -> dict[str, Any]:
    """Nodes by provider of a session that records them; its profile goes into the file that `operators` names."""
    feeds = read_inputs(spec)
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(spec, {"session.record_ep_graph_assignment_info": "1"}, str(Path(folder, "ort")))
        for _ in range(PROFILED_RUNS + 1):
            session.run(None, feeds)
        nodes = assigned_nodes(session)
        shutil.move(session.end_profiling(), spec["operators"])
    return {"provider_nodes": nodes}


def assigned_nodes(session: Any) -> "dict[str, int] | None":
    """Nodes by provider as the session assigned them, before fusion; None where onnxruntime cannot say."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts) or None


# The machine and its memory.


def machine() -> dict[str, Any]:
    """Its name in its network, system, architecture, CPU name and logical cores."""
    name, file = platform.processor(), Path("/proc/cpuinfo")
    if file.exists():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((x.partition(":")[2].strip() for x in lines if x.startswith(("model name", "Hardware"))), name)
    known = {"name": platform.node(), "system": platform.system(), "arch": platform.machine()}
    return known | {"cpu": name or "unknown", "cores": os.cpu_count()}


def keep_to(cores: list[int]) -> None:
    """Run on some cores only."""
    if not hasattr(os, "sched_setaffinity"):
        cannot("this system cannot keep a process to some cores; leave out 'cores'")
    try:
        os.sched_setaffinity(0, cores)
    except OSError:
        cannot(f"there are no cores {cores} here, only {sorted(os.sched_getaffinity(0))}")


def cannot(words: str) -> NoReturn:
    """End with exit code 2: this machine cannot do what was asked."""
    print(f"agent: {words}", file=sys.stderr)
    sys.exit(2)


def sensors() -> dict[str, Any]:
    """The hottest thermal zone in °C, and the governor of the first core's clock; None where Linux does not say."""
    zones = [read_number(path) for path in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    hot = [zone / 1000 for zone in zones if zone is not None and zone > 0]
    governor = read_text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"))
    return {"temperature_c": max(hot, default=None), "governor": governor}


def energy_uj() -> "float | None":
    """What the processor has used so far by its own counter (RAPL), in µJ; None where it cannot be read."""
    parts = [read_number(path) for path in sorted(Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj"))]
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def read_text(path: Path) -> "str | None":
    """A small file of the system; None where it is not there or not for us."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def read_number(path: Path) -> "float | None":
    """A number in such a file."""
    try:
        return float(read_text(path) or "")
    except ValueError:
        return None


def drop_from_page_cache(model: Path) -> bool:
    """Ask the system to forget the model's files, so that loading reads them again; False where it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in (file for file in model.parent.iterdir() if file.name.startswith(model.name)):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)  # pages not yet written stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return True


def status_mb(field: str) -> "float | None":
    """A memory field of /proc/self/status in MB; None where there is none."""
    lines = (read_text(Path("/proc/self/status")) or "").splitlines()
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field + ":")), None)


def reset_peak() -> bool:
    """Set the peak of resident memory back to the present (proc(5), clear_refs); False where that is forbidden."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def rss_mb() -> float:
    """Resident memory now in MB; the peak so far where the system does not say."""
    now = status_mb("VmRSS")
    return peak_mb(False)[0] if now is None else now


def peak_mb(reset: bool) -> tuple[float, str]:
    """Peak of resident memory in MB, and how it was read."""
    peak = status_mb("VmHWM")
    if peak is not None and reset:
        return peak, "VmHWM since the load"
    try:
        import resource
    except ImportError:
        return 0.0, "unavailable"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, "ru_maxrss since the start"


if __name__ == "__main__":
    main()
