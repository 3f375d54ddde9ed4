"""The folder that ships: the model in a target's number formats, what feeds it, its proof and its golden samples."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from potstill.export.graph import Parity, export_graph, fix_shapes
from potstill.export.quantize import Quantized, as_trained, fits, quantize, scheme_for
from potstill.export.search import Judging, Limits, Start, helps, search, searchable
from potstill.export.search_record import Search
from potstill.targets.host import here, runs_here
from potstill.targets.request import GOLDEN_FORMAT
from potstill.targets.target import Hardware, ModelForm, Quantize, Runtime, Scheme, Target
from potstill.validate.data import Examples
from potstill.validate.encoder import Encoder, TextEncoder
from potstill.validate.errors import InputError
from potstill.validate.files import read_json, sha256_file, size_bytes, whole_folder, write_json, write_text
from potstill.validate.gate import Verdict
from potstill.validate.predictor import OnnxPredictor
from potstill.validate.quantized import FakeQuantized
from potstill.validate.scorecard import Scorecard
from potstill.validate.task import Model

GOLDEN_SAMPLES = 4
GOLDEN_TOLERANCE = {  # of the largest logit; other processors round otherwise, see docs/decisions.md
    "float32": 1e-3,
    "float16": 2e-2,
    "static": 1e-1,
    "dynamic": 1e-1,
}
Judge = Callable[[OnnxPredictor, int, tuple[str, ...]], tuple[Scorecard, Verdict | None]]
MANIFEST, MODEL, GOLDEN = "manifest.json", "model.onnx", "golden"


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

    def formats(self) -> str:
        """Its number formats in words, with what is in float and how that was found."""
        made = self.quantized
        left = f"{made.left_float} of {made.weighted} weighted nodes in float"
        told = [made.scheme, *made.repaired, left if made.left_float and made.scheme != "float32" else ""]
        return ", ".join(filter(None, [*told, self.search.in_words() if self.search else ""]))


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
        encode = package_encoder(model.encode, target)
        graph = _fixed(encode, source, aside, target)
        if source == order.graph:
            quantized = quantize(graph, aside / MODEL, scheme, calibrate, encode, order.seed)
        else:
            quantized = as_trained(graph, aside / MODEL, scheme, order.graph)
        _check_size(_model_bytes(aside), target)
        scorecard, verdict = judge(open_package(aside, model, target), _model_bytes(aside), ())
        found = None
        if order.limits and verdict and helps(verdict) and calibrate and source == order.graph and searchable(scheme):
            start = Start(
                graph, aside / MODEL, (scorecard, verdict), scheme, model, encode, calibrate, order.seed,
                target.runtime.session_options,
            )  # fmt: skip
            found, made, scorecard, verdict = search(start, order.limits, _judging(judge, model, target))
            quantized = made or quantized
        if order.trained and source == order.graph:
            quantized = replace(quantized, scheme=f"{quantized.scheme}, from the float weights")
        if graph != source:
            for part in aside.glob(f"{graph.name}*"):
                part.unlink()
        model_bytes = _model_bytes(aside)
        _check_size(model_bytes, target)
        package = Package(
            folder=folder,
            target=target.id,
            quantized=quantized,
            scorecard=scorecard,
            verdict=verdict,
            checked=_checked(target),
            model_bytes=model_bytes,
            seconds=time.monotonic() - started,
            search=found,
        )
        predictor = open_package(aside, model, target)
        _write_sources(aside, model)
        write_golden(aside / GOLDEN, predictor, golden, GOLDEN_TOLERANCE[scheme.method], model.output)
        write_text(aside / "README.md", card(package))
        write_json(aside / MANIFEST, _manifest(package, target, order, aside, model))
    return package


def _model_bytes(folder: Path) -> int:
    return sum(size_bytes(path) for path in folder.glob(f"{MODEL}*"))


def _judging(judge: Judge, model: Model, target: Target) -> Judging:
    """What judges the model files of a search as it judges the package's."""

    def judged(path: Path, left: tuple[str, ...]) -> tuple[Scorecard, Verdict]:
        card, verdict = judge(_open(path, model, target), size_bytes(path), left)
        assert verdict
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


def _fixed(encode: Encoder, graph: Path, aside: Path, target: Target) -> Path:
    """The graph with static shapes where the target wants them."""
    if target.model.shapes == "dynamic":
        return graph
    fixed = aside / "fixed.onnx"
    fix_shapes(graph, fixed, encode, encode.max_length if isinstance(encode, TextEncoder) else None)
    return fixed


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
    found |= {"search": manifest.get("search")}
    return TypeAdapter(Package).validate_python(found)


