"""What `potstill profile` prints: each figure with its unit, how it was taken, and of what kind it is."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from potstill.pipeline.comparing import Compared
from potstill.pipeline.going_on import readable
from potstill.pipeline.profiling import Profiled
from potstill.pipeline.tell import console, plain_table
from potstill.targets.measurement import Measurement
from potstill.targets.modules import folded
from potstill.targets.sustained import LEAST_S, START_S, Sustained
from potstill.validate.scorecard import Scorecard
from potstill.validate.units import counted, signed
from potstill.validate.verdict import Verdict

MOST_MODULES = 32  # lines; more are told by the modules that hold them
UNKNOWN = "not available"
STYLE = {"pass": "green", "fail": "bold red", "undecided": "yellow"}


def print_profiled(found: Profiled) -> None:
    """All that was found of a package on a device."""
    print_measurement(found.measurement)
    for series in (*found.broken_off, *([found.sustained] if found.sustained else [])):
        console.print(under_load_in_words(series), highlight=False, markup=False)
    if found.there:
        card = found.there.judged.scorecard
        same = _same(card, " as the teacher's")
        console.print(
            f"{card.metric} {card.value:.2%} there on {counted(card.examples, 'example')}{same}", highlight=False
        )
        if step := found.there.judged.step:
            points = f"{signed(step.difference * 100)} points"
            console.print(f"beside the same file on this machine: {card.metric} {points}{_same(step)}", highlight=False)
        print_verdict("gate", found.there.verdict)
    print_verdict("budget", found.budget)
    console.print(f"kept: {found.file}", highlight=False, soft_wrap=True, markup=False)


def _same(card: Scorecard, whose: str = "") -> str:
    return "" if card.agreement is None else f", {card.agreement:.2%} of the answers the same{whose}"


def print_verdict(of: str, verdict: Verdict | None) -> None:
    """One line for each limit."""
    for check in verdict.checks if verdict else []:
        style = STYLE["pass" if check.passed else check.outcome]
        console.print(f"[{style}]{of}: {check.outcome}[/]  {escape(check.reason)}", highlight=False)


def print_measurement(measurement: Measurement) -> None:
    """What a package costs."""
    where = measurement.where
    shapes = ", ".join(f"{name} {shape}" for name, shape in measurement.inputs.items() if "×0" not in shape)
    empty = sum("×0" in shape for shape in measurement.inputs.values())
    shapes += f" and {empty} that are empty" if empty else ""
    table = plain_table(
        escape(
            f"{measurement.package}, {measurement.kind} on {measurement.device}: {where.cpu} ({where.system}, "
            f"{counted(where.cores, 'core')})"
        ),
        f"{counted(measurement.runs, 'run')} after {measurement.warmup} to warm up, "
        f"{counted(measurement.threads, 'thread')}, input {escape(shapes)}",
        show_header=False,
    )
    for name, value, note in (
        *_instructions(measurement),
        *_times(measurement),
        *_writing(measurement),
        *_costs(measurement),
    ):
        table.add_row(name, value, f"[dim]{escape(note)}[/]")
    console.print(table)
    for provider in measurement.missing_providers:
        console.print(f"[bold yellow]{provider} is not here[/]: the target wants it, and the CPU ran instead")
    for note in measurement.notes:
        console.print(note, highlight=False, markup=False)
    print_operators(measurement)


def _instructions(measurement: Measurement) -> list[tuple[str, str, str]]:
    if measurement.kind != "emulated":
        return []
    found = measurement.instructions
    if found is None:
        return [("instructions", UNKNOWN, "")]
    return [
        ("instructions", f"{found.median / 1e6:,.2f} million", f"median of the runs; their range {found.spread:.2%}"),
        ("of the first run", f"{found.first_run / 1e6:,.2f} million", "before the warm-up"),
        ("of the load", f"{found.load / 1e6:,.2f} million", ""),
    ]


def _times(measurement: Measurement) -> list[tuple[str, str, str]]:
    if measurement.kind == "emulated":
        return [("median of a run", f"{measurement.median_ms:.0f} ms", "the emulator's own, no latency")]
    noise = UNKNOWN if measurement.noise is None else f"± {measurement.noise:.1%}"
    cold = "from disk" if measurement.page_cache_dropped else "the file may have been in the page cache"
    return [
        ("median", f"{measurement.median_ms:.3f} ms", f"noise {noise}: half the range of ten consecutive tenths"),
        ("min", f"{measurement.min_ms:.3f} ms", ""),
        ("p90", f"{measurement.p90_ms:.3f} ms", "noisy where other programs run"),
        ("p99", f"{measurement.p99_ms:.3f} ms", "the same"),
        ("first run", f"{measurement.first_run_ms:.1f} ms", "before the warm-up"),
        ("cold load", f"{measurement.load_ms:.1f} ms", cold),
    ]


def _writing(measurement: Measurement) -> list[tuple[str, str, str]]:
    """What a language model costs where it writes."""
    found = measurement.written
    if found is None:
        return []
    share = UNKNOWN if found.of_bandwidth is None else f"{found.of_bandwidth:.0%} of {found.read_gb_s:.1f} GB/s"
    return [
        ("first token", f"{found.first_token_ms:.1f} ms", f"of a prompt of {counted(found.prompt, 'token')}"),
        ("prompt", f"{found.prompt_tokens_per_s:,.0f} tokens/s", f"median of {counted(found.rounds, 'round')}"),
        ("decode", f"{found.decode_tokens_per_s:,.1f} tokens/s", f"median over {found.tokens} tokens, one by one"),
        ("of the bandwidth", share, "constants read a token, by what as many threads read here; above 100 %: caches"),
        ("context", f"{found.past_mb_per_1k:.2f} MB", "keys and values of 1,000 tokens"),
    ]


def _costs(measurement: Measurement) -> list[tuple[str, str, str]]:
    def mb(value: float | None) -> str:
        return UNKNOWN if value is None else f"{value:.1f} MB"

    after = measurement.sensors.get("after", {})
    hot, energy = after.get("temperature_c"), measurement.energy_mj
    nodes = ", ".join(f"{provider}: {count}" for provider, count in measurement.provider_nodes.items())
    rates = ", ".join(f"{threads}: {rate:.0f}" for threads, rate in measurement.throughput.items())
    rows = [
        (
            "peak memory",
            mb(measurement.peak_memory_mb),
            f"over the {measurement.baseline_mb:.0f} MB of the imports ({measurement.memory_method})"
            if measurement.peak_memory_mb is not None
            else "",
        ),
        ("weights", mb(measurement.weights_mb), "constants of the file"),
        ("activations", mb(measurement.activations_mb), "what a run adds to ONNX Runtime's allocator at most"),
        ("model file", f"{measurement.file_mb:.2f} MB", ""),
        ("energy of a run", UNKNOWN if energy is None else f"{energy:.2f} mJ", "the whole processor's"),
        ("temperature", UNKNOWN if hot is None else f"{hot:.0f} °C", "hottest zone, after the runs"),
        ("nodes by provider", nodes or UNKNOWN, "before fusion; on a phone and in a browser, after it"),
    ]
    if "battery_percent" in after:
        rows.append(_battery(after))
    return rows + ([("runs a second", rates, "by number of threads")] if rates else [])


def _battery(after: Mapping[str, Any]) -> tuple[str, str, str]:
    """A phone's battery after the runs, and the state of its throttling in Android's word."""
    charge, hot, state = (after[key] for key in ("battery_percent", "battery_temperature_c", "thermal_status"))
    said = [f"{charge} %" if charge is not None else "", f"{hot:.1f} °C" if hot is not None else ""]
    return "battery", ", ".join(filter(None, said)) or UNKNOWN, f"thermal state: {state or UNKNOWN}"


def print_operators(measurement: Measurement) -> None:
    """Where the time of a run goes, by operator."""
    if not measurement.operators:
        console.print(f"time by operator: {UNKNOWN} on {measurement.device}", highlight=False)
        return
    operators = plain_table("Time by operator, of a profiled session")
    for heading in ("operator", "nodes", "share", "provider"):
        operators.add_column(heading, justify="right" if heading in ("nodes", "share") else "left")
    for one in measurement.operators[:12]:
        operators.add_row(one.operator, str(one.count), f"{one.share:.1%}", one.provider)
    if measurement.unattributed_share is not None:
        operators.add_row("[dim]between operators[/]", "", f"{measurement.unattributed_share:.1%}", "")
    console.print(operators)
    print_modules(measurement)


def print_modules(measurement: Measurement) -> None:
    """Where the time of a run goes, by the model's own modules."""
    if not measurement.modules:
        console.print(f"time by module: {UNKNOWN}; the package has no modules.json: export it again", highlight=False)
        return
    modules = plain_table("Time by module, of the same session")
    modules.add_column("module")
    for heading in ("nodes", "share"):
        modules.add_column(heading, justify="right")
    for one in folded(measurement.modules, MOST_MODULES):
        name = one.in_words()
        modules.add_row(escape(name) if one.module else f"[dim]{name}[/]", str(one.nodes), f"{one.share:.1%}")
    modules.add_row("[dim]between nodes[/]", "", f"{measurement.unattributed_share or 0:.1%}")
    console.print(modules)


