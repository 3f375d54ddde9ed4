"""A verdict on licences and terms, before anything is trained or asked. It is no lawyer's.

Each source of what is made (teacher, the student's origin, data, service) is held against the table's answers for what
it is used for; the worst answer is that of the whole.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from potstill.pipeline.lineage.licences import OWN, Licence, Service, licence_named
from potstill.pipeline.lineage.reading import LICENCE_FILE, NOTICE_FILE, Read
from potstill.pipeline.lineage.said import DECIDED_BY, LicencesSpec
from potstill.validate.errors import GateFailed

Level = Literal["allowed", "allowed if", "unknown", "forbidden"]
LEVELS: tuple[Level, ...] = ("allowed", "allowed if", "unknown", "forbidden")
NO_LAWYER = (
    "Potstill is no lawyer: this is what its table of licences says, with the source and the day of each answer."
)
OTHERS = "THIRD_PARTY_LICENSES"
RECORDED = "its record"  # where the licence of a source of an earlier model was found


@dataclass(frozen=True)
class Origin:
    """One source of what is made.

    Attributes:
        role: `teacher`, `student`, `train`, `api`, …
        name: of it, without the folders that lead there.
        use: what becomes of it: its answers `teach`, its `weights` go into what is made, it is `data` that trains, or
            it only `judges`; one model may be used in two ways.
        read: its licence; None for a service.
        service: its terms; None for what is none, or where nobody knows them.
    """

    role: str
    name: str
    use: tuple[Literal["teaches", "weights", "data", "judges"], ...]
    read: Read | None = None
    service: Service | None = None

    @property
    def terms(self) -> Licence | Service | None:
        """Its entry of the table."""
        return self.read.licence if self.read else self.service


@dataclass(frozen=True)
class Finding:
    """What the table says of one source.

    Attributes:
        role, name: of the source.
        licence: the id of its entry, or the name that was given; None where there is none.
        where: that was found.
        source: of the answers; None without an entry.
        read: on which day.
        level: of it alone.
        why: the answers that count, a sentence each.
        must: what must be done, a sentence each.
    """

    role: str
    name: str
    licence: str | None
    where: str
    source: str | None
    read: str | None
    level: Level
    why: tuple[str, ...]
    must: tuple[str, ...] = ()

    def in_words(self) -> str:
        """One line."""
        why, must = "; ".join(self.why), " and ".join(self.must)
        told = f"allowed if {must} ({why})" if self.level == "allowed if" else f"{self.level}: {why}"
        return f"{self.role} {self.name}, {self.licence or 'no licence known'} ({self.where}): {told}"


@dataclass(frozen=True)
class Verdict:
    """All findings together, and what they ask for.

    Attributes:
        level: the worst of them.
        findings: one for each source.
        decided_by: who decides where the level is unknown; None where nobody does.
        decision: why.
        licence: of what is made; None where nothing says one.
        prefix: what its name must begin with.
        credits: what its card must say.
        texts: the files that go along, by name.
        left: what must be done and Potstill cannot do, a sentence each.
    """

    level: Level
    findings: tuple[Finding, ...]
    decided_by: str | None = None
    decision: str | None = None
    licence: Licence | None = None
    prefix: str | None = None
    credits: tuple[str, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    def check(self) -> None:
        """Stop where it is forbidden, or unknown and nobody decided.

        Raises:
            GateFailed: nothing may be trained or asked.
        """
        if self.level in ("allowed", "allowed if") or (self.level == "unknown" and self.decided_by):
            return
        told = " ".join(f"{one.in_words()}." for one in self.findings if one.level == self.level)
        if self.level == "forbidden":
            raise GateFailed(f"licences: forbidden, so nothing was run. {told} {NO_LAWYER}")
        raise GateFailed(
            f"licences: unknown, so nothing was run. {told} Say which they are (licences: {{teacher: …, data: …}}, "
            f"--licences; `own` for what you made yourself), or who decided (decided_by, --decided-by NAME, "
            f"{DECIDED_BY}). {NO_LAWYER}"
        )

    def in_words(self) -> list[str]:
        """Lines for a person."""
        by = f", decided by {self.decided_by}{f' ({self.decision})' if self.decision else ''}"
        first = f"licences: {self.level}{by if self.level == 'unknown' and self.decided_by else ''}"
        return [
            first,
            *(f"  {one.in_words()}" for one in self.findings),
            *(f"  left to you: {one}" for one in self.left),
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the texts of the files."""
        plain = asdict(replace(self, licence=None, texts={}))
        del plain["texts"]
        return plain | {"licence": self.licence.id if self.licence else None, "files": [*self.texts]}


