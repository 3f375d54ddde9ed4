"""What was kept of profiles as one page: latency against accuracy against size, and where the time of a run goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from potstill.pipeline import pictures_devices
from potstill.pipeline.cache import MARKER
from potstill.pipeline.comparing import FORMAT as COMPARISON
from potstill.pipeline.comparing import last_of_each
from potstill.pipeline.profiling import FORMAT, PROFILES
from potstill.pipeline.report import environment, percent
from potstill.pipeline.tell_profile import UNKNOWN, drift_in_words
from potstill.validate.errors import InputError
from potstill.validate.files import read_json, write_text
from potstill.validate.units import counted


@dataclass(frozen=True)
class Row:
    """One kept profile, in words where a device does not say."""

    package: str
    device: str
    kind: str
    median: str
    p90: str
    noise: str
    memory: str
    size: str
    metric: str
    judged: str
    agreement: str
    budget: str


def write_device_report(places: Sequence[Path], out: Path) -> tuple[int, int]:
    """Write the page of all profiles and comparisons kept of some runs or packages; of each on a device, the last one.

    Where a profile looked neither at accuracy nor at load, and an earlier one of the same file did, that stands.

    Args:
        places: folders of runs or of packages, those that hold `profiles`, or files that `potstill profile` kept.
        out: the HTML file to write.

    Returns:
        How many profiles and comparisons are on it.

    Raises:
        InputError: none is kept there, or a file is no profile.
    """
    files = {file for place in places for file in kept_at(place)}
    kept = [(file, _read(file)) for file in sorted(files, key=lambda one: one.stem.rpartition("-")[2])]
    turns = last_of_each([one for one in kept if one[1]["format"] == COMPARISON])
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file, found in kept:
        if found["format"] == COMPARISON:
            continue
        found["made_by"] = _made_by(file, found)
        before = last.get(of := (file.parent, found["package"], found["measurement"]["device"]))
        if before and before["model_sha256"] == found["model_sha256"]:
            found |= {name: before[name] for name in ("accuracy", "sustained") if found[name] is None}
        last[of] = found
    profiles = list(last.values())
    if not profiles and not turns:
        raise InputError(
            f"no profiles are kept at {', '.join(map(str, places))}; make one with potstill profile PACKAGE"
        )
    scatter = pictures_devices.scatter(profiles, "devices", 1036)
    write_text(
        out,
        environment()
        .get_template("devices.html")
        .render(
            title=", ".join(dict.fromkeys(place.resolve().name for place in places)),
            headline=_headline(profiles),
            scatter=Markup(scatter) if scatter else None,
            rows=[_row(one) for one in profiles],
            turns=[_turns(one, i) for i, one in enumerate(turns)],
            modules=[_modules(one, i) for i, one in enumerate(profiles) if one["measurement"].get("modules")],
            layers=[_layers(one, i) for i, one in enumerate(profiles) if one["measurement"]["nodes"]],
            sustained=[
                _sustained(one, i) for i, one in enumerate(series for one in profiles for series in _loads(one))
            ],
        ),
    )
    return len(profiles), len(turns)


def kept_at(place: Path) -> list[Path]:
    """What was kept at a run's folder, or another that holds `profiles`; of a package; or one file itself."""
    if place.is_file():
        return [place]
    if (place / PROFILES).is_dir():
        return sorted((place / PROFILES).glob("*.json"))
    run = place.resolve().parent.parent
    folder = (run if (run / MARKER).is_file() else place.resolve().parent) / PROFILES
    return [file for file in sorted(folder.glob("*.json")) if place.resolve().name in _packages(_read(file))]


def _packages(kept: dict[str, Any]) -> list[str]:
    """The packages that a profile or a comparison is of."""
    return [*kept["model_sha256"]] if kept["format"] == COMPARISON else [kept["package"]]


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(file)
        if found["format"] in (FORMAT, COMPARISON):
            return found
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise InputError(f"{file} is no profile that potstill kept; expected format {FORMAT!r} or {COMPARISON!r}")


