"""One recipe from start to end: each step made or taken from the cache, judged against the teacher, and gated."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape

from potstill.compress.lesson import Lesson
from potstill.compress.likeness import likeness_from_json
from potstill.compress.meeting import meeting_of
from potstill.compress.student import Student
from potstill.pipeline.cache import WORK, Cache, Planned
from potstill.pipeline.deliverables import publish_student, stale
from potstill.pipeline.judging import Judge, Subject, verdict_on
from potstill.pipeline.ledger import Entry, Ledger, failure_in_words
from potstill.pipeline.lineage import record as lineage
from potstill.pipeline.lineage.card import About
from potstill.pipeline.lineage.energy import metered
from potstill.pipeline.lineage.origins import verdict_of_recipe
from potstill.pipeline.lineage.terms import Verdict, with_licences
from potstill.pipeline.material import Material
from potstill.pipeline.packing import Packing
from potstill.pipeline.ranks import crew
from potstill.pipeline.recipe import Recipe
from potstill.pipeline.stages import STAGES, compared, in_words, settings_of
from potstill.targets.measurement import Comparison
from potstill.validate.checkpoint import RECORD, WEIGHTS, Checkpoint
from potstill.validate.errors import GateFailed
from potstill.validate.files import read_json, sealed, sha256_each, size_bytes, write_json
from potstill.validate.metrics import share_outside
from potstill.validate.onnx_file import OnnxModule
from potstill.validate.predictor import TorchPredictor, best_device
from potstill.validate.task import Model


class Run:
    """A recipe at work in a folder.

    The folder:
        stages/      one folder for each step and its settings: a checkpoint and its log; predictions; what they say
        student/     the checkpoint that passed last
        packages/    one folder for each target
        ledger.json, report.html, recipe.yaml
    """

    def __init__(self, recipe: Recipe, out: Path, console: Console) -> None:
        self.recipe, self.out, self.console = recipe, out, console
        self.cache, self.material = Cache(out / "stages"), Material(recipe)
        self.judge = Judge(self.cache, self.material)
        self.last: Subject | None = None  # the model that was judged last, but for packages
        self.gate = recipe.gate.build() if recipe.gate else None
        self.plain = recipe.to_mapping()
        self.entries: list[Entry] = []
        self.made: list[dict[str, Any]] = []
        self.comparison: Comparison | None = None
        self.packing = Packing(self)

    def plan(self) -> list[Planned]:
        """The steps in order, each with its key and whether it is done.

        A step hangs on the models and examples that made it, not on what judges it: more evaluation examples, or
        another gate, judge the same models anew and make nothing again.
        """
        material, recipe, make = self.material, self.recipe, self.cache.key
        _ = material.cuts, material.elsewhere  # what cannot be judged by is told before anything is made
        seed = recipe.seed
        cut_at = [recipe.data.max_length, recipe.data.max_seconds]
        key = make("teacher", task=recipe.task, limits=cut_at, model=lineage.identity(material.teacher, seed))
        teacher = key
        steps = [self._planned("0-teacher", key)]
        if recipe.student:
            own = recipe.student
            digest = Checkpoint(own.checkpoint, own.weights).digest() if own.checkpoint else None
            cut_by = material.student_examples.digest if material.student_examples else None
            key = make("student", previous=key, settings=settings_of(own), sha256=digest, examples=cut_by, seed=seed)
            steps.append(self._planned("1-student", key, whole=not recipe.stages))
        others = [
            [*lineage.identity(model, seed), spec.weight]
            for model, spec in zip(material.other_teachers, recipe.other_teachers, strict=True)
        ]
        for index, (spec, stage) in enumerate(zip(recipe.stages, recipe.build_stages(STAGES), strict=True)):
            train = material.lesson_examples[0].digest
            key = make(spec.name, previous=key, settings=settings_of(stage), train=train, seed=seed, others=others)
            steps.append(self._planned(f"{index + 2}-{spec.name}", key))
        if recipe.targets:
            steps += self.packing.plan(key, teacher)
        return steps

    def _planned(self, step: str, key: str, whole: bool = True) -> Planned:
        return Planned(step, key, self.cache.done(step, key), self.judge.predicted(key, whole))

    def __call__(self) -> None:
        """Walk the road; what is done already is taken from the run's folder.

        Raises:
            GateFailed: a stage missed its limits, or, after all of them were made, a package did.
        """
        model = self.last_model(self.plan())
        if self.recipe.targets:
            self.comparison = self.packing(model)
            self._stop_if_failed()

    def last_model(self, plan: list[Planned]) -> Model:
        """The model that the stages leave, made or taken from the run's folder.

        Raises:
            GateFailed: a stage missed its limits.
        """
        self.keys = {planned.step: planned.key for planned in plan}
        self.material.find_leaks(self.cache)
        self._teacher("0-teacher")
        model = self._student("1-student")
        stages = self.recipe.build_stages(STAGES)
        for index, (spec, stage) in enumerate(zip(self.recipe.stages, stages, strict=True)):
            model = self._stage(f"{index + 2}-{spec.name}", spec.name, stage, model)
            publish_student(self.out, self.about(), self.entries, self.material.warnings, self.say)
        return model

    def ledger(self) -> Ledger:
        """What is known so far."""
        found = [f"{entry.name}: {sentence}" for entry in self.entries for sentence in entry.findings]
        warnings, leaks = [*self.material.warnings, *found], self.material.leaks
        versions = lineage.versions()
        machine, licences = lineage.machine(), self.licences.to_json()
        return Ledger(self.plain, self.entries, machine, versions, self.comparison, warnings, leaks, licences)

    # The steps.

    def _teacher(self, step: str) -> None:
        """Predict the evaluation set with the teacher, once."""
        teacher, key = self.material.teacher, self.keys[step]
        name = lineage.short(teacher.checkpoint.source)
        if not self.cache.done(step, key):
            with self.cache.making(step, key) as (_folder, record):
                record |= {"size_bytes": teacher.parameters * 4, "seconds": 0.0}  # bytes of the weights as they run
        self.say("teacher", f"{name}: {teacher.core.in_words()}" if isinstance(teacher.core, OnnxModule) else name)
        self._enter("teacher", "teacher", name, teacher, step)
        if self.gate:
            self.gate.check(self.entries[0].scorecard, has_classes=bool(self.material.cuts))
        self.judge.check_teacher(self.gate)

    def _student(self, step: str) -> Model:
        """The student before training; the teacher itself when no student is asked for."""
        spec, stages = self.recipe.student, self.recipe.stages
        if spec is None:
            return self.material.new_student() if stages else self.material.teacher
        settings = TypeAdapter(type(spec)).dump_python(spec, mode="json", exclude_defaults=True)
        what = lineage.short(Student(**dataclasses.asdict(spec)).in_words(self.material.teacher))
        settings |= {name: lineage.short(settings[name]) for name in ("checkpoint", "weights") if settings.get(name)}
        model = self._made(step, "student", what, settings, lambda: (self.material.new_student(), {}))
        self._enter("student", "start" if stages else "stage", what, model, step)
        self._tell_left_out(model)
        self._stop_if_failed()
        return model

    def _tell_left_out(self, student: Model) -> None:
        """What the teacher says of tokens that the student has no more."""
        places = meeting_of(student, self.material.teacher).columns
        if places is None:
            return
        assert self.judge.teacher
        share = share_outside(self.judge.rows(self.judge.teacher), places.numpy())
        self.material.warn(
            f"The student has {len(places):,} of the teacher's tokens; on {self.material.eval.name} the teacher gives "
            f"{share:.2%} of its probability to the others, which the student spells."
        )

    def _stage(self, step: str, name: str, stage: Any, model: Model) -> Model:
        """One stage: train, judge, gate."""
        settings = settings_of(stage)
        what, work = in_words(settings), self.cache.folder / f"{WORK}{step}-{self.keys[step][:10]}"
        work.mkdir(parents=True, exist_ok=True)
        trained = self._made(step, name, what, settings, lambda: (model, self._train(stage, model, work)))
        shutil.rmtree(work)
        if hasattr(stage, "notes"):  # a stage may say what a reader should know, from its log
            for sentence in stage.notes(self._record(step)["log"]):
                self.material.warn(sentence)
        self._enter(name, "stage", what, trained, step)
        self._stop_if_failed()
        return trained

    def _train(self, stage: Any, model: Model, work: Path) -> dict[str, Any]:
        """Train, together with the other processes where there are some; what is to be recorded."""
        last, number = self.entries[-1], self.recipe.build_stages(STAGES).index(stage)
        student = None if last.kind == "teacher" else str(self.out / last.folder / "checkpoint")
        lesson = self.lesson(work)
        with crew.called(stage=number, student=student, work=str(work)):
            log = stage(model, lesson)
        return {"log": log, "likeness": compared(stage, model, lesson)}

    def lesson(self, work: Path) -> Lesson:
        """What a training stage works with; `work` holds its checkpoints."""
        return self.material.lesson(work, self.recipe.teacher_outputs or self.cache.folder)

    def _made(
        self,
        step: str,
        name: str,
        what: str,
        settings: dict[str, Any],
        make: Callable[[], tuple[Model, dict[str, Any]]],
    ) -> Model:
        """A step's checkpoint, made now or taken from the cache; `make` gives what to record beside."""
        key = self.keys[step]
        if not self.cache.done(step, key):
            self.say(name, what)
            started, began = time.monotonic(), lineage.now()
            with self.cache.making(step, key) as (folder, record):
                with metered() as energy:
                    model, beside = make()
                checkpoint = folder / "checkpoint"
                checkpoint.mkdir()
                model.save(checkpoint)
                record |= {"size_bytes": size_bytes(checkpoint / WEIGHTS)} | beside
                record["seconds"] = time.monotonic() - started
                own = read_json(checkpoint / RECORD) if (checkpoint / RECORD).is_file() else {}
                record["stage"] = {
                    "name": name,
                    "settings": settings,
                    "seconds": record["seconds"],
                    "started": began,
                    "energy": energy,
                    "code": lineage.code(),
                    "machine": lineage.machine(),
                    "files": {one: found for one, found in sha256_each(checkpoint).items() if one != RECORD},
                }
                write_json(checkpoint / RECORD, sealed(own | self.lineage([*self.made, record["stage"]])))
        done = self._record(step)
        self.made.append(done.get("stage") or {"name": name, "settings": settings, "seconds": done["seconds"]})
        return self.material.load(self.cache.place(step, key) / "checkpoint")

    def _record(self, step: str) -> dict[str, Any]:
        """What was recorded of a step that is done."""
        record: dict[str, Any] = read_json(self.cache.place(step, self.keys[step]) / "record.json")
        return record

    # Measuring, judging and recording.

    def measured(self, name: str, steps: list[str], kind: Any, measure: Callable[[], Any]) -> Any:
        """A measurement of packages, taken again only when what made them, the settings or the machine changed."""
        key = self.cache.key(
            "measurement",
            of=name,
            packages=[self.keys[step] for step in steps],
            profile=self.recipe.profile.model_dump(),
            form=[one.name for one in dataclasses.fields(kind)],
            machine=lineage.machine(),
        )
        if not self.cache.done("measured", key):
            self.say("profile", name)
            with self.cache.making("measured", key) as (_folder, record):
                record["value"] = TypeAdapter(kind).dump_python(measure(), mode="json")
        record = read_json(self.cache.place("measured", key) / "record.json")
        return TypeAdapter(kind).validate_python(record["value"])

    def _enter(self, name: str, kind: Any, what: str, model: Model, step: str) -> None:
        """Judge a checkpoint's step and add it to the ledger."""
        subject = Subject(self.keys[step], model.encode, lambda: TorchPredictor(model, f"the {name}", best_device()))
        found = self.judge(subject, after=self.last, whole=kind == "stage")
        self.last, record = subject, self._record(step)
        self.entries.append(
            Entry(
                name=name,
                kind=kind,
                what=what,
                verdict=verdict_on(found, self.gate) if kind == "stage" else None,
                parameters=model.parameters,
                size_bytes=record["size_bytes"],
                seconds=record["seconds"],
                folder=str(self.cache.place(step, self.keys[step]).relative_to(self.out)),
                log=record.get("log"),
                likeness=likeness_from_json(record.get("likeness")),
                **vars(found),
            )
        )

    def _stop_if_failed(self) -> None:
        failed = self.ledger().failed
        if failed:
            if old := stale(self.out, self.entries):
                self.material.warn(f"{', '.join(old)}: from an earlier run, and not passed by these limits.")
            raise GateFailed("; ".join(failure_in_words(entry, self.out) for entry in failed))

    def lineage(self, stages: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Where a step's result comes from; without stages, those up to now."""
        teacher, others, student = self._begun
        made = lineage.lineage(
            self.recipe.task,
            self.recipe.seed,
            teacher,
            self.material.sources(),
            self.made if stages is None else stages,
            others=others,
            student=student,
        )
        return with_licences(made, self.licences)

    def about(self) -> About:
        """What a model card is written of, beside the ledger."""
        return About(self.plain, self.licences, self.material.sources())

    @cached_property
    def licences(self) -> Verdict:
        """The verdict on the licences of what the recipe names; raises InputError where a source says two things."""
        return verdict_of_recipe(self.recipe)

    @cached_property
    def _begun(self) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any] | None]:
        """What the run starts from: the teacher, further ones, and the checkpoint that the student was given."""
        recipe, material = self.recipe, self.material
        teacher = lineage.origin_of(material.teacher, recipe.teacher.api)
        others = [
            lineage.origin_of(model) | {"weight": spec.weight}
            for model, spec in zip(material.other_teachers, recipe.other_teachers, strict=True)
        ]
        given = recipe.student.checkpoint if recipe.student else None
        student = lineage.origin(Checkpoint(given, recipe.student.weights)) if recipe.student and given else None
        return teacher, others, student

    def say(self, step: str, what: str) -> None:
        """Tell which step it is."""
        self.console.print(f"[bold]{escape(step)}[/] [dim]{escape(what)}[/]", highlight=False)
