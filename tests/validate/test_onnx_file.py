"""What is refused of an ONNX file before it is used, and what ONNX Runtime computes of the rest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from potstill.validate.errors import InputError
from potstill.validate.external_data import files_of
from potstill.validate.onnx_file import OnnxModule

FREE = {0: "batch"}


def linear(
    path: Path,
    weights: np.ndarray | None = None,
    batch: int | str = "n",
    nodes: list[onnx.NodeProto] | None = None,
    outputs: tuple[str, ...] = ("y",),
    domain: str | None = None,
) -> Path:
    """A file that gives x (batch, 3) times weights (3, 4), or has nodes of its own."""
    weights = np.arange(12, dtype=np.float32).reshape(3, 4) if weights is None else weights
    kind = helper.np_dtype_to_tensor_dtype(weights.dtype)
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, [batch, 3])],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(weights, "w")],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


@pytest.mark.parametrize("batch", ["n", 1])
def test_it_computes_what_onnx_runtime_does(tmp_path: Path, batch: int | str) -> None:
    core = OnnxModule(linear(tmp_path / "m.onnx", batch=batch), "logits")
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    expected = np.concatenate([session.run(None, {"x": x[i : i + 1]})[0] for i in range(5)])
    np.testing.assert_allclose(core(torch.from_numpy(x)).numpy(), expected, rtol=1e-6)
    assert core.weights == 12
    assert core.one_by_one == (batch == 1)
    assert core.in_words() == f"ONNX of opset 17, x ({batch}, 3) → y ()"


def test_inputs_that_do_not_run(tmp_path: Path) -> None:
    core = OnnxModule(linear(tmp_path / "m.onnx"), "y")
    with pytest.raises(InputError, match=r"m.onnx does not run on x \(2, 5\): .*"):
        core(torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"version https://git-lfs\n", "cannot be read as ONNX"), (b"", "holds no ONNX graph"), (None, "no such file")],
)
def test_files_that_are_none(tmp_path: Path, content: bytes | None, match: str) -> None:
    if content is not None:
        (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(InputError, match=match):
        OnnxModule(tmp_path / "m.onnx", "y")


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="m.onnx cannot be read as ONNX"):
        OnnxModule(path, "y")


def test_a_graph_that_onnx_runtime_cannot_open(tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx", nodes=[helper.make_node("MatMul", ["x", "nothing"], ["y"])])
    with pytest.raises(InputError, match="ONNX Runtime cannot open .*nothing"):
        OnnxModule(path, "y")


def test_operators_of_ones_own_are_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Twice", ["x"], ["a"], domain="mine"), helper.make_node("Magic", ["a"], ["y"])]
    with pytest.raises(InputError, match=r"does not know \(1 Magic, 1 mine::Twice\); a package runs without"):
        OnnxModule(linear(tmp_path / "m.onnx", nodes=nodes, domain="mine"), "y")


def test_a_newer_opset_than_is_known(tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.opset_import[0].version = 99
    onnx.save(model, path)
    with pytest.raises(InputError, match="ONNX Runtime cannot open .*[Oo]pset"):
        OnnxModule(path, "y")


def test_quantised_files(tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    path = linear(tmp_path / "m.onnx")
    quantize_dynamic(path, tmp_path / "q.onnx")
    with pytest.raises(InputError, match="q.onnx is quantised already .*1 MatMulInteger.*give the float32 file"):
        OnnxModule(tmp_path / "q.onnx", "y")


def test_half_precision(tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx", weights=np.ones((3, 4), dtype=np.float16))
    with pytest.raises(InputError, match="holds 1 weights in half precision; give the float32 file"):
        OnnxModule(path, "y")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    weights = np.ones((3, 4), dtype=np.float32)
    weights[1, :2] = np.nan
    path = linear(tmp_path / "m.onnx", weights)
    with pytest.raises(InputError, match=r"m.onnx holds .*in 1 of its tensors \(2 of 12 values of 'w'\)"):
        OnnxModule(path, "y")
    external(path, "m.data")
    with pytest.raises(InputError, match=r"2 of 12 values of 'w'"):
        OnnxModule(path, "y")


def test_several_outputs(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["logits"])]
    path = linear(tmp_path / "m.onnx", nodes=nodes, outputs=("y", "logits"))
    assert OnnxModule(path, "logits").output == "logits"
    with pytest.raises(InputError, match="gives y, logits; expected one output, or one of the name 'scores'"):
        OnnxModule(path, "scores")


def external(path: Path, location: str) -> None:
    """Move the weights to another file, and say they lie at `location`."""
    model = onnx.load(path)
    (path.parent / "m.data").write_bytes(model.graph.initializer[0].raw_data)
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())


def test_weights_in_another_file(tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx")
    external(path, "m.data")
    assert files_of(path) == [path, tmp_path / "m.data"]
    assert OnnxModule(path, "y")(torch.ones(1, 3)).tolist() == [[12, 15, 18, 21]]


def missing(folder: Path) -> str:
    (folder / "m.data").unlink()
    return "m.data"


def cut_off(folder: Path) -> str:
    (folder / "m.data").write_bytes(b"1234")
    return "m.data"


def by_a_link(folder: Path) -> str:
    (folder / "m.data").rename(folder.parent / "outside.data")
    (folder / "m.data").symlink_to(folder.parent / "outside.data")
    return "m.data"


@pytest.mark.parametrize(
    ("place", "match"),
    [
        (missing, "keeps weights in 'm.data', which is not in .*; put it there"),
        (cut_off, "'m.data', which has 4 of at least 48 bytes; copy it again"),
        (by_a_link, "'m.data', a link that leads out of its folder"),
        (lambda folder: str(folder / "m.data"), "expected a file in the folder of m.onnx"),
        (lambda folder: "../m.data", "keeps weights in '../m.data'; expected a file in the folder"),
        (lambda folder: "sub\\..\\..\\m.data", "expected a file in the folder"),
        (lambda folder: "", "keeps weights in ''; expected a file in the folder"),
    ],
)
def test_weights_elsewhere(tmp_path: Path, place: Callable[[Path], str], match: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = linear(folder / "m.onnx")
    external(path, "m.data")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = place(folder)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=match):
        OnnxModule(path, "y")


@pytest.mark.parametrize(
    ("batch", "given", "match"),
    [
        ("n", {"tokens": np.zeros((2, 3), np.float32)}, "takes x, and the data gives tokens: nothing feeds x"),
        ("n", {"x": np.zeros((2, 3), np.int64)}, r"takes x as float32 \(n, 3\), and the data gives int64 \(batch, 3\)"),
        ("n", {"x": np.zeros((2, 4), np.float32)}, r"float32 \(n, 3\), and the data gives float32 \(batch, 4\)"),
        ("n", {"x": np.zeros((2, 3, 1), np.float32)}, r"gives float32 \(batch, 3, 1\)"),
        (8, {"x": np.zeros((2, 3), np.float32)}, "takes x in batches of 8 only; export it with a dynamic batch"),
    ],
)
def test_what_is_fed(tmp_path: Path, batch: int | str, given: dict[str, np.ndarray], match: str) -> None:
    core = OnnxModule(linear(tmp_path / "m.onnx", batch=batch), "y")
    with pytest.raises(InputError, match=match):
        core.check_fed(given, FREE, "the data")
