"""float16: which nodes stay in float32, against numpy's float16 and nets that are built to need it."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from potstill.export import half
from potstill.export.graph import export_graph
from potstill.export.half import Half, to_float16
from potstill.export.quantize import quantize
from potstill.targets.target import Scheme
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples, load_examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError
from potstill.validate.task import TASKS, Model

HALF = Scheme(method="float16", why="test")


def vectors(n: int = 8) -> Examples:
    x = np.random.default_rng(0).normal(size=(n, 16)).astype(np.float32)
    return Examples("made", Arrays({"x": x}), np.zeros(n, dtype=np.int64), None, "d")


class Net(nn.Module):
    """Three layers; what the second takes and gives is scaled up or down and back again."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        scaled = torch.relu(self.two(torch.relu(self.one(x)) * self.scale))
        return self.three(scaled / self.scale)  # type: ignore[no-any-return]


def graph_of(core: nn.Module, folder: Path) -> Path:
    model = Model(core.eval(), ArrayEncoder(), ("x",), ("0", "1", "2", "3"), Checkpoint("made:up"), core)
    export_graph(model, vectors(), folder / "g.onnx", 20)
    return folder / "g.onnx"


def made(path: Path) -> Half:
    return to_float16(path, path.with_name("h.onnx"), [{"x": vectors().rows([i])["x"]} for i in range(8)])


def types(path: Path) -> dict[str, int]:
    """Element type of the weights, by their name."""
    return {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}


def run(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def test_nothing_stays_where_nothing_must(tmp_path: Path) -> None:
    found = made(graph_of(Net(2.0), tmp_path))
    assert found.float32_nodes == []
    assert set(types(tmp_path / "h.onnx").values()) == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize("scale", [1e6, 2.0**-22])
def test_what_overflows_or_vanishes_stays(scale: float, tmp_path: Path) -> None:
    """Without the nodes in float32 numpy's float16 has no finite number there, or few bits."""
    path, x = graph_of(Net(scale), tmp_path), vectors().rows(range(8))["x"]
    found = made(path)
    assert 0 < len(found.float32_nodes) < found.nodes
    kinds = types(tmp_path / "h.onnx")
    assert kinds["one.weight"] == kinds["three.weight"] == onnx.TensorProto.FLOAT16
    scaled = [kind for name, kind in kinds.items() if name.startswith(("two", "val"))]
    assert scaled
    assert set(scaled) == {onnx.TensorProto.FLOAT}
    np.testing.assert_allclose(run(tmp_path / "h.onnx", x), run(path, x), atol=5e-3)


def test_an_operator_that_squares_inside_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = nn.Linear(16, 16)
    with torch.no_grad():
        first.weight *= 1000  # 1,000 fits into float16, its square does not
    path = graph_of(nn.Sequential(first, nn.LayerNorm(16), nn.Linear(16, 4)), tmp_path)
    kept = set(made(path).float32_nodes)
    assert [node.op_type for node in onnx.load(path).graph.node if node.name in kept] == ["LayerNormalization"]


def test_what_no_range_shows_is_found_by_halving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference of two large numbers that float16 cannot tell apart."""

    class Near(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            found = self.before(x)
            return self.after(torch.tanh((found + 30_000.0) - 30_000.0))  # type: ignore[no-any-return]

    path = graph_of(Near(), tmp_path)
    monkeypatch.setattr(half, "_beyond", lambda model, peaks: set())
    found = made(path)
    kept = [node.op_type for node in onnx.load(path).graph.node if node.name in found.float32_nodes]
    assert set(kept) == {"Add", "Sub"}
    monkeypatch.setattr(half, "MOST_TRIES", 1)
    short = made(path)
    assert set(found.float32_nodes) < set(short.float32_nodes)  # what was not tried stays in float32


def test_the_tolerance_is_a_share_of_small_outputs_too(tmp_path: Path) -> None:
    """Outputs up to 0.05 from a difference that costs numpy's float16 far more of them than the tolerance."""

    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 16.0) - 16.0

    path, x = graph_of(Small(), tmp_path), vectors().rows(range(8))["x"]
    x = x * np.float32(0.05) / np.abs(x).max()
    apart = np.abs(((x.astype(np.float16) + np.float16(16)) - np.float16(16)).astype(np.float32) - x).max()
    assert apart > 5 * half.TOLERANCE * np.abs(x).max()
    found = to_float16(path, tmp_path / "h.onnx", [{"x": x[i : i + 1]} for i in range(8)])
    assert len(found.float32_nodes) == found.nodes == 2


def test_outputs_that_are_all_zero_need_nothing(tmp_path: Path) -> None:
    core = nn.Linear(16, 4)
    with torch.no_grad():
        core.weight.zero_()
        core.bias.zero_()
    assert made(graph_of(core, tmp_path)).float32_nodes == []


def test_a_bert_needs_none_with_padding_too(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    model = TASKS["text-classification"].load(Checkpoint(str(text_teacher)), max_length=24)
    data = load_examples(str(texts["calibrate"]), ("text",), {"text": "sentence"})
    export_graph(model, data, tmp_path / "g.onnx", 20)
    found = quantize(tmp_path / "g.onnx", tmp_path / "h.onnx", HALF, data, model.encode, 0)
    assert (found.scheme, found.float32_nodes, found.left_float) == ("float16", [], 0)
    padded = [model.encode(data.rows([i, i + 1])) for i in range(8)]
    assert to_float16(tmp_path / "g.onnx", tmp_path / "p.onnx", padded).float32_nodes == []
    assert (tmp_path / "p.onnx").read_bytes() == (tmp_path / "h.onnx").read_bytes()


def test_the_record_says_what_stayed(tmp_path: Path) -> None:
    path = graph_of(Net(1e6), tmp_path)
    found = quantize(path, tmp_path / "h.onnx", HALF, vectors(), ArrayEncoder(), 0)
    count, nodes = len(found.float32_nodes), len(onnx.load(path).graph.node)
    assert found.scheme == f"float16, {count} of {nodes} nodes in float32"
    assert sorted(part.name for part in tmp_path.iterdir()) == ["g.modules.json", "g.onnx", "h.onnx"]


def test_an_output_that_float16_cannot_hold_stays_whole(tmp_path: Path) -> None:
    core = nn.Linear(16, 4)
    with torch.no_grad():
        core.weight *= 1e6
    path, x = graph_of(core, tmp_path), vectors().rows(range(8))["x"]
    assert len(made(path).float32_nodes) == 1
    np.testing.assert_array_equal(run(tmp_path / "h.onnx", x), run(path, x))
    onnx.checker.check_model(onnx.load(tmp_path / "h.onnx"), full_check=True)


def test_float16_is_measured_or_refused(tmp_path: Path) -> None:
    path = graph_of(Net(1.0), tmp_path)
    with pytest.raises(InputError, match="float16 needs at least 1 real example"):
        quantize(path, tmp_path / "h.onnx", HALF, None, ArrayEncoder(), 0)
    with pytest.raises(InputError, match=r"an output of g.onnx in float32 is not finite on a real example"):
        to_float16(path, tmp_path / "h.onnx", [{"x": np.full((1, 16), np.inf, dtype=np.float32)}])
