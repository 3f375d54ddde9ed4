"""Repairs: the float function stays, each is its paper's formula, and integers are nearer the float graph after it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from potstill.export import adaround, equalize, smooth
from potstill.export.adaround import Layer, learn, rectified, regulariser
from potstill.export.bias_correction import corrected_biases
from potstill.export.calibrate import Reader
from potstill.export.graph import export_graph
from potstill.export.net import Net
from potstill.export.quantize import float_nodes, in_words, prepare, quantize
from potstill.export.repairs import repaired_graph, repairs_beside
from potstill.targets.target import Scheme
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.task import Model

Array = NDArray[Any]
SIZE = 12


def scheme(*repairs: str, per_channel: bool = False, **changes: Any) -> Scheme:
    fields = {"method": "static", "activation": "uint8", "weight": "int8", "why": "test", "repairs": list(repairs)}
    return Scheme.model_validate(fields | {"per_channel": per_channel} | changes)


def images(n: int, seed: int = 0) -> Examples:
    x = np.random.default_rng(seed).normal(size=(n, 3, SIZE, SIZE)).astype(np.float32)
    return Examples("made", Arrays({"x": x}), np.zeros(n, dtype=np.int64), None, "d")


def model_of(core: nn.Module) -> Model:
    return Model(core, ArrayEncoder(), ("x",), ("0", "1", "2", "3"), Checkpoint("made:up"), core)


def run(path: Path, x: Array) -> Array:
    return np.asarray(onnxruntime.InferenceSession(path).run(None, {"x": x})[0])


def sqnr(path: Path, reference: Path, x: Array) -> float:
    theirs = run(reference, x)
    return float(10 * np.log10((theirs**2).sum() / ((theirs - run(path, x)) ** 2).sum()))


def exported(core: nn.Module, folder: Path, examples: Examples) -> tuple[Path, Path]:
    graph, prepared = folder / "float.onnx", folder / "prepared.onnx"
    export_graph(model_of(core.eval()), examples, graph, 20)
    prepare(graph, prepared)
    return graph, prepared


class Depthwise(nn.Module):
    """A net with depthwise convolution, ReLU or ReLU6, a mean and a linear layer; its channels are badly scaled."""

    def __init__(self, relu: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3), relu(), nn.Conv2d(16, 16, 3, groups=16), relu(), nn.Conv2d(16, 24, 1), relu(),
            nn.Conv2d(24, 24, 3, groups=4),
        )  # fmt: skip
        self.linear = nn.Linear(24, 4)
        with torch.no_grad():
            for layer in (*self.layers, self.linear):
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(layer.weight)
                    nn.init.normal_(layer.bias)
            for i in (0, 2, 4):
                first, second = self.layers[i], self.layers[i + 2]
                factor = torch.logspace(-1.5, 1.5, first.weight.shape[0])
                first.weight *= factor[:, None, None, None]
                first.bias *= factor
                if i == 0:
                    second.weight /= factor[:, None, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.layers(x).relu().mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def depthwise(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    return exported(Depthwise(nn.ReLU), tmp_path_factory.mktemp("depthwise"), images(4))


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    return exported(Depthwise(nn.ReLU6), tmp_path_factory.mktemp("clipped"), images(4))


class Norms(nn.Module):
    """Residual blocks: the first norm is read by the residual too, the second by linear layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(2))
        self.one, self.two, self.after = (nn.Linear(SIZE, SIZE) for _ in range(3))
        self.out = nn.Linear(SIZE, 4)
        with torch.no_grad():
            for norm, most in zip(self.norms, (2.0, 60.0), strict=True):
                norm.weight[2], norm.bias[2] = most, most / 20  # a channel of outliers, as the paper finds them
            for layer in (self.one, self.two, self.after):
                layer.weight[:, 2] /= 60

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1, 2)
        y = self.norms[0](x)
        y = self.norms[1](x + self.one(y).tanh() + y / 1000)
        return (self.two(y).tanh() + self.after(y).tanh()).mean(1) @ self.out.weight.T


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    return exported(Norms(), tmp_path_factory.mktemp("norms"), images(4))


