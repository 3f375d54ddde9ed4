"""One recipe from start to end: each step made or taken from the cache, judged against the teacher, and gated."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from rich.console import Console

from potstill.compress.lesson import Lesson
from potstill.compress.likeness import likeness_from_json
from potstill.compress.student import Student
from potstill.export.graph import Parity, export_graph
from potstill.export.package import MANIFEST, MODEL, Order, Package, make_package, write_reference
from potstill.pipeline import lineage
from potstill.pipeline.cache import WORK, Cache
from potstill.pipeline.card import model_card
from potstill.pipeline.examined import examined
from potstill.pipeline.ledger import Entry, Ledger, failure_in_words, package_entry
from potstill.pipeline.material import Material
from potstill.pipeline.ranks import crew
from potstill.pipeline.recipe import Recipe
from potstill.pipeline.stages import STAGES, compared, in_words, settings_of
from potstill.targets import local
from potstill.targets.measurement import Comparison, Measurement
from potstill.targets.target import load_target
from potstill.validate.checkpoint import RECORD, WEIGHTS, Checkpoint
from potstill.validate.errors import GateFailed
from potstill.validate.files import read_json, sha256_file, size_bytes, whole_folder, write_json, write_text
from potstill.validate.flips import flips
from potstill.validate.predictor import Predictor, TorchPredictor, best_device, predict
from potstill.validate.quantized import FakeQuantized
from potstill.validate.scorecard import Scorecard, scorecard_from_json
from potstill.validate.task import Model

OPSET = 20
TRAINED = "trained.onnx"  # the graph that holds the integers of quantisation-aware training


@dataclasses.dataclass(frozen=True)
class Planned:
    """A step before its turn: its folder's name, the hash of all that it depends on, and whether it is done."""

    step: str
    key: str
    done: bool


