"""Quantisation-aware training: what is trained is what ONNX Runtime runs."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from potstill.compress.distill import Distill
from potstill.compress.lesson import Lesson
from potstill.compress.qat import Qat, find_plan, quantized
from potstill.export.graph import QDQ_PARITY, Parity, export_graph
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Examples, load_examples
from potstill.validate.errors import InputError
from potstill.validate.fake_quant import Formats, Plan, Watching
from potstill.validate.files import read_json, write_json
from potstill.validate.predictor import OnnxPredictor, TorchPredictor
from potstill.validate.quantized import FakeQuantized
from potstill.validate.task import TASKS, Model
from tests.predicted import predicted

CPU, UINT8 = torch.device("cpu"), Formats()
CONVNET = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, before, width, relu):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.short = nn.Sequential(nn.Conv2d(before, width, 1), nn.BatchNorm2d(width)) if before != width else None
        self.relu = relu

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.short is None else self.short(x)
        return self.relu(out)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(2)
        relus = nn.ReLU(inplace=True), nn.ReLU(), nn.ReLU6()
        self.body = nn.Sequential(*(Block(*width, relu) for width, relu in zip(((8, 8), (8, 16), (16, 16)), relus)))
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        x = self.pool(torch.relu(self.bn(self.conv(x.permute(0, 3, 1, 2) / 255))))
        return self.out(self.body(x).mean(dim=(2, 3)))
"""


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("code")
    (folder / "small_convnet.py").write_text(CONVNET)
    sys.path.insert(0, str(folder))
    return "small_convnet:Net"


