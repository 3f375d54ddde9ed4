"""`potstill check`: a package held against a target without the device."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter
from rich.markup import escape

from potstill.pipeline.options import print_json
from potstill.pipeline.tell import console, plain_table
from potstill.targets.coverage import Coverage
from potstill.targets.fallback import LIMIT
from potstill.targets.request import read_package
from potstill.targets.static_check import StaticCheck, static_check
from potstill.targets.target import load_target
from potstill.validate.errors import GateFailed, InputError
from potstill.validate.units import PARSERS

STYLE = {"holds": "green", "broken": "bold red", "not checked": "yellow"}


def check_package(folder: Path, name: str | None, max_fallback: str | None, as_json: bool) -> None:
    """Print what is known of a package on a target, by default its own.

    Raises:
        GateFailed: the target does not take it, or a limit on what leaves its first provider is not held.
        InputError: there is no such package or target, or the limit is none.
    """
    limit = None
    if max_fallback is not None:
        try:
            limit = PARSERS[LIMIT](max_fallback)
        except InputError as error:
            raise InputError(f"--max-fallback: {error}") from None
    package = read_package(folder)
    target = load_target(name) if name else package.target
    found = static_check(package, target, limit)
    if as_json:
        print_json(_plain(folder, found))
    else:
        _print(folder, found)
    if found.broken:
        told = "; ".join(f"{one.what}: {one.told}" for one in found.broken)
        raise GateFailed(f"{folder} is not for {found.target} as it is: {told}")


def _plain(folder: Path, found: StaticCheck) -> dict[str, object]:
    coverage = TypeAdapter(Coverage).dump_python(found.coverage, mode="json") if found.coverage else None
    return {
        "package": str(folder),
        "target": found.target,
        "kind": found.kind,
        "findings": [asdict(one) for one in found.findings],
        "coverage": coverage,
    }


def _print(folder: Path, found: StaticCheck) -> None:
    shown = plain_table(f"{folder} on {found.target}, {found.kind}: no device was asked", show_header=False)
    for one in found.findings:
        shown.add_row(one.what, f"[{STYLE[one.outcome]}]{one.outcome}[/]", escape(one.told))
    console.print(shown)
    left = Counter((one.operator, one.reason) for one in found.coverage.left) if found.coverage else Counter()
    for (operator, reason), count in left.most_common():
        console.print(f"leaves: {count} {operator}: {reason}", highlight=False, markup=False)
