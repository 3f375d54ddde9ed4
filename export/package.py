"""The folder that ships: the model in a target's number formats, what feeds it, its proof and its golden samples."""

import shutil
import time
from collections.abc import Callable
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import onnx
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from potstill.export.checked import checked, emulated_from, tolerance
from potstill.export.context import CONTEXT, Context, on_npu
from potstill.export.decoder_graph import is_decoder, one_token
from potstill.export.fusions import Fusions, count_fusions
from potstill.export.golden import GOLDEN, write_golden
from potstill.export.graph import Parity, fix_shapes, model_bytes, save_model
from potstill.export.language import finish
from potstill.export.manifest import hashed, manifest_of, plain
from potstill.export.modules import modules_beside
from potstill.export.ort_format import ORT, write_ort
from potstill.export.papers import PAPERS, put
from potstill.export.quantize import Quantized, as_trained, fits, quantize, scheme_for
from potstill.export.rewrites import suit
from potstill.export.search import helps, search, searchable
from potstill.export.search_files import Judging, Limits, Start
from potstill.export.search_record import Search
from potstill.export.sources import write_sources
from potstill.targets.coverage import Coverage
from potstill.targets.modules import MODULES
from potstill.targets.target import Scheme, Target
from potstill.validate.data import Examples
from potstill.validate.encoder import Encoder, TextEncoder
from potstill.validate.errors import InputError
from potstill.validate.files import read_json, sealed, whole_folder, write_json, write_text
from potstill.validate.gate import Verdict
from potstill.validate.predictor import OnnxPredictor
from potstill.validate.quantized import FakeQuantized
from potstill.validate.scorecard import Scorecard
from potstill.validate.session import CPU
from potstill.validate.task import Model
from potstill.validate.units import counted
from potstill.validate.verdict import Check, verdict_of

Judge = Callable[[OnnxPredictor, int, tuple[str, ...]], tuple[Scorecard, Verdict | None]]
MANIFEST, MODEL, BOM = "manifest.json", "model.onnx", "bom.cdx.json"


@dataclass(frozen=True)
class Package:
    """A package on disk and what was found out about it.

    Attributes:
        folder: where it is.
        target: name of the target.
        quantized: its number formats, and what stayed in floating point.
        scorecard: of ONNX Runtime running this very file.
        verdict: the gate's; None without a gate.
        checked: where the scorecard was made, and whether that computes as the target does.
        model_bytes: size of the model file(s); of the largest form of the model, where there are more than `.onnx`.
        seconds: that it took to make and judge.
        search: how the nodes that stayed in float were found; None where nothing was searched.
        not_searched: why nothing was, where the gate was missed.
        fusions: what ONNX Runtime fuses in the file; None where the target's provider is not here or not known.
        coverage: which nodes the target's provider takes; None where that is the CPU's own.
        context: what became of the context binary; None where the target wants none.
        rewritten: how many places of the graph were written otherwise for the target's provider, by what was done.
        min_version: of ONNX Runtime on the device; None where nobody knows.
    """

    folder: Path
    target: str
    quantized: Quantized
    scorecard: Scorecard
    verdict: Verdict | None
    checked: dict[str, Any]
    model_bytes: int
    seconds: float
    search: Search | None = None
    not_searched: str | None = None
    fusions: Fusions | None = None
    coverage: Coverage | None = None
    context: Context | None = None
    rewritten: dict[str, int] = field(default_factory=dict)
    min_version: str | None = None

    def formats(self) -> str:
        """Its number formats in words, with what is in float and how that was found."""
        made = self.quantized
        left = f"{made.left_float} of {counted(made.weighted, 'weighted node')} in float"
        told = [made.scheme, *made.repaired, left if made.left_float and made.scheme != "float32" else ""]
        told += [f"{made.more_bits} with 8-bit weights in blocks"] if made.more_bits else []
        return ", ".join(filter(None, [*told, self.search.in_words() if self.search else ""]))

    def on_target(self) -> list[str]:
        """Sentences on the runtime that its target needs, where it will run the nodes, and what was compiled for it."""
        context = self.context
        told = [f"The device needs ONNX Runtime {self.min_version} or newer." if self.min_version else ""]
        told += [self.coverage.in_words() if self.coverage else "", context.in_words() if context else ""]
        return [one for one in told if one]

    def findings(self) -> list[str]:
        """Sentences on what went wrong by its target's arithmetic: a crash, or outputs that are not those of here."""
        emulated, npu = emulated_from(self.checked), self.context.emulated if self.context else None
        told = [self.checked["note"]] if self.checked.get("where") == "crashed" else []
        told += [emulated.in_words()] if emulated and emulated.differs else []
        return told + ([npu.in_words()] if npu and not npu.within else [])