def with_licences(record: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    """A lineage, or a part of it, with the verdict, and with each source's licence beside it where one is known."""
    known = [(one.role, one.licence) for one in verdict.findings if one.licence]
    of: dict[str, str | None] = dict(known)
    if "api" in {one.role for one in verdict.findings}:  # the student's own checkpoint stands in the teacher's place
        of |= {"teacher": of.get("student")}
    found = record | {"licences": verdict.to_json()}
    for role in ("teacher", "student"):
        if found.get(role):
            found[role] = found[role] | {"licence": of.get(role)}
    if found.get("other_teachers"):
        others = [one.licence for one in verdict.findings if one.role == "other teacher"]
        pairs = zip(found["other_teachers"], others or [None] * len(found["other_teachers"]), strict=True)
        found["other_teachers"] = [one | {"licence": licence} for one, licence in pairs]
    if "data" in found:
        found["data"] = {name: one | {"licence": of.get(name)} for name, one in found["data"].items()}
    return found


def verdict_on(origins: Sequence[Origin], said: LicencesSpec, task: str) -> Verdict:
    """What the table says of all sources together.

    Args:
        origins: the sources.
        said: what the recipe says beside their licences.
        task: of the recipe: some licences speak of language models alone.
    """
    own = {one.terms.id for one in origins if one.terms and "weights" in one.use}
    findings = [_finding(one, said, task, own) for one in origins]
    wanted, made = _licence_of_what_is_made(origins), _made(said)
    if len(wanted) > 1:
        findings.append(_joined("unknown", f"{' and '.join(wanted)} each want what is made under them"))
    elif made and wanted and made.id not in wanted:
        findings.append(_joined("forbidden", f"licences.made is {made.id}, and {next(iter(wanted))} wants its own"))
    level: Level = max((one.level for one in findings), key=LEVELS.index, default="allowed")
    weights = next((one.terms for one in origins if "weights" in one.use and isinstance(one.terms, Licence)), None)
    licence = next(iter(wanted.values())) if len(wanted) == 1 else made or (weights if not wanted else None)
    used = [one for one in origins if one.use != ("judges",) and isinstance(one.terms, Licence)]
    taken = [one.terms for one in used if isinstance(one.terms, Licence) and one.use != ("data",)]
    prefixes = sorted({one.prefix for one in taken if one.prefix}, key=len, reverse=True)
    texts, left = _papers(origins, licence)
    return Verdict(
        level,
        tuple(findings),
        said.decider if level == "unknown" else said.decided_by,
        said.decision,
        None if licence and licence.id == OWN else licence,
        prefixes[0] if prefixes else None,
        tuple(dict.fromkeys(one.credit for one in taken if one.credit)),
        texts,
        tuple(left),
    )


def _finding(origin: Origin, said: LicencesSpec, task: str, own: set[str]) -> Finding:
    """One source by what it is used for."""
    terms = origin.terms
    if terms is None:
        name, where, why = _nothing(origin)
        level: Level = "allowed" if origin.use == ("judges",) else "unknown"
        return Finding(origin.role, origin.name, name, where, None, None, level, (why,))
    answers = list[tuple[Level, str, tuple[str, ...]]]()
    if origin.use == ("judges",):
        answers.append(("allowed", "it only judges", ()))
    if "teaches" in origin.use:
        answers.append(_taught(terms, said, task, own, "weights" in origin.use))
    if isinstance(terms, Licence) and "weights" in origin.use:
        answers.append(_derived(terms))
    if isinstance(terms, Licence) and origin.use == ("data",):
        answers.append(_learned(origin, terms))
    if isinstance(terms, Licence) and origin.use != ("judges",):
        answers += _for_money(terms, said)
    where = (origin.read.where if origin.read else "the service's address") + ("" if terms.seen != "no" else ", unread")
    return Finding(
        origin.role,
        origin.name,
        terms.id,
        where,
        terms.source,
        terms.read.isoformat(),
        max((level for level, *_ in answers), key=LEVELS.index),
        tuple(dict.fromkeys(why for _, why, _ in answers)),
        tuple(dict.fromkeys(must for *_, musts in answers for must in musts)),
    )


def _nothing(origin: Origin) -> tuple[str | None, str, str]:
    """The name, the place and the reason where the table has no entry."""
    if origin.read is None:
        return None, "the service's address", f"the table has no terms for {origin.name}"
    return origin.read.name, origin.read.where, origin.read.why or "its licence is not known"


def _taught(
    terms: Licence | Service, said: LicencesSpec, task: str, own: set[str], also_weights: bool
) -> tuple[Level, str, tuple[str, ...]]:
    """Whether its answers may teach what is made."""
    must = _named(terms) if isinstance(terms, Licence) else ()
    under = (f"what is made is under {terms.id}", *must)
    match terms.outputs:
        case "free":
            return "allowed if" if must else "allowed", "its answers may teach", must
        case "same":
            return "allowed if", "what it teaches is a derivative", under
        case "family" if also_weights or terms.id in own:
            return "allowed if", "it may teach models under its own licence", under
        case "family" if task == "text-generation":
            return "forbidden", "its answers may improve no language model but those under its own licence", ()
        case "family":
            return "unknown", f"it forbids to improve other language models; whether one for {task} is one is open", ()
        case "rivals" if said.competes is False and said.decided_by:
            must = (f"what is made does not compete with its owner, says {said.decided_by}",)
            return "allowed if", "its answers may teach what does not compete", must
        case "rivals":
            how = "where what is made does not: licences.competes: false, with decided_by"
            return "forbidden", f"its answers may teach nothing that competes with its owner ({how})", ()
    return "unknown", f"whether its answers may teach {'was not read' if terms.seen == 'no' else 'is not known'}", ()


def _named(terms: Licence) -> tuple[str, ...]:
    """What must be seen of it."""
    must = (f"the name of what is made begins with {terms.prefix!r}",) if terms.prefix else ()
    return must + ((f"its card says {terms.credit!r}",) if terms.credit else ())


def _derived(terms: Licence) -> tuple[Level, str, tuple[str, ...]]:
    """Whether its weights may go into what is made."""
    if terms.weights == "unknown":
        return "unknown", "what it asks of derivatives was not read", ()
    must: tuple[str, ...] = (f"what is made is under {terms.id}",) if terms.weights == "same" else ()
    must += ("its licence's text goes along",) if terms.keep else ()
    must += (f"a notice: {terms.notice}",) if terms.notice else ()
    must += _named(terms)
    must += ("its author is named",) if terms.credited else ()
    return "allowed if" if must else "allowed", "its weights may be changed and passed on", must


def _learned(origin: Origin, terms: Licence) -> tuple[Level, str, tuple[str, ...]]:
    """Whether data may train what is made."""
    if terms.outputs in ("unknown", "rivals", "family"):
        return "unknown", "whether it may train a model is not known", ()
    must = (f"the card names {origin.name} and its licence",) if terms.credited else ()
    if terms.outputs == "same":
        return "allowed if", "a model that it trains is a derivative", (f"what is made is under {terms.id}", *must)
    told = "it may train a model" + (f", though {terms.open}" if terms.open else "")
    return "allowed if" if must else "allowed", told, must


def _for_money(terms: Licence, said: LicencesSpec) -> list[tuple[Level, str, tuple[str, ...]]]:
    """Whether what is made may be used commercially."""
    if terms.commercial == "limited":
        return [("allowed if", f"commercial use is limited: {terms.limit}", ("the card says so",))]
    if terms.commercial == "none":
        if said.use == "non-commercial":
            return [("allowed if", "no commercial use", ("the card says so",))]
        if said.use == "commercial":
            return [("forbidden", "it allows no commercial use, and licences.use is commercial", ())]
        return [("unknown", "it allows no commercial use; say licences.use: non-commercial, or commercial", ())]
    return [("unknown", "whether it allows commercial use was not read", ())] if terms.commercial == "unknown" else []


def _licence_of_what_is_made(origins: Sequence[Origin]) -> dict[str, Licence]:
    """The licences that want what is made under them, by id."""
    wanted = {}
    for one in origins:
        terms = one.terms
        if not isinstance(terms, Licence):
            continue
        taught = terms.outputs == "same" and ("teaches" in one.use or one.use == ("data",))
        if taught or (terms.weights == "same" and "weights" in one.use):
            wanted[terms.id] = terms
    return wanted


def _made(said: LicencesSpec) -> Licence | None:
    return licence_named(said.made, "licences.made") if said.made else None


def _joined(level: Level, why: str) -> Finding:
    return Finding("made", "all together", None, "the sources", None, None, level, (why,))


def _papers(origins: Sequence[Origin], licence: Licence | None) -> tuple[dict[str, str], list[str]]:
    """The files that go along: LICENSE, NOTICE and the licences of other sources; and what is missing of them."""
    texts, left, notices, others = dict[str, str](), list[str](), list[str](), list[str]()
    for one in origins:
        terms = one.terms
        if not isinstance(terms, Licence) or one.read is None or one.use in (("judges",), ("data",)):
            continue
        of_file = {name: text for name, text in one.read.texts.items() if LICENCE_FILE.fullmatch(name)}
        notices += [terms.notice] if terms.notice else []
        notices += [text.strip() for name, text in one.read.texts.items() if NOTICE_FILE.fullmatch(name)]
        if not terms.keep or one.read.where == RECORDED or not ("weights" in one.use or terms.outputs == "same"):
            continue
        if not of_file:
            left.append(f"the text of {terms.title} is not beside {one.name}; add it from {terms.source}")
        elif licence and terms.id == licence.id and "LICENSE" not in texts:
            texts["LICENSE"] = "\n\n".join(of_file.values())
        else:
            others += [f"{one.role} {one.name}: {terms.title}\n\n{text.strip()}\n" for text in of_file.values()]
    if notices:
        texts["NOTICE"] = "\n\n".join(dict.fromkeys(notices)) + "\n"
    if others:
        texts[OTHERS] = "\n\n".join(others)
    return texts, left
