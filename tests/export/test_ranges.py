"""Calibration in one pass: what is kept of activations, and the ranges made of it, against independent references."""

import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import scipy.stats
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.calibrate import HistogramCollector, create_calibrator

from potstill.export.calibrate import Reader
from potstill.export.histogram import BINS, Histogram
from potstill.export.quantize import quantize
from potstill.export.ranges import Seen, float_tensors, observe
from potstill.export.thresholds import METHODS, entropy, minmax, mse, percentile
from potstill.targets.target import Scheme
from potstill.validate.data import Arrays, Examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError
from potstill.validate.fake_quant import Activation

Array = NDArray[Any]
RNG = np.random.default_rng(0)
SHAPES = {
    "normal": RNG.normal(size=200_000),
    "relu": np.maximum(RNG.normal(size=200_000), 0),
    "heavy": RNG.standard_t(3, size=200_000),
    "skewed": RNG.gamma(2, size=200_000) - 0.5,
    "far": RNG.normal(size=200_000) * 0.01 + 40,
    "below": -RNG.gamma(0.5, size=200_000),
}
DATA = {name: values.astype(np.float32) for name, values in SHAPES.items()}
shapes = pytest.mark.parametrize("name", DATA)
both = pytest.mark.parametrize("activation", ["uint8", "int8"])


def seen_of(values: Array, parts: int = 7) -> Seen:
    seen = Seen(binned=True)
    for part in np.array_split(values, parts):
        seen.add(float(part.min()), float(part.max()), part)
    return seen


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolution, ReLU, convolution, mean over space, a linear layer; weights by chance, sizes free."""
    rng = np.random.default_rng(0)
    weights = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "b2": (8,), "w3": (8, 4), "axes": (2,)}
    held = {name: rng.normal(size=shape).astype(np.float32) * 0.3 for name, shape in weights.items()}
    held["axes"] = np.array([2, 3])
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="c1", kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c1"], ["r1"], name="r1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="c2", kernel_shape=[3, 3]),
        helper.make_node("ReduceMean", ["c2", "axes"], ["m"], name="m", keepdims=0),
        helper.make_node("MatMul", ["m", "w3"], ["logits"], name="logits"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "height", "width"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])]
    tensors = [numpy_helper.from_array(array, name) for name, array in held.items()]
    made = helper.make_graph(nodes, "net", inputs, outputs, tensors)
    path = tmp_path_factory.mktemp("graph") / "net.onnx"
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def images(n: int, seed: int = 1) -> Array:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, 3, 12, 12)) * rng.gamma(2, size=(n, 1, 1, 1))).astype(np.float32)


def in_batches(x: Array, size: int = 16) -> Iterator[dict[str, Array]]:
    return ({"x": x[start : start + size]} for start in range(0, len(x), size))


def examples(x: Array) -> Examples:
    return Examples("made", Arrays({"x": x}), np.zeros(len(x), dtype=np.int64), None, "d")


def activations(path: Path, x: Array) -> dict[str, Array]:
    """All of a graph's activations at once, of one run."""
    model = onnx.load(path)
    names = ["c1", "r1", "c2", "m", "logits"]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return {"x": x} | dict(zip(names, session.run(None, {"x": x}), strict=True))


@shapes
def test_a_histogram_is_that_of_all_values_at_once(name: str) -> None:
    values = DATA[name]
    histogram = Histogram()
    for part in np.split(values, [1, 10, 5000, 90_000]):
        histogram.add(part, float(part.min()), float(part.max()))
    assert np.array_equal(histogram.counts, np.histogram(values.astype(np.float64), histogram.edges)[0])
    assert histogram.counts.sum() == values.size
    held = np.flatnonzero(histogram.counts)
    spread = max(held[-1] + histogram.start, 0) - min(held[0] + histogram.start, 0) + 1
    assert BINS / 2 - 1 <= spread <= BINS  # no wider than needed