@dataclass(frozen=True)
class Order:
    """What a package is made of, beside the target.

    Attributes:
        graph: the float32 graph of the model.
        parity: how it compared with torch.
        opset: of that graph.
        seed: of the choice of calibration examples.
        key: a hash of all that the package depends on, kept in its manifest.
        lineage: what made the model, for the manifest.
        trained: after quantisation-aware training, the graph with the trained integers, and how it compared.
        limits: on the search for nodes to leave in float where the gate is missed; None: it is not searched.
        papers: licences and notices that go along, by the name of their file in `PAPERS`.
    """

    graph: Path
    parity: Parity
    opset: int
    seed: int
    key: str
    lineage: dict[str, Any]
    trained: tuple[Path, Parity] | None = None
    limits: Limits | None = None
    papers: dict[str, str] = field(default_factory=dict)


def make_package(
    folder: Path,
    model: Model,
    target: Target,
    order: Order,
    *,
    calibrate: Examples | None,
    golden: Examples,
    judge: Judge,
    card: Callable[["Package"], str],
) -> Package:
    """Quantise a graph for a target, judge the file as ONNX Runtime runs it, and write the package whole.

    A model that was trained in the target's own integers keeps them; for other targets it is made from its float
    weights. `quantization.scheme` in the manifest says which.

    Args:
        folder: to make.
        model: whose tokenizer or processor, classes and config go along.
        target: what the device wants.
        order: the graph and its record.
        calibrate: examples for activation ranges.
        golden: examples whose inputs and outputs an app can test itself with.
        judge: of a predictor, the bytes of its model file and what was searched (repairs, nodes left in float), its
            scorecard and the gate's verdict, if there is one.
        card: gives the text of the package's README.

    Raises:
        InputError: the target's scheme cannot be had, or its limit on the file's size is passed.
    """
    started = time.monotonic()
    with whole_folder(folder) as aside:
        scheme = scheme_for(order.graph, target)
        source, order = _source(model, order, scheme)
        some = golden if scheme.method == "float16" and calibrate is None else calibrate
        found = _write_model(aside, model, target, order, source, scheme, some, judge)
        found |= _write_beside(aside, model, target, golden, tolerance(scheme.method).largest)
        _check_size(shipped_bytes(aside), target)
        package = Package(
            folder=folder,
            target=target.id,
            checked=checked(target),
            model_bytes=shipped_bytes(aside),
            seconds=time.monotonic() - started,
            min_version=target.runtime.min_version,
            **found,
        )
        write_sources(aside, model)
        if modules_beside(source).is_file():  # graphs that were made before 2026-11-23 have none
            shutil.copyfile(modules_beside(source), aside / MODULES)
        put(aside, order.papers)
        write_text(aside / "README.md", card(package))
        write_json(aside / MANIFEST, sealed(manifest_of(package, target, order, aside, model)))
    return package


