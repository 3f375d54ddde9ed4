"""The table of licences and terms (`licences.yaml`), and how a name or a text finds its entry.

Names are matched by SPDX through `packaging.licenses`, and by the hub's own ids. A text is recognised by words that
only it has: the versions of one licence differ in a digit, which no measure of likeness tells apart.
"""

import re
from datetime import date
from functools import cache
from importlib.resources import files
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from potstill.validate.errors import InputError, did_you_mean

OWN, OWN_SERVER = "own", "own-server"
LONGEST = 20_000  # characters of a file that is looked into for a licence's words


class _Entry(BaseModel):
    """What licences and services have in common; see the head of `licences.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    title: str
    outputs: Literal["free", "same", "family", "rivals", "unknown"]
    source: str
    seen: Literal["text", "quoted", "no"]
    read: date


class Licence(_Entry):
    """A licence, with its answers."""

    names: tuple[str, ...] = ()
    weights: Literal["free", "same", "unknown"]
    commercial: Literal["free", "limited", "none", "unknown"]
    limit: str | None = None
    prefix: str | None = None
    credit: str | None = None
    notice: str | None = None
    keep: bool = False
    credited: bool = False
    open: str | None = None
    says: tuple[str, ...] = ()
    on_hub: bool = True


class Service(_Entry):
    """The terms of a service that answers over HTTP."""

    hosts: tuple[str, ...] = ()


class Table(BaseModel):
    """All entries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    licences: tuple[Licence, ...]
    hub: tuple[str, ...] = Field(default=())
    services: tuple[Service, ...]


@cache
def table() -> Table:
    """The table, read once."""
    text = files("potstill.pipeline.lineage").joinpath("licences.yaml").read_text(encoding="utf-8")
    return Table.model_validate(yaml.safe_load(text))


def licence_named(text: str, where: str) -> Licence | None:
    """The licence of a name: an SPDX id, an id of the hub's, or a name that it is known by.

    Args:
        text: as it was written.
        where: it was written, for the message.

    Returns:
        The entry; None for a name that is known to SPDX or the hub, and that the table has no answers for.

    Raises:
        InputError: no such licence is known.
    """
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    known = _by_name()
    if found := known.get(_plain(text)):
        return found
    if _plain(text) in table().hub:
        return None
    try:
        spdx = canonicalize_license_expression(text)
    except InvalidLicenseExpression:
        words = [*known, *table().hub]
        raise InputError(
            f"{where}: unknown licence {text!r}{_close(text, words)}; expected an SPDX id, an id of the hub's, or `own`"
        ) from None
    return known.get(_plain(spdx))


def service_named(text: str, where: str) -> Service:
    """The terms of a service by its id; raises InputError where there is none of that name."""
    known = {one.id: one for one in table().services}
    if text in known:
        return known[text]
    raise InputError(f"{where}: unknown terms {text!r}{did_you_mean(text, [*known])}")


def service_at(host: str) -> Service | None:
    """The terms of the service that answers at a host, with or without a port; None where nobody knows."""
    name = host.lower().rpartition("@")[2].partition(":")[0]
    return next(
        (one for one in table().services for own in one.hosts if name == own or name.endswith(f".{own}")),
        None,
    )


def recognised(text: str) -> list[Licence]:
    """The licences whose words a text has; one whose words are among those of another that is there does not count."""
    plain = re.sub(r"[\s#*_=>|`-]+", " ", text[:LONGEST].lower())
    found = [one for one in table().licences if one.says and all(_unmarked(says) in plain for says in one.says)]
    return [one for one in found if not any({*one.says} < {*other.says} for other in found)]


def _unmarked(text: str) -> str:
    return re.sub(r"[\s#*_=>|`-]+", " ", text.lower())


@cache
def _by_name() -> dict[str, Licence]:
    return {_plain(name): one for one in table().licences for name in (one.id, *one.names)}


def _plain(text: str) -> str:
    return re.sub(r"[\s_]+", "-", text.strip().lower())


def _close(text: str, words: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(_plain(text), words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
