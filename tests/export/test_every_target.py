"""A small convolutional and a small transformer-like model, packaged for every target that comes along."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from potstill.export.graph import export_graph
from potstill.export.package import MODEL, Order, Package, make_package
from potstill.export.quantize import in_words, scheme_for
from potstill.targets.target import load_target, target_names
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.predictor import Predictor, predict
from potstill.validate.task import TASKS, Model

FLOATS = {"float16": onnx.TensorProto.FLOAT16, "float32": onnx.TensorProto.FLOAT}


class Convolutions(nn.Module):
    """Two convolutions, one of them depthwise, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 4)."""
        return self.layers(x)  # type: ignore[no-any-return]


class Products(nn.Module):
    """Matrix products alone, with a layer norm between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 4)."""
        return self.layers(x.flatten(2)).mean(dim=1)  # type: ignore[no-any-return]


def examples(count: int = 12) -> Examples:
    x = np.random.default_rng(0).normal(size=(count, 3, 12)).astype(np.float32)
    return Examples("made", Arrays({"x": x}), np.arange(count) % 4, None, f"d{count}")


def images(count: int = 12) -> Examples:
    x = np.random.default_rng(0).normal(size=(count, 3, 12, 12)).astype(np.float32)
    return Examples("made", Arrays({"x": x}), np.arange(count) % 4, None, f"i{count}")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Model, Examples, Any]]:
    """A model of a kind, its examples, and its float graph in an opset with the comparison to torch."""

    @cache
    def graph(kind: str, opset: int) -> tuple[Model, Examples, Any]:
        core = (Convolutions() if kind == "convolution" else Products()).eval()
        some = images() if kind == "convolution" else examples()
        model = Model(core, ArrayEncoder(), ("x",), tuple("0123"), Checkpoint("made:up"), core)
        path = tmp_path_factory.mktemp("graph") / "graph.onnx"
        return model, some, (path, export_graph(model, some, path, opset))

    return graph


@pytest.mark.parametrize("kind", ["convolution", "matmul"])
@pytest.mark.parametrize("name", target_names())
def test_a_package_is_made(
    name: str,
    kind: str,
    graphs: Callable[[str, int], tuple[Model, Examples, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = load_target(name)
    opset = target.model.opset or 20
    model, some, (path, parity) = graphs(kind, opset)
    assert scheme_for(path, target) == getattr(target.quantize, kind)
    task, rows = TASKS["module"], np.asarray(model.module(torch.from_numpy(some.rows(range(len(some)))["x"])).detach())
    found: list[np.ndarray] = []

    def judge(predictor: Predictor, size: int, left: tuple[str, ...]) -> Any:
        found.append(np.asarray(predict(predictor, some, task.length_of, tmp_path / "rows.npy")))
        return task.judge(found[0], rows, some, predictor.encode, 0), None

    monkeypatch.setattr("potstill.export.context.find_spec", lambda name: None)
    package: Package = make_package(
        tmp_path / "package", model, target, Order(path, parity, opset, 0, "k", {}),
        calibrate=some, golden=some, judge=judge, card=lambda package: package.target,
    )  # fmt: skip
    scheme = getattr(target.quantize, kind)
    assert package.quantized.scheme.startswith(in_words(scheme).partition(", embeddings")[0])
    file = onnx.load(str(package.folder / MODEL))
    assert max(one.version for one in file.opset_import if not one.domain) >= opset
    dims = [dim for one in file.graph.input for dim in one.type.tensor_type.shape.dim]
    assert all(dim.HasField("dim_value") for dim in dims) == (target.model.shapes == "static")
    weights = {one.data_type for one in file.graph.initializer if len(one.dims) > 1}
    assert weights == {FLOATS[scheme.method]} if scheme.method in FLOATS else weights & {2, 3}
    power, noise = (rows**2).sum(), ((found[0] - rows) ** 2).sum()
    assert 10 * np.log10(power / max(noise, 1e-30)) > (15 if scheme.weight else 50)