def test_widening_keeps_every_count() -> None:
    histogram, values = Histogram(), np.zeros(10, dtype=np.float32)
    histogram.add(values, 0, 0)
    all_values = [values]
    for scale in (1e-38, -1e-30, 1e-3, -2.0, 1e9, 3e38):
        part = (scale * RNG.uniform(size=1000)).astype(np.float32)
        histogram.add(part, float(part.min()), float(part.max()))
        all_values.append(part)
        together = np.concatenate(all_values).astype(np.float64)
        assert np.array_equal(histogram.counts, np.histogram(together, histogram.edges)[0])
        assert histogram.counts.sum() == together.size


def test_least_and_greatest_are_numpys(graph: Path) -> None:
    x = images(50)
    seen = observe(graph, in_batches(x))
    expected = activations(graph, x)
    assert set(seen) == set(expected) == set(float_tensors(graph))
    for name, values in expected.items():
        assert minmax(seen[name], "uint8") == pytest.approx((values.min(), values.max()), rel=1e-5, abs=1e-6)
        assert seen[name].histogram is None
    assert [path.name for path in graph.parent.iterdir()] == [graph.name]


def test_all_methods_come_from_one_pass(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, real = [], onnxruntime.InferenceSession

    class Counting(real):  # type: ignore[misc]
        def run(self, *args: Any) -> Any:
            runs.append(len(args[1]["x"]))
            return super().run(*args)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Counting)
    seen = observe(graph, in_batches(images(50)), ["r1", "c2"])
    assert runs == [16, 16, 16, 2]
    for name in ("r1", "c2"):
        ranges = {method: of(seen[name], "uint8") for method, of in METHODS.items()}
        assert len(set(ranges.values())) == 5
        assert all(seen[name].low <= low < high <= seen[name].high for low, high in ranges.values())


def test_moving_average_is_onnxruntimes_mean_and_then_torchs(graph: Path, tmp_path: Path) -> None:
    x = images(64)
    calibrator = create_calibrator(
        graph, [], str(tmp_path / "a.onnx"), CalibrationMethod.MinMax, extra_options={"moving_average": True}
    )

    class Feed:
        batches = in_batches(x)

        def get_next(self) -> Any:
            return next(self.batches, None)

    calibrator.collect_data(Feed())
    seen = observe(graph, in_batches(x))
    for name, data in calibrator.compute_data().items():
        expected = [float(np.squeeze(end)) for end in data.range_value]
        assert (seen[name].mean_low, seen[name].mean_high) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    many, mean = Seen(binned=False), 0.0
    for i, high in enumerate(np.random.default_rng(0).gamma(2, size=300), start=1):
        mean = mean + (high - mean) / i if i <= 100 else 0.99 * mean + 0.01 * high
        many.add(-high, high, None)
    assert (many.mean_low, many.mean_high) == pytest.approx((-mean, mean))


@shapes
def test_percentile_is_numpys_within_a_bin(name: str) -> None:
    seen = seen_of(DATA[name])
    assert seen.histogram is not None
    expected = np.percentile(DATA[name].astype(np.float64), [0.005, 99.995])
    assert np.abs(np.array(percentile(seen, "uint8")) - expected).max() <= 2.0**seen.histogram.exponent


def divergence(counts: Array, bins: int, levels: int) -> float:
    """KL(P || Q) of one candidate as Migacz's slides say it, a loop over the levels; scipy's divergence."""
    p, q = counts[:bins].copy(), np.zeros(bins)
    p[-1] += counts[bins:].sum()
    level = np.arange(bins) * levels // bins
    for i in range(levels):
        inside = (level == i) & (counts[:bins] > 0)
        if inside.any():
            q[inside] = counts[:bins][inside].sum() / inside.sum()
    return float(scipy.stats.entropy(p, q)) if q.any() else np.inf


def magnitudes(values: Array) -> tuple[Array, float]:
    """Counts of magnitudes in at most 2,048 bins of a power of two, and their width."""
    sizes = np.abs(values.astype(np.float64))
    width = 2.0 ** np.floor(np.log2(sizes.max() / 1024))
    counts = np.histogram(sizes, np.arange(2049) * width)[0][: int(sizes.max() / width) + 1].astype(float)
    counts[0] = counts[1]
    return counts, width


