import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before any test imports onnxruntime

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from potstill.targets.target import load_target

MakePackage = Callable[..., Path]


def write_model(path: Path, width: int, layers: int, seed: int = 0) -> None:
    """`layers` square MatMuls of `width`, each followed by a Tanh."""
    rng = np.random.default_rng(seed)
    nodes, weights = [], []
    for layer in range(layers):
        matrix = (rng.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"m{layer}"], name=f"matmul{layer}"))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [f"x{layer + 1}"], name=f"tanh{layer}"))
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, ["rows", width])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def write_package(
    folder: Path, *, width: int = 256, layers: int = 4, rows: Sequence[int] = (8,), target: str = "laptop-x86-vnni"
) -> Path:
    golden = folder / "golden"
    golden.mkdir(parents=True)
    write_model(folder / "model.onnx", width, layers)
    samples: list[dict[str, Any]] = []
    for number, count in enumerate(rows):
        values = np.random.default_rng(number).standard_normal((count, width)).astype("<f4")
        (golden / f"{number}.x0.bin").write_bytes(values.tobytes())
        entry = {"file": f"{number}.x0.bin", "dtype": "float32", "shape": [count, width]}
        samples.append({"inputs": {"x0": entry}, "outputs": {}})
    (golden / "golden.json").write_text(json.dumps({"format": "potstill-golden/1", "samples": samples}))
    (folder / "manifest.json").write_text(json.dumps({"target": load_target(target).model_dump(mode="json")}))
    return folder


@pytest.fixture
def make_package(tmp_path: Path) -> MakePackage:
    def make(name: str = "package", **options: Any) -> Path:
        return write_package(tmp_path / name, **options)

    return make