def under_load_in_words(found: Sustained) -> str:
    """Latency under load: the start, the drift, and where throttling begins."""
    end, hot = found.seconds[-1].at_s, found.seconds[-1].temperature_c
    length = (
        f"broken off after {end:.0f} s, from {readable(found.began)} on" if found.broken_off else f"for {end:.0f} s"
    )
    first = counted(len(found.seconds), "second") if len(found.seconds) < START_S else "ten seconds"
    return (
        f"under load {length}: {found.start_ms:.3f} ms in the first {first}, "
        f"{drift_in_words(found.drift, found.throttles_at_s)}; temperature at the end "
        f"{UNKNOWN if hot is None else f'{hot:.0f} °C'} ({found.kind})"
    )


def drift_in_words(drift: float | None, throttles_at_s: float | None) -> str:
    """How much slower the end is than the start, and where throttling begins."""
    if drift is None:
        return f"too short to tell drift and throttling, for which {LEAST_S} s are needed"
    when = "no throttling" if throttles_at_s is None else f"throttles from {throttles_at_s:.0f} s on"
    return f"{drift:+.1%} in the last ten seconds against the first ten; {when}"


def print_comparison(compared: Compared) -> None:
    """Packages timed in turns."""
    found = compared.comparison
    table = plain_table(
        f"{found.kind} in turns on {found.device}: {found.where.cpu}",
        f"{counted(found.runs, 'round')} after {found.warmup} to warm up, {counted(found.threads, 'thread')}; "
        "ratio to the first, "
        "median of the rounds with its 95 % interval; above 1 is slower",
    )
    for heading in ("package", "median", "ratio", "interval"):
        table.add_column(heading, justify="left" if heading == "package" else "right")
    for one in found.packages:
        interval = UNKNOWN if one.ratio_low is None else f"{one.ratio_low:.3f} to {one.ratio_high:.3f}"
        table.add_row(one.package, f"{one.median_ms:.3f} ms", f"{one.ratio:.3f}", interval)
    console.print(table)
    for note in found.notes:
        console.print(note, highlight=False, markup=False)
    for one in found.packages:
        if one.missing_providers:
            console.print(f"[bold yellow]{one.package}: {', '.join(one.missing_providers)} not here[/]")
    console.print(f"kept: {compared.file}", highlight=False, soft_wrap=True, markup=False)
