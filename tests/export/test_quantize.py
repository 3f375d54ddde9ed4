"""Number formats: what is in the file, and what it computes, against numpy and the float graph."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from potstill.export.calibrate import CALIBRATION_EXAMPLES, Reader, calibration_indices
from potstill.export.graph import export_graph
from potstill.export.quantize import as_trained, in_words, prepare, quantize, scheme_for
from potstill.targets.target import Scheme, load_target
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples, load_examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError
from potstill.validate.predictor import OnnxPredictor
from potstill.validate.task import TASKS, Model

STATIC = {"method": "static", "activation": "uint8", "weight": "int8", "per_channel": True, "why": "test"}
DYNAMIC = {"method": "dynamic", "weight": "int8", "per_channel": True, "why": "test"}


def images(n: int) -> Examples:
    x = np.random.default_rng(0).normal(size=(n, 3, 12, 12)).astype(np.float32)
    return Examples("made", Arrays({"x": x}), np.zeros(n, dtype=np.int64), None, "d")


@pytest.fixture(scope="module")
def convnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    torch.manual_seed(0)
    core = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    model = Model(core, ArrayEncoder(), ("x",), ("0", "1", "2", "3"), Checkpoint("made:up"), core)
    path = tmp_path_factory.mktemp("graph") / "conv.onnx"
    export_graph(model, images(4), path, 20)
    return path, model


@pytest.fixture(scope="module")
def bert(text_teacher: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    model = TASKS["text-classification"].load(Checkpoint(str(text_teacher)))
    path = tmp_path_factory.mktemp("graph") / "bert.onnx"
    export_graph(model, load_examples(str(texts["train"]), ("text",), {"text": "sentence"}), path, 20)
    return path, model


def sqnr(path: Path, reference: Path, inputs: dict[str, Any]) -> float:
    """Signal to quantisation noise of the logits, in dB."""
    float_, int_ = (onnxruntime.InferenceSession(p).run(None, inputs)[0] for p in (reference, path))
    return float(10 * np.log10((float_**2).sum() / ((float_ - int_) ** 2).sum()))


def counts(path: Path) -> dict[str, int]:
    ops = [node.op_type for node in onnx.load(path).graph.node]
    return {op: ops.count(op) for op in set(ops)}


@pytest.mark.parametrize(
    ("changes", "least_db"),
    [
        ({}, 30),
        ({"activation": "int8"}, 30),
        ({"activation": "uint16"}, 36),
        ({"activation": "int16"}, 36),
        ({"reduce_range": True}, 26),
        ({"per_channel": False}, 26),
    ],
)
def test_static_formats(convnet: tuple[Path, Model], tmp_path: Path, changes: dict[str, Any], least_db: float) -> None:
    path, model = convnet
    scheme = Scheme(**{**STATIC, **changes})
    made = quantize(path, tmp_path / "q.onnx", scheme, images(64), model.encode, 0)
    assert (made.weighted, made.left_float, made.calibration_examples) == (3, 0, 64)
    assert sqnr(tmp_path / "q.onnx", path, {"x": images(80).rows([70])["x"]}) > least_db
    weights = [numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer if t.data_type == 3]
    largest = max(int(np.abs(w.astype(int)).max()) for w in weights if w.ndim > 1)
    assert largest <= (64 if scheme.reduce_range else 127)
    assert largest > (60 if scheme.reduce_range else 100)


def test_zero_points_of_zero_are_left_out_and_nothing_else_changes(
    convnet: tuple[Path, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = convnet
    scheme = load_target("laptop-x86-vnni").quantize.convolution
    quantize(path, tmp_path / "without.onnx", scheme, images(32), model.encode, 0)
    monkeypatch.setattr("potstill.export.static._drop_zeros", lambda path: None)
    quantize(path, tmp_path / "with.onnx", scheme, images(32), model.encode, 0)
    of = {}
    for name in ("with", "without"):
        graph = onnx.load(tmp_path / f"{name}.onnx").graph
        weights = {tensor.name for tensor in graph.initializer}
        reads = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights]
        of[name] = sum(len(node.input) == 3 for node in reads), len(reads)
        assert weights <= {one for node in graph.node for one in node.input}
    gemm = 2  # the weight and the bias of the one Gemm keep theirs
    assert of["with"][0] == of["with"][1]
    assert of["without"] == (gemm, of["with"][1])
    outputs = [OnnxPredictor(tmp_path / f"{name}.onnx", model.encode, name)(images(32).rows(range(8))) for name in of]
    np.testing.assert_array_equal(*outputs)
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in of]
    assert sizes[1] < sizes[0]


def test_a_static_weight_is_rounded_as_numpy_rounds(convnet: tuple[Path, Model], tmp_path: Path) -> None:
    path, model = convnet
    quantize(path, tmp_path / "q.onnx", Scheme(**STATIC), images(64), model.encode, 0)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    floats = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    weight = next(w for w in floats.values() if w.shape == (16, 16, 3, 3))
    found = next(w for w in tensors.values() if w.shape == (16, 16, 3, 3) and w.dtype == np.int8)
    scale = np.abs(weight).reshape(16, -1).max(axis=1) / 127
    expected = np.clip(np.rint(weight / scale[:, None, None, None]), -128, 127)
    assert (np.abs(found - expected) <= 1).all()
    assert (found == expected).mean() > 0.99


def in_float64(path: Path, x: np.ndarray) -> tuple[np.ndarray, float]:
    """A QDQ file's output by the operators' definitions, in float64; and the last step of its output."""
    graph, step = onnx.load(path).graph, 0.0
    values: dict[str, Any] = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer} | {"x": x}
    for node in graph.node:
        first, *others = (values[name] for name in node.input)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            axis = next((one.i for one in node.attribute if one.name == "axis"), 1)
            around = [-1 if i == axis else 1 for i in range(first.ndim)] if others[0].size > 1 else []
            scale, zero = (one.astype(np.float64).reshape(around) for one in others)
            limits = np.iinfo(others[1].dtype)
            if node.op_type == "QuantizeLinear":
                found = np.clip(np.rint(first / scale) + zero, limits.min, limits.max)
                step = float(scale.max())
            else:
                found = (first.astype(np.float64) - zero) * scale
        elif node.op_type == "Gemm":
            assert [one.name for one in node.attribute if one.i == 1 and one.name.startswith("trans")] == ["transB"]
            found = first @ others[0].T + others[1]
        else:
            assert node.op_type == "Relu"
            found = np.maximum(first, 0)
        values[node.output[0]] = found
    return values[graph.output[0].name], step


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model, Examples]:
    """The float graph of two linear layers, and 64 examples."""
    torch.manual_seed(0)
    core = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = np.random.default_rng(1).normal(size=(64, 24)).astype(np.float32)
    examples = Examples("made", Arrays({"x": x}), np.zeros(64, dtype=np.int64), None, "d")
    model = Model(core, ArrayEncoder(), ("x",), tuple("01234567"), Checkpoint("made:up"), core)
    path = tmp_path_factory.mktemp("linear") / "float.onnx"
    export_graph(model, examples, path, 20)
    return path, model, examples


@pytest.mark.parametrize(
    ("activation", "weight"),
    [*((one, "int8") for one in ("uint8", "int8", "uint16", "int16")), ("uint8", "uint8"), ("uint16", "uint8")],
)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("reduce_range", [True, False])
def test_static_numbers_are_those_of_the_definition(
    linear: tuple[Path, Model, Examples],
    tmp_path: Path,
    activation: Any,
    weight: Any,
    per_channel: bool,
    reduce_range: bool,
) -> None:
    """Scales against the data, and ONNX Runtime's output against float64: never more than a step away."""
    (path, model, examples), out = linear, tmp_path / "q.onnx"
    x = examples.rows(range(64))["x"]
    types: dict[str, Any] = {"activation": activation, "weight": weight}
    scheme = Scheme(**{**STATIC, **types, "per_channel": per_channel, "reduce_range": reduce_range})
    assert quantize(path, out, scheme, examples, model.encode, 0).left_float == 0
    graph = onnx.load(out).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    of_input = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "x")
    scale, zero = (tensors[name] for name in of_input.input[1:])
    assert zero.dtype == np.dtype(activation)
    levels = 2 ** (16 if "16" in activation else 8) - 1
    signed = activation.startswith("i")
    expected = 2 * float(np.abs(x).max()) / (levels - 1) if signed else (float(x.max()) - float(x.min())) / levels
    assert scale == pytest.approx(expected, rel=1e-5)
    whole = [values for values in tensors.values() if values.dtype == np.dtype(weight) and values.ndim == 2]
    assert [values.shape for values in whole] == [(32, 24), (8, 32)]
    spread = max(int(values.max()) - int(values.min()) for values in whole)
    assert spread <= (128 if reduce_range else 255)
    assert spread > (100 if reduce_range else 200)
    if "16" in activation:
        assert next(one.version for one in onnx.load(out).opset_import if not one.domain) == 21
    found = onnxruntime.InferenceSession(out).run(None, {"x": x})[0]
    reference, step = in_float64(out, x)
    assert np.abs(found - reference).max() <= 1.01 * step
    assert (np.abs(found - reference) < 0.01 * step + 1e-6).mean() > 0.97
    float_ = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
    assert np.abs(found - float_).max() < 0.1 * np.abs(float_).max()


