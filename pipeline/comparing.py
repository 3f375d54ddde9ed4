"""What `potstill profile A B --compare` does: packages in turns on one device, and what was found is kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.pipeline.profiling import Wish, fresh_file
from potstill.targets.measurement import Comparison
from potstill.targets.profile import compare
from potstill.targets.request import read_package
from potstill.validate.files import write_json

FORMAT = "potstill-comparison/1"


@dataclass(frozen=True)
class Compared:
    """A comparison; `file` is where it is kept, beside the profiles of its first package."""

    comparison: Comparison
    file: Path


def compare_packages(packages: Sequence[Path], wish: Wish) -> Compared:
    """Packages in turns on one device, which is opened for the first one's target."""
    opened = [read_package(package) for package in packages]
    device = wish.device(opened[0])
    found = compare(
        opened, device=device, runs=wish.runs, threads=wish.threads, cores=wish.cores, timeout_s=wish.timeout_s
    )
    file = fresh_file(opened[0], "in-turns", found.device)
    hashes = {package.name: package.model_sha256 for package in opened}
    write_json(file, {"format": FORMAT, "model_sha256": hashes, "comparison": found.to_json()})
    return Compared(found, file)


def last_of_each(kept: Sequence[tuple[Path, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of comparisons of the same packages on the same device the last one; `kept` is in the order of time."""
    last = {}
    for file, found in kept:
        comparison = found["comparison"]
        of = tuple(sorted({one["package"] for one in comparison["packages"]}))
        last[file.parent, of, comparison["device"]] = comparison
    return list(last.values())
