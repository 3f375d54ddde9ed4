"""What a recipe makes its model of, and the verdict on it. It needs no torch, and loads no model."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from potstill.pipeline.lineage.licences import OWN_SERVER, Service, licence_named, service_at, service_named, table
from potstill.pipeline.lineage.reading import Read, private, read_checkpoint, read_data, written_by
from potstill.pipeline.lineage.said import LicencesSpec
from potstill.pipeline.lineage.terms import RECORDED, Origin, Verdict, verdict_on
from potstill.validate.checkpoint import RECORD
from potstill.validate.errors import InputError
from potstill.validate.files import read_json

if TYPE_CHECKING:
    from potstill.pipeline.recipe import Recipe

PRIVATE = "a server of one's own"  # whose address is nobody's business
DATA = ("train", "unlabelled", "prompts")
Use = Literal["teaches", "weights", "data", "judges"]


def verdict_of_recipe(recipe: "Recipe") -> Verdict:
    """The verdict on what a recipe makes.

    Raises:
        InputError: a source says two things of its licence, or what the recipe says does not fit it.
    """
    said, trained = recipe.licences, bool(recipe.stages)
    own = recipe.student.checkpoint if recipe.student else None
    origins = list[Origin]()
    if len(said.other_teachers) not in (0, len(recipe.other_teachers)):
        raise InputError(
            f"licences.other_teachers: {len(said.other_teachers)} given for {len(recipe.other_teachers)} other teachers"
        )
    if recipe.teacher.api:
        origins += of_service(recipe.teacher.api.host, recipe.teacher.api.model, said)
    else:
        uses = _uses(trained, bool(own))
        read = _read(said, "teacher", recipe.teacher.checkpoint, recipe.teacher.weights)
        origins.append(Origin("teacher", short(recipe.teacher.checkpoint), uses, read))
        origins += earlier(recipe.teacher.checkpoint) if uses != ("judges",) else []
    for index, other in enumerate(recipe.other_teachers if trained else ()):
        read = _read(said, "other_teachers", other.checkpoint, other.weights, index)
        origins += [Origin("other teacher", short(other.checkpoint), ("teaches",), read), *earlier(other.checkpoint)]
    if own and recipe.student:
        read = _read(said, "student", own, recipe.student.weights)
        origins += [Origin("student", short(own), ("weights",), read), *earlier(own)]
    for role in DATA if trained else ():
        source = getattr(recipe.data, role)
        if source and not (role == "train" and recipe.teacher.api):  # the service's own words
            origins += of_data(role, source, said)
    return verdict_on(origins, said, recipe.task)


def earlier(source: str) -> list[Origin]:
    """What a model that Potstill made was made of, by its record: its licences go on to what is made of it.

    Only those that ask for something, or are not known; none for a model of other make.
    """
    folder, found = Path(source).expanduser(), list[Origin]()
    files = [(folder / RECORD, ("licences",)), (folder / "manifest.json", ("lineage", "licences"))]
    for path, keys in files:
        try:
            said = read_json(path)
            for key in keys:
                said = said[key]
            findings = [(str(one["role"]), str(one["name"]), one["licence"]) for one in said["findings"]]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # there is none, or it is from before licences were recorded
        for role, name, licence in findings:
            if role != "made":
                found += _asks(f"{role} of {folder.name}", name, licence)
    return found


def _asks(role: str, name: str, licence: str | None) -> list[Origin]:
    """A source of an earlier model, where it asks for something."""
    first = role.partition(" ")[0]
    if first == "api":
        service = next((one for one in table().services if one.id == licence), None)
        return [] if service and service.outputs == "free" else [Origin(role, name, ("teaches",), None, service)]
    entry = next((one for one in table().licences if one.id == licence), None)
    asks = entry is None or entry.prefix or entry.credit or entry.credited
    if not asks and entry and (entry.outputs, entry.commercial) == ("free", "free"):
        return []
    why = None if entry else "it was not known when that was made"
    return [Origin(role, name, ("data",) if first in DATA else ("teaches",), Read(entry, licence, RECORDED, why))]


def _uses(trained: bool, own_student: bool) -> tuple[Use, ...]:
    """What becomes of a teacher: a student without a checkpoint of its own is cut from it."""
    if own_student:
        return ("teaches",) if trained else ("judges",)
    return ("teaches", "weights") if trained else ("weights",)


def of_service(host: str, model: str, said: LicencesSpec) -> list[Origin]:
    """A service that writes what is learned, and the model behind it where its licence is said or must be."""
    service: Service | None = service_named(said.api, "licences.api") if said.api else service_at(host)
    if service is None and private(host):
        service = service_named(OWN_SERVER, host)
    found = [Origin("api", PRIVATE if private(host) else host, ("teaches",), None, service)]
    if said.teacher or (service and service.id == OWN_SERVER):
        read = _said("teacher", said) or Read(
            None, None, "the recipe", "which licence the served model has is not said"
        )
        found.append(Origin("teacher", model, ("teaches",), read))
    return found


def of_data(role: str, source: str, said: LicencesSpec) -> list[Origin]:
    """Examples that are learned from; those that a service wrote are under its terms, too."""
    written, given = written_by(source), _said(role, said)
    found = of_service(*written, said) if written else []
    if given is None and written:
        return found
    read = _agreed(given, read_data(source), role, short(source), said)
    return [*found, Origin(role, short(source), ("data",), read)]


def _said(role: str, said: LicencesSpec, index: int = 0) -> Read | None:
    """What the recipe says of one source."""
    name = said.of(role, index)
    if name is None:
        return None
    found = licence_named(name, f"licences.{role}")
    return Read(found, name, "the recipe", None if found else f"the table has no answers for {name!r}")


def _read(said: LicencesSpec, role: str, source: str, weights: Path | None, index: int = 0) -> Read:
    given = _said(role, said, index)
    if given and said.decided_by and not _readable(source, weights):
        return given
    return _agreed(given, read_checkpoint(source, weights), role, short(source), said)


def _readable(source: str, weights: Path | None) -> bool:
    """Whether a source says one thing of its licence: what a recipe decides may be that it says two."""
    try:
        read_checkpoint(source, weights)
    except InputError:
        return False
    return True


def _agreed(given: Read | None, found: Read, role: str, name: str, said: LicencesSpec) -> Read:
    """What the recipe says, with the files beside the source; else what was read.

    Raises:
        InputError: both differ, and the recipe does not say who decided.
    """
    if given is None:
        return found
    of_code = found.where == "its code"
    if found.name and not of_code and given.licence != found.licence and not said.decided_by:
        raise InputError(
            f"licences.{role} is {given.name}, and {found.where} says {found.name} of {name}; say who decided that "
            "(licences.decided_by), or leave it away"
        )
    differs = found.name and not of_code and given.licence != found.licence
    where = f"the recipe, against {found.where}: {found.name}" if differs else "the recipe"
    texts = found.texts if not differs else {}
    return Read(given.licence, given.name, where, given.why, texts)


def short(source: str) -> str:
    """The last part of a path; names of the hub and factories as they are."""
    path = Path(source).expanduser()
    return path.name if path.is_absolute() or path.exists() else source
