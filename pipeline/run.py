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
from potstill.compress.student import Student
from potstill.export.graph import Parity, export_graph
from potstill.export.package import MANIFEST, MODEL, Order, Package, make_package, write_reference
from potstill.pipeline import lineage
from potstill.pipeline.cache import WORK, Cache
from potstill.pipeline.card import model_card
from potstill.pipeline.ledger import Entry, Ledger, failure_in_words, package_entry
from potstill.pipeline.material import Material
from potstill.pipeline.ranks import crew
from potstill.pipeline.recipe import Recipe
from potstill.pipeline.stages import STAGES
from potstill.targets import local
from potstill.targets.measurement import Comparison, Measurement
from potstill.targets.target import load_target
from potstill.validate.checkpoint import RECORD, WEIGHTS, Checkpoint
from potstill.validate.errors import GateFailed
from potstill.validate.files import read_json, sha256_file, size_bytes, whole_folder, write_json, write_text
from potstill.validate.gate import Gate, parse_limit
from potstill.validate.predictor import Predictor, TorchPredictor, best_device, predict
from potstill.validate.scorecard import Scorecard, judge, scorecard_from_json
from potstill.validate.task import Model

OPSET = 20
Log = list[dict[str, float]]


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
        self.gate = Gate(parse_limit(recipe.gate.max_drop)) if recipe.gate else None
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
        seed = recipe.seed
        key = make(
            "teacher", task=recipe.task, max_length=recipe.data.max_length, model=_identity(material.teacher, seed)
        )
        teacher = key
        steps = [self._planned("0-teacher", key)]
        if recipe.student:
            own = recipe.student
            digest = Checkpoint(own.checkpoint, own.weights).digest() if own.checkpoint else None
            key = make("student", previous=key, settings=own.model_dump(mode="json"), sha256=digest, seed=seed)
            steps.append(self._planned("1-student", key))
        for index, (spec, stage) in enumerate(zip(recipe.stages, recipe.build_stages(STAGES), strict=True)):
            train = material.lesson_examples[0].digest
            key = make(spec.name, previous=key, settings=_settings(stage), train=train, seed=seed)
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
        warnings = self.material.warnings
        return Ledger(self.plain, self.entries, lineage.machine(), lineage.versions(), self.comparison, list(warnings))

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
        self.teacher_logits: NDArray[np.float32] = np.load(judged / "logits.npy", mmap_mode="r")
        self._enter("teacher", "teacher", name, teacher, self.cache.place(step, key), judged)

    def _student(self, step: str) -> Model:
        """The student before training; the teacher itself when no student is asked for."""
        spec, stages = self.recipe.student, self.recipe.stages
        if spec is None:
            return self.material.new_student() if stages else self.material.teacher
        settings = spec.model_dump(mode="json", exclude_none=True)
        what = _short(Student(**spec.model_dump()).in_words(self.material.teacher))
        model, place = self._made(step, "student", what, settings, lambda: (self.material.new_student(), None))
        judged = self._judged(model, self.keys[step], "student")
        self._enter("student", "start" if stages else "stage", what, model, place, judged)
        self._stop_if_failed()
        return model

    def _stage(self, step: str, name: str, stage: Any, model: Model) -> Model:
        """One stage: train, judge, gate."""
        settings = _settings(stage)
        what, work = _in_words(settings), self.cache.folder / f"{WORK}{step}-{self.keys[step][:10]}"
        work.mkdir(parents=True, exist_ok=True)
        trained, place = self._made(step, name, what, settings, lambda: (model, self._train(stage, model, work)))
        shutil.rmtree(work)
        self._enter(name, "stage", what, trained, place, self._judged(trained, self.keys[step], name))
        self._stop_if_failed()
        return trained

    def _train(self, stage: Any, model: Model, work: Path) -> Log:
        """Train, together with the other processes where there are some."""
        last, number = self.entries[-1], self.recipe.build_stages(STAGES).index(stage)
        student = None if last.kind == "teacher" else str(self.out / last.folder / "checkpoint")
        with crew.called(stage=number, student=student, work=str(work)):
            log: Log = stage(model, self.lesson(work))
        return log

    def lesson(self, work: Path) -> Lesson:
        """What a training stage works with; `work` holds its checkpoints."""
        train, held_out = self.material.lesson_examples
        return Lesson(self.material.task, self.material.teacher, train, held_out, self.recipe.seed, work)

    def _made(
        self,
        step: str,
        name: str,
        what: str,
        settings: dict[str, Any],
        make: Callable[[], tuple[Model, Log | None]],
    ) -> tuple[Model, Path]:
        """A step's checkpoint, made now or taken from the cache."""
        key = self.keys[step]
        if not self.cache.done(step, key):
            self._say(name, what)
            started = time.monotonic()
            with self.cache.making(step, key) as (folder, record):
                model, log = make()
                checkpoint = folder / "checkpoint"
                checkpoint.mkdir()
                model.save(checkpoint)
                record |= {"size_bytes": size_bytes(checkpoint / WEIGHTS), "log": log}
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
        graph, parity = self._graph(model)
        packages = [self._package(model, name, graph, parity) for name in self.recipe.targets]
        reference, threads = self._reference(), self.recipe.profile.threads or 1
        self.comparison = self._measured(
            "comparison",
            packages,
            Comparison,
            lambda: local.compare([reference, *packages], runs=self.recipe.profile.runs, threads=threads),
        )
        self._stop_if_failed()

    def _graph(self, model: Model) -> tuple[Path, Parity]:
        """The float32 graph, exported once for all targets."""
        key = self.keys["graph"]
        if not self.cache.done("graph", key):
            self._say("graph", f"torch to ONNX, opset {OPSET}, compared with torch")
            with self.cache.making("graph", key) as (folder, record):
                parity = export_graph(model, self.material.samples, folder / MODEL, OPSET)
                record["parity"] = dataclasses.asdict(parity)
        place = self.cache.place("graph", key)
        return place / MODEL, Parity(**read_json(place / "record.json")["parity"])

    def _package(self, model: Model, name: str, graph: Path, parity: Parity) -> Path:
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
                Order(graph, parity, OPSET, self.recipe.seed, key, self._lineage(self.made)),
                calibrate=self.material.calibrate,
                golden=self.material.samples,
                judge=lambda predictor: self._judge(predictor, self.teacher_logits)[1],
                gate=self.gate,
                card=lambda package: self._package_card(package, model),
            )
            manifest = read_json(folder / MANIFEST)
        settings = self.recipe.profile
        measurement = self._measured(
            target.id,
            [folder],
            Measurement,
            lambda: local.profile(folder, runs=settings.runs, threads=settings.threads),
        )
        self.entries.append(
            package_entry(target.id, folder.relative_to(self.out), manifest, model.parameters, measurement)
        )
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
        key = self._judged_key(key)
        if not self.cache.done("judged", key):
            with self.cache.making("judged", key) as (folder, record):
                teacher = None if name == "teacher" else self.teacher_logits
                logits, card = self._judge(TorchPredictor(model, f"the {name}", best_device()), teacher)
                np.save(folder / "logits.npy", logits)
                record["scorecard"] = card.to_json()
        return self.cache.place("judged", key)

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
        self, predictor: Predictor, teacher: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32], Scorecard]:
        """Logits and scorecard on the evaluation set; without a teacher, of the teacher itself."""
        examples, before = self.material.eval, predictor.encode.truncated
        logits = predict(predictor, examples, self.material.task.length_of)
        truncated = predictor.encode.truncated - before
        return logits, judge(logits, logits if teacher is None else teacher, examples.labels, examples.name, truncated)

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
            write_text(aside / "README.md", model_card("Student", self.plain, self.entries, []))

    def _package_card(self, package: Package, model: Model) -> str:
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
        limits = [] if package.checked["as_target"] else [package.checked["note"]]
        steps = [step for step in self.entries if step.kind != "package"]
        return model_card(f"Package for {package.target}", self.plain, [*steps, entry], limits)

    def _lineage(self, stages: list[dict[str, Any]]) -> dict[str, Any]:
        material, checkpoint = self.material, self.material.teacher.checkpoint
        data = {
            key: {"name": examples.name, "sha256": examples.digest, "examples": len(examples)}
            for key, examples in (("train", material.train), ("eval", material.eval), ("calibrate", material.calibrate))
            if examples
        }
        teacher = {"source": _short(checkpoint.source), "sha256": checkpoint.digest()}
        return lineage.lineage(self.recipe.seed, teacher, data, stages)

    def _say(self, step: str, what: str) -> None:
        self.console.print(f"[bold]{step}[/] [dim]{what}[/]", highlight=False)


def _identity(model: Model, seed: int) -> list[Any]:
    """What a loaded teacher is: its content; for a hub name the revision; for a factory without weights the seed."""
    checkpoint = model.checkpoint
    revision = getattr(getattr(model.core, "config", None), "_commit_hash", None)
    drawn = seed if checkpoint.is_factory and not checkpoint.weights else None
    return [checkpoint.source, checkpoint.digest(), revision, drawn]


def _short(source: str) -> str:
    """The last part of a path; other names as they are."""
    path = Path(source)
    return path.name if path.exists() else source.rpartition(".")[2] if ":" in source else source


def _settings(stage: Any) -> dict[str, Any]:
    """All settings of a stage, defaults included."""
    plain: dict[str, Any] = TypeAdapter(type(stage)).dump_python(stage, mode="json")
    return plain


def _in_words(settings: dict[str, Any]) -> str:
    """The settings that say most of a stage."""
    words = {
        "epochs": "{:g} epochs",
        "temperature": "T {:g}",
    }
    return ", ".join(word.format(settings[name]) for name, word in words.items() if name in settings)