def test_a_node_that_is_kept_in_float_runs_in_float(convnet: tuple[Path, Model], tmp_path: Path) -> None:
    """ONNX Runtime would put its weights into int8 itself: seen in the graph that it makes of the file."""
    path, model = convnet
    prepare(path, tmp_path / "p.onnx")
    names = [node.name for node in onnx.load(tmp_path / "p.onnx").graph.node if node.op_type == "Conv"]
    made = quantize(path, tmp_path / "q.onnx", Scheme(**STATIC), images(64), model.encode, 0, keep_float=names[1:])
    assert made.left_float == 1
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(tmp_path / "q.onnx", options)
    found = counts(tmp_path / "optimized.onnx")
    assert found["QLinearConv"] == 1
    assert found.get("Conv", 0) + found.get("FusedConv", 0) == 1


def test_ranges_that_are_kept_are_not_measured_again(convnet: tuple[Path, Model], tmp_path: Path) -> None:
    path, model = convnet
    kept, (first, second, other) = tmp_path / "ranges.json", (tmp_path / f"{i}.onnx" for i in range(3))
    quantize(path, first, Scheme(**STATIC), images(64), model.encode, 0, ranges=kept)
    quantize(path, second, Scheme(**STATIC), images(2), model.encode, 0, ranges=kept)  # of two images they would differ
    quantize(path, other, Scheme(**STATIC), images(2), model.encode, 0)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()