def net(path: Path) -> Net:
    return Net(onnx.load(str(path)))


def saved(one: Net, path: Path) -> Path:
    onnx.save(one.model, path)
    return path


def test_equalisation_keeps_the_function(depthwise: tuple[Path, Path], tmp_path: Path) -> None:
    one, x = net(depthwise[1]), images(64, 5).rows(range(64))["x"]
    assert equalize.equalize(one) == 4
    float_, made = run(depthwise[0], x), run(saved(one, tmp_path / "e.onnx"), x)
    assert np.abs(made - float_).max() < 1e-5 * np.abs(float_).max()


def test_equalisation_keeps_what_is_clipped_at_six(clipped: tuple[Path, Path], tmp_path: Path) -> None:
    one, x = net(clipped[1]), 3 * images(64, 5).rows(range(64))["x"]
    assert equalize.equalize(one) == 4
    assert {"Min", "Relu"} <= {node.op_type for node in one.model.graph.node}
    float_, made = run(clipped[0], x), run(saved(one, tmp_path / "e.onnx"), x)
    assert np.abs(made - float_).max() < 1e-5 * np.abs(float_).max()


def test_equalised_ranges_are_alike(depthwise: tuple[Path, Path]) -> None:
    """Where one pair alone is equalised, r1 = r2 = √(r1 r2) for each channel, by equations 8 to 11."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(6, 3, 3)) * np.logspace(-2, 2, 6)[:, None, None], rng.normal(size=(6, 20))
    s = equalize.scales(first, second)
    r1, r2 = np.abs(first).max(axis=(1, 2)), np.abs(second).max(axis=1)
    assert s == pytest.approx(np.sqrt(r1 * r2) / r2)
    assert r1 / s == pytest.approx(r2 * s)
    assert equalize.scales(np.zeros((2, 3)), np.ones((2, 3))).tolist() == [1, 1]
    one = net(depthwise[1])
    equalize.equalize(one)
    for a, b in (("layers.0.weight", "layers.2.weight"), ("layers.2.weight", "layers.4.weight")):
        rows = np.abs(one.array(a)).max(axis=(1, 2, 3))
        columns = np.abs(one.array(b)).max(axis=(1, 2, 3) if b == "layers.2.weight" else (0, 2, 3))
        assert rows == pytest.approx(columns, rel=0.01)
    wide = np.abs(one.array("layers.6.weight").reshape(4, 6, 6, 9)).max(axis=(1, 3)).ravel()  # group, out, in, space
    assert np.abs(one.array("layers.4.weight")).max(axis=(1, 2, 3)) == pytest.approx(wide, rel=0.01)


def test_smoothing_keeps_the_function_and_folds_where_it_can(norms: tuple[Path, Path], tmp_path: Path) -> None:
    one, x = net(norms[1]), images(64, 5).rows(range(64))["x"]
    assert smooth.smooth(one, [{"x": x}]) == 2
    kinds = [node.op_type for node in one.model.graph.node]
    before = [node.op_type for node in onnx.load(norms[1]).graph.node]
    assert kinds.count("Mul") == before.count("Mul") + 1  # the second norm took the factors up itself
    float_, made = run(norms[0], x), run(saved(one, tmp_path / "s.onnx"), x)
    assert np.abs(made - float_).max() < 1e-5 * np.abs(float_).max()


def test_smoothing_is_equation_4(norms: tuple[Path, Path]) -> None:
    rng = np.random.default_rng(0)
    x, weights = np.abs(rng.normal(size=5)), rng.normal(size=(5, 7))
    expected = [x[j] ** 0.5 / max(abs(w) for w in weights[j]) ** 0.5 for j in range(5)]
    assert smooth.scales(x, weights) == pytest.approx(expected)
    one, batches = net(norms[1]), [{"x": images(8, i).rows(range(8))["x"]} for i in range(3)]
    before = net(norms[1])
    smooth.smooth(one, batches)
    layer = nn.LayerNorm(SIZE)
    with torch.no_grad():
        layer.weight[2], layer.bias[2] = 2.0, 0.1
        read = np.concatenate([layer(torch.from_numpy(b["x"]).flatten(1, 2)).numpy() for b in batches])
    product = next(node for node in one.model.graph.node if node.op_type == "MatMul")
    w = before.array(product.input[1]).astype(np.float64)
    s = np.sqrt(np.abs(read).max(axis=(0, 1)) / np.abs(w).max(axis=1))
    assert one.array(product.input[1]) == pytest.approx(s[:, None] * w, rel=1e-4)


def made(graph: Path, out: Path, **of: Any) -> Any:
    repairs = of.pop("repairs", ())
    return quantize(graph, out, scheme(*repairs, **of), images(256), ArrayEncoder(), 0)


@pytest.mark.parametrize(("repairs", "db"), [(("equalize",), 8), (("equalize", "bias"), 9)])
def test_badly_scaled_channels_are_repaired(
    depthwise: tuple[Path, Path], clipped: tuple[Path, Path], tmp_path: Path, repairs: tuple[str, ...], db: float
) -> None:
    x = images(200, 7).rows(range(200))["x"]
    for graph, _ in (depthwise, clipped):
        plain, repaired = tmp_path / "plain.onnx", tmp_path / "repaired.onnx"
        made(graph, plain)
        found = made(graph, repaired, repairs=repairs)
        assert found.repaired[0] == "equalized: 4 pairs of layers"
        assert found.left_float == 0
        assert sqnr(repaired, graph, x) > sqnr(plain, graph, x) + db


def test_outliers_behind_a_norm_are_smoothed(norms: tuple[Path, Path], tmp_path: Path) -> None:
    x = images(200, 7).rows(range(200))["x"]
    made(norms[0], tmp_path / "plain.onnx", per_channel=True)
    found = made(norms[0], tmp_path / "smooth.onnx", per_channel=True, repairs=("smooth",))
    assert found.repaired == ["smoothed: 2 layer norms"]
    assert sqnr(tmp_path / "smooth.onnx", norms[0], x) > sqnr(tmp_path / "plain.onnx", norms[0], x) + 3


def one_by_one(x: Array) -> Reader:
    return Reader(Examples("made", Arrays({"x": x}), np.zeros(len(x)), None, "d"), ArrayEncoder(), 0, 64)


def test_bias_correction_is_the_mean_difference_layer_after_layer(depthwise: tuple[Path, Path], tmp_path: Path) -> None:
    """On one batch, with what came before corrected, each layer's channels have the float graph's means exactly."""
    ints, x = tmp_path / "q.onnx", images(64, 3).rows(range(64))["x"]
    made(depthwise[0], ints, repairs=("equalize",))
    float_, int_ = net(depthwise[1]), net(ints)
    equalize.equalize(float_)
    biases = corrected_biases(float_, int_, [{"x": x}])
    assert len(biases) == 5
    order = [node for node in float_.model.graph.node if float_.bias(node) in biases]
    wide = {"layers.0": 3, "layers.2": 16, "layers.4": 16, "layers.6": 24}
    assert len(order) == len(wide) + 1
    for node in order:  # each checked by ONNX Runtime on the graph in integers, with the biases before it put there
        own = int_.nodes[node.name]
        theirs, ours = _outputs(float_, node.output[0], x), _outputs(int_, own.output[0], x)
        rest = (0, *range(2, ours.ndim))
        correction = (ours.astype(np.float64) - theirs).mean(axis=rest)
        name = str(float_.bias(node))
        mine = float_.array(name) - biases[name]
        assert mine == pytest.approx(correction, abs=0.1 * float(np.abs(correction).max()))
        if len(own.input) > 2:
            dequantized = int_.made_by[own.input[2]]
            scale = int_.array(dequantized.input[1])
            int_.put(dequantized.input[0], np.rint(biases[name] / scale))


def _outputs(one: Net, name: str, x: Array) -> Array:
    model = onnx.ModelProto()
    model.CopyFrom(one.model)
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return np.asarray(onnxruntime.InferenceSession(model.SerializeToString(), options).run([name], {"x": x})[0])


def test_biases_bring_the_mean_output_back(depthwise: tuple[Path, Path], tmp_path: Path) -> None:
    x = images(256, 7).rows(range(256))["x"]
    apart = []
    for i, repairs in enumerate([("equalize",), ("equalize", "bias")]):
        made(depthwise[0], tmp_path / f"{i}.onnx", repairs=repairs)
        apart.append(np.abs((run(tmp_path / f"{i}.onnx", x) - run(depthwise[0], x)).mean(axis=0)).sum())
    assert apart[1] < 0.3 * apart[0]


def layer(seed: int = 0, rows: int = 8, wide: int = 27) -> Layer:
    """Outputs of correlated inputs, where rounding to the nearest is not the best."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, wide, generator=rng)
    mixed = torch.randn(4, wide, generator=rng)
    inputs = (torch.randn(4096, 4, generator=rng) @ mixed + 0.2 * torch.randn(4096, wide, generator=rng))[:, None]
    scale = weight.abs().amax(1, keepdim=True) / 7
    identity = nn.Identity()
    return Layer(weight, scale, 7, inputs, inputs[:, 0] @ weight.T, torch.zeros(rows), identity)