def reseal(
    folder: Path,
    target: Target,
    scorecard: Scorecard,
    verdict: Verdict | None,
    data: dict[str, Any],
    card: Callable[[Package], str],
) -> Package:
    """Bring a package's manifest and card up to what it was judged by since it was made; the model stays.

    Args:
        folder: of the package.
        target: that it is for.
        scorecard: of the file, on this machine.
        verdict: the gate's; None without a gate.
        data: for the lineage: the sets of examples.
        card: gives the text of the package's README.
    """
    manifest, readme = read_json(folder / MANIFEST), folder / "README.md"
    package = replace(read_package(folder), scorecard=scorecard, verdict=verdict, checked=_checked(target))
    text = card(package)
    if not readme.is_file() or readme.read_text(encoding="utf-8") != text:
        write_text(readme, text)
    now = manifest | {"scorecard": scorecard.to_json(), "verdict": _plain(verdict) if verdict else None}
    now |= {"checked": package.checked, "lineage": manifest["lineage"] | {"data": data}}
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


def _checked(target: Target) -> dict[str, Any]:
    """Where the scorecard was made, and whether that machine computes as the target does."""
    same, why = runs_here(target)
    return {"provider": "CPUExecutionProvider", "machine": here().cpu, "as_target": same, "note": why}


def _write_sources(folder: Path, model: Model) -> None:
    """Config, tokenizer or processor where optimum and transformers.js look; the class names for a module."""
    core: Any = model.core
    model.encode.save(folder)
    if hasattr(core, "config"):
        core.config.save_pretrained(folder)
        _open_in_older(folder)
    else:
        write_json(folder / "labels.json", list(model.labels))


def _open_in_older(folder: Path) -> None:
    """Name the tokenizer by the class that every transformers release knows."""
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = read_json(path)
        if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for it
            write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_golden(
    folder: Path, predictor: OnnxPredictor, examples: Examples, tolerance: float, output: str = "logits"
) -> None:
    """Write inputs and expected outputs as raw little-endian files with an index that any language can read.

    `golden.json`: `samples`, each with `inputs` and `outputs` by name: `file`, `dtype`, `shape`, and for outputs
    `atol`, the largest absolute difference to expect: `tolerance` times the largest logit.
    """
    samples: list[dict[str, Any]] = []
    folder.mkdir()
    for i in range(min(GOLDEN_SAMPLES, len(examples))):
        inputs = predictor.encode(examples.rows([i]))
        inputs = {name: inputs[name] for name in predictor.input_types}
        logits = predictor.run(inputs)
        atol = tolerance * float(np.abs(logits).max())
        samples.append(
            {
                "inputs": {name: _raw(folder, f"{i}.{name}.bin", array) for name, array in inputs.items()},
                "outputs": {output: _raw(folder, f"{i}.{output}.bin", logits) | {"atol": atol}},
            }
        )
    write_json(folder / "golden.json", {"format": GOLDEN_FORMAT, "byte_order": "little", "samples": samples})


def _raw(folder: Path, name: str, array: NDArray[Any]) -> dict[str, Any]:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    (folder / name).write_bytes(little.tobytes())
    return {"file": name, "dtype": array.dtype.name, "shape": list(array.shape)}


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


def write_reference(folder: Path, model: Model, examples: Examples, opset: int) -> None:
    """A float32 graph with golden samples and the least of a manifest: something to time packages against.

    Raises:
        InputError, PotstillError: as `export_graph`.
    """
    folder.mkdir(parents=True)
    export_graph(model.in_float(), examples, folder / MODEL, opset)
    predictor = OnnxPredictor(folder / MODEL, model.encode, "the teacher's graph")
    write_golden(folder / GOLDEN, predictor, examples, GOLDEN_TOLERANCE["float32"], model.output)
    write_json(folder / MANIFEST, {"format": "potstill-package/1", "target": REFERENCE.model_dump(mode="json")})


_FLOAT32 = Scheme(method="float32", why="the reference is not quantised")
REFERENCE = Target(
    id="teacher",
    title="the teacher's float32 graph on a CPU",
    hardware=Hardware(kind="laptop", arch="x86_64", accelerator="cpu"),
    runtime=Runtime(name="onnxruntime", providers=["CPUExecutionProvider"]),
    model=ModelForm(shapes="dynamic"),
    quantize=Quantize(convolution=_FLOAT32, matmul=_FLOAT32),
)