def test_dynamic_format_of_a_transformer(bert: tuple[Path, Model], tmp_path: Path) -> None:
    path, model = bert
    made = quantize(path, tmp_path / "q.onnx", Scheme(**DYNAMIC), None, model.encode, 0)
    assert made.left_float == 0
    assert made.calibration_examples == 0
    assert sqnr(tmp_path / "q.onnx", path, model.encode({"text": ["the film is very good"]})) > 25
    assert counts(tmp_path / "q.onnx")["MatMulInteger"] == made.weighted
    assert (tmp_path / "q.onnx").stat().st_size < path.stat().st_size


def test_float16_keeps_inputs_and_outputs(
    bert: tuple[Path, Model], texts: dict[str, Path], tmp_path: Path
) -> None:  # fmt: skip
    path, model = bert
    some = load_examples(str(texts["calibrate"]), ("text",), {"text": "sentence"})
    quantize(path, tmp_path / "q.onnx", Scheme(method="float16", why="test"), some, model.encode, 0)
    inputs = model.encode({"text": ["the film is very good"]})
    assert sqnr(tmp_path / "q.onnx", path, inputs) > 45
    assert onnxruntime.InferenceSession(tmp_path / "q.onnx").get_outputs()[0].type == "tensor(float)"


def test_float32_is_the_graph(bert: tuple[Path, Model], tmp_path: Path) -> None:
    path, model = bert
    made = quantize(path, tmp_path / "q.onnx", Scheme(method="float32", why="test"), None, model.encode, 0)
    assert made.left_float == made.weighted > 0
    assert (tmp_path / "q.onnx").read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["q.onnx"]


