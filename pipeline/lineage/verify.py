"""`potstill verify`: every hash from a package or a checkpoint up to its teacher, until the first that does not fit."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from potstill.export.package import BOM, MANIFEST
from potstill.export.papers import PAPERS
from potstill.pipeline.cache import MARKER
from potstill.pipeline.lineage import signing
from potstill.pipeline.lineage.bom import README, checkpoint_bom, differs, package_bom
from potstill.pipeline.lineage.golden import rerun
from potstill.pipeline.lineage.record import chained, read_record
from potstill.pipeline.lineage.upward import Upward
from potstill.validate.checkpoint import RECORD
from potstill.validate.errors import GateFailed, InputError
from potstill.validate.files import seal, sha256_each
from potstill.validate.units import counted

PERSONAL = (README, *PAPERS)  # of a checkpoint: a person may add to them
OLDER = "its record is of an older form, without a chain; make it again to have one"


@dataclass(frozen=True)
class Checked:
    """One thing that was looked at: that it holds, or why it could not be checked."""

    what: str
    outcome: Literal["holds", "not checked"]
    told: str


@dataclass
class Verification:
    """A package or a checkpoint, and what it is held against.

    Attributes:
        folder: of it.
        teacher: the teacher's folder, weights or ONNX file; None: where the run's recipe names it.
        run: the folder of the run that made it; None: the one that it lies in, if it does.
        public_key: whose signature it must bear; None: any or none.
        golden: whether a package's golden samples are run.
        checked: what was looked at so far.
    """

    folder: Path
    teacher: Path | None = None
    run: Path | None = None
    public_key: Path | None = None
    golden: bool = False
    checked: list[Checked] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse what is no package or checkpoint of Potstill, and places that are not there."""
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} is not a folder; give a package, or a checkpoint that Potstill made")
        if not self.file.is_file():
            raise InputError(
                f"{self.folder} has no {MANIFEST} and no {RECORD}, so nothing says where it came from; give a package, "
                "or a checkpoint that Potstill made"
            )
        if self.teacher and not self.teacher.exists():
            raise InputError(f"no such teacher: {self.teacher}; give its folder, its weights or its ONNX file")
        if self.run and not (self.run / MARKER).is_file():
            raise InputError(f"{self.run} is no folder of a run: it has no {MARKER}; give --out of the run")
        if self.golden and not self.is_package:
            raise InputError(f"{self.folder} is a checkpoint and has no golden samples; leave --golden away")
        if "format" not in self.record:
            raise InputError(f"{self.file} says nothing of where it came from; give what a run of potstill made")

    @property
    def is_package(self) -> bool:
        """Whether it has a manifest."""
        return (self.folder / MANIFEST).is_file()

    @property
    def file(self) -> Path:
        """Where its record is."""
        return self.folder / (MANIFEST if self.is_package else RECORD)

    @cached_property
    def record(self) -> dict[str, Any]:
        """The manifest, or a checkpoint's record."""
        return read_record(self.file)

    @property
    def lineage(self) -> dict[str, Any]:
        """Where it came from."""
        found: dict[str, Any] = self.record["lineage"] if self.is_package else self.record
        return found

    def __call__(self) -> None:
        """Look at everything in order, from the files to the teacher.

        Raises:
            GateFailed: the first thing that does not fit, with what was expected and what was found.
            InputError: a record or a key cannot be read.
        """
        self.itself()
        self._walk(self._signature, self._upward, self._golden)

    def itself(self) -> None:
        """Look at the folder alone, but for its signature; see `__call__`."""
        self._walk(self._files, self._chain, self._seal, self._bom)

    def _walk(self, *steps: Callable[[], Iterator[Checked]]) -> None:
        for step in steps:
            try:
                self.checked += step()
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                raise GateFailed(
                    f"{self.file} was edited: it has not the form of a record ({type(error).__name__}: {error}); take "
                    "a whole copy"
                ) from error

    def _files(self) -> Iterator[Checked]:
        """Each file against the record, and each file that it does not name."""
        named = self._named()
        if named is None:
            yield Checked("files", "not checked", OLDER)
            return
        found = sha256_each(self.folder)
        for name in sorted(named):
            if found.get(name) != named[name]:
                now = f"SHA-256 {found[name]}" if name in found else "no such file"
                raise GateFailed(
                    f"{self.folder / name} is not what {self.file.name} names: expected SHA-256 {named[name]}, "
                    f"found {now}; take a whole copy"
                )
        others = sorted(set(found) - set(named) - {self.file.name, signing.SUMS, signing.SIGNATURE, BOM})
        may = () if self.is_package else PERSONAL
        if foreign := [name for name in others if name not in may and not name.startswith(".")]:
            raise GateFailed(
                f"{self.folder / foreign[0]} is not what {self.file.name} names: expected no such file, found one of "
                f"SHA-256 {found[foreign[0]]}; remove it, or take a whole copy"
            )
        yield Checked("files", "holds", f"{counted(len(named), 'file')} as {self.file.name} names them")
        for name in others:
            yield Checked(name, "not checked", f"{self.file.name} does not speak of it")

    def _named(self) -> dict[str, str] | None:
        """SHA-256 by name of the files that the record speaks of; None where an older one speaks of none."""
        if self.is_package:
            return {name: found["sha256"] for name, found in self.record["files"].items()}
        files: dict[str, str] | None = self.lineage["stages"][-1].get("files") if self.lineage["stages"] else None
        return files

    def _chain(self) -> Iterator[Checked]:
        """The links of the lineage, and of the lineages of what the model began with."""
        if "chain" not in self.lineage:
            yield Checked("lineage", "not checked", OLDER)
            return
        self._unbroken(self.lineage, "the lineage")
        yield Checked("lineage", "holds", f"{counted(len(self.lineage['chain']), 'link')}, the last {self._last}")

    def _unbroken(self, lineage: dict[str, Any], whose: str) -> None:
        for name, model in _models(lineage):
            if model["lineage"] and "chain" in model["lineage"]:
                self._unbroken(model["lineage"], f"the lineage of the {name} {model['source']}")
        expected, found = lineage["chain"], chained(lineage)
        for i, link in enumerate(found):
            if i >= len(expected) or expected[i] != link:
                stage = f"stage {i} ({lineage['stages'][i - 1]['name']})" if i else "what the model began with"
                said = expected[i] if i < len(expected) else "no link"
                raise GateFailed(
                    f"{self.file}: {whose} was edited at {stage}: its link says {said}, what stands there gives {link}"
                )
        if len(expected) > len(found):
            raise GateFailed(
                f"{self.file}: {whose} was edited: it has {counted(len(expected), 'link')} and "
                f"{counted(len(lineage['stages']), 'stage')}; expected one link more than stages"
            )

    @property
    def _last(self) -> str:
        return str(self.lineage["chain"][-1])[:12]

    def _seal(self) -> Iterator[Checked]:
        """All that the record says, against its seal."""
        if "chain" not in self.lineage and "seal" not in self.record:
            return
        said, found = self.record.get("seal", "none"), seal(self.record)
        if said != found:
            raise GateFailed(
                f"{self.file} was edited after it was written: its seal says {said}, what stands there gives {found}"
            )
        yield Checked(self.file.name, "holds", f"sealed as {found[:12]}")

    def _bom(self) -> Iterator[Checked]:
        """The bill of materials against the record."""
        file = self.folder / BOM
        wanted = (package_bom if self.is_package else checkpoint_bom)(self.folder, self.record)
        if wanted is None or not file.is_file():
            yield Checked(BOM, "not checked", f"there is no {BOM} here" if wanted else OLDER)
            return
        expected, found = json.loads(wanted), read_record(file)
        if first := differs(expected, found):
            where, was, now = first
            raise GateFailed(
                f"{file} does not say what {self.file.name} says, at {where}: expected {_shown(was)}, found "
                f"{_shown(now)}"
            )
        yield Checked(BOM, "holds", f"{counted(len(found['components']), 'component')} as the record has them")

    def _signature(self) -> Iterator[Checked]:
        """The signature, by the key that was given."""
        if self.public_key:
            yield Checked("signature", "holds", f"by the key SHA256:{signing.check(self.folder, self.public_key)}")
            return
        by = signing.signed_by(self.folder)
        told = f"it names the key SHA256:{by}; give --public-key" if by else "there is none"
        yield Checked("signature", "not checked", told)

    def _upward(self) -> Iterator[Checked]:
        """What the run kept: stages, data and teacher."""
        if "chain" not in self.lineage:
            yield from self._teacher_of_old()
            return
        upward = Upward(self.file, self.lineage, self._run_folder, self.run is not None, self.teacher)
        for what, told, holds in upward():
            yield Checked(what, "holds" if holds else "not checked", told)

    def _teacher_of_old(self) -> Iterator[Checked]:
        """A teacher's folder against the one hash that an older record has of it."""
        from potstill.validate.checkpoint import Checkpoint

        wanted = self.lineage["teacher"]["sha256"]
        if self.teacher is None or self.teacher.is_file():
            yield Checked("teacher", "not checked", "give its folder as --teacher")
            return
        if (found := Checkpoint(str(self.teacher)).digest()) != wanted:
            raise GateFailed(f"the teacher {self.teacher} is another: expected SHA-256 {wanted}, found {found}")
        yield Checked("teacher", "holds", f"SHA-256 {wanted[:12]} of {self.teacher}")

    @cached_property
    def _run_folder(self) -> Path | None:
        """The run that was given, or that the folder lies in: as its student, a package or a stage's checkpoint."""
        above = self.folder.resolve().parents[:3]
        return self.run or next((one for one in above if (one / MARKER).is_file()), None)

    def _golden(self) -> Iterator[Checked]:
        """The golden samples, run here."""
        if self.golden:
            yield Checked("golden samples", "holds", rerun(self.folder, self.record["target"]))
        elif self.is_package:
            yield Checked("golden samples", "not checked", "give --golden to run them")


def _models(lineage: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What a model began with, by what it was."""
    student = [("student's checkpoint", lineage["student"])] if lineage["student"] else []
    return [("teacher", lineage["teacher"]), *(("other teacher", one) for one in lineage["other_teachers"]), *student]


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)[:200]