def _made_by(file: Path, profile: dict[str, Any]) -> dict[str, Any] | None:
    """The scorecard that the package was made with, where the package is still there."""
    for packages in (file.parent.parent / "packages", file.parent.parent):
        manifest = packages / profile["package"] / "manifest.json"
        if manifest.is_file():
            card: dict[str, Any] | None = read_json(manifest).get("scorecard")
            return card
    return None


def _headline(profiles: Sequence[dict[str, Any]]) -> str:
    devices = {one["measurement"]["device"] for one in profiles}
    packages = {one["package"] for one in profiles}
    if not profiles:
        return "Packages in turns."
    return f"{counted(len(packages), 'package')} on {counted(len(devices), 'device')}."


def _row(profile: dict[str, Any]) -> Row:
    measurement, there = profile["measurement"], profile["accuracy"]
    card = there["scorecard"] if there else profile["made_by"]
    memory, noise = measurement["peak_memory_mb"], measurement["noise"]
    timed = measurement["kind"] == "measured"
    return Row(
        package=profile["package"],
        device=f"{measurement['device']} ({measurement['where']['cpu']})",
        kind=measurement["kind"],
        median=f"{measurement['median_ms']:.3f} ms" if timed else "–",
        p90=f"{measurement['p90_ms']:.3f} ms" if timed else "–",
        noise=f"± {noise:.1%}" if timed and noise is not None else UNKNOWN,
        memory=UNKNOWN if memory is None else f"{memory:.1f} MB",
        size=f"{measurement['file_mb']:.2f} MB",
        metric=f"{card['metric']} {percent(card['value'])}" if card else UNKNOWN,
        judged="there" if there else "where it was made",
        agreement=percent(card["agreement"]) if card and card["agreement"] is not None else UNKNOWN,
        budget=profile["budget"]["outcome"] if profile["budget"] else "none",
    )


def _modules(profile: dict[str, Any], number: int) -> tuple[str, Markup]:
    name = f"{profile['package']} on {profile['measurement']['device']}"
    return name, Markup(pictures_devices.modules(profile, f"modules-{number}", 1036))


def _layers(profile: dict[str, Any], number: int) -> tuple[str, Markup, str]:
    measurement = profile["measurement"]
    name = f"{profile['package']} on {measurement['device']}"
    words = (
        f"{counted(len(measurement['nodes']), 'node')} after fusion, in the order of a run, of a profiled session; "
        f"{measurement['unattributed_share']:.1%} of the time lies between nodes"
    )
    return name, Markup(pictures_devices.nodes(profile, f"nodes-{number}", 1036)), words


def _loads(profile: dict[str, Any]) -> list[dict[str, Any]]:
    """The series under load, those that broke off first."""
    whole = profile["sustained"]
    return [*profile.get("broken_off", []), *([whole] if whole else [])]


def _turns(comparison: dict[str, Any], number: int) -> tuple[str, Markup, str]:
    first = comparison["packages"][0]["package"]
    words = (
        f"{comparison['kind']} on {comparison['device']} ({comparison['where']['cpu']}): {comparison['runs']} rounds, "
        f"{counted(comparison['threads'], 'thread')}; time over that of {first}, median of the rounds with its 95 % "
        "interval; above 1 is slower"
    )
    return comparison["device"], Markup(pictures_devices.in_turns(comparison, f"turns-{number}", 1036)), words


def _sustained(series: dict[str, Any], number: int) -> tuple[str, Markup, str]:
    words = f"median of each second; {drift_in_words(series['drift'], series['throttles_at_s'])}"
    if why := series.get("broken_off"):
        words = f"broken off after {series['seconds'][-1]['at_s']:.0f} s: {why}; {words}"
    name = f"{series['package']} on {series['device']}"
    return name, Markup(pictures_devices.under_load(series, f"load-{number}", 1036)), words
