"""`potstill export model.onnx`: a user's own ONNX file on the whole road, and what is refused at its door."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from potstill.pipeline import cli

Potstill = Callable[..., str]


@pytest.fixture
def potstill(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Potstill]:
    """Runs a command in a folder of its own; gives its standard output, or standard error if it fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*words: object, code: int = 2) -> str:
        capsys.readouterr()
        found = cli.call([str(word) for word in words])
        said = capsys.readouterr()
        assert found == code, said.err
        assert "Traceback" not in said.err
        return " ".join(said.err.split()) if code else said.out

    yield run
    sys.modules.pop("models", None)


def export(potstill: Potstill, source: object, data: list[object], *more: object, code: int = 2) -> Any:
    words = ["export", source, "--target", "laptop-x86-vnni", *data, *more, "--json"]
    said = potstill(*words, code=code)
    return said if code else json.loads(said)


@pytest.fixture
def of_texts(texts: dict[str, Path]) -> list[object]:
    return ["--calibrate", texts["calibrate"], "--eval", texts["eval"], "--columns", "text=sentence"]


@pytest.fixture
def of_arrays(arrays: Path) -> list[object]:
    return ["--calibrate", f"{arrays}:train", "--eval", f"{arrays}:test"]


def bert_file(teacher: Path, folder: Path) -> Path:
    """A BERT as optimum lays it out: model.onnx, config and tokenizer; no weights of torch."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    core = BertForSequenceClassification.from_pretrained(teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    core.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    core.config.return_dict = False
    encoded = tokenizer(["a good film", "bad"], padding=True, return_tensors="pt")
    names = ["input_ids", "attention_mask"]
    torch.onnx.export(
        core, tuple(encoded[name] for name in names), str(folder / "model.onnx"), input_names=names,
        output_names=["logits"], dynamic_axes={name: {0: "b", 1: "s"} for name in names}, opset_version=17,
        dynamo=False,
    )  # fmt: skip
    return folder


NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        pool = nn.AdaptiveAvgPool2d(2)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(32, 4))
    def forward(self, x):
        return self.body(x.permute(0, 3, 1, 2) / 255)
"""


def net_file(path: Path) -> Path:
    """A small net as a user would write it by TorchScript; its factory is `models:Net`."""
    path.with_name("models.py").write_text(NET)
    from models import Net  # type: ignore[import-not-found]

    torch.onnx.export(
        Net().eval(), (torch.rand(2, 12, 12, 3),), str(path), input_names=["image"], output_names=["scores"],
        dynamic_axes={"image": {0: "N"}}, opset_version=17, dynamo=False,
    )  # fmt: skip
    return path


def accuracies(ledger: dict[str, Any]) -> list[float]:
    return [entry["scorecard"]["value"] for entry in ledger["entries"]]


def test_a_bert_file_gets_what_its_checkpoint_gets(
    potstill: Potstill, text_teacher: Path, of_texts: list[object], tmp_path: Path
) -> None:
    folder = bert_file(text_teacher, tmp_path / "bert")
    of_file = export(potstill, folder, of_texts, "--out", "a", code=0)
    of_checkpoint = export(potstill, text_teacher, of_texts, "--out", "b", code=0)
    np.testing.assert_allclose(accuracies(of_file), accuracies(of_checkpoint), atol=1 / 200)
    assert of_file["recipe"]["task"] == "text-classification"
    package = tmp_path / "a" / "packages" / "laptop-x86-vnni"
    manifest = json.loads((package / "manifest.json").read_text())
    assert manifest["opset"] == 17
    assert manifest["labels"] == ["negative", "positive"]
    assert {"config.json", "tokenizer.json", "model.onnx"} <= {path.name for path in package.iterdir()}
    assert "MatMulInteger" in {node.op_type for node in onnx.load(package / "model.onnx").graph.node}


def test_a_bare_file_of_arrays_keeps_its_own_names(potstill: Potstill, of_arrays: list[object], tmp_path: Path) -> None:
    path = net_file(tmp_path / "net.onnx")
    of_file = export(potstill, path, of_arrays, "--out", "a", code=0)
    of_factory = export(potstill, "models:Net", of_arrays, "--out", "b", code=0)
    np.testing.assert_allclose(accuracies(of_file), accuracies(of_factory), atol=1 / 300)
    package = tmp_path / "a" / "packages" / "laptop-x86-vnni"
    golden = json.loads((package / "golden" / "golden.json").read_text())["samples"][0]
    assert [*golden["inputs"], *golden["outputs"]] == ["image", "scores"]
    again = export(potstill, path, of_arrays, "--out", "a", code=0)
    assert again["entries"] == of_file["entries"]


def test_a_recipe_with_an_onnx_file(
    potstill: Potstill, text_teacher: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    moved = shutil.move(bert_file(text_teacher, tmp_path / "bert") / "model.onnx", tmp_path / "alone.onnx")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "task: text-classification\nteacher: {checkpoint: alone.onnx, preprocessing: bert}\n"
        f"data: {{eval: {texts['eval']}, calibrate: {texts['calibrate']}, columns: {{text: sentence}}}}\n"
        "targets: [laptop-x86-vnni]\n"
    )
    plan = json.loads(potstill("run", recipe, "--dry-run", "--json", code=0))
    assert [step["name"] for step in plan["steps"]] == ["0-teacher", "graph", "packages/laptop-x86-vnni", "reference"]
    assert plan["disk_bytes"] > 2 * Path(moved).stat().st_size
    recipe.write_text(recipe.read_text().replace("alone.onnx", str(text_teacher)))
    assert "preprocessing goes with an ONNX file only" in potstill("run", recipe, "--dry-run")


