"""Whose module each node is: packages of models with known modules, profiled on this machine."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from potstill.export.graph import export_graph
from potstill.export.modules import modules_beside
from potstill.export.quantize import quantize
from potstill.targets.measurement import Measurement
from potstill.targets.modules import MODULES, Module, by_module, folded, read_modules
from potstill.targets.operators import Node
from potstill.targets.profile import profile
from potstill.targets.target import Scheme, load_target
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples, load_examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError
from potstill.validate.files import write_json
from potstill.validate.task import TASKS, Model

FLOAT = {"method": "float32"}
STATIC = {"method": "static", "activation": "uint8", "weight": "int8", "per_channel": True}
DYNAMIC = {"method": "dynamic", "weight": "int8", "per_channel": True}


class Block(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=groups), nn.BatchNorm2d(width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x)  # type: ignore[no-any-return]


class Slow(nn.Module):
    """Of three blocks the second has 64 times the work."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 64, 1)
        self.blocks = nn.ModuleList([Block(64, 64), Block(64, 1), Block(64, 64)])
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


Made = tuple[Model, Examples, Path]


def made(model: Model, some: Examples, folder: Path) -> Made:
    export_graph(model, some, folder / "graph.onnx", 20)
    return model, some, folder / "graph.onnx"


def packed(of: Made, package: Path, scheme: dict[str, Any]) -> Path:
    """What a device needs of a package."""
    model, some, graph = of
    (package / "golden").mkdir(parents=True)
    quantize(graph, package / "model.onnx", Scheme(**scheme, why="test"), some, model.encode, 0)
    shutil.copy(modules_beside(graph), package / MODULES)
    inputs = {}
    for name, array in model.encode(some.rows([0])).items():
        array.tofile(package / f"golden/{name}.bin")
        inputs[name] = {"file": f"{name}.bin", "dtype": array.dtype.name, "shape": array.shape}
    golden = {"format": "potstill-golden/1", "samples": [{"inputs": inputs, "outputs": {}}]}
    write_json(package / "golden/golden.json", golden)
    write_json(package / "manifest.json", {"target": load_target("laptop-x86-vnni").model_dump(mode="json")})
    return package


def shares(found: Measurement) -> dict[str | None, float]:
    """By module; all of a run's time is there."""
    assert found.unattributed_share is not None
    assert sum(one.share for one in found.modules) + found.unattributed_share == pytest.approx(1)
    assert sum(one.nodes for one in found.modules) == len(found.nodes)
    return {one.module: one.share for one in found.modules}


def nameless(found: Measurement) -> float:
    """The share of nodes without a module."""
    return sum(one.nodes for one in found.modules if one.module is None) / len(found.nodes)


