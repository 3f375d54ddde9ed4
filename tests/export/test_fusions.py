"""Fusions counted in the graph that ONNX Runtime makes, and the ones that do not happen told."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from potstill.export.fusions import COSTLY, PATTERNS, Fusions, _known, _told, count_fusions
from potstill.export.graph import export_graph
from potstill.export.quantize import quantize
from potstill.targets.target import Scheme, Target, load_target
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.task import TASKS, Model

VNNI = load_target("laptop-x86-vnni")
FLOAT = {"method": "float32", "why": "test"}
STATIC = {"method": "static", "activation": "uint8", "weight": "int8", "per_channel": True, "why": "test"}
DYNAMIC = {"method": "dynamic", "weight": "int8", "per_channel": True, "why": "test"}


def images(n: int = 8) -> Examples:
    x = np.random.default_rng(0).normal(size=(n, 3, 12, 12)).astype(np.float32)
    return Examples("made", Arrays({"x": x}), np.zeros(n, dtype=np.int64), None, "d")


@pytest.fixture(scope="module")
def convnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two convolutions with an activation, one without, and a product."""
    torch.manual_seed(0)
    core = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    path = tmp_path_factory.mktemp("graph") / "conv.onnx"
    export_graph(Model(core, ArrayEncoder(), ("x",), tuple("0123"), Checkpoint("made:up"), core), images(), path, 20)
    return path


def counted(graph: Path, scheme: dict[str, object], folder: Path, target: Target = VNNI) -> tuple[Fusions, list[str]]:
    """The record, and the operators that differ from what was expected."""
    quantize(graph, folder / "q.onnx", Scheme(**scheme), images(), ArrayEncoder(), 0)  # type: ignore[arg-type]
    found = count_fusions(folder / "q.onnx", graph, target)
    assert found
    return found, [kind for kind in found.expected if found.expected[kind] != found.found[kind]]


def test_a_convnet_in_float_and_in_integers(convnet: Path, tmp_path: Path) -> None:
    found, apart = counted(convnet, FLOAT, tmp_path)
    assert found.expected["convolution with activation"] == 2
    assert apart == found.warnings == []
    found, apart = counted(convnet, STATIC, tmp_path)
    assert found.expected | {"integer convolution": 3, "integer matrix product": 1} == found.expected
    assert apart == found.warnings == []


class Residual(nn.Module):
    """Two residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.out = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in "ab") for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for a, b in self.blocks:  # type: ignore[misc]
            x = torch.relu(x + b(torch.relu(a(x))))
        return self.out(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def test_int8_activations_are_slow_on_x86_and_fast_on_arm(tmp_path: Path) -> None:
    core = Residual().eval()
    graph = tmp_path / "g.onnx"
    export_graph(Model(core, ArrayEncoder(), ("x",), tuple("0123"), Checkpoint("made:up"), core), images(), graph, 20)
    found, apart = counted(graph, {**STATIC, "activation": "int8"}, tmp_path)
    assert apart == ["integer convolution"]
    assert found.expected["integer convolution"] == 5
    missing = 5 - found.found["integer convolution"]
    assert found.warnings == [
        f"{missing} of 5 expected fusions of the kind 'integer convolution' did not happen in ONNX Runtime; "
        "without any of them a model took 3.1 times as long."
    ]
    there, apart = counted(graph, {**STATIC, "activation": "int8"}, tmp_path, load_target("phone-arm64-dotprod"))
    assert apart == there.warnings == []


def test_weights_that_onnx_runtime_quantises_by_itself(convnet: Path, tmp_path: Path) -> None:
    """A Conv in float between a DequantizeLinear and a QuantizeLinear, with nothing that holds it there."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": images().rows([i])["x"]} for i in range(4)]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    second = [node.name for node in onnx.load(convnet).graph.node if node.op_type == "Conv"][1]
    quantize_static(convnet, tmp_path / "q.onnx", Reader(), per_channel=True, nodes_to_exclude=[second])
    found = count_fusions(tmp_path / "q.onnx", convnet, load_target("phone-arm64"))
    assert found
    assert found.warnings[0] == (
        "ONNX Runtime computes 3 nodes of the kind 'integer convolution' where the file has 2; "
        "it quantised 1 by itself."
    )


@pytest.mark.parametrize(("opset", "fused"), [(20, 4), (17, 0)])
def test_a_bert(opset: int, fused: int, text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    """At opset 17 torch's GELU comes in pieces, in a form that ONNX Runtime does not put together."""
    task = TASKS["text-classification"]
    model = task.load(Checkpoint(str(text_teacher)))
    data = task.examples(str(texts["calibrate"]), {"text": "sentence"})
    export_graph(model, data, tmp_path / "g.onnx", opset)
    quantize(tmp_path / "g.onnx", tmp_path / "q.onnx", Scheme(**DYNAMIC), None, model.encode, 0)  # type: ignore[arg-type]
    found = count_fusions(tmp_path / "q.onnx", tmp_path / "g.onnx", VNNI)
    assert found
    products = sum(node.op_type in ("MatMul", "Gemm") for node in onnx.load(tmp_path / "g.onnx").graph.node) - 8
    wanted = {"integer matrix product": products, "GELU": 4, "layer norm": 9, "skip layer norm": 9, "attention": 4}
    assert {kind: count for kind, count in found.expected.items() if count} == wanted
    assert (
        found.found | {"integer matrix product": products, "GELU": fused, "layer norm": 9, "attention": 0}
        == found.found
    )
    assert (found.warnings == []) == (fused == 4)
    if not fused:
        assert found.warnings[0].startswith("4 of 4 expected fusions of the kind 'GELU' did not happen in ONNX Runtime")


class Pieces(nn.Module):
    """Layer norm and GELU by their formulas, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.out = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 4)

    def norm(self, x: Tensor) -> Tensor:
        apart = x - x.mean(-1, keepdim=True)
        return apart / torch.sqrt(apart.pow(2).mean(-1, keepdim=True) + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(self.norm(x))
        return self.out(self.norm(x + self.down(up * 0.5 * (1 + torch.erf(up / 2**0.5)))).mean(dim=(1, 2)))  # type: ignore[no-any-return]


def test_pieces_are_known(tmp_path: Path) -> None:
    core = Pieces().eval()
    export_graph(
        Model(core, ArrayEncoder(), ("x",), tuple("0123"), Checkpoint("made:up"), core),
        images(),
        tmp_path / "g.onnx",
        20,
    )
    ops = {node.op_type for node in onnx.load(tmp_path / "g.onnx").graph.node}
    assert not ops & {"Gelu", "LayerNormalization"}
    found = count_fusions(tmp_path / "g.onnx", tmp_path / "g.onnx", VNNI)
    assert found
    assert found.expected | {"GELU": 1, "layer norm": 2, "skip layer norm": 1} == found.expected


def test_a_provider_that_is_not_here(convnet: Path) -> None:
    assert count_fusions(convnet, convnet, load_target("phone-iphone")) is None
    assert count_fusions(convnet, convnet, load_target("browser-wasm")) is None


def test_what_costs_nothing_is_not_warned_of() -> None:
    assert _told("attention", 4, 0, COSTLY - 0.01) == ""
    assert _told("attention", 4, 4, 2) == ""
    assert "4 of 4" in _told("attention", 4, 0, COSTLY)


def test_each_kind_has_a_pattern_and_a_source() -> None:
    for kinds in _known().values():
        assert set(kinds) == set(PATTERNS)
        assert all("measured" in kind["source"] for kind in kinds.values())