def _write_model(
    aside: Path,
    model: Model,
    target: Target,
    order: Order,
    source: Path,
    scheme: Scheme,
    calibrate: Examples | None,
    judge: Judge,
) -> dict[str, Any]:
    """Write the model file, searched where the gate is missed; what a package says of it, by name."""
    encode, own, search_ = package_encoder(model.encode, target), source == order.graph, None
    graph, rewritten = _suited(encode, source, aside, target, scheme, own)
    if own:
        quantized = quantize(graph, aside / MODEL, scheme, calibrate, encode, order.seed)
    else:
        quantized = as_trained(graph, aside / MODEL, scheme, order.graph)
    finish(graph, aside / MODEL)
    _check_size(model_bytes(aside / MODEL), target)
    scorecard, verdict = judge(open_package(aside, model, target), model_bytes(aside / MODEL), ())
    may = own and searchable(scheme) and not one_token(graph)
    if order.limits and verdict and helps(verdict) and calibrate and may:
        start = Start(
            graph, aside / MODEL, (scorecard, verdict), scheme, model, encode, calibrate, order.seed,
            target.runtime.session_options,
        )  # fmt: skip
        search_, made, scorecard, verdict = search(start, order.limits, _judging(judge, model, target))
        quantized = made or quantized
    if order.trained and own:
        quantized = replace(quantized, scheme=f"{quantized.scheme}, from the float weights")
    fusions = count_fusions(aside / MODEL, graph, target)
    if graph != source:
        for part in aside.glob(f"{graph.name}*"):
            part.unlink()
    return {
        "quantized": quantized,
        "scorecard": scorecard,
        "verdict": verdict,
        "search": search_,
        "fusions": fusions,
        "rewritten": rewritten,
    }


def _write_beside(aside: Path, model: Model, target: Target, golden: Examples, within: float) -> dict[str, Any]:
    """Write golden samples and the target's other forms of the model; what a package says of them, by name."""
    samples = write_golden(aside / GOLDEN, open_package(aside, model, target), golden, within, model.output)
    if target.model.ort:
        write_ort(aside / MODEL, target.hardware.arch, samples, within)
    context, coverage = on_npu(aside / MODEL, aside / GOLDEN, target, within)
    return {"context": context, "coverage": coverage}


def _judging(judge: Judge, model: Model, target: Target) -> Judging:
    """What judges the model files of a search as it judges the package's; one too large for the target misses."""

    def judged(path: Path, left: tuple[str, ...], encode: Encoder) -> tuple[Scorecard, Verdict]:
        card, verdict = judge(_open(path, model, target, encode), model_bytes(path), left)
        assert verdict
        try:
            _check_size(model_bytes(path), target)
        except InputError as error:
            verdict = verdict_of([*verdict.checks, Check("max_file_mb", "fail", False, str(error))])
        return card, verdict

    return judged


def _source(model: Model, order: Order, scheme: Scheme) -> tuple[Path, Order]:
    """The graph to make a package of: the one with trained integers where they are what the scheme asks for."""
    if order.trained and isinstance(model.module, FakeQuantized) and fits(model.module.formats, scheme):
        graph, parity = order.trained
        return graph, replace(order, parity=parity)
    return order.graph, order


def package_encoder(encode: Encoder, target: Target) -> Encoder:
    """What feeds a package: the model's own encoder, at one length where the target wants static shapes."""
    if target.model.shapes == "dynamic" or not isinstance(encode, TextEncoder):
        return encode
    return replace(encode, pad_to=encode.max_length, truncated=0)


def _suited(
    encode: Encoder, graph: Path, aside: Path, target: Target, scheme: Scheme, own: bool
) -> tuple[Path, dict[str, int]]:
    """The graph with static shapes where the target wants them, in operators that suit it; how many were rewritten.

    Not that of quantisation-aware training (`own` is False), nor, for a CPU, one that `quantize_static` takes: it knows
    an Add and no Sum.
    """
    static, cpu = target.model.shapes == "static", target.runtime.providers[0] == CPU
    if is_decoder(graph):
        if static:
            raise InputError(
                f"{target.id} takes fixed shapes, and what a language model keeps grows with each token; choose a "
                "target with model.shapes: dynamic"
            )
        return graph, {}
    rewrite = own and not (cpu and scheme.method == "static")
    if not static and not (cpu and rewrite):
        return graph, {}
    suited = aside / "suited.onnx"
    if static:
        fix_shapes(graph, suited, encode, encode.max_length if isinstance(encode, TextEncoder) else None)
    else:
        save_model(onnx.load(str(graph)), suited)
    return suited, suit(suited, target) if rewrite else {}