@pytest.fixture(scope="module")
def bert(text_teacher: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    model = TASKS["text-classification"].load(Checkpoint(str(text_teacher)))
    some = load_examples(str(texts["train"]), ("text",), {"text": "sentence"})
    return made(model, some, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def resnet(image_teacher: Path, pictures: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    model = TASKS["image-classification"].load(Checkpoint(str(image_teacher)))
    return made(model, load_examples(str(pictures["train"]), ("image",), {}), tmp_path_factory.mktemp("resnet"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Made:
    x = np.random.default_rng(0).normal(size=(8, 3, 48, 48)).astype(np.float32)
    core = Slow().eval()
    model = Model(core, ArrayEncoder(), ("x",), tuple("0123"), Checkpoint("made:up"), core)
    some = Examples("made", Arrays({"x": x}), np.zeros(8, dtype=np.int64), None, "d")
    return made(model, some, tmp_path_factory.mktemp("slow"))


@pytest.mark.parametrize("scheme", [FLOAT, DYNAMIC], ids=["float", "int8"])
def test_a_bert(bert: Made, tmp_path: Path, scheme: dict[str, Any]) -> None:
    found = profile(packed(bert, tmp_path / "package", scheme), runs=1)
    by, modules = shares(found), {name for name, _ in bert[0].core.named_modules()}
    assert {one for one in by if one is not None} <= modules
    layers = {one for one in modules if one.endswith((".attention.self", ".output.dense", ".intermediate.dense"))}
    assert layers <= set(by)
    assert nameless(found) < 0.05


@pytest.mark.parametrize("scheme", [FLOAT, STATIC], ids=["float", "int8"])
def test_a_resnet(resnet: Made, tmp_path: Path, scheme: dict[str, Any]) -> None:
    found = profile(packed(resnet, tmp_path / "package", scheme), runs=1)
    by, parts = shares(found), dict(resnet[0].core.named_modules())
    assert {one for one in by if one is not None} <= set(parts)
    for name in (name for name, part in parts.items() if isinstance(part, nn.Conv2d)):
        assert name in by or name.rpartition(".")[0] in by  # with its activation it is of the module that holds both
    assert nameless(found) < 0.15  # the input's conversions


@pytest.mark.parametrize("scheme", [FLOAT, STATIC], ids=["float", "int8"])
def test_the_slow_layer_is_named(slow: Made, tmp_path: Path, scheme: dict[str, Any]) -> None:
    found = profile(packed(slow, tmp_path / "package", scheme), runs=1)
    by = shares(found)
    blocks = [
        sum(share for name, share in by.items() if name and f"{name}.".startswith(f"blocks.{n}.")) for n in range(3)
    ]
    assert blocks[1] > 2 * max(blocks[0], blocks[2])
    slowest = max((one for one in folded(found.modules, 12) if one.module is not None), key=lambda one: one.share)
    assert (slowest.module or "").startswith("blocks.1")


def test_the_map_tells_nothing_of_this_machine(bert: Made, tmp_path: Path) -> None:
    package = packed(bert, tmp_path / "package", FLOAT)
    assert str(Path(__file__).parent) not in (package / MODULES).read_text()
    graph = onnx.load(package / "model.onnx").graph
    assert not any(node.metadata_props for node in graph.node)
    known = read_modules(package)
    assert all(node.name in known for node in graph.node)


def test_names_that_lead_to_a_module(tmp_path: Path) -> None:
    known = {"linear_1": "one", "linear_10": "ten", "relu": "act", "w": "heavy"}
    nodes = [
        helper.make_node("Add", ["relu_q", "b"], ["linear_10_out"], "linear_10_quant"),
        helper.make_node("SkipLayerNormalization", ["x", "y"], ["linear_1_QuantizeLinear"], "SkipLayer_token_3"),
        helper.make_node("Reorder", ["relu"], ["reorder_1"], "Reorder"),
        helper.make_node("Reorder", ["reorder_1"], ["reorder_2"], "Reorder_again"),
        helper.make_node("Conv", ["input", "w"], ["y_1"], "fresh"),
        helper.make_node("Shape", ["input"], ["s"], "Shape_9"),
    ]
    graph = helper.make_graph(nodes, "g", [], [])
    onnx.save(helper.make_model(graph), tmp_path / "graph.onnx")
    shown = [Node(node.name, node.op_type, "CPU", 0.1) for node in nodes]
    shown.append(Node("fused InsertedPrecisionFreeCast_relu_nchwc", "Conv", "CPU", 0.2))
    found = {one.module: one.nodes for one in by_module(shown, known, tmp_path / "graph.onnx")}
    assert found == {"ten": 1, "one": 1, "act": 3, "heavy": 1, None: 1}
    by_name = {one.module: one.nodes for one in by_module(shown, known, None)}
    assert by_name == {"ten": 1, "act": 1, None: 5}
    assert by_module(shown, {}, None) == []


def test_inner_modules_are_folded_into_outer_ones() -> None:
    found = [Module("", 1, 0.1), Module("a.x.p", 1, 0.2), Module("a.x.q", 2, 0.3), Module("a.y", 1, 0.1)]
    found += [Module("b", 1, 0.2), Module(None, 1, 0.05)]
    assert folded(found, 6) == found
    assert [(one.module, one.nodes, round(one.share, 3)) for one in folded(found, 5)] == [
        ("", 1, 0.1), ("a.x", 3, 0.5), ("a.y", 1, 0.1), ("b", 1, 0.2), (None, 1, 0.05),
    ]  # fmt: skip
    assert [one.module for one in folded(found, 1)] == ["", "a", "b", None]
    assert [one.in_words() for one in (found[0], found[1], found[-1])] == [
        "the model itself", "a.x.p", "of no known module",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "other/1", "modules": {}}', "no json", '{"format": 1}'])
def test_a_malformed_map(text: str, tmp_path: Path) -> None:
    assert read_modules(tmp_path) == {}
    (tmp_path / MODULES).write_text(text)
    with pytest.raises(InputError, match=r"modules.json: no map of modules \(.*; export the model again"):
        read_modules(tmp_path)
