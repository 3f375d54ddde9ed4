"""The examples that run golden samples in an app: compiled and run where their compilers are, and shown in the docs."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from potstill.export.golden import write_golden
from potstill.validate.data import Arrays, Examples
from potstill.validate.encoder import ArrayEncoder, Inputs
from potstill.validate.examples import Rows
from potstill.validate.predictor import OnnxPredictor

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, DOCS = ROOT / "examples" / "golden", (ROOT / "docs" / "golden.md").read_text()
HEADERS = Path(os.environ.get("POTSTILL_HEADERS", "/usr/include"))  # of ONNX Runtime and nlohmann-json3-dev
KOTLINC = os.environ.get("POTSTILL_KOTLINC") or shutil.which("kotlinc")
SWIFTC = os.environ.get("POTSTILL_SWIFTC") or shutil.which("swiftc")
ORG_JSON = Path("/usr/share/java/json-android.jar")  # of libandroid-json-org-java
LANGUAGES = ["cpp", *(pytest.param(one, marks=pytest.mark.slow) for one in ("kotlin", "swift"))]
Run = Callable[[Path], subprocess.CompletedProcess[str]]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A model and its golden samples: x (N, 4) and a past (N, P), of length 0 here, to logits (N, 3)."""
    folder, rng = tmp_path / "package", np.random.default_rng(0)
    folder.mkdir()
    sizes = {"x": ["batch", 4], "past": ["batch", "past"], "logits": ["batch", 3]}
    x, past, logits = (helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items())
    weights = numpy_helper.from_array(rng.normal(size=(4, 3)).astype(np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["now"]),
        helper.make_node("ReduceSum", ["past", "axis"], ["before"], keepdims=1),
        helper.make_node("Add", ["now", "before"], ["logits"]),
    ]
    constants = [weights, numpy_helper.from_array(np.array([1]), "axis")]
    graph = helper.make_graph(nodes, "one", [x, past], [logits], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    given = rng.normal(size=(5, 4)).astype(np.float32)
    examples = Examples("made", Arrays({"x": given}), np.zeros(5, dtype=np.int64), None, "made")
    predictor = OnnxPredictor(folder / "model.onnx", _WithPast(), "made")
    write_golden(folder / "golden", predictor, examples, 0.001)
    return folder


class _WithPast(ArrayEncoder):
    """Feeds a past of no tokens beside x."""

    def __call__(self, rows: Rows) -> Inputs:
        return super().__call__(rows) | {"past": np.zeros((1, 0), dtype=np.float32)}


def edit(package: Path, change: Change) -> None:
    index = package / "golden" / "golden.json"
    golden = json.loads(index.read_text())
    change(golden)
    index.write_text(json.dumps(golden))


def off(package: Path, sample: int) -> None:
    """Make the expected output of a sample another one."""
    file = package / "golden" / f"{sample}.logits.bin"
    file.write_bytes((np.fromfile(file, dtype="<f4") + 1).astype("<f4").tobytes())


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The program of golden.cpp, with the library that Python's ONNX Runtime brings."""
    compiler, needed = shutil.which("g++"), ["onnxruntime/onnxruntime_cxx_api.h", "nlohmann/json.hpp"]
    if not compiler or any(not (HEADERS / one).is_file() for one in needed):
        pytest.skip(f"needs g++ and {' and '.join(needed)} in {HEADERS}, or where POTSTILL_HEADERS says")
    libraries = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1.*"))
    if not libraries:
        pytest.skip("needs ONNX Runtime's library of its wheel for Linux")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "libonnxruntime.so.1").symlink_to(libraries[0])
    places = ["-isystem", str(HEADERS / "onnxruntime"), "-isystem", str(HEADERS)]
    words = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", *places, str(EXAMPLES / "golden.cpp")]
    words += [str(folder / "libonnxruntime.so.1"), f"-Wl,-rpath,{folder}", "-o", str(folder / "golden")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return lambda package: subprocess.run(
        [str(folder / "golden"), str(package)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def kotlin(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The program of Golden.kt over a stand-in for ONNX Runtime's classes, which answers what the samples were."""
    java, folder = shutil.which("java"), tmp_path_factory.mktemp("kotlin")
    if not KOTLINC or not java or not ORG_JSON.is_file():
        pytest.skip(f"needs java, kotlinc (or POTSTILL_KOTLINC) and {ORG_JSON} (libandroid-json-org-java)")
    program, stand_in = folder / "golden.jar", Path(__file__).with_name("onnxruntime.kt")
    words = [KOTLINC, "-Werror", "-include-runtime", "-cp", str(ORG_JSON), str(EXAMPLES / "Golden.kt"), str(stand_in)]
    done = subprocess.run([*words, "-d", str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def run(package: Path) -> subprocess.CompletedProcess[str]:
        words = [java, "-cp", f"{program}:{ORG_JSON}", "golden.GoldenKt", str(package)]
        return subprocess.run(words, cwd=package, capture_output=True, text=True, timeout=60, check=False)

    return run


@pytest.fixture(scope="module")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A program with Golden.swift over a stand-in for ONNX Runtime's module, which answers what the samples were."""
    if not SWIFTC:
        pytest.skip("needs swiftc (6 or later), or POTSTILL_SWIFTC")
    folder, here = tmp_path_factory.mktemp("swift"), Path(__file__).with_name("swift")
    module = ["-parse-as-library", "-emit-module", "-emit-library", "-static", "-module-name", "OnnxRuntimeBindings"]
    program = [str(EXAMPLES / "Golden.swift"), str(here / "main.swift"), "-I.", "-L.", "-lOnnxRuntimeBindings"]
    for words in ([*module, str(here / "OnnxRuntimeBindings.swift")], [*program, "-o", "golden"]):
        done = subprocess.run(
            [SWIFTC, "-warnings-as-errors", *words], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    return lambda package: subprocess.run(
        [str(folder / "golden"), str(package)], cwd=package, capture_output=True, text=True, timeout=60, check=False
    )


def answers(package: Path) -> None:
    """What the stand-in answers: the outputs as they are expected now."""
    (package / "answers").mkdir()
    for number in range(4):
        shutil.copyfile(package / "golden" / f"{number}.logits.bin", package / "answers" / f"{number}.bin")
    (package / "answers" / "shape").write_text("1 3\n")


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_example_runs_the_samples(language: str, package: Path, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(language)
    answers(package)
    done = run(package)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^logits: (\S+) off, \S+ allowed: ok$", done.stdout, flags=re.M) in (["0"] * 4, ["0.0"] * 4)
    off(package, 2)
    done = run(package)
    assert done.returncode == 1
    assert re.findall("ok$|WRONG$", done.stdout, flags=re.M) == ["ok", "ok", "WRONG", "ok"]
    (package / "golden" / "1.logits.bin").write_bytes(np.full(3, np.nan, dtype="<f4").tobytes())
    assert re.findall("ok$|WRONG$", run(package).stdout, flags=re.M) == ["ok", "WRONG", "WRONG", "ok"]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda golden: golden.update(format="potstill-golden/2"), "golden.json has another form"),
        (lambda golden: golden["samples"][0]["outputs"]["logits"].update(shape=[3, 1]), "logits has another shape"),
        (lambda golden: golden["samples"][0]["outputs"]["logits"].update(dtype="int64"), "compares outputs of float32"),
    ],
)
def test_an_example_refuses_another_form(
    language: str, change: Change, words: str, package: Path, request: pytest.FixtureRequest
) -> None:
    run: Run = request.getfixturevalue(language)
    answers(package)
    edit(package, change)
    done = run(package)
    assert done.returncode in (1, 2)
    assert words in done.stderr


@pytest.mark.parametrize(
    ("language", "file"), [("cpp", "golden.cpp"), ("kotlin", "Golden.kt"), ("swift", "Golden.swift")]
)
def test_what_the_docs_show_is_in_the_example(language: str, file: str) -> None:
    shown = re.findall(rf"```{language}\n(.*?)```", DOCS, flags=re.S)
    assert shown
    assert all(one in (EXAMPLES / file).read_text() for one in shown)


def test_the_python_of_the_docs_runs(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, flags=re.S)
    monkeypatch.chdir(package.parent)
    exec(compile(code, "docs/golden.md", "exec"), {})
    off(package, 3)
    with pytest.raises(AssertionError, match="logits of sample 3"):
        exec(compile(code, "docs/golden.md", "exec"), {})