def test_learned_rounding_is_nearer_than_the_nearest() -> None:
    one = layer()
    steps, learned = one.weight / one.scale, learn(one, 0)
    errors = [((w * one.scale - one.weight) @ one.inputs[:, 0].T).square().mean() for w in (steps.round(), learned)]
    assert errors[1] < 0.3 * errors[0]
    assert ((learned == steps.floor()) | (learned == steps.ceil())).all()
    largest = steps.abs().argmax(1)
    assert (learned.gather(1, largest[:, None]).abs() == 7).all()  # so the scale is the same
    assert (learned == learn(one, 0)).all()


def test_learned_rounding_is_near_the_best_of_all() -> None:
    """Of one output with ten weights: all 1,024 ways to round, by the error itself in float64."""
    one = layer(1, rows=1, wide=10)
    floor = (one.weight / one.scale).floor().double()
    ways = torch.tensor([[(i >> k) & 1 for k in range(10)] for i in range(1024)]).double()
    ways = ways[:, :][((floor + ways).abs() <= 7).all(1)]
    outputs = one.inputs[:, 0].double()
    scale, weight = one.scale.double(), one.weight.double()
    errors = torch.stack([(((floor + way) * scale - weight) @ outputs.T).square().mean() for way in ways])
    mine = ((learn(one, 0).double() * scale - weight) @ outputs.T).square().mean()
    assert mine <= errors.sort().values[3]