class Run:
    """A recipe at work in a folder.

    The folder:
        stages/      one folder for each step and its settings: a checkpoint and its log, or a scorecard
        student/     the checkpoint that passed last
        packages/    one folder for each target
        ledger.json, report.html, recipe.yaml
    """

    def __init__(self, recipe: Recipe, out: Path, console: Console) -> None:
        self.recipe, self.out, self.console = recipe, out, console
        self.cache, self.material = Cache(out / "stages"), Material(recipe)
        self.gate = recipe.gate.build() if recipe.gate else None
        self.plain = recipe.to_mapping()
        self.entries: list[Entry] = []
        self.made: list[dict[str, Any]] = []
        self.comparison: Comparison | None = None

    def plan(self) -> list[Planned]:
        """The steps in order, each with its key and whether it is done.

        A step hangs on the models and examples that made it, not on the evaluation set: more evaluation
        examples judge the same student anew and train nothing again.
        """
        material, recipe, make = self.material, self.recipe, self.cache.key
        _ = material.cuts  # a column that cannot be sliced by is told before anything is made
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
            steps.append(self._planned("1-student", key))
        others = [
            [*lineage.identity(model, seed), spec.weight]
            for model, spec in zip(material.other_teachers, recipe.other_teachers, strict=True)
        ]
        for index, (spec, stage) in enumerate(zip(recipe.stages, recipe.build_stages(STAGES), strict=True)):
            train = material.lesson_examples[0].digest
            key = make(spec.name, previous=key, settings=settings_of(stage), train=train, seed=seed, others=others)
            steps.append(self._planned(f"{index + 2}-{spec.name}", key))
        if recipe.targets:
            samples = material.samples.digest
            key = make("graph", previous=key, opset=OPSET, samples=samples)
            steps.append(self._planned("graph", key))
            for name in recipe.targets:
                target = load_target(name).model_dump(mode="json")
                gate, judged_on = str(self.gate), material.eval.digest
                step_key = make("package", graph=key, target=target, gate=gate, eval=judged_on, seed=seed)
                manifest = self.out / "packages" / target["id"] / MANIFEST
                done = manifest.is_file() and read_json(manifest).get("key") == step_key
                steps.append(Planned(f"packages/{target['id']}", step_key, done))
            steps.append(self._planned("reference", make("reference", teacher=teacher, opset=OPSET, samples=samples)))
        return steps

    def _planned(self, step: str, key: str) -> Planned:
        return Planned(step, key, self.cache.done(step, key))

    def _judged_key(self, key: str) -> str:
        """The key of a model's scorecard, from the model's and the teacher's keys and the evaluation set."""
        return self.cache.key("judged", model=key, teacher=self.keys["0-teacher"], eval=self.material.eval.digest)

    def __call__(self) -> None:
        """Walk the road; what is done already is taken from the run's folder.

        Raises:
            GateFailed: a stage missed its limits, or, after all of them were made, a package did.
        """
        self.keys = {planned.step: planned.key for planned in self.plan()}
        self.material.find_leaks(self.cache)
        self._teacher("0-teacher")
        model = self._student("1-student")
        stages = self.recipe.build_stages(STAGES)
        for index, (spec, stage) in enumerate(zip(self.recipe.stages, stages, strict=True)):
            model = self._stage(f"{index + 2}-{spec.name}", spec.name, stage, model)
            self._publish_student()
        if self.recipe.targets:
            self._packages(model)

    def ledger(self) -> Ledger:
        """What is known so far."""
        warnings, leaks = list(self.material.warnings), self.material.leaks
        versions = lineage.versions()
        return Ledger(self.plain, self.entries, lineage.machine(), versions, self.comparison, warnings, leaks)

    # The steps.

    def _teacher(self, step: str) -> None:
        """Predict the evaluation set with the teacher, once."""
        teacher, key = self.material.teacher, self.keys[step]
        name = _short(teacher.checkpoint.source)
        if not self.cache.done(step, key):
            with self.cache.making(step, key) as (_folder, record):
                record |= {"size_bytes": teacher.parameters * 4, "seconds": 0.0}  # bytes of the weights as they run
        self._say("teacher", name)
        judged = self._judged(teacher, key, "teacher")
        self.teacher_logits: NDArray[np.floating] = np.load(judged / "logits.npy", mmap_mode="r")
        self._enter("teacher", "teacher", name, teacher, self.cache.place(step, key), judged)
        if self.gate:
            self.gate.check(self.entries[0].scorecard)

    def _student(self, step: str) -> Model:
        """The student before training; the teacher itself when no student is asked for."""
        spec, stages = self.recipe.student, self.recipe.stages
        if spec is None:
            return self.material.new_student() if stages else self.material.teacher
        settings = TypeAdapter(type(spec)).dump_python(spec, mode="json", exclude_defaults=True)
        what = _short(Student(**dataclasses.asdict(spec)).in_words(self.material.teacher))
        model, place = self._made(step, "student", what, settings, lambda: (self.material.new_student(), {}))
        judged = self._judged(model, self.keys[step], "student")
        self._enter("student", "start" if stages else "stage", what, model, place, judged)
        self._stop_if_failed()
        return model

    def _stage(self, step: str, name: str, stage: Any, model: Model) -> Model:
        """One stage: train, judge, gate."""
        settings = settings_of(stage)
        what, work = in_words(settings), self.cache.folder / f"{WORK}{step}-{self.keys[step][:10]}"
        work.mkdir(parents=True, exist_ok=True)
        trained, place = self._made(step, name, what, settings, lambda: (model, self._train(stage, model, work)))
        shutil.rmtree(work)
        if hasattr(stage, "notes"):  # a stage may say what a reader should know, from its log
            for sentence in stage.notes(read_json(place / "record.json")["log"]):
                self.material.warn(sentence)
        self._enter(name, "stage", what, trained, place, self._judged(trained, self.keys[step], name))
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
    ) -> tuple[Model, Path]:
        """A step's checkpoint, made now or taken from the cache; `make` gives what to record beside."""
        key = self.keys[step]
        if not self.cache.done(step, key):
            self._say(name, what)
            started = time.monotonic()
            with self.cache.making(step, key) as (folder, record):
                model, beside = make()
                checkpoint = folder / "checkpoint"
                checkpoint.mkdir()
                model.save(checkpoint)
                record |= {"size_bytes": size_bytes(checkpoint / WEIGHTS)} | beside
                record["seconds"] = time.monotonic() - started
                own = read_json(checkpoint / RECORD) if (checkpoint / RECORD).is_file() else {}
                stage = {"name": name, "settings": settings, "seconds": record["seconds"]}
                write_json(checkpoint / RECORD, own | self._lineage([*self.made, stage]))
        place = self.cache.place(step, key)
        record = read_json(place / "record.json")
        self.made.append({"name": name, "settings": settings, "seconds": record["seconds"]})
        return self.material.load(place / "checkpoint"), place

    def _packages(self, model: Model) -> None:
        """A package for each target, all of them before a failed gate stops the run; then all timed in turn."""
        graphs = self._graphs(model)
        packages = [self._package(model, name, *graphs) for name in self.recipe.targets]
        reference, threads = self._reference(), self.recipe.profile.threads or 1
        self.comparison = self._measured(
            "comparison",
            packages,
            Comparison,
            lambda: local.compare([reference, *packages], runs=self.recipe.profile.runs, threads=threads),
        )
        self._stop_if_failed()

    def _graphs(self, model: Model) -> tuple[Path, Parity, tuple[Path, Parity] | None]:
        """The float32 graph, and after quantisation-aware training that with the trained integers; for all targets."""
        key = self.keys["graph"]
        if not self.cache.done("graph", key):
            self._say("graph", f"torch to ONNX, opset {OPSET}, compared with torch")
            with self.cache.making("graph", key) as (folder, record):
                parity = export_graph(model.in_float(), self.material.samples, folder / MODEL, OPSET)
                record["parity"] = dataclasses.asdict(parity)
                if isinstance(model.module, FakeQuantized):
                    trained = export_graph(model, self.material.samples, folder / TRAINED, OPSET)
                    record["trained"] = dataclasses.asdict(trained)
        place = self.cache.place("graph", key)
        record = read_json(place / "record.json")
        own = (place / TRAINED, Parity(**record["trained"])) if "trained" in record else None
        return place / MODEL, Parity(**record["parity"]), own

    def _package(
        self, model: Model, name: str, graph: Path, parity: Parity, trained: tuple[Path, Parity] | None
    ) -> Path:
        """One target's package, judged and profiled; an entry of the ledger."""
        target = load_target(name)
        folder, key = self.out / "packages" / target.id, self.keys[f"packages/{target.id}"]
        manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
        if manifest.get("key") != key:
            self._say(target.id, target.title)
            make_package(
                folder,
                model,
                target,
                Order(graph, parity, OPSET, self.recipe.seed, key, self._lineage(self.made), trained),
                calibrate=self.material.calibrate,
                golden=self.material.samples,
                judge=lambda predictor: self._judge_into(predictor, key, self.teacher_logits),
                gate=self.gate,
                card=lambda package: self._package_card(package, model),
            )
            manifest = read_json(folder / MANIFEST)
        self.material.check_calibration(manifest["quantization"]["calibration_examples"])
        settings = self.recipe.profile
        measurement = self._measured(
            target.id,
            [folder],
            Measurement,
            lambda: local.profile(folder, runs=settings.runs, threads=settings.threads),
        )
        judged, place = self.cache.place("judged", self._judged_key(key)), folder.relative_to(self.out)
        beyond = self._examined(judged) | {"unleaked": self.material.unleaked(judged, self.teacher_logits)}
        self.entries.append(package_entry(target.id, place, manifest, model.parameters, measurement, beyond, self.gate))
        return folder

    def _reference(self) -> Path:
        """The teacher's own float32 ONNX with golden inputs, to time the packages against."""
        key = self.keys["reference"]
        if not self.cache.done("reference", key):
            self._say("reference", "the teacher's own ONNX, to time the packages against")
            with self.cache.making("reference", key) as (folder, _record):
                write_reference(folder / "teacher", self.material.teacher, self.material.samples, OPSET)
        return self.cache.place("reference", key) / "teacher"

    # Measuring, judging and recording.

    def _judged(self, model: Model, key: str, name: str) -> Path:
        """The folder with a model's logits and scorecard on the evaluation set, made now or before."""
        if not self.cache.done("judged", self._judged_key(key)):
            teacher = None if name == "teacher" else self.teacher_logits
            self._judge_into(TorchPredictor(model, f"the {name}", best_device()), key, teacher)
        return self.cache.place("judged", self._judged_key(key))

    def _judge_into(self, predictor: Predictor, key: str, teacher: NDArray[np.floating] | None) -> Scorecard:
        """Judge, and keep the logits, the scorecard and the flips in the run's folder under the model's key."""
        examples, labels = self.material.eval, self.material.teacher.labels
        with self.cache.making("judged", self._judged_key(key)) as (folder, record):
            logits, card = self._judge(predictor, teacher, folder / "logits.npy")
            record["scorecard"] = card.to_json()
            if teacher is not None and self.material.task.gives == "class":
                record["flips"] = flips(logits, teacher, examples.labels, labels).to_json()
        return card

    def _examined(self, judged: Path) -> dict[str, Any]:
        """The flips, the slices and the calibration of a model that was judged, for its entry."""
        teacher = self.cache.place("judged", self._judged_key(self.keys["0-teacher"]))
        return examined(self.cache, self.material, judged, teacher)

    def _measured(self, name: str, packages: list[Path], kind: Any, measure: Callable[[], Any]) -> Any:
        """A measurement of packages, taken again only when a file, the settings or the machine changed."""
        key = self.cache.key(
            "measurement",
            of=name,
            packages=[sha256_file(package / MANIFEST) for package in packages],
            profile=self.recipe.profile.model_dump(),
            machine=lineage.machine(),
        )
        if not self.cache.done("measured", key):
            self._say("profile", name)
            with self.cache.making("measured", key) as (_folder, record):
                record["value"] = TypeAdapter(kind).dump_python(measure(), mode="json")
        record = read_json(self.cache.place("measured", key) / "record.json")
        return TypeAdapter(kind).validate_python(record["value"])

    def _judge(
        self, predictor: Predictor, teacher: NDArray[np.floating] | None, into: Path
    ) -> tuple[NDArray[np.float16], Scorecard]:
        """Logits, kept in a file, and scorecard on the evaluation set; without a teacher, of the teacher itself."""
        examples, before = self.material.eval, predictor.encode.truncated
        logits = predict(predictor, examples, self.material.task.length_of, into)
        truncated = predictor.encode.truncated - before
        teacher = logits if teacher is None else teacher
        return logits, self.material.task.judge(logits, teacher, examples, predictor.encode, truncated)

    def _enter(self, name: str, kind: Any, what: str, model: Model, place: Path, judged: Path) -> None:
        """Add a checkpoint's step to the ledger."""
        record = read_json(place / "record.json")
        card = scorecard_from_json(read_json(judged / "record.json")["scorecard"])
        self.entries.append(
            Entry(
                name=name,
                kind=kind,
                what=what,
                scorecard=card,
                verdict=self.gate(card) if self.gate and kind == "stage" else None,
                parameters=model.parameters,
                size_bytes=record["size_bytes"],
                seconds=record["seconds"],
                folder=str(place.relative_to(self.out)),
                log=record.get("log"),
                likeness=likeness_from_json(record.get("likeness")),
                **(self._examined(judged) if kind == "stage" else {}),
                unleaked=self.material.unleaked(judged, self.teacher_logits),
            )
        )

    def _stop_if_failed(self) -> None:
        failed = self.ledger().failed
        if failed:
            raise GateFailed("; ".join(failure_in_words(entry, self.out) for entry in failed))

    def _publish_student(self) -> None:
        """Copy the checkpoint that passed to `student/`, with its card."""
        with whole_folder(self.out / "student") as aside:
            shutil.copytree(self.out / self.entries[-1].folder / "checkpoint", aside, dirs_exist_ok=True)
            write_text(aside / "README.md", model_card("Student", self.plain, self.entries, self.material.warnings))

    def _package_card(self, package: Package, model: Model) -> str:
        self.material.check_calibration(package.quantized.calibration_examples)
        entry = Entry(
            name=package.target,
            kind="package",
            what=package.quantized.scheme,
            scorecard=package.scorecard,
            verdict=package.verdict,
            parameters=model.parameters,
            size_bytes=package.model_bytes,
            seconds=package.seconds,
            folder="",
        )
        limits = [*self.material.warnings, *([] if package.checked["as_target"] else [package.checked["note"]])]
        steps = [step for step in self.entries if step.kind != "package"]
        return model_card(f"Package for {package.target}", self.plain, [*steps, entry], limits)

    def _lineage(self, stages: list[dict[str, Any]]) -> dict[str, Any]:
        checkpoint = self.material.teacher.checkpoint
        teacher = {"source": _short(checkpoint.source), "sha256": checkpoint.digest()}
        return lineage.lineage(self.recipe.seed, teacher, self.material.sources(), stages)

    def _say(self, step: str, what: str) -> None:
        self.console.print(f"[bold]{step}[/] [dim]{what}[/]", highlight=False)


def _short(source: str) -> str:
    """The last part of a path; other names as they are."""
    path = Path(source)
    return path.name if path.exists() else source.rpartition(".")[2] if ":" in source else source
