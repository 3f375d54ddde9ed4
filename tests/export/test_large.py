"""A model past the limit of protobuf, the limit being patched: every scheme, and the package as it opens."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from potstill.export import graph
from potstill.export.graph import data_file, export_graph, fix_shapes, model_bytes
from potstill.export.quantize import quantize, scheme_for
from potstill.export.ranges import observe
from potstill.export.rewrites import suit
from potstill.targets.target import Scheme, load_target
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.external_data import files_of
from potstill.validate.predictor import OnnxPredictor
from potstill.validate.task import Model

STATIC = {"method": "static", "activation": "uint8", "weight": "int8", "per_channel": True}
SCHEMES = {
    "float32": {"method": "float32"},
    "float16": {"method": "float16"},
    "static": STATIC,
    "mse": {**STATIC, "calibration": "mse"},
    "repaired": {**STATIC, "repairs": ["equalize", "adaround", "bias"]},
    "dynamic": {"method": "dynamic", "weight": "int8", "per_channel": True},
    "weights": {"method": "weights", "weight": "int8", "block_size": 32},
}


def vectors(n: int = 32) -> Examples:
    x = np.random.default_rng(0).normal(size=(n, 64)).astype(np.float32)
    return Examples("made", Arrays({"x": x}), np.zeros(n, dtype=np.int64), None, "d")


def exported(folder: Path) -> Path:
    torch.manual_seed(0)
    core = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)).eval()
    model = Model(core, ArrayEncoder(), ("x",), tuple("0123"), Checkpoint("made:up"), core)
    export_graph(model, vectors(), folder / "g.onnx", 20)
    return folder / "g.onnx"


def limit(monkeypatch: pytest.MonkeyPatch, kilobytes: int) -> None:
    monkeypatch.setattr(graph, "PROTOBUF_LIMIT", 2**24 + kilobytes * 1000)


@pytest.mark.parametrize("kilobytes", [20, 200])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme(name: str, kilobytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 330 kB of weights pass both limits; in integers (85 kB) and float16 (165 kB) only the lower one."""
    for folder in ("small", "large"):
        (tmp_path / folder).mkdir()
    scheme = Scheme(**SCHEMES[name], why="test")  # type: ignore[arg-type]
    small = exported(tmp_path / "small")
    quantize(small, small.with_name("q.onnx"), scheme, vectors(), ArrayEncoder(), 0)
    limit(monkeypatch, kilobytes)
    large = exported(tmp_path / "large")
    assert data_file(large).is_file()
    out = large.with_name("q.onnx")
    quantize(large, out, scheme, vectors(), ArrayEncoder(), 0)
    assert data_file(out).is_file() == (kilobytes == 20 or name == "float32")
    assert {path.name for path in out.parent.iterdir()} <= {
        "g.onnx",
        "g.onnx.data",
        "g.modules.json",
        "q.onnx",
        "q.onnx.data",
    }
    files_of(out)
    x = vectors().rows([0, 1, 2])["x"]
    first, second = (
        onnxruntime.InferenceSession(path).run(None, {"x": x})[0] for path in (small.with_name("q.onnx"), out)
    )
    np.testing.assert_array_equal(first, second)
    assert model_bytes(out) == pytest.approx(model_bytes(small.with_name("q.onnx")), rel=0.2)


@pytest.mark.parametrize("embedding", ["int8", "int4"])
def test_embeddings(embedding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).integers(0, 512, size=(8, 6))
    data = Examples("made", Arrays({"x": x}), np.zeros(8, dtype=np.int64), None, "d")
    scheme = Scheme.model_validate({**SCHEMES["dynamic"], "embedding": embedding, "why": "test"})
    found = []
    for name, kilobytes in (("small", 10**6), ("large", 20)):
        limit(monkeypatch, kilobytes)
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        core = nn.Sequential(nn.Embedding(512, 64), nn.Flatten(), nn.Linear(384, 4)).eval()
        model = Model(core, ArrayEncoder(), ("x",), tuple("0123"), Checkpoint("made:up"), core)
        path, out = tmp_path / name / "g.onnx", tmp_path / name / "q.onnx"
        export_graph(model, data, path, 20)
        assert data_file(path).is_file() == (name == "large")
        assert f"embeddings in {embedding} rows" in quantize(path, out, scheme, data, ArrayEncoder(), 0).scheme
        found.append(onnxruntime.InferenceSession(out).run(None, {"x": x})[0])
    np.testing.assert_array_equal(*found)


def test_what_else_reads_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 20)
    path = exported(tmp_path)
    before = {part.name: part.read_bytes() for part in tmp_path.iterdir()}
    assert scheme_for(path, load_target("laptop-x86-vnni")).method == "dynamic"
    fix_shapes(path, tmp_path / "f.onnx", ArrayEncoder(), None)
    x = vectors().rows([0])["x"]
    seen = observe(path, [{"x": x}])
    assert seen["x"].high == x.max()
    fixed, free = (OnnxPredictor(one, ArrayEncoder(), "g").run({"x": x}) for one in (tmp_path / "f.onnx", path))
    np.testing.assert_array_equal(fixed, free)
    assert (
        onnx.load(tmp_path / "f.onnx", load_external_data=False).graph.input[0].type.tensor_type.shape.dim[0].dim_value
    )
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert {path.name for path in tmp_path.iterdir()} == {*before, "f.onnx", "f.onnx.data"}


@pytest.mark.parametrize("target", ["phone-iphone", "laptop-x86-vnni"])
def test_what_suits_a_provider(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewritten with its weights in a file of their own, it computes what it does in one file."""
    found = {}
    for name, kilobytes in (("small", 10**6), ("large", 20)):
        limit(monkeypatch, kilobytes)
        (tmp_path / name).mkdir()
        exported(tmp_path / name)
        path = tmp_path / name / "f.onnx"
        fix_shapes(tmp_path / name / "g.onnx", path, ArrayEncoder(), None)
        suit(path, load_target(target))
        assert data_file(path).is_file() == (name == "large")
        assert {part.name.partition(".")[0] for part in path.parent.iterdir()} == {"f", "g"}
        found[name] = onnxruntime.InferenceSession(path).run(None, {"x": vectors().rows([0])["x"]})[0]
    np.testing.assert_array_equal(found["small"], found["large"])


def test_written_twice_it_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 20)
    sizes = [model_bytes(exported(tmp_path)) for _ in range(2)]
    assert sizes[0] == sizes[1]