@pytest.fixture(scope="module")
def convnet(factory: str, arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of such a net, trained until it is nearly always right."""
    torch.manual_seed(0)
    net = TASKS["module"].load(Checkpoint(factory), example=images(arrays, "test").rows([0])).core
    train = images(arrays, "train")
    x, y = torch.from_numpy(train.rows(range(len(train)))["x"]).float(), torch.from_numpy(train.labels)
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=1e-2)
    for _ in range(4):
        for index in torch.randperm(len(y)).split(50):
            nn.functional.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(net.state_dict(), path)
    return path


def images(arrays: Path, part: str) -> Examples:
    return load_examples(f"{arrays}:{part}", ("x",), {})


@pytest.fixture(scope="module")
def lessons(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lesson]:
    """Each kind of model with its training examples; `held_out` is what it is judged on here."""
    get = request.getfixturevalue

    def lesson(kind: str) -> Lesson:
        work = tmp_path_factory.mktemp("work")
        if kind == "convnet":
            task, test = TASKS["module"], images(get("arrays"), "test")
            teacher = task.load(Checkpoint(get("factory"), get("convnet")), example=test.rows([0]))
            return Lesson(task, teacher, images(get("arrays"), "train"), test, 0, work)
        if kind == "vit":
            task, where, files, columns = TASKS["image-classification"], get("image_teacher"), get("pictures"), {}
        else:
            task, where, files = TASKS["text-classification"], get("text_teacher"), get("texts")
            columns = {"text": "sentence"}
        teacher = task.load(Checkpoint(str(where)))
        train, test = (
            load_examples(str(files[part]), task.features, columns).with_labels(teacher.labels)
            for part in ("train", "eval")
        )
        return Lesson(task, teacher, train, test, 0, work)

    return lesson


@pytest.fixture
def convnet_lesson(lessons: Callable[[str], Lesson]) -> Lesson:
    return lessons("convnet")


@dataclass
class Exported:
    """A quantised model and its graph."""

    lesson: Lesson
    model: Model
    path: Path
    parity: Parity


@pytest.fixture(scope="module", params=["convnet uint8", "convnet int8", "vit uint8", "bert uint8"])
def exported(
    request: pytest.FixtureRequest, lessons: Callable[[str], Lesson], tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    kind, activation = request.param.split()
    lesson = lessons(kind)
    model, path = made_quantized(lesson, Formats(activation)), tmp_path_factory.mktemp("graph") / "q.onnx"
    return Exported(lesson, model, path, export_graph(model, lesson.held_out, path, 20))


def again(lesson: Lesson) -> Model:
    """The teacher, loaded once more."""
    options = {"example": lesson.train.rows([0])} if lesson.task.word == "module" else {}
    return lesson.task.load(lesson.teacher.checkpoint, lesson.teacher.labels, **options)


def made_quantized(lesson: Lesson, formats: Formats = UINT8) -> Model:
    student = again(lesson)
    student.module = quantized(student, lesson, formats, 64)
    return student


def logits(model: Model, lesson: Lesson) -> np.ndarray:
    return predicted(TorchPredictor(model, "model", CPU), lesson.held_out, lesson.task.length_of)


def linears(model: Model) -> int:
    return sum(isinstance(module, nn.Linear) for module in model.core.modules())


def optimised(path: Path) -> Counter[str]:
    """The operators that ONNX Runtime runs in the end."""
    options, out = onnxruntime.SessionOptions(), path.with_suffix(".optimised")
    options.optimized_model_filepath, options.log_severity_level = str(out), 3
    onnxruntime.InferenceSession(path, options)
    return Counter(node.op_type for node in onnx.load(out).graph.node)


def test_onnx_runtime_computes_what_was_trained(exported: Exported) -> None:
    lesson, model = exported.lesson, exported.model
    ours = logits(model, lesson)
    theirs = predicted(OnnxPredictor(exported.path, model.encode, "onnx"), lesson.held_out)
    assert np.abs(ours - theirs).max() <= QDQ_PARITY * np.abs(ours).max()
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() >= 0.99
    assert exported.parity.max_difference <= exported.parity.tolerance
    assert (ours != logits(lesson.teacher, lesson)).mean() > 0.9  # it was rounded at all


def test_onnx_runtime_runs_integer_kernels(exported: Exported) -> None:
    ops, model = optimised(exported.path), exported.model
    weights = [t for t in onnx.load(exported.path).graph.initializer if t.data_type == onnx.TensorProto.INT8]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.core.modules())
    assert len([t for t in weights if len(t.dims) > 1]) == linears(model) + convolutions
    if isinstance(model.module, FakeQuantized) and model.module.formats.activation == "int8":
        return  # on ARM only; here they stay float
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "BatchNormalization"} & set(ops)
    assert ops["QLinearConv"] == convolutions
    assert ops["MatMulIntegerToFloat"] + ops["QGemm"] == linears(model)
    assert ops["QLinearAdd"] == (3 if exported.lesson.task.word == "module" else 0)


def test_batch_norms_fold_exactly_and_relus_come_before_the_rounding(convnet_lesson: Lesson) -> None:
    student = again(convnet_lesson)
    inputs = student.batch(convnet_lesson.train.rows(range(8)), CPU)
    plan = find_plan(student.module, inputs, Formats())
    assert plan.fold == {
        "conv": "bn", "body.0.conv1": "body.0.bn1", "body.0.conv2": "body.0.bn2", "body.1.conv1": "body.1.bn1",
        "body.1.conv2": "body.1.bn2", "body.1.short.0": "body.1.short.1", "body.2.conv1": "body.2.bn1",
        "body.2.conv2": "body.2.bn2",
    }  # fmt: skip
    assert set(plan.through) == {
        "conv", "body.0.conv1", "body.1.conv1", "body.2.conv1", "add#1", "add#2", "add#3"
    }  # fmt: skip
    assert find_plan(student.module, inputs, Formats("int8")) == Plan(fold=plan.fold)
    with torch.no_grad(), Watching(student.module, plan):
        ours = student.module(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(ours, student.module(*inputs), rtol=1e-5, atol=1e-5)


class Unlike(nn.Module):
    """A convolution that two read, a batch norm before its convolution, and padding with ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.second, self.third = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.second(self.norm(x)) + x
        return self.third(nn.functional.pad(x, (1, 1), value=1.0))  # type: ignore[no-any-return]


def test_what_is_read_twice_is_not_folded_and_its_statistics_are_frozen() -> None:
    torch.manual_seed(0)
    module, x = Unlike(), torch.randn(4, 3, 5, 5)
    plan = find_plan(module.eval(), [x], Formats())
    assert plan == Plan()
    before = module.norm.running_mean.clone()  # type: ignore[union-attr]
    sites = ["first.input", "first", "second.input", "second", "add#1", "third.input", "third"]
    FakeQuantized(module, Formats(), plan, dict.fromkeys(sites, (0.1, 128))).train()(x)
    assert torch.equal(module.norm.running_mean, before)  # type: ignore[arg-type]


def test_training_brings_the_integers_to_the_teacher(convnet_lesson: Lesson, tmp_path: Path) -> None:
    lesson, teacher = replace(convnet_lesson, work=tmp_path / "work"), convnet_lesson.teacher
    student = again(lesson)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.core.parameters():  # so far from the teacher that there is something to learn
            parameter.add_(torch.randn_like(parameter) * 0.5 * parameter.std().nan_to_num(0.1))
    means = {k: v.clone() for k, v in student.core.state_dict().items() if "running" in k}
    start = again(lesson)
    start.core.load_state_dict(student.core.state_dict())
    start.module = quantized(start, lesson, Formats(), 64)
    log = Qat(distill=Distill(epochs=4, learning_rate=5e-3), calibrate=64)(student, lesson)
    theirs = logits(teacher, lesson).argmax(axis=1)
    before, after = ((logits(model, lesson).argmax(axis=1) == theirs).mean() for model in (start, student))
    assert after > before + 0.05
    assert [entry["loss"] for entry in log if "loss" in entry][-1] < log[0]["loss"]
    assert all(torch.equal(student.core.state_dict()[name], value) for name, value in means.items())


def test_a_training_that_was_cut_off_goes_on_to_the_same_weights(convnet_lesson: Lesson, tmp_path: Path) -> None:
    made = []
    for part in ("whole", "resumed"):
        lesson = replace(convnet_lesson, work=tmp_path / "work")
        student = again(lesson)
        Qat(distill=Distill(epochs=2, learning_rate=1e-3), calibrate=64)(student, lesson)
        made.append(student.module.state_dict())
        if part == "whole":
            newest = max(lesson.work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
            shutil.rmtree(newest)
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


@pytest.mark.parametrize("kind", ["convnet", "bert"])
def test_a_saved_student_computes_the_same_bits(lessons: Callable[[str], Lesson], kind: str, tmp_path: Path) -> None:
    lesson = lessons(kind)
    student = made_quantized(lesson)
    student.save(tmp_path)
    factory = lesson.teacher.checkpoint.is_factory
    where = Checkpoint(lesson.teacher.checkpoint.source, tmp_path / "model.safetensors") if factory else str(tmp_path)
    checkpoint = where if isinstance(where, Checkpoint) else Checkpoint(where)
    loaded = again(replace(lesson, teacher=replace(lesson.teacher, checkpoint=checkpoint)))
    assert isinstance(loaded.module, FakeQuantized)
    assert isinstance(student.module, FakeQuantized)
    assert (loaded.module.plan, loaded.module.sites) == (student.module.plan, student.module.sites)
    np.testing.assert_array_equal(logits(loaded, lesson), logits(student, lesson))
    np.testing.assert_array_equal(logits(loaded.in_float(), lesson), logits(lesson.teacher, lesson))


def test_a_saved_transformer_opens_without_potstill(lessons: Callable[[str], Lesson], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    made_quantized(lessons("bert")).save(tmp_path)
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_broken_record_is_an_error(convnet_lesson: Lesson, tmp_path: Path) -> None:
    made_quantized(convnet_lesson).save(tmp_path)
    source = convnet_lesson.teacher.checkpoint.source
    teacher = replace(convnet_lesson.teacher, checkpoint=Checkpoint(source, tmp_path / "model.safetensors"))
    lesson = replace(convnet_lesson, teacher=teacher)
    ranges, record = load_file(tmp_path / "quantization.safetensors"), read_json(tmp_path / "potstill.json")
    save_file({**ranges, "scales": ranges["scales"] * 0}, tmp_path / "quantization.safetensors")
    with pytest.raises(InputError, match="does not fit potstill.json: .* all scales must be above 0"):
        again(lesson)
    save_file({"scales": ranges["scales"]}, tmp_path / "quantization.safetensors")
    with pytest.raises(InputError, match="holds no whole record of a quantised model"):
        again(lesson)
    (tmp_path / "quantization.safetensors").unlink()
    with pytest.raises(InputError, match="cannot open"):
        again(lesson)
    write_json(tmp_path / "potstill.json", {key: value for key, value in record.items() if key != "quantization"})
    assert not isinstance(again(lesson).module, FakeQuantized)


def test_a_path_that_calibration_did_not_meet_is_an_error(convnet_lesson: Lesson) -> None:
    student = again(convnet_lesson)
    student.module = FakeQuantized(student.module, Formats(), Plan(), {"conv.input": (1.0, 0)})
    with pytest.raises(InputError, match="quantises 'conv', which calibration did not meet"):
        student.module(*student.batch(convnet_lesson.train.rows([0]), CPU))


def test_a_model_without_weights_to_quantise_is_an_error(convnet_lesson: Lesson) -> None:
    student = replace(again(convnet_lesson), module=nn.Flatten())
    with pytest.raises(InputError, match="no convolution and no linear layer that can be quantised"):
        Qat()(student, convnet_lesson)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"calibrate": 0}, "calibrate must be at least 1"), ({"activation": "int4"}, "activation"), ({"bits": 4}, "bits")],
)
def test_settings_that_cannot_quantise(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Qat(**settings)
