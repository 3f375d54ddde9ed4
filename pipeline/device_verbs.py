"""The verbs of the command line that reach devices. Heavy packages are imported inside."""

from pathlib import Path
from typing import Annotated

import typer

from potstill.pipeline.options import JsonOption, print_json
from potstill.targets.device import FORMS
from potstill.validate.errors import InputError


def profile(
    packages: Annotated[list[Path], typer.Argument(help="Folder of a package; several with --compare.")],
    on: Annotated[
        str,
        typer.Option(
            "--on",
            help=f"The device: {FORMS}.",
        ),
    ] = "local",
    python: Annotated[str | None, typer.Option("--python", help="The interpreter there: ~/venv/bin/python.")] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Let a phone's own browser come: prints an address and a QR code.")
    ] = False,
    runs: Annotated[
        int | None, typer.Option("--runs", help="Timed runs; default: as many as fill 3 seconds; emulated: 5.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads; default: the target's, else 1.")] = None,
    cores: Annotated[str | None, typer.Option("--cores", help="Cores to keep to: 0,1.")] = None,
    throughput: Annotated[
        str | None, typer.Option("--throughput", help="Runs a second with these numbers of threads: 1,2,4.")
    ] = None,
    sustained: Annotated[
        str | None, typer.Option("--sustained", help="Latency over this time under load, 20s at least: 120s.")
    ] = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="Judge the run's evaluation set by the device's own answers.")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Time the packages in turns, A B A B.")] = False,
    timeout: Annotated[
        str,
        typer.Option(
            "--timeout",
            help="The longest that a request may take: the measurement, 64 examples of --accuracy, what --sustained "
            "takes beside its own time: 30min.",
        ),
    ] = "15min",
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            help="What it may cost, once for each: latency_p90=20ms (or _min, _median, _p99), first_run, load, "
            "peak_memory=150MB, size.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a package on a device and say what it costs there."""
    from rich.console import Console

    from potstill.pipeline.comparing import compare_packages
    from potstill.pipeline.limits import seconds
    from potstill.pipeline.profiling import Wish, profile_package
    from potstill.pipeline.tell_profile import print_comparison, print_profiled

    wish = Wish(
        where=on,
        runs=runs,
        threads=threads,
        cores=_numbers("--cores", cores),
        throughput=_numbers("--throughput", throughput),
        sustained_s=seconds(sustained) if sustained else None,
        accuracy=accuracy,
        budget=tuple(budget or ()),
        python=python,
        serve=serve,
        timeout_s=seconds(timeout),
    )
    if wish.timeout_s == 0:
        raise InputError(f"--timeout is {timeout!r}, and no device answers in that; give a time like 30min")
    if compare:
        if sustained or accuracy or budget or throughput:
            raise InputError("--compare only takes times in turns; profile each package alone for the rest")
        found = compare_packages(packages, wish)
        print_json(found.comparison.to_json()) if as_json else print_comparison(found)
        return
    if len(packages) > 1:
        raise InputError(f"{len(packages)} packages given; give one, or --compare to time them in turns")
    profiled = profile_package(packages[0], wish, Console(stderr=as_json))
    print_json(profiled.to_json()) if as_json else print_profiled(profiled)
    if failure := profiled.failed():
        raise failure


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    """`1,2,4`."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"{option} is {text!r}, expected numbers with commas, like 0,1") from None


def report(
    places: Annotated[list[Path], typer.Argument(help="Folders of runs or packages, or profiles that were kept.")],
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")] = Path("profiles.html"),
) -> None:
    """Draw what was kept: latency against accuracy against size, packages in turns, and where the time goes."""
    from potstill.pipeline.device_report import write_device_report
    from potstill.validate.units import counted

    profiles, turns = write_device_report(places, out)
    also = f" and {counted(turns, 'comparison')}" if turns else ""
    typer.echo(f"{counted(profiles, 'profile')}{also} on one page: {out}")


devices = typer.Typer(help="Look after devices that run packages.", no_args_is_help=True)


@devices.callback()
def _of_devices() -> None:
    """Look after devices that run packages."""


@devices.command()
def clean(
    on: Annotated[str, typer.Option("--on", help="The device: ssh://user@host:port, adb or adb://serial.")],
) -> None:
    """Remove what earlier runs left on a device."""
    from potstill.targets.devices import clean as remove

    typer.echo(f"{remove(on) / 1e6:.1f} MB removed from {on}")
