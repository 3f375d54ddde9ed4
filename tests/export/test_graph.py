"""The graph against torch, at other shapes than it was traced with."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from potstill.export.graph import PARITY, check_parity, export_graph, fix_shapes
from potstill.targets.target import OPSETS
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples, load_examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError, PotstillError
from potstill.validate.task import TASKS, Model

pytestmark = pytest.mark.usefixtures("exported_anew")

OPSET = 20


def images(n: int = 8) -> Examples:
    x = np.random.default_rng(0).normal(size=(n, 3, 12, 12)).astype(np.float32)
    return Examples("made", Arrays({"x": x}), np.zeros(n, dtype=np.int64), None, "d")


def module(core: nn.Module) -> Model:
    return Model(core.eval(), ArrayEncoder(), ("x",), ("0", "1", "2", "3"), Checkpoint("made:up"), core)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.out = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.bn(self.conv(x))).mean(dim=(2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def bert(text_teacher: Path) -> Model:
    return TASKS["text-classification"].load(Checkpoint(str(text_teacher)))


@pytest.fixture(scope="module")
def sentences(texts: dict[str, Path]) -> Examples:
    return load_examples(str(texts["eval"]), ("text",), {"text": "sentence"})


def test_a_bert_at_other_batches_and_lengths(bert: Model, sentences: Examples, tmp_path: Path) -> None:
    parity = export_graph(bert, sentences, tmp_path / "g.onnx", OPSET)
    assert parity.max_difference < 1e-5
    assert parity.examples == 16
    session = onnxruntime.InferenceSession(tmp_path / "g.onnx")
    for rows in ({"text": ["good"]}, {"text": ["a very good film", "bad", "the plot is dull " * 6, "x", "fine"]}):
        inputs = bert.encode(rows)
        with torch.inference_mode():
            expected = bert.module(*bert.batch(rows, torch.device("cpu"))).numpy()
        np.testing.assert_allclose(session.run(None, inputs)[0], expected, atol=1e-5)


def test_the_graph_is_the_same_each_time_and_says_nothing_of_this_machine(
    bert: Model, sentences: Examples, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        export_graph(bert, sentences, tmp_path / f"{name}.onnx", OPSET)
    first = (tmp_path / "a.onnx").read_bytes()
    assert first == (tmp_path / "b.onnx").read_bytes()
    assert b".py" not in first
    assert str(Path(__file__).parents[2]).encode() not in first
    assert (tmp_path / "a.modules.json").read_bytes() == (tmp_path / "b.modules.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.modules.json", "a.onnx", "b.modules.json", "b.onnx"]


def test_a_module(tmp_path: Path) -> None:
    parity = export_graph(module(Net()), images(), tmp_path / "g.onnx", OPSET)
    assert parity.max_difference <= parity.tolerance
    graph = onnx.load(tmp_path / "g.onnx").graph
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, 12, 12]
    assert graph.output[0].name == "logits"


class OneByOne(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(OneByOne, self).forward(x[i : i + 1]) for i in range(len(x))])


def test_a_graph_that_fixes_the_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be exported to ONNX: its x would have a fixed batch"):
        export_graph(module(OneByOne()), images(), tmp_path / "g.onnx", OPSET)


def test_fixed_shapes(bert: Model, sentences: Examples, tmp_path: Path) -> None:
    export_graph(bert, sentences, tmp_path / "g.onnx", OPSET)
    fix_shapes(tmp_path / "g.onnx", tmp_path / "f.onnx", bert.encode, 32)
    session = onnxruntime.InferenceSession(tmp_path / "f.onnx")
    assert {tuple(i.shape) for i in session.get_inputs()} == {(1, 32)}
    with pytest.raises(InputError, match="say data.max_length"):
        fix_shapes(tmp_path / "g.onnx", tmp_path / "f.onnx", bert.encode, None)


class Forked(nn.Module):
    """Control flow that depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)[:, :4]
        return flat * 2 if flat.sum() > 0 else flat


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="made:up cannot be exported to ONNX: .*data-dependent"):
        export_graph(module(Forked()), images(), tmp_path / "g.onnx", OPSET)


def test_a_graph_that_computes_something_else_is_an_error(tmp_path: Path) -> None:
    model, other = module(Net()), module(Net())
    export_graph(model, images(), tmp_path / "g.onnx", OPSET)
    with torch.no_grad():
        other.core.out.bias.add_(10 * PARITY)  # type: ignore[union-attr,operator]
    with pytest.raises(PotstillError, match="does not compute what torch does: a logit differs by 0.001"):
        check_parity(other, tmp_path / "g.onnx", images())


def test_a_graph_that_gives_nan_is_an_error(tmp_path: Path) -> None:
    broken = module(Net())
    with torch.no_grad():
        broken.core.out.bias.fill_(float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(PotstillError, match="does not compute what torch does"):
        export_graph(broken, images(), tmp_path / "g.onnx", OPSET)


class Sequence(nn.Module):
    """A recurrent layer, which goes by TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run, self.out = nn.GRU(12, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.run(x.flatten(1, 2))[0].amax(dim=1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "core", [nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()), Sequence()]
)
@pytest.mark.parametrize("opset", [OPSETS.start, OPSETS.stop - 1])
def test_the_ends_of_the_opsets(core: nn.Module, opset: int, tmp_path: Path) -> None:
    export_graph(module(core), images(), tmp_path / "g.onnx", opset)
    assert [one.version for one in onnx.load(tmp_path / "g.onnx").opset_import if not one.domain] == [opset]


def test_an_opset_that_torch_gives_up_on_is_an_error(tmp_path: Path) -> None:
    """torch writes ReduceMean of opset 18, and its converter leaves the graph there without an error."""
    with pytest.raises(
        InputError, match="made:up cannot be exported in opset 17: .* let the target's model.opset be 18"
    ):
        export_graph(module(Net()), images(), tmp_path / "g.onnx", 17)
