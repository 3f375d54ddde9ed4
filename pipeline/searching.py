"""The search for nodes to leave in float, in a run: when it is asked for, and what its models are known by."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from potstill.export.package import MANIFEST, Package
from potstill.export.search import helps, searchable
from potstill.export.search_files import Limits
from potstill.export.search_record import Search
from potstill.pipeline.cache import WORK, Cache
from potstill.pipeline.judging import Subject
from potstill.pipeline.material import Material
from potstill.targets.target import DECODER, Scheme, Target
from potstill.validate.files import read_json, sha256_json
from potstill.validate.shift import SHIFTED
from potstill.validate.verdict import Verdict


def limits(material: Material, cache: Cache, key: str) -> Limits | None:
    """How the search of a package with this key may go; None where there is no gate or no time for one."""
    recipe = material.recipe
    if recipe.gate is None or not recipe.search.seconds:
        return None
    shifted = material.elsewhere[SHIFTED].digest if SHIFTED in material.elsewhere else None
    asked = sha256_json([recipe.gate.model_dump(), material.eval.digest, recipe.data.slices, shifted])
    return Limits(recipe.search.seconds, cache.folder / f"{WORK}search-{key[:10]}", asked)


def not_searched(
    package: Package,
    here: Verdict | None,
    there: Verdict | None,
    limits: Limits | None,
    scheme: Scheme,
    trained: bool,
    calibrated: bool,
) -> str | None:
    """Why nothing was searched though a gate was missed, in one sentence; None where it was, or would not help.

    Args:
        package: as it is.
        here: the gate's verdict on it on this machine.
        there: the same with what the target's own arithmetic misses.
        limits: on a search.
        scheme: the target's for this graph.
        trained: whether it keeps integers from training.
        calibrated: whether there are examples that a search can measure on.
    """
    if package.search or not helps(there):
        return None
    reasons = {
        "more bits do not help what it misses on this machine, where a search judges": not helps(here),
        "it keeps the integers that it was trained in": trained,
        f"{scheme.method} has no integers that nodes could be left out of": not searchable(scheme),
        "no examples are left to measure on that do not judge; give others to --calibrate": not calibrated,
        "it has no time; give --search-time (search.time)": limits is None,
        "the gate was held when this package was made; remove its folder and run again": True,
    }
    why = next(reason for reason, holds in reasons.items() if holds)
    return f"The gate is missed and nothing was searched for: {why}."


def most_seconds(material: Material, cache: Cache, folder: Path, key: str, target: Target) -> float:
    """How long the search of a package may take if it misses the gate; 0 where there is none, or it is done.

    Args:
        material: of the run.
        cache: of the run.
        folder: of the package.
        key: of what it is made of.
        target: that it is for.
    """
    found, asked = limits(material, cache, key), target.quantize
    writes = material.task.gives == "tokens"
    schemes = (asked.decoder or DECODER,) if writes else (asked.convolution, asked.matmul)
    some = any(map(searchable, schemes))
    wanted = found and some and material.measured and to_be_made(folder, key, found, lambda: True)
    return found.seconds if found and wanted else 0.0


def manifest_of(folder: Path, key: str) -> dict[str, Any] | None:
    """The manifest of a package that is there with this key."""
    found: dict[str, Any] | None = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    return found if found and found.get("key") == key else None


def to_be_made(folder: Path, key: str, limits: Limits | None, missed: Callable[[], bool]) -> bool:
    """Whether a package is not there, or its search was for another gate, or this gate asks for the first one.

    A search that was out of time goes on where there is more of it now.

    Args:
        folder: of the package.
        key: of what it is made of.
        limits: on a search, with what it is asked by.
        missed: whether the package as it is misses what a search may help.
    """
    manifest = manifest_of(folder, key)
    if manifest is None:
        return True
    search: dict[str, Any] = manifest.get("search") or {}
    if manifest.get("asked") == (limits.asked if limits else None):
        late = search.get("ended") == "out of time"
        return late and limits is not None and limits.seconds > search["seconds"]
    return bool(search) or (limits is not None and missed())


def key_with(key: str, left: Sequence[str]) -> str:
    """What a package's predictions and measurements are kept under, by what a search repaired and left in float."""
    return sha256_json([key, sorted(left)]) if left else key


def key_of(folder: Path, key: str, known: str) -> str:
    """`key_with` of what a package that is there with this key is known by; `known` itself where there is none."""
    search = (manifest_of(folder, key) or {}).get("search")
    return key_with(known, _found(TypeAdapter(Search).validate_python(search))) if search else known


def known_by(subject: Subject, package: Package) -> Subject:
    """A package as a subject, by what a search repaired and left in float in it."""
    return replace(subject, key=key_with(subject.key, _found(package.search) if package.search else ()))


def _found(search: Search) -> list[str]:
    """What a search repaired, the format of what it kept out of the integers where that is not float, and its names."""
    return [*search.repairs, *([search.more_bits] if search.more_bits else []), *search.keep_float]