@both
@shapes
def test_entropy_is_the_least_of_brute_force(name: str, activation: Activation) -> None:
    counts, width = magnitudes(DATA[name])
    levels = 256 if activation == "uint8" and DATA[name].min() >= 0 else 128
    low, high = entropy(seen_of(DATA[name]), activation)
    bins = min(round(max(-low, high) / width), len(counts))
    found = [divergence(counts, bins, levels) for bins in range(levels, len(counts) + 1, 23)]
    assert divergence(counts, bins, levels) <= min(found) + 1e-9
    assert low >= DATA[name].min()
    assert high <= DATA[name].max()


@pytest.mark.parametrize("name", ["normal", "heavy"])
def test_entropy_loses_no_more_information_than_onnxruntimes(name: str) -> None:
    counts, width = magnitudes(DATA[name])
    collector = HistogramCollector("entropy", True, 2048, 256, 99.99, "same")  # 256 levels of both signs
    collector.collect_value({"a": DATA[name]})
    theirs = float(collector.compute_collection_result()["a"][1])
    ours = max(np.abs(entropy(seen_of(DATA[name]), "int8")))
    one, other = (divergence(counts, min(round(end / width), len(counts)), 128) for end in (ours, theirs))
    assert one <= other
    assert 0.2 < ours / theirs < 1.2


def true_error(values: Array, low: float, high: float, activation: Activation) -> float:
    """Mean squared error of values quantised by ONNX's formula, one by one."""
    low, high = min(low, 0), max(high, 0)
    if activation == "uint8":
        scale = (high - low) / 255
        zero = round(-low / scale)
        whole = np.clip(np.rint(values / scale) + zero, 0, 255) - zero
    else:
        scale = max(-low, high) / 127
        whole = np.clip(np.rint(values / scale), -128, 127)
    return float(((values - whole * scale) ** 2).mean())


@both
@shapes
def test_mse_is_as_good_as_brute_force_over_all_values(name: str, activation: Activation) -> None:
    values = DATA[name].astype(np.float64)
    part = values[:20_000]
    seen = seen_of(part.astype(np.float32))
    ours = true_error(part, *mse(seen, activation), activation)
    shares = np.linspace(0.02, 1, 50)
    lows = shares if activation == "uint8" and seen.low < 0 < seen.high else [1.0]
    brute = min(
        true_error(part, low * seen.low if len(lows) > 1 else share * seen.low, share * seen.high, activation)
        for share in shares
        for low in lows
    )
    assert ours <= 1.01 * brute
    if name in ("heavy", "normal"):
        assert ours < 0.95 * true_error(part, seen.low, seen.high, activation)


