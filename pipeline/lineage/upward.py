"""What made a model, as far as it is here: the run's checkpoints, its data and the teachers, against the lineage."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.pipeline.lineage.record import LEARNED_FROM, from_hub, read_record
from potstill.validate.checkpoint import RECORD, Checkpoint
from potstill.validate.errors import GateFailed, PotstillError
from potstill.validate.files import sha256_each, sha256_file
from potstill.validate.shift import SHIFTED
from potstill.validate.units import counted

if TYPE_CHECKING:
    from potstill.pipeline.recipe import Recipe

Finding = tuple[str, str, bool]  # what was looked at, what is told of it, and whether it holds or was not checked


@dataclass
class Upward:
    """A lineage and where its makers may be.

    Attributes:
        file: the record, for messages.
        lineage: where a model came from.
        run: the run's folder; None where there is none.
        asked: whether it was given, and not only found.
        teacher: the teacher's place; None: where the run's recipe names it.
    """

    file: Path
    lineage: dict[str, Any]
    run: Path | None
    asked: bool
    teacher: Path | None

    def __call__(self) -> Iterator[Finding]:
        """All that could be looked at, and all that could not; GateFailed at the first that does not fit."""
        yield from self._stages()
        yield from self._data()
        yield from self._models()

    def _stages(self) -> Iterator[Finding]:
        """Each stage's checkpoint in the run."""
        for number, stage in enumerate(self.lineage["stages"], 1):
            what, link = f"stage {number} ({stage['name']})", self.lineage["chain"][number]
            if self.run is None:
                yield what, "give the run's folder as --run", False
                continue
            kept = [one for one in self._kept if one[0] and one[0][-1] == link]
            if not kept and not (self.asked and self._kept):
                yield what, f"its checkpoint is not in {self.run / 'stages'}", False
                continue
            if not kept:
                raise GateFailed(
                    f"{self.file}: {what} is not of the run {self.run}: expected a checkpoint with the link {link}, "
                    f"found {counted(len(self._kept), 'checkpoint')} with others"
                )
            folder, wanted = kept[0][1], stage.get("files")
            if wanted is None:
                yield what, "it was made before its files were recorded", False
                continue
            _compare(folder, wanted, f"{what} of the run")
            yield what, f"{counted(len(wanted), 'file')} in {folder.relative_to(self.run)}", True

    @cached_property
    def _kept(self) -> list[tuple[list[str], Path]]:
        """The chain and the folder of each checkpoint in the run's stages."""
        records = sorted(self.run.glob(f"stages/*/checkpoint/{RECORD}")) if self.run else []
        return [(read_record(one).get("chain", []), one.parent) for one in records]

    @cached_property
    def _recipe(self) -> "Recipe | str":
        """The run's recipe, or why there is none."""
        if self.run is None:
            return "give the run's folder as --run"
        from potstill.pipeline.recipe import load_recipe
        from potstill.pipeline.stages import STAGES
        from potstill.targets.target import target_names

        try:
            return load_recipe(self.run / "recipe.yaml", stage_types=STAGES, target_names=target_names())
        except PotstillError as error:
            return f"the run's recipe cannot be followed here: {error}"

    def _data(self) -> Iterator[Finding]:
        """Each set of examples, read again."""
        for name, one in self.lineage["data"].items():
            what, recipe = f"data: {name}", self._recipe
            if isinstance(recipe, str):
                yield what, recipe, False
                continue
            try:
                found = self._digest(recipe, name)
            except PotstillError as error:
                yield what, f"it cannot be read here: {error}", False
                continue
            if found != one["sha256"] and name not in LEARNED_FROM and self.file.name == RECORD:
                yield what, "the run judges and calibrates by others now, which makes no other checkpoint", False
                continue
            if found != one["sha256"]:
                raise GateFailed(
                    f"{what} ({one['name']}) is not what it was: expected SHA-256 {one['sha256']} of its examples, "
                    f"found {found}"
                )
            yield what, f"{counted(one['examples'], 'example')} of {one['name']}", True

    def _digest(self, recipe: "Recipe", name: str) -> str:
        """SHA-256 of a set of examples as it is now."""
        from potstill.pipeline.black_box import LEARNED
        from potstill.validate.task import TASKS

        source, task = getattr(recipe.data, name), TASKS[recipe.task]
        if source is None and self.run and recipe.teacher.api:
            source = str(self.run / LEARNED)
        if source is None and name == "calibrate":
            source = recipe.data.train
        judging, labelled = name in ("eval", SHIFTED), name != "unlabelled"
        return task.examples(source, recipe.data.columns, judging=judging, labelled=labelled).digest

    def _models(self) -> Iterator[Finding]:
        """The teachers and the student's own checkpoint."""
        recipe = None if isinstance(self._recipe, str) else self._recipe
        others = recipe.other_teachers if recipe else ()
        student = recipe.student if recipe else None
        named: list[tuple[str, dict[str, Any], Any]] = []
        if self.lineage["student"]:
            named.append(("student's checkpoint", self.lineage["student"], student))
        for i, one in enumerate(self.lineage["other_teachers"]):
            named.append((f"teacher {i + 2}", one, others[i] if i < len(others) else None))
        named.append(("teacher", self.lineage["teacher"], self.teacher or (recipe.teacher if recipe else None)))
        for what, one, spec in named:
            place = spec if isinstance(spec, Path) else _place(spec, one["revision"])
            if not one["files"]:
                yield what, f"{one['source']} has no file on record: code alone, or a hub name without a cache", False
            elif place is None or not place.exists():
                option = "--teacher" if what == "teacher" else "--run"
                yield what, f"{one['source']} is not here; give it by {option}", False
            else:
                yield what, _compare(place, one["files"], f"the {what}"), True


def _place(spec: Any, revision: str | None) -> Path | None:
    """Where the model of a recipe lies here."""
    if spec is None or not spec.checkpoint:
        return None
    checkpoint = Checkpoint(spec.checkpoint, spec.weights)
    return checkpoint.weights or checkpoint.onnx or checkpoint.folder or from_hub(checkpoint, revision)


def _compare(place: Path, wanted: dict[str, str], what: str) -> str:
    """Hold a folder, or a file with those beside it, against hashes by name; what holds, in words.

    Raises:
        GateFailed: one of them is not what it was.
    """
    found = sha256_each(place) if place.is_dir() else _beside(place, wanted)
    for name, sha256 in wanted.items():
        if found.get(name) != sha256:
            now = f"SHA-256 {found[name]}" if name in found else "no such file"
            raise GateFailed(f"{what} ({place}) is another: {name}: expected SHA-256 {sha256}, found {now}")
    return f"{counted(len(wanted), 'file')} of {place}"


def _beside(file: Path, wanted: dict[str, str]) -> dict[str, str]:
    """SHA-256 of a file under the only or first name that is wanted, and of the others that lie beside it."""
    first, *others = wanted
    return {first: sha256_file(file)} | {
        name: sha256_file(file.with_name(name)) for name in others if file.with_name(name).is_file()
    }
