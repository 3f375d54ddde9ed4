"""The folder that ships: the model in a target's number formats, what feeds it, its proof and its golden samples."""

import time
from collections.abc import Callable
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import onnx
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from potstill.export.checked import checked, tolerance
from potstill.export.context import Context, on_npu
from potstill.export.fusions import Fusions, count_fusions
from potstill.export.golden import GOLDEN, write_golden
from potstill.export.graph import Parity, fix_shapes, model_bytes, save_model
from potstill.export.ort_format import write_ort
from potstill.export.quantize import Quantized, as_trained, fits, quantize, scheme_for
from potstill.export.rewrites import suit
from potstill.export.search import helps, search, searchable
from potstill.export.search_record import Search
from potstill.export.search_sets import Judging, Limits, Start
from potstill.targets.coverage import Coverage
from potstill.targets.target import CPU, Scheme, Target
from potstill.validate.checkpoint import LABELS
from potstill.validate.data import Examples
from potstill.validate.encoder import Encoder, TextEncoder
from potstill.validate.errors import InputError
from potstill.validate.files import read_json, sha256_file, whole_folder, write_json, write_text
from potstill.validate.gate import Verdict
from potstill.validate.predictor import OnnxPredictor
from potstill.validate.quantized import FakeQuantized
from potstill.validate.scorecard import Scorecard
from potstill.validate.task import Model
from potstill.validate.verdict import Check, verdict_of

Judge = Callable[[OnnxPredictor, int, tuple[str, ...]], tuple[Scorecard, Verdict | None]]
MANIFEST, MODEL = "manifest.json", "model.onnx"


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
        model_bytes: size of the model file(s).
        seconds: that it took to make and judge.
        search: how the nodes that stayed in float were found; None where nothing was searched.
        fusions: what ONNX Runtime fuses in the file; None where the target's provider is not here or not known.
        coverage: which nodes the target's provider takes; None where that is the CPU's own.
        context: what became of the context binary; None where the target wants none.
        rewritten: how many places of the graph were written otherwise for the target's provider, by what was done.
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
    fusions: Fusions | None = None
    coverage: Coverage | None = None
    context: Context | None = None
    rewritten: dict[str, int] = field(default_factory=dict)

    def formats(self) -> str:
        """Its number formats in words, with what is in float and how that was found."""
        made = self.quantized
        left = f"{made.left_float} of {made.weighted} weighted nodes in float"
        told = [made.scheme, *made.repaired, left if made.left_float and made.scheme != "float32" else ""]
        told += [f"{made.more_bits} with 8-bit weights in blocks"] if made.more_bits else []
        return ", ".join(filter(None, [*told, self.search.in_words() if self.search else ""]))

    def on_target(self) -> list[str]:
        """Sentences on where its target will run the nodes, and on what was compiled for it."""
        context = self.context
        told = [self.coverage.in_words() if self.coverage else "", context.in_words() if context else ""]
        return [one for one in told if one]


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
    """

    graph: Path
    parity: Parity
    opset: int
    seed: int
    key: str
    lineage: dict[str, Any]
    trained: tuple[Path, Parity] | None = None
    limits: Limits | None = None


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
        found = _write_model(aside, model, target, order, source, scheme, calibrate, golden, judge)
        _check_size(model_bytes(aside / MODEL), target)
        within = tolerance(scheme.method).largest
        samples = write_golden(aside / GOLDEN, open_package(aside, model, target), golden, within, model.output)
        if target.model.ort:
            write_ort(aside / MODEL, target.hardware.arch, samples, within)
        context, coverage = on_npu(aside / MODEL, aside / GOLDEN, target, within)
        package = Package(
            folder=folder,
            target=target.id,
            checked=checked(target),
            model_bytes=model_bytes(aside / MODEL),
            seconds=time.monotonic() - started,
            coverage=coverage,
            context=context,
            **found,
        )
        _write_sources(aside, model)
        write_text(aside / "README.md", card(package))
        write_json(aside / MANIFEST, _manifest(package, target, order, aside, model))
    return package


def _write_model(
    aside: Path,
    model: Model,
    target: Target,
    order: Order,
    source: Path,
    scheme: Scheme,
    calibrate: Examples | None,
    golden: Examples,
    judge: Judge,
) -> dict[str, Any]:
    """Write the model file, searched where the gate is missed; what a package says of it, by name."""
    encode, own, search_ = package_encoder(model.encode, target), source == order.graph, None
    graph, rewritten = _suited(encode, source, aside, target, scheme, own)
    if own:
        some = golden if scheme.method == "float16" and calibrate is None else calibrate
        quantized = quantize(graph, aside / MODEL, scheme, some, encode, order.seed)
    else:
        quantized = as_trained(graph, aside / MODEL, scheme, order.graph)
    _check_size(model_bytes(aside / MODEL), target)
    scorecard, verdict = judge(open_package(aside, model, target), model_bytes(aside / MODEL), ())
    if order.limits and verdict and helps(verdict) and calibrate and own and searchable(scheme):
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


def _judging(judge: Judge, model: Model, target: Target) -> Judging:
    """What judges the model files of a search as it judges the package's; one too large for the target misses."""

    def judged(path: Path, left: tuple[str, ...]) -> tuple[Scorecard, Verdict]:
        card, verdict = judge(_open(path, model, target), model_bytes(path), left)
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
    return _open(folder / MODEL, model, target)


