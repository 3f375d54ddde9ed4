"""One judge for all: torch, ONNX Runtime here and the agent give the same scorecard on the same examples."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.export.graph import export_graph
from potstill.targets.device import Kind, Made, files_in
from potstill.targets.local import AGENT, Local
from potstill.targets.wire import DevicePredictor
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError, PotstillError, Unreachable
from potstill.validate.predictor import OnnxPredictor, Predictor, TorchPredictor, predict
from potstill.validate.task import TASKS

MakePackage = Callable[..., Path]
Reply = dict[str, Any]
CPU = torch.device("cpu")
CASES = {
    "text-classification": ("text_teacher", "texts", {"text": "sentence"}),
    "token-classification": ("tag_teacher", "tag_files", {}),  # several rows of an example
    "question-answering": ("span_teacher", "span_files", {}),  # rows as wide as the example
    "feature-extraction": ("text_teacher", "pair_files", {}),
}


@pytest.mark.parametrize("word", CASES)
def test_all_three_are_judged_the_same(word: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    teacher, files, columns = CASES[word]
    task, file = TASKS[word], str(request.getfixturevalue(files)["eval"])
    model = task.load(Checkpoint(str(request.getfixturevalue(teacher))))
    examples = task.checked(task.examples(file, columns, judging=True), model.labels, judging=True)
    examples = examples.take(range(60), "60")
    graph = tmp_path / "model.onnx"
    export_graph(model, examples, graph, 20)
    predictors: dict[str, Predictor] = {
        "torch": TorchPredictor(model, "torch", CPU),
        "onnx": OnnxPredictor(graph, model.encode, "onnx", read=model.read),
        "device": DevicePredictor(graph, model.encode, "device", read=model.read, batch_size=25),
    }
    kept = {
        name: predict(predictor, examples, task.length_of, tmp_path / f"{name}.npy")
        for name, predictor in predictors.items()
    }
    cards = {name: task.judge(rows, kept["torch"], examples, model.encode) for name, rows in kept.items()}
    assert kept["device"].tobytes() == kept["onnx"].tobytes()
    assert cards["device"] == cards["onnx"]
    np.testing.assert_allclose(kept["device"], kept["torch"], rtol=2**-10, atol=1e-4)  # a float16 step
    if task.gives != "vector":
        assert cards["device"].agreement == 1
        assert (cards["device"].lost, cards["device"].gained) in ((0, 0), (None, None))
        assert cards["device"].value == cards["torch"].value
    assert cards["device"].value == pytest.approx(cards["torch"].value, abs=1e-3)
    assert cards["device"].kl_nats is None or cards["device"].kl_nats < 2e-6
    assert len(np.unique(np.asarray(kept["device"]), axis=0)) > 10  # no constant


@pytest.fixture
def device(make_package: MakePackage) -> Callable[..., DevicePredictor]:
    def make(**options: Any) -> DevicePredictor:
        return DevicePredictor(make_package(width=4, layers=1) / "model.onnx", Renamed(), "the device", **options)

    return make


class Renamed(ArrayEncoder):
    """`x` as the graph calls it."""

    def __call__(self, rows: Any) -> Any:
        return {"x0": super().__call__(rows)["x"]}


@dataclass(frozen=True)
class Fixed:
    """A device that writes some outputs and gives some answer, whatever it is asked."""

    outputs: bytes | None
    answer: Reply | None
    where: str = "fixed"
    kind: Kind = "measured"

    def ask(self, request: Mapping[str, Any], *, timeout_s: float = 900) -> dict[str, Any]:
        (made,) = [one for one in files_in(request) if isinstance(one, Made)]
        if self.outputs is not None:
            made.path.write_bytes(self.outputs)
        return {} if self.answer is None else {"answer": self.answer}


ROWS = {"x": np.arange(12, dtype=np.float32).reshape(3, 4) / 12}


def test_it_runs_in_another_process_alone(device: Callable[..., DevicePredictor], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    found = device(device=Local((str(python),)))(ROWS)
    assert (found.dtype, found.shape) == (np.float32, (3, 4))
    assert (tmp_path / "asked").read_text().startswith(f"-P {AGENT} ")


@pytest.mark.parametrize(
    ("reply", "written", "words"),
    [
        ({}, b"", "the agent gave no answer"),
        ({"outputs": [{"dtype": "float32", "shape": [1, 4]}] * 2}, bytes(32), "gave 2 outputs for 3 examples"),
        ({"outputs": [{"dtype": "float32", "shape": [1, 4]}] * 3}, bytes(47), "hold 47 bytes, expected 48 for 3"),
        ({"outputs": [{"dtype": "float32", "shape": [1, 4]}] * 3}, bytes(52), "hold 52 bytes, expected 48"),
        ({"outputs": [{"dtype": "float32", "shape": [1, 4]}] * 3}, None, "hold 0 bytes, expected 48"),
        ({"outputs": [{"dtype": "object", "shape": [1, 4]}] * 3}, bytes(48), "dtype 'object', expected numbers"),
        ({"outputs": [{"dtype": "float32", "shape": [-1, 4]}] * 3}, bytes(48), "gave no answer: .*greater than"),
    ],
)
def test_a_wrong_answer_is_refused(
    device: Callable[..., DevicePredictor],
    reply: Reply,
    written: bytes | None,
    words: str,
) -> None:
    answer = {"providers": [], "missing_providers": [], **reply} if reply else None
    with pytest.raises(PotstillError, match=words):
        device(device=Fixed(written, answer))(ROWS)


def test_outputs_of_another_float_are_read(device: Callable[..., DevicePredictor]) -> None:
    outputs = [{"dtype": "float16", "shape": [1, 2]}] * 3
    answer = {"providers": [], "missing_providers": [], "outputs": outputs}
    fixed = Fixed(np.arange(6, dtype="<f2").tobytes(), answer)
    assert device(device=fixed)(ROWS).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_a_provider_that_is_not_there_is_told(device: Callable[..., DevicePredictor]) -> None:
    with pytest.raises(InputError, match=r"the device wants CoreMLExecutionProvider, and its device has only CPUExec"):
        device(providers=("CoreMLExecutionProvider", "CPUExecutionProvider"))(ROWS)


def test_a_python_that_is_none(device: Callable[..., DevicePredictor]) -> None:
    with pytest.raises(InputError, match="cannot start '/no/python'"):
        device(device=Local(("/no/python",)))(ROWS)


def test_a_device_that_does_not_answer(device: Callable[..., DevicePredictor]) -> None:
    with pytest.raises(Unreachable, match=r"did not finish within 0\.01 s"):
        device(timeout_s=0.01)(ROWS)


# What the agent refuses.


@pytest.fixture
def asked(make_package: MakePackage, tmp_path: Path) -> Reply:
    (tmp_path / "inputs.bin").write_bytes(ROWS["x"].astype("<f4").tobytes())
    return {
        "path": str(make_package(width=4, layers=1) / "model.onnx"),
        "inputs": str(tmp_path / "inputs.bin"),
        "outputs": str(tmp_path / "outputs.bin"),
        "examples": [{"x0": {"dtype": "float32", "shape": [1, 4]}}] * 3,
    }


def test_the_agent_answers_what_onnx_runtime_does(asked: Reply) -> None:
    reply = Local().ask({"threads": 1, "answer": asked})
    assert reply["answer"]["outputs"] == [{"dtype": "float32", "shape": [1, 4]}] * 3
    assert (reply["threads"], reply["answer"]["providers"]) == (1, ["CPUExecutionProvider"])
    found = np.fromfile(asked["outputs"], dtype="<f4").reshape(3, 4)
    weights = (np.random.default_rng(0).standard_normal((4, 4)) / 2).astype(np.float32)  # as the package was made
    np.testing.assert_allclose(found, np.tanh(ROWS["x"] @ weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", ["path", "inputs", "outputs", "examples"])
def test_an_incomplete_request(asked: Reply, key: str) -> None:
    asked.pop(key)
    with pytest.raises(PotstillError, match=f"agent: the answer asked for lacks '{key}'"):
        Local().ask({"threads": 1, "answer": asked})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"examples": [{"x0": {"dtype": "float32", "shape": [1, 4]}}] * 4}, "inputs.bin ends within example 4"),
        ({"examples": [{"x0": {"dtype": "float32", "shape": [1, 4]}}] * 2}, "inputs.bin holds more than its 2 exam"),
        ({"examples": [{"x9": {"dtype": "float32", "shape": [1, 4]}}] * 3}, "example 1 lacks 'x0'"),
    ],
)
def test_inputs_that_do_not_fit(asked: Reply, change: Reply, words: str) -> None:
    with pytest.raises(PotstillError, match=f"agent: .*{words}"):
        Local().ask({"threads": 1, "answer": asked | change})


def test_an_answer_overwrites_nothing(asked: Reply) -> None:
    Path(asked["outputs"]).write_bytes(b"mine")
    with pytest.raises(PotstillError, match="outputs.bin is there already; outputs go into a new file"):
        Local().ask({"threads": 1, "answer": asked})
    assert Path(asked["outputs"]).read_bytes() == b"mine"
    with pytest.raises(PotstillError, match="agent: the request lacks 'threads'"):
        Local().ask({"answer": asked})
