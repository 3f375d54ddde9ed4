"""The packages of a run: the graph of its last model, a package for each target, and what they are timed against."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from potstill.export.checked import Emulated, checked, emulated_from
from potstill.export.graph import Parity, export_graph
from potstill.export.language import float_graph
from potstill.export.package import (
    MODEL,
    Order,
    Package,
    make_package,
    open_package,
    package_encoder,
    read_package,
    reseal,
)
from potstill.export.quantize import fits, scheme_for
from potstill.export.reference import write_reference
from potstill.export.search import helps
from potstill.export.search_files import Limits
from potstill.pipeline import searching
from potstill.pipeline.cache import Planned
from potstill.pipeline.emulating import Emulation, verdict_there
from potstill.pipeline.judging import Judged, Subject, verdict_on
from potstill.pipeline.ledger import Entry, package_entry
from potstill.pipeline.lineage.additions import with_additions
from potstill.pipeline.lineage.bom import package_bom
from potstill.pipeline.lineage.card import model_card
from potstill.pipeline.lineage.terms import with_licences
from potstill.targets import profile
from potstill.targets.fallback import with_fallback
from potstill.targets.host import here
from potstill.targets.measurement import Comparison, Measurement
from potstill.targets.target import Scheme, Target, load_target
from potstill.validate.files import read_json
from potstill.validate.gate import Verdict
from potstill.validate.onnx_file import OnnxModule, opset_of
from potstill.validate.predictor import OnnxPredictor
from potstill.validate.quantized import FakeQuantized
from potstill.validate.scorecard import Scorecard
from potstill.validate.task import Model
from potstill.validate.units import counted

if TYPE_CHECKING:
    from potstill.pipeline.run import Run

OPSET = 20  # where a target has no wish
TRAINED = "trained.onnx"  # the graph that holds the integers of quantisation-aware training


def wanted_opset(target: Target) -> int:
    """The opset of a target's graph: its own wish, or `OPSET`."""
    return target.model.opset or OPSET


def graph_step(opset: int) -> str:
    """The name of the step that exports a graph; targets of the same opset share it."""
    return "graph" if opset == OPSET else f"graph-{opset}"