def _open(path: Path, model: Model, target: Target) -> OnnxPredictor:
    return OnnxPredictor(
        path,
        package_encoder(model.encode, target),
        f"{target.id} package",
        read=model.read,
        session_options=target.runtime.session_options,
    )


def read_package(folder: Path) -> Package:
    """What the manifest of a package says of it."""
    manifest = read_json(folder / MANIFEST)
    found = {name: manifest[name] for name in ("scorecard", "verdict", "checked", "model_bytes", "seconds")}
    found |= {"folder": folder, "target": manifest["target"]["id"], "quantized": manifest["quantization"]}
    found |= {name: manifest.get(name) for name in ("search", "fusions", "coverage", "context")}
    found |= {"rewritten": manifest.get("rewritten", {})}
    return TypeAdapter(Package).validate_python(found)


def reseal(
    folder: Path,
    scorecard: Scorecard,
    verdict: Verdict | None,
    checked: dict[str, Any],
    data: dict[str, Any],
    card: Callable[[Package], str],
) -> Package:
    """Bring a package's manifest and card up to what it was judged by since it was made; the model stays.

    Args:
        folder: of the package.
        scorecard: of the file, on this machine.
        verdict: the gate's; None without a gate.
        checked: where it was made, and how far the target's arithmetic is from it.
        data: for the lineage: the sets of examples.
        card: gives the text of the package's README.
    """
    manifest, readme = read_json(folder / MANIFEST), folder / "README.md"
    package = replace(read_package(folder), scorecard=scorecard, verdict=verdict, checked=checked)
    text = card(package)
    if not readme.is_file() or readme.read_text(encoding="utf-8") != text:
        write_text(readme, text)
    now = manifest | {"scorecard": scorecard.to_json(), "verdict": _plain(verdict) if verdict else None}
    now |= {"checked": checked, "lineage": manifest["lineage"] | {"data": data}}
    now |= {"files": manifest["files"] | {readme.name: _hashed(readme)}}
    if now != manifest:
        write_json(folder / MANIFEST, now)
    return package


def _check_size(model_bytes: int, target: Target) -> None:
    most = target.model.max_file_mb
    if most and model_bytes > most * 10**6:
        raise InputError(
            f"the model is {model_bytes / 1e6:.0f} MB, and {target.id} takes at most {most} MB; take a smaller student"
        )


def _write_sources(folder: Path, model: Model) -> None:
    """Config, tokenizer or processor where optimum and transformers.js look; the class names for a module."""
    core: Any = model.core
    model.encode.save(folder)
    if hasattr(core, "config"):
        core.config.save_pretrained(folder)
        _open_in_older(folder)
    else:
        write_json(folder / LABELS, list(model.labels))


def _open_in_older(folder: Path) -> None:
    """Name the tokenizer by the class that every transformers release knows."""
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = read_json(path)
        if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for it
            write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _manifest(package: Package, target: Target, order: Order, folder: Path, model: Model) -> dict[str, Any]:
    """Everything a reader must know, with the hash of every other file of the package."""
    max_length = model.encode.max_length if isinstance(model.encode, TextEncoder) else None
    return {
        "format": "potstill-package/1",
        "key": order.key,
        "target": target.model_dump(mode="json"),
        "labels": list(model.labels),
        "quantization": _plain(package.quantized),
        "asked": order.limits.asked if order.limits else None,
        "search": _plain(package.search) if package.search else None,
        "fusions": _plain(package.fusions) if package.fusions else None,
        "coverage": _plain(package.coverage) if package.coverage else None,
        "context": _plain(package.context) if package.context else None,
        "rewritten": package.rewritten,
        "parity": _plain(order.parity),
        "opset": order.opset,
        "max_length": max_length,
        "checked": package.checked,
        "scorecard": package.scorecard.to_json(),
        "verdict": _plain(package.verdict) if package.verdict else None,
        "model_bytes": package.model_bytes,
        "seconds": package.seconds,
        "lineage": order.lineage,
        "files": {
            path.relative_to(folder).as_posix(): _hashed(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
    }


def _hashed(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def _plain(value: Any) -> dict[str, Any]:
    plain: dict[str, Any] = TypeAdapter(type(value)).dump_python(value, mode="json")
    return plain