def open_package(folder: Path, model: Model, target: Target) -> OnnxPredictor:
    """A package in ONNX Runtime, fed and read as the model that it was made of."""
    return _open(folder / MODEL, model, target, package_encoder(model.encode, target))


def _open(path: Path, model: Model, target: Target, encode: Encoder) -> OnnxPredictor:
    return OnnxPredictor(
        path,
        encode,
        f"{target.id} package",
        read=model.read,
        session_options=target.runtime.session_options,
    )


def read_package(folder: Path) -> Package:
    """What the manifest of a package says of it."""
    manifest = read_json(folder / MANIFEST)
    found = {name: manifest[name] for name in ("scorecard", "verdict", "checked", "model_bytes", "seconds")}
    found |= {"folder": folder, "target": manifest["target"]["id"], "quantized": manifest["quantization"]}
    found |= {name: manifest.get(name) for name in ("search", "not_searched", "fusions", "coverage", "context")}
    found |= {"rewritten": manifest.get("rewritten", {}), "min_version": manifest["target"]["runtime"]["min_version"]}
    return TypeAdapter(Package).validate_python(found)


def reseal(
    folder: Path,
    scorecard: Scorecard,
    verdict: Verdict | None,
    not_searched: str | None,
    checked: dict[str, Any],
    lineage: dict[str, Any],
    papers: dict[str, str],
    card: Callable[[Package], str],
    bom: Callable[[Path, dict[str, Any]], str | None],
) -> Package:
    """Bring a package's manifest and card up to what it was judged by since it was made; the model stays.

    Args:
        folder: of the package.
        scorecard: of the file, on this machine.
        verdict: the gate's; None without a gate.
        not_searched: why nothing was searched, where the gate was missed.
        checked: where it was made, and how far the target's arithmetic is from it.
        lineage: its parts that may have changed: the sets of examples, the licences.
        papers: licences and notices that go along, by the name of their file.
        card: gives the text of the package's README.
        bom: gives the bill of materials of the folder with this manifest; None: it has none.
    """
    manifest, readme = read_json(folder / MANIFEST), folder / "README.md"
    package = replace(
        read_package(folder), scorecard=scorecard, verdict=verdict, not_searched=not_searched, checked=checked
    )
    text = card(package)
    if not readme.is_file() or readme.read_text(encoding="utf-8") != text:
        write_text(readme, text)
    now = manifest | {"scorecard": scorecard.to_json(), "verdict": plain(verdict) if verdict else None}
    now |= {"not_searched": not_searched, "checked": checked, "lineage": manifest["lineage"] | lineage}
    others = {name: found for name, found in manifest["files"].items() if name not in PAPERS}
    put(folder, papers)
    now |= {"files": others | {name: hashed(folder / name) for name in (readme.name, *papers)}}
    if materials := bom(folder, now):
        if not (folder / BOM).is_file() or (folder / BOM).read_text(encoding="utf-8") != materials:
            write_text(folder / BOM, materials)
        now["files"][BOM] = hashed(folder / BOM)
    now = sealed(now)
    if now != manifest:
        write_json(folder / MANIFEST, now)
    return package


def shipped_bytes(folder: Path) -> int:
    """Size of a package's model in its largest form; an app ships one: `.onnx`, `.ort` or the context binary."""
    context = sum(part.stat().st_size for part in folder.glob(f"{Path(CONTEXT).stem}*"))
    return max(model_bytes(folder / MODEL), model_bytes(folder / ORT), context)


def _check_size(model_bytes: int, target: Target) -> None:
    most = target.model.max_file_mb
    if most and model_bytes > most * 10**6:
        raise InputError(
            f"the model is {model_bytes / 1e6:.0f} MB, and {target.id} takes at most {most} MB; take a smaller student"
        )