class Packing:
    """The last steps of a run, with what the run has: its recipe, its folder, its judge."""

    def __init__(self, run: "Run") -> None:
        self.run = run
        recipe = run.recipe
        self.emulation = Emulation(run.cache, run.judge, recipe.emulate.seconds, recipe.seed)

    def plan(self, key: str, teacher: str) -> list[Planned]:
        """The steps in order; `key` is of the last model, `teacher` the teacher's."""
        make, cache, seed, steps = self.run.cache.key, self.run.cache, self.run.recipe.seed, list[Planned]()
        samples = self.run.material.samples.digest
        targets, graphs = [load_target(name) for name in self.run.recipe.targets], dict[int, str]()
        measured = self.run.material.measured.digest if self.run.material.measured else None
        for opset in dict.fromkeys(map(wanted_opset, targets)):
            graphs[opset] = make("graph", previous=key, opset=opset, samples=samples)
            steps.append(Planned(graph_step(opset), graphs[opset], cache.done(graph_step(opset), graphs[opset])))
        for one in targets:
            target = one.model_dump(mode="json")
            step_key = make("package", graph=graphs[wanted_opset(one)], target=target, seed=seed, calibrate=measured)
            folder = self.run.out / "packages" / target["id"]
            done = searching.manifest_of(folder, step_key) is not None
            judged = self.run.judge.predicted(searching.key_of(folder, step_key, self.on_here(step_key)))
            steps.append(Planned(f"packages/{target['id']}", step_key, done, judged))
        key = make("reference", teacher=teacher, opset=OPSET, samples=samples)
        steps.append(Planned("reference", key, cache.done("reference", key)))
        return steps

    def __call__(self, model: Model) -> Comparison:
        """A package for each target, all of them before a failed gate stops the run; then all timed in turn."""
        packages = [self._package(model, load_target(name)) for name in self.run.recipe.targets]
        reference, threads = self._reference(model), self.run.recipe.profile.threads or 1
        found: Comparison = self.run.measured(
            "comparison",
            ["reference", *(f"packages/{package.name}" for package in packages)],
            Comparison,
            lambda: profile.compare([reference, *packages], runs=self.run.recipe.profile.runs, threads=threads),
        )
        return found

    def scheme(self, target: Target) -> Scheme:
        """The number formats that a target wants of the run's graph, which has been made."""
        step = graph_step(wanted_opset(target))
        return scheme_for(self.run.cache.place(step, self.run.keys[step]) / MODEL, target)

    def _graphs(self, model: Model, opset: int) -> tuple[Path, Parity, tuple[Path, Parity] | None]:
        """The float32 graph, and after quantisation-aware training that with the trained integers.

        They are made once for all targets of an opset. An ONNX file keeps its own.
        """
        step = graph_step(opset)
        key = self.run.keys[step]
        if not self.run.cache.done(step, key):
            taken = isinstance(model.module, OnnxModule)
            how = "the file's own, compared with it" if taken else f"torch to ONNX, opset {opset}, compared with torch"
            self.run.say(step, how)
            with self.run.cache.making(step, key) as (folder, record):
                made = float_graph(model, self.run.material.samples, folder / MODEL, opset)
                record |= {"parity": dataclasses.asdict(made.parity), "by": made.by, "why": made.why}
                if made.why:
                    self.run.say(step, f"by torch's exporter: {made.why}")
                if isinstance(model.module, FakeQuantized):
                    trained = export_graph(model, self.run.material.samples, folder / TRAINED, opset)
                    record["trained"] = dataclasses.asdict(trained)
        place = self.run.cache.place(step, key)
        record = read_json(place / "record.json")
        own = (place / TRAINED, Parity(**record["trained"])) if "trained" in record else None
        return place / MODEL, Parity(**record["parity"]), own

    def _package(self, model: Model, target: Target) -> Path:
        """One target's package, judged and profiled; an entry of the ledger."""
        graph, parity, trained = self._graphs(model, wanted_opset(target))
        step, folder = f"packages/{target.id}", self.run.out / "packages" / target.id
        key, limits = self.run.keys[step], searching.limits(self.run.material, self.run.cache, self.run.keys[step])
        subject = Subject(
            self.on_here(key), package_encoder(model.encode, target), lambda: open_package(folder, model, target)
        )

        def judged(package: Package) -> Judged:
            return self.run.judge(searching.known_by(subject, package), after=self.run.last)

        def missed() -> bool:
            package = read_package(folder)
            return helps(verdict_on(judged(package), self.run.gate, package.model_bytes))

        def judge(made: OnnxPredictor, size: int, left: tuple[str, ...]) -> tuple[Scorecard, Verdict | None]:
            tried = replace(subject, key=searching.key_with(subject.key, left), open=lambda: made)
            return self._first_seal(tried, size)

        if searching.to_be_made(folder, key, limits, missed):
            self.run.say(target.id, target.title)
            make_package(
                folder,
                model,
                target,
                self._order(graph, parity, trained, key, limits),
                calibrate=self.run.material.measured,
                golden=self.run.material.samples,
                judge=judge,
                card=lambda package: self._card(package, model, judged(package)),
            )
        made = read_package(folder)
        for line in made.on_target():
            self.run.say(target.id, line)
        found, known, scheme = judged(made), searching.known_by(subject, made), scheme_for(graph, target)
        self.run.keys[step] = known.key
        emulated = self.emulation(known, folder / MODEL, target, scheme.method, model.read)
        if isinstance(emulated, Emulated) or (emulated and emulated.crashed):
            self.run.say(target.id, emulated.in_words())
        said = with_fallback(verdict_on(found, self.run.gate, made.model_bytes), made.coverage, target, self.run.gate)
        there = verdict_there(said, found.scorecard, self.run.gate, emulated)
        kept = isinstance(model.module, FakeQuantized) and fits(model.module.formats, scheme)
        why = searching.not_searched(made, said, there, limits, scheme, kept, bool(self.run.material.measured))
        if why:
            self.run.say(target.id, why)
        package = reseal(
            folder,
            found.scorecard,
            there,
            why,
            checked(target, emulated),
            with_licences({"data": self.run.material.sources()}, self.run.licences),
            self.run.licences.texts,
            lambda package: self._card(package, model, found),
            package_bom,
        )
        self._enter(package, folder, model, found)
        return folder

    def _order(
        self, graph: Path, parity: Parity, trained: tuple[Path, Parity] | None, key: str, limits: Limits | None
    ) -> Order:
        """What a package is made of, with the opset that its graph has."""
        opset = opset_of(onnx.load(str(graph), load_external_data=False))
        papers = self.run.licences.texts
        return Order(graph, parity, opset, self.run.recipe.seed, key, self.run.lineage(), trained, limits, papers)

    def _enter(self, package: Package, folder: Path, model: Model, found: Judged) -> None:
        """Time a package, warn of what it lacks, and enter it in the ledger."""
        self.run.material.check_calibration(package.quantized.calibration_examples)
        for sentence in package.fusions.warnings if package.fusions else ():
            self.run.material.warn(f"{package.target}: {sentence}")
        settings = self.run.recipe.profile
        measurement = self.run.measured(
            package.target,
            [f"packages/{package.target}"],
            Measurement,
            lambda: profile.profile(folder, runs=settings.runs, threads=settings.threads),
        )
        place = folder.relative_to(self.run.out)
        self.run.entries.append(package_entry(package, place, model.parameters, measurement, found, self.run.gate))

    def on_here(self, key: str) -> str:
        """The key of a package as it runs on this machine: another one rounds otherwise, and is asked anew."""
        host = here()
        return self.run.cache.key("package on", package=key, arch=host.arch, cpu=host.cpu)

    def _first_seal(self, subject: Subject, size_bytes: int) -> tuple[Scorecard, Verdict | None]:
        """The scorecard of a package that was made just now, and the gate's verdict; nothing kept of another file."""
        self.run.judge.forget(subject)
        found = self.run.judge(subject, self.run.last)
        return found.scorecard, verdict_on(found, self.run.gate, size_bytes)

    def _reference(self, model: Model) -> Path:
        """The teacher's own float32 ONNX with golden inputs, to time the packages against.

        It is the graph of the packages where they are made of the teacher itself.
        """
        key, teacher, graph = self.run.keys["reference"], self.run.material.teacher, None
        if model is teacher and (own := self.run.keys.get(graph_step(OPSET))):
            graph = self.run.cache.place(graph_step(OPSET), own) / MODEL
        if not self.run.cache.done("reference", key):
            self.run.say("reference", "the teacher's own ONNX, to time the packages against")
            with self.run.cache.making("reference", key) as (folder, _record):
                write_reference(folder / "teacher", teacher, self.run.material.samples, OPSET, graph)
        return self.run.cache.place("reference", key) / "teacher"

    def _formats(self, package: Package) -> str:
        """A package's number formats, with what gave the ranges."""
        used, source = package.quantized.calibration_examples, self.run.material.measured
        return package.formats() + (
            f", ranges from {counted(used, 'example')} of {source.name}" if used and source else ""
        )

    def _card(self, package: Package, model: Model, found: Judged) -> str:
        self.run.material.check_calibration(package.quantized.calibration_examples)
        entry = Entry(
            name=package.target,
            kind="package",
            what=self._formats(package),
            verdict=package.verdict,
            parameters=model.parameters,
            size_bytes=package.model_bytes,
            seconds=package.seconds,
            folder="",
            as_target=package.checked["as_target"],
            emulated=emulated_from(package.checked),
            **vars(found),
        )
        note = package.checked["note"]
        limits = [*self.run.material.warnings, *([] if entry.stands_on_target else [note])]
        limits += package.fusions.warnings if package.fusions else []
        limits += [package.not_searched] if package.not_searched else []
        steps = [step for step in self.run.entries if step.kind != "package"]
        said = [*package.on_target(), *([note] if entry.emulated and entry.stands_on_target else [])]
        about, place = self.run.about(), f"packages/{package.target}"
        text = model_card(f"Package for {package.target}", about, [*steps, entry], limits, said)
        return with_additions(self.run.out, place, text, self.run.say)
