"""Embedding tables by row: the stored numbers against the formula in float64, and what ONNX Runtime reads of them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantizer

from potstill.export.embeddings import ROW_BLOCK, Embedding, embeddings, embeddings_in_rows, quantize_row_blocks
from potstill.export.graph import export_graph
from potstill.export.quantize import quantize
from potstill.targets.target import Scheme
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Examples, load_examples
from potstill.validate.errors import InputError
from potstill.validate.task import TASKS, Model

ROWS, WIDE = 30, 40  # 40 is no whole number of blocks
TABLE = (np.random.default_rng(0).normal(size=(ROWS, WIDE)) * np.logspace(-3, 0, ROWS)[:, None]).astype(np.float32)
TABLE[7] = 0
IDS = np.array([[0, 29, 7], [-1, 3, 3]])


def graph(path: Path, table: NDArray[np.float32] = TABLE, axis: int = 0) -> Path:
    """Two nodes that read one table, the second added to the table's own first row."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"], "one", axis=axis),
        helper.make_node("Gather", ["table", "ids"], ["b"], "two", axis=axis),
        helper.make_node("Add", ["a", "b"], ["y"], "sum"),
    ]
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n", "m"])
    y = helper.make_tensor_value_info("y", 1, None)
    made = helper.make_graph(nodes, "made", [ids], [y], [numpy_helper.from_array(table, "table")])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def rounded(kind: Embedding) -> NDArray[np.float64]:
    """The table as its integers hold it, in float64."""
    values = TABLE.astype(np.float64)
    if kind == "int8":
        scale = np.abs(values).max(axis=1, keepdims=True) / 127
        return np.asarray(np.rint(values / np.where(scale == 0, 1, scale)) * scale)
    found = np.zeros_like(values)
    for row in range(ROWS):
        for start in range(0, WIDE, 16):
            block = values[row, start : start + 16]
            scale = max(block, key=abs) / -8
            if scale:
                found[row, start : start + 16] = np.clip(np.rint(block / scale), -8, 7) * scale
    return found


def run(path: Path) -> NDArray[np.float32]:
    return np.asarray(onnxruntime.InferenceSession(path).run(None, {"ids": IDS})[0])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_onnxruntime_reads_the_rows_of_the_formula(tmp_path: Path, kind: Embedding) -> None:
    path = graph(tmp_path / "e.onnx")
    embeddings_in_rows(path, kind, ["one", "two"])
    expected = 2 * rounded(kind)[IDS]
    assert np.abs(run(path) - expected).max(axis=(0, 1)) == pytest.approx(0, abs=1e-6)
    assert (np.abs(run(path) - 2 * TABLE[IDS]).max(axis=2)[:, 0] > 1e-6).all()
    kept = {tensor.name: tuple(tensor.dims) for tensor in onnx.load(path).graph.initializer}
    width, scales = (WIDE, 1) if kind == "int8" else (WIDE // 2, 3)
    assert kept == {f"table.{kind}": (ROWS, width), "table.scales": (ROWS, scales)}  # once, for both


def test_four_bits_are_those_of_onnxruntimes_own_quantiser() -> None:
    packed, scales = quantize_row_blocks(TABLE)
    theirs, their_scales, _ = DefaultWeightOnlyQuantizer.quantize_ndarray(TABLE, 1, ROW_BLOCK, True)
    whole = np.stack([packed & 15, packed >> 4], axis=-1).reshape(ROWS, WIDE)
    their_whole = np.stack([theirs & 15, theirs >> 4], axis=-1).reshape(ROWS, WIDE) ^ 8  # two's complement, plus 8
    np.testing.assert_array_equal(scales, their_scales)
    np.testing.assert_array_equal(whole, their_whole)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_only_what_is_named_changes_and_a_table_that_is_read_stays(tmp_path: Path, kind: Embedding) -> None:
    path = graph(tmp_path / "e.onnx")
    embeddings_in_rows(path, kind, ["two"])
    assert [node.name for node in embeddings(onnx.load(path).graph)] == ["one"]
    assert {"table", f"table.{kind}"} < {tensor.name for tensor in onnx.load(path).graph.initializer}
    assert np.abs(run(path) - (TABLE[IDS] + rounded(kind)[IDS])).max() < 1e-6


def test_another_axis_is_no_embedding(tmp_path: Path) -> None:
    assert embeddings(onnx.load(graph(tmp_path / "e.onnx", axis=1)).graph) == []


def test_an_odd_width_in_four_bits(tmp_path: Path) -> None:
    path = graph(tmp_path / "e.onnx", TABLE[:, :5])
    before = path.read_bytes()
    with pytest.raises(
        InputError, match="'table' is 5 wide, and int4 stores two values in a byte; set embedding: int8"
    ):
        embeddings_in_rows(path, "int4", ["one", "two"])
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def bert(
    text_teacher: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Model, Examples]:
    model = TASKS["text-classification"].load(Checkpoint(str(text_teacher)))
    path = tmp_path_factory.mktemp("graph") / "bert.onnx"
    examples = load_examples(str(texts["train"]), ("text",), {"text": "sentence"})
    export_graph(model, examples, path, 20)
    return path, model, examples


def logits(path: Path, inputs: dict[str, Any]) -> NDArray[np.float32]:
    return np.asarray(onnxruntime.InferenceSession(path).run(None, inputs)[0])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("method", ["dynamic", "static", "weights"])
def test_a_transformers_embeddings_beside_each_method(
    bert: tuple[Path, Model, Examples], tmp_path: Path, method: Any, kind: Embedding
) -> None:
    """The file's embeddings are the float graph's with the tables rounded, and nothing else of the scheme changes."""
    path, model, examples = bert
    names = [node.name for node in embeddings(onnx.load(path).graph)]
    scheme = Scheme(method=method, weight="int8", activation="uint8" if method == "static" else None, why="test")
    both, rounded_, alone = (tmp_path / f"{name}.onnx" for name in ("both", "rounded", "alone"))
    made = quantize(path, both, scheme.model_copy(update={"embedding": kind}), examples, model.encode, 0)
    assert made.scheme.endswith(f", embeddings in {kind} rows")
    assert len(names) == 3
    assert embeddings(onnx.load(both).graph) == []
    rounded_.write_bytes(path.read_bytes())
    embeddings_in_rows(rounded_, kind, names)
    plain = quantize(path, alone, scheme, examples, model.encode, 0, keep_float=names)
    assert made.left_float == plain.left_float < 5
    inputs = model.encode(examples.rows(range(8)))
    float_ = logits(path, inputs)
    of_tables, of_products = (np.abs(logits(p, inputs) - float_).max() for p in (rounded_, alone))
    assert 0 < of_tables < (0.05 if kind == "int8" else 0.5) * np.abs(float_).max()
    assert np.abs(logits(both, inputs) - float_).max() < 2 * (of_tables + of_products) + 0.02


def test_without_tables_nothing_is_said_of_them(tmp_path: Path, bert: tuple[Path, Model, Examples]) -> None:
    path, model, _ = bert
    names = [node.name for node in embeddings(onnx.load(path).graph)]
    scheme = Scheme(method="dynamic", weight="int8", embedding="int8", why="test")
    made = quantize(path, tmp_path / "q.onnx", scheme, None, model.encode, 0, keep_float=names)
    assert made.scheme == "dynamic int8 weights, per tensor"
    assert len(embeddings(onnx.load(tmp_path / "q.onnx").graph)) == 3