def test_what_an_onnx_file_cannot_do(
    potstill: Potstill, of_arrays: list[object], text_teacher: Path, tmp_path: Path
) -> None:
    path, data = net_file(tmp_path / "net.onnx"), of_arrays[3]
    train = ("--task", "module", "--train", data, "--eval", data, "--out", "a")
    assert "distillation, pruning and students need a checkpoint" in potstill("compress", path, *train)
    assert "a recipe that distils needs a checkpoint" in potstill("init", path, "--train", data, "--eval", data)
    said = potstill("compress", "models:Net", *train, "--student", path)
    assert "is an ONNX file, which is judged against itself; give a checkpoint" in said
    assert "is judged against itself" in export(potstill, path, of_arrays, "--teacher", "models:Net", "--out", "a")
    assert "no such file or folder: 'none.onnx'" in export(potstill, "none.onnx", of_arrays, "--out", "a")
    said = export(potstill, text_teacher, of_arrays, "--preprocessing", text_teacher, "--out", "a")
    assert "a checkpoint brings its own" in said
    assert not (tmp_path / "a").exists()


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def quantised(path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(path, path)


def foreign(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[-1].domain = "mine"
    model.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.save(model, path)


def outside(path: Path) -> None:
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="net.data", size_threshold=0)
    path.with_name("net.data").rename(path.parent.parent / "net.data")
    path.with_name("net.data").symlink_to(path.parent.parent / "net.data")


def broken(path: Path) -> None:
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)


def two_inputs(path: Path) -> None:
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("scale", onnx.TensorProto.FLOAT, ["N", 4]))
    model.graph.node.append(helper.make_node("Mul", ["scores", "scale"], ["scaled"]))
    model.graph.output[0].name = "scaled"
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (corrupt, "cannot be read as ONNX"),
        (quantised, "net.onnx is quantised already"),
        (foreign, "operators that ONNX Runtime does not know (1 mine::Gemm)"),
        (outside, "'net.data', a link that leads out of its folder"),
        (broken, "weights that are not finite in 1 of its tensors (27 of 216 values of"),
        (two_inputs, "net.onnx takes image, scale, and the data gives image: nothing feeds scale"),
    ],
)
def test_files_that_cannot_be_taken(
    potstill: Potstill, of_arrays: list[object], tmp_path: Path, damage: Callable[[Path], None], match: str
) -> None:
    damage(net_file(tmp_path / "net.onnx"))
    assert match in export(potstill, "net.onnx", of_arrays, "--out", "a")
    assert not list((tmp_path / "a" / "stages").glob("0-*"))


def test_a_checkpoint_whose_weights_are_not_finite(
    potstill: Potstill, text_teacher: Path, of_texts: list[object], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(text_teacher, tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"][0, :5] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = export(potstill, folder, of_texts, "--out", "a")
    assert "bert holds weights that are not finite in 1 of its tensors (5 of 64 values of 'classifier.weight')" in said


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (
            np.zeros((1, 12, 12, 3), np.uint8),
            "data.calibrate (c.npz) holds 1 example, expected 2 or more; give some 256 of the training set",
        ),
        (np.zeros((9, 10, 10, 3), np.uint8), "(c.npz) holds x as float32 (10, 10, 3) for each example, and data.eval"),
        (np.zeros((9, 12, 12, 3), np.int64), "(c.npz) holds x as int64 (12, 12, 3) for each example, and data.eval"),
    ],
)
def test_calibration_examples_that_cannot_calibrate(
    potstill: Potstill, arrays: Path, tmp_path: Path, x: np.ndarray, match: str
) -> None:
    np.savez(tmp_path / "c.npz", x=x, y=np.arange(len(x)) % 4)
    (tmp_path / "models.py").write_text(NET)
    data: list[object] = ["--calibrate", "c.npz", "--eval", f"{arrays}:test"]
    assert match in export(potstill, "models:Net", data, "--out", "a")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (
            "torch.special.bessel_j0(x)",
            "models:Odd cannot be exported to ONNX: the operator prims.bessel_j0 of odd (Part), ",
        ),
        (
            "x if x.sum() > 0 else -x",
            "data-dependent in odd (Part), models.py line 15: `return x if x.sum() > 0 else -x`",
        ),
    ],
)
def test_a_model_that_cannot_be_exported(
    potstill: Potstill, of_arrays: list[object], tmp_path: Path, line: str, match: str
) -> None:
    odd = f"class Part(nn.Module):\n    def forward(self, x):\n        return {line}\n"
    net = "class Odd(Net):\n    def __init__(self):\n        super().__init__()\n        self.odd = Part()\n"
    (tmp_path / "models.py").write_text(
        f"{NET}\n{odd}\n{net}    def forward(self, x):\n        return self.odd(super().forward(x))\n"
    )
    assert match in export(potstill, "models:Odd", of_arrays, "--out", "a")