def test_memory_does_not_grow_with_examples(graph: Path) -> None:
    def peak(n: int) -> int:
        one = images(16)
        tracemalloc.start()
        seen = observe(graph, ({"x": one + i} for i in range(n // 16)), ["x", "r1", "c2", "m"])
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(one.histogram is not None for one in seen.values()) == 4
        return most

    peak(32)
    assert peak(480) <= 1.1 * peak(48)


def test_activations_are_gone_before_the_next_batch(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[weakref.ref[Any]] = []
    alive, real = [], onnxruntime.InferenceSession

    class Watched(real):  # type: ignore[misc]
        def run(self, *args: Any) -> Any:
            alive.append(sum(one() is not None for one in given))
            outputs = super().run(*args)
            given.extend(weakref.ref(output) for output in outputs)
            return outputs

    monkeypatch.setattr(onnxruntime, "InferenceSession", Watched)
    observe(graph, in_batches(images(64)), ["x", "r1", "c2"])
    assert alive == [0, 0, 0, 0]
    assert len(given) == 4 * (3 * 6 + 3)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("binned", [[], ["x", "c1"]])
def test_what_is_not_finite_is_named(graph: Path, wrong: float, binned: list[str]) -> None:
    x = images(32)
    x[20, 1, 3, 3] = wrong
    with pytest.raises(InputError, match="activation 'x' is not finite on calibration batch 2"):
        observe(graph, in_batches(x), binned)


def test_bad_batches(graph: Path) -> None:
    with pytest.raises(InputError, match="no calibration examples: ranges need at least one batch"):
        observe(graph, [])
    for inputs in ({"x": images(4)[:, :2]}, {"y": images(4)}, {"x": images(4).astype(np.float64)}):
        with pytest.raises(InputError, match="calibration batch 2 does not fit the graph: "):
            observe(graph, [{"x": images(4)}, inputs])


def test_sizes_may_change_from_batch_to_batch(graph: Path) -> None:
    parts = [images(1)[:, :, :side, :side] for side in (5, 12, 8)]
    seen = observe(graph, ({"x": part} for part in parts), ["c2"])
    expected = [activations(graph, part)["c2"] for part in parts]
    assert seen["c2"].histogram is not None
    assert seen["c2"].histogram.counts.sum() == sum(part.size for part in expected)
    assert seen["c2"].high == pytest.approx(max(part.max() for part in expected), rel=1e-5)


@both
def test_minmax_packages_are_those_of_quantize_static(graph: Path, tmp_path: Path, activation: Activation) -> None:
    x, ours, theirs = images(64), tmp_path / "ours.onnx", tmp_path / "theirs.onnx"
    scheme = Scheme(method="static", activation=activation, weight="int8", per_channel=True, why="test")
    quantize(graph, ours, scheme, examples(x), ArrayEncoder(), 0)

    class Feed:
        batches = iter(Reader(examples(x), ArrayEncoder(), 0, 16))

        def get_next(self) -> Any:
            return next(self.batches, None)

    quantize_static(
        graph,
        theirs,
        Feed(),
        per_channel=True,
        activation_type={"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}[activation],
        extra_options={"ActivationSymmetric": activation == "int8"},
    )
    test = images(200, seed=9)
    one, other = (onnxruntime.InferenceSession(path).run(None, {"x": test})[0] for path in (ours, theirs))
    assert np.abs(one - other).max() <= 0.01 * np.abs(other).max()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.onnx", "theirs.onnx"]


@both
@pytest.mark.parametrize("method", METHODS)
def test_each_method_makes_a_package_with_its_ranges(
    graph: Path, tmp_path: Path, method: Any, activation: Activation
) -> None:
    scheme = Scheme(
        method="static", activation=activation, weight="int8", per_channel=True, calibration=method, why="test"
    )
    made = quantize(graph, tmp_path / "q.onnx", scheme, examples(images(64)), ArrayEncoder(), 0)
    assert (made.left_float, made.calibration_examples) == (0, 64)
    tensors = {one.name: numpy_helper.to_array(one) for one in onnx.load(tmp_path / "q.onnx").graph.initializer}
    seen = observe(graph, Reader(examples(images(64)), ArrayEncoder(), 0, 16), ["x", "r1", "c2"])
    for name in ("x", "r1"):
        low, high = METHODS[method](seen[name], activation)
        expected = (max(high, 0) - min(low, 0)) / 255 if activation == "uint8" else max(-low, high) / 127
        assert float(tensors[f"{name}_scale"]) == pytest.approx(expected, rel=1e-4)
    x = images(200, seed=9)
    float_, int_ = (onnxruntime.InferenceSession(p).run(None, {"x": x})[0] for p in (graph, tmp_path / "q.onnx"))
    assert (float_.argmax(1) == int_.argmax(1)).mean() > 0.9


def test_only_a_static_scheme_calibrates() -> None:
    with pytest.raises(ValueError, match="method dynamic has no ranges to calibrate: leave out calibration"):
        Scheme(method="dynamic", weight="int8", calibration="mse", why="test")
    assert Scheme(method="dynamic", weight="int8", why="test").calibration is None
    assert Scheme(method="static", weight="int8", activation="int8", why="test").calibration == "minmax"