def test_the_scheme_follows_where_the_weights_are(convnet: tuple[Path, Model], bert: tuple[Path, Model]) -> None:
    target = load_target("laptop-x86-vnni")
    assert scheme_for(convnet[0], target) == target.quantize.convolution
    assert scheme_for(bert[0], target) == target.quantize.matmul


def test_in_words() -> None:
    assert in_words(Scheme(**STATIC, reduce_range=True)) == "static uint8 × int8, per channel, reduced range"
    assert in_words(Scheme(**STATIC, calibration="mse")) == "static uint8 × int8, per channel, ranges by mse"
    assert in_words(Scheme(**DYNAMIC)) == "dynamic int8 weights, per channel"
    assert in_words(Scheme(method="float16", why="")) == "float16"
    assert in_words(Scheme(method="weights", weight="int4", why="")) == "int4 weights in blocks of 32"
    rows = Scheme(**DYNAMIC, embedding="int4")
    assert in_words(rows) == "dynamic int8 weights, per channel, embeddings in int4 rows"


def test_trained_ranges_are_by_no_method(convnet: tuple[Path, Model], tmp_path: Path) -> None:
    made = as_trained(convnet[0], tmp_path / "q.onnx", Scheme(**STATIC, calibration="mse"), convnet[0])
    assert made.scheme == "static uint8 × int8, per channel, from training"


def test_static_needs_examples(convnet: tuple[Path, Model], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs at least 2 real examples: give --calibrate DATA"):
        quantize(convnet[0], tmp_path / "q.onnx", Scheme(**STATIC), None, convnet[1].encode, 0)
    with pytest.raises(InputError, match="needs at least 2 real examples"):
        quantize(convnet[0], tmp_path / "q.onnx", Scheme(**STATIC), images(1), convnet[1].encode, 0)
    assert list(tmp_path.iterdir()) == []


def test_calibration_reads_each_chosen_example_once() -> None:
    x = np.arange(1000, dtype=np.float32)[:, None]
    examples = Examples("made", Arrays({"x": x}), np.zeros(1000, dtype=np.int64), None, "d")
    reader = Reader(examples, ArrayEncoder(), seed=3, batch_size=100)
    batches = [batch["x"].ravel().tolist() for batch in reader]
    assert [len(batch) for batch in batches] == [100, 100, 56]
    seen = [value for batch in batches for value in batch]
    assert len(seen) == len(set(seen)) == CALIBRATION_EXAMPLES == reader.used
    assert seen == [batch["x"].item() for batch in Reader(examples, ArrayEncoder(), seed=3, batch_size=1)]
    assert seen != [batch["x"].item() for batch in Reader(examples, ArrayEncoder(), seed=4, batch_size=1)]
    assert len(calibration_indices(examples.take(range(5), "few"), 0)) == 5


def test_calibration_examples_are_spread_over_classes_and_lengths() -> None:
    rng = np.random.default_rng(0)
    lengths, labels = rng.permutation(np.arange(1, 2049)), np.repeat([0, 1, 2], [64, 448, 1536])
    table = datasets.Dataset.from_dict({"text": ["a" * n for n in lengths]})
    examples = Examples("made", table, labels, None, "d")
    for seed in range(3):
        chosen = calibration_indices(examples, seed)
        found = labels[chosen]
        assert np.abs(np.bincount(found) - [8, 56, 192]).max() <= 1  # an eighth of each class
        assert not (found[:-1] <= found[1:]).all()
        ours = lengths[chosen][found == 2]
        assert ours.max() == lengths[labels == 2].max()
        bounds = np.quantile(lengths[labels == 2], [0.25, 0.5, 0.75])
        assert np.abs(np.bincount(np.searchsorted(bounds, ours)) - 48).max() <= 2  # a quarter from each quarter