def test_equations_23_and_24() -> None:
    v = torch.linspace(-6, 6, 25, dtype=torch.float64)
    h = np.clip(1 / (1 + np.exp(-v.numpy())) * (1.1 + 0.1) - 0.1, 0, 1)
    assert rectified(v).numpy() == pytest.approx(h)
    assert float(regulariser(torch.from_numpy(h), 3.0)) == pytest.approx(sum(1 - abs(2 * one - 1) ** 3 for one in h))


@pytest.mark.parametrize("per_channel", [True, False])
def test_what_was_learned_is_what_runs(
    depthwise: tuple[Path, Path], tmp_path: Path, per_channel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`quantize_static` rounds to the learned integers, and they are nearer the float graph."""
    learned: list[Array] = []
    given = adaround._from_rows

    def kept(node: Any, rows: Array, shape: Any) -> Array:
        learned.append(given(node, rows, shape))
        return learned[-1]

    monkeypatch.setattr(adaround, "_from_rows", kept)
    plain, out = tmp_path / "plain.onnx", tmp_path / "q.onnx"
    made(depthwise[0], plain, repairs=("equalize",), per_channel=per_channel)
    found = made(depthwise[0], out, repairs=("equalize", "adaround"), per_channel=per_channel)
    assert found.repaired == ["equalized: 4 pairs of layers", "rounding learned: 5 nodes"]
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    held = [t for t in tensors.values() if t.dtype == np.int8 and t.ndim > 1]
    for integers in learned[::2]:
        assert any(one.shape == integers.shape and (one == integers).all() for one in held)
    x = images(200, 7).rows(range(200))["x"]
    assert sqnr(out, depthwise[0], x) > sqnr(plain, depthwise[0], x)


def test_a_node_in_float_keeps_its_own_weights(depthwise: tuple[Path, Path], tmp_path: Path) -> None:
    ranges, out = tmp_path / "ranges.json", tmp_path / "q.onnx"
    of = scheme("equalize", "adaround", "bias")
    quantize(depthwise[0], out, of, images(256), ArrayEncoder(), 0, ranges=ranges)
    first = out.read_bytes()
    repaired_graph(repairs_beside(ranges), tmp_path / "float.onnx")
    float_ = net(tmp_path / "float.onnx")
    node = next(one for one in float_.model.graph.node if "layers.4.weight" in one.input)
    found = quantize(depthwise[0], out, of, images(256), ArrayEncoder(), 0, ranges=ranges, keep_float=[node.name])
    assert float_nodes(out) == [node.name]
    apart = "4 of 5 nodes, the others are in float"
    assert found.repaired[1:] == [f"rounding learned: {apart}", f"bias corrected: {apart}"]
    every = [one.name for one in float_.model.graph.node]
    none = quantize(
        depthwise[0], tmp_path / "f.onnx", of, images(256), ArrayEncoder(), 0, ranges=ranges, keep_float=every
    )
    apart = "0 of 5 nodes, the others are in float"
    assert none.repaired[1:] == [f"rounding learned: {apart}", f"bias corrected: {apart}"]
    left = net(out)
    for name in node.input[1:]:
        assert (left.array(name) == float_.array(name)).all()
    quantize(depthwise[0], out, of, images(2), ArrayEncoder(), 0, ranges=ranges)  # nothing is learned again
    assert out.read_bytes() == first


def test_where_nothing_fits_the_file_is_the_same_and_that_is_said(norms: tuple[Path, Path], tmp_path: Path) -> None:
    """No two layers of the norms' net follow each other; a net of convolutions has no norm."""
    made(norms[0], tmp_path / "plain.onnx")
    found = made(norms[0], tmp_path / "q.onnx", repairs=("equalize",))
    assert (tmp_path / "q.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()
    assert found.repaired == ["equalized: nothing, there are no pairs of layers for it"]


def test_nothing_to_smooth(depthwise: tuple[Path, Path], tmp_path: Path) -> None:
    made(depthwise[0], tmp_path / "plain.onnx")
    found = made(depthwise[0], tmp_path / "q.onnx", repairs=("smooth",))
    assert (tmp_path / "q.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()
    assert found.repaired == ["smoothed: nothing, there are no layer norms for it"]


def test_in_words() -> None:
    assert in_words(scheme("equalize", "bias")).endswith("per tensor, repaired by equalize and bias")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dynamic", "activation": None}, "method dynamic takes no repairs, they need calibrated ranges"),
        ({"weight": "uint8", "repairs": ["adaround"]}, "adaround needs weights around zero: say weight: int8"),
        ({"repairs": ["bias", "bias"]}, "repairs names one twice: bias, bias"),
    ],
)
def test_a_scheme_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheme("bias", **changes)
