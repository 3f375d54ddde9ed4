"""The search for nodes to leave in float, in a run: when it is asked for, and what its models are known by."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from potstill.export.package import MANIFEST, Package
from potstill.export.search import helps
from potstill.export.search_record import Search
from potstill.export.search_sets import Limits
from potstill.pipeline.cache import WORK, Cache
from potstill.pipeline.judging import Subject
from potstill.pipeline.material import Material
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


def manifest_of(folder: Path, key: str) -> dict[str, Any] | None:
    """The manifest of a package that is there with this key."""
    found: dict[str, Any] | None = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    return found if found and found.get("key") == key else None


def to_be_made(folder: Path, key: str, limits: Limits | None, verdict: Callable[[], Verdict | None]) -> bool:
    """Whether a package is not there, or its search was for another gate, or this gate asks for the first one.

    A search that was out of time goes on where there is more of it now.

    Args:
        folder: of the package.
        key: of what it is made of.
        limits: on a search, with what it is asked by.
        verdict: of the gate on the package as it is.
    """
    manifest = manifest_of(folder, key)
    if manifest is None:
        return True
    search: dict[str, Any] = manifest.get("search") or {}
    if manifest.get("asked") == (limits.asked if limits else None):
        late = search.get("ended") == "out of time"
        return late and limits is not None and limits.seconds > search["seconds"]
    return bool(search) or (limits is not None and helps(verdict()))


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
