"""What licence a model, data or a service has: read from its card, its LICENSE file, or the record of who wrote it.

Only small text files are read; nothing of a model is loaded.
"""

import importlib.util
import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from potstill.pipeline.lineage.licences import OWN, Licence, licence_named, recognised, table
from potstill.validate.checkpoint import RECORD, is_factory
from potstill.validate.data import split_key
from potstill.validate.errors import InputError
from potstill.validate.files import read_json

CARD = "README.md"
LICENCE_FILE = re.compile(r"(licen[cs]e|copying)([-_.](model|txt|md|rst))*", re.IGNORECASE)
NOTICE_FILE = re.compile(r"notice([-_.](txt|md|rst))*", re.IGNORECASE)
SMALL = 200_000  # bytes of a text that goes along


@dataclass(frozen=True)
class Read:
    """What is known of the licence of one source.

    Attributes:
        licence: its entry of the table; None where it is not known, or the table has no answers.
        name: as it is written; None where nothing is.
        where: it was found, or what was looked into.
        why: what else is to be said, e.g. why it is not known.
        texts: of files beside it that go along, by the file's name: licences and notices.
    """

    licence: Licence | None
    name: str | None
    where: str
    why: str | None = None
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """What the header of a card says."""

    licence: Licence | None
    name: str


def read_checkpoint(source: str, weights: Path | None = None) -> Read:
    """The licence of a model: a folder, an ONNX file, a name on the hub, or a factory.

    A factory of one's own code is one's own; that of an installed package is not known.

    Raises:
        InputError: a card names a licence that nobody knows, or another one than its LICENSE file.
    """
    if is_factory(source):
        return _read_factory(source, weights)
    path = Path(source).expanduser()
    if path.exists():
        return read_folder(path if path.is_dir() else path.parent)
    return _read_hub(source, "model")


def read_data(source: str) -> Read:
    """The licence of examples: a file, a folder, or a data set on the hub; raises InputError as `read_checkpoint`."""
    file, _ = split_key(source)
    path = Path(file).expanduser()
    if path.exists():
        return read_folder(path if path.is_dir() else path.parent)
    return _read_hub(file, "dataset")


def written_by(source: str, depth: int = 3) -> tuple[str, str] | None:
    """Host and model of the service that wrote a file of examples, by the records of `generate` and `clean` beside it.

    None where no record says so.
    """
    path = Path(split_key(source)[0]).expanduser()
    record = path.with_name(f"{path.name}.record.json")
    if depth == 0 or not record.is_file():
        return None
    try:
        said: Any = read_json(record)
        if isinstance(said.get("settings"), dict) and said["settings"].get("api"):
            return re.sub(r"^https?://|/.*$", "", said["settings"]["api"]), str(said["settings"]["model"])
        return written_by(str(path.with_name(Path(said["input"]["file"]).name)), depth - 1)
    except (ValueError, LookupError, AttributeError, TypeError):
        return None  # another program's file of that name


def read_folder(folder: Path, called: str | None = None) -> Read:
    """The licence of what lies in a folder, by its card and its LICENSE file.

    Raises:
        InputError: both name another licence, or the card one that nobody knows.
    """
    called = called or folder.name
    card, texts = _card(folder / CARD, called), {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and (LICENCE_FILE.fullmatch(path.name) or NOTICE_FILE.fullmatch(path.name)):
            texts[path.name] = _text(path)
    files = {name: recognised(text) for name, text in texts.items() if LICENCE_FILE.fullmatch(name)}
    found = {one.id: one for ones in files.values() for one in ones}
    if card and card.licence and found and card.licence.id not in found:
        raise InputError(
            f"{called}: its card says {card.name}, and its file {_some(files)} is {_titles(found)}; find out which, "
            "and say it in the recipe (licences), with decided_by"
        )
    unread = f"the text of {' and '.join(files)} is not recognised" if files and not found else None
    if card and (card.licence or not found):
        why = unread if card.licence else f"the table has no answers for {card.name!r}"
        return Read(card.licence, card.name, "its card", why, texts)
    if len(found) == 1:
        (one,) = found.values()
        return Read(one, one.id, f"its file {_some(files)}", None, texts)
    if not files and _made_here(folder):
        return Read(
            _own(), OWN, "its record", "made by Potstill, and nothing that it was made of wants its own licence"
        )
    why = f"{_some(files)} names several: {_titles(found)}" if found else unread or "neither its card nor a file says"
    return Read(None, None, "its folder", why, texts)


def private(host: str) -> bool:
    """Whether an address is of this machine or a private network."""
    name = host.strip("[]") if host.startswith("[") and host.endswith("]") else host.rpartition(":")[0] or host
    name = name.strip("[]")
    try:
        return ipaddress.ip_address(name).is_private
    except ValueError:
        return "." not in name or name.endswith((".local", ".localhost", ".internal", ".lan"))


def _card(path: Path, called: str) -> Card | None:
    """What the header of a card says of a licence; None where it says nothing."""
    from huggingface_hub import metadata_load

    if not path.is_file():
        return None
    try:
        header = metadata_load(path)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{called}: the header of its card cannot be read: {str(error).splitlines()[0]}") from None
    said = (header or {}).get("license")
    if isinstance(said, list) and len(said) == 1:
        said = said[0]
    if said is None:
        return None
    if not isinstance(said, str):
        return Card(None, " and ".join(map(str, said)) if isinstance(said, list) else str(said))
    if said.lower() == "other" and isinstance((header or {}).get("license_name"), str):
        name = str((header or {})["license_name"])
        try:
            return Card(licence_named(name, called), name)
        except InputError:  # a name of one's own is what `other` is for
            return Card(None, name)
    return Card(licence_named(said, f"{called}: its card"), said)


def _made_here(folder: Path) -> bool:
    """Whether a record says that Potstill made it, and that its sources were known and leave its licence open."""
    try:
        said = read_json(folder / RECORD)["licences"]
        return said["level"] in ("allowed", "allowed if") and said["licence"] is None
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _own() -> Licence:
    return next(one for one in table().licences if one.id == OWN)


def _read_factory(source: str, weights: Path | None) -> Read:
    if weights and (found := read_folder(weights.parent, weights.name)).name:
        return found
    top = source.partition(":")[0].partition(".")[0]
    spec = importlib.util.find_spec(top)
    places = [*([spec.origin] if spec and spec.origin else []), *((spec and spec.submodule_search_locations) or [])]
    if any(part in ("site-packages", "dist-packages") for place in places for part in Path(place).parts):
        return Read(None, None, "its code", f"its code is of the installed package {top}, and not one's own")
    return Read(_own(), OWN, "its code", "a factory of one's own code")


def _read_hub(name: str, kind: Literal["model", "dataset"]) -> Read:
    """The same of a repository of the hub, from the cache where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [CARD, "*LICEN[CS]E*", "*licen[cs]e*", "COPYING*", "NOTICE*", "Notice*", "notice*"]
    try:
        folder = snapshot_download(name, repo_type=kind, allow_patterns=wanted)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        return Read(None, None, "the hub", f"its card could not be read ({type(error).__name__})")
    return read_folder(Path(folder), name)


def _text(path: Path) -> str:
    return path.read_bytes()[:SMALL].decode("utf-8", "replace")


def _some(names: Any) -> str:
    return " and ".join(names)


def _titles(found: dict[str, Licence]) -> str:
    return " and ".join(one.title for one in found.values())
