"""The whole road by the command line, as a user walks it."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.pipeline.test_tasks import check_shapes
from tests.program import called, potstill


def check_package(folder: Path) -> dict[str, Any]:
    """Every hash fits, and the golden samples give what they say."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    named = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == named
    for name, file in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == file["sha256"], name
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    samples = json.loads((folder / "golden" / "golden.json").read_text())["samples"]
    assert len(samples) == 4
    for sample in samples:
        arrays = {
            name: np.fromfile(folder / "golden" / one["file"], dtype=np.dtype(one["dtype"]).newbyteorder("<")).reshape(
                one["shape"]
            )
            for name, one in (sample["inputs"] | sample["outputs"]).items()
        }
        logits = arrays.pop("logits")
        np.testing.assert_allclose(session.run(None, arrays)[0], logits, atol=sample["outputs"]["logits"]["atol"])
    return manifest


@pytest.fixture(scope="module")
def run(text_teacher: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe walked from start to end."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(
        f"""
task: text-classification
teacher: {text_teacher}
data:
  train: {texts["train"]}
  eval: {texts["eval"]}
  calibrate: {texts["calibrate"]}
  columns: {{text: sentence}}
student: {{layers: 2}}
stages:
  - distill: {{epochs: 2, learning_rate: 1e-3}}
gate: {{max_drop: 5pp}}
targets: [laptop-x86-vnni, phone-iphone]
profile: {{runs: 20}}
"""
    )
    potstill("run", folder / "recipe.yaml", "--out", folder / "out")
    return folder


def test_a_run_leaves_what_it_promises(run: Path) -> None:
    out = run / "out"
    assert {"ledger.json", "report.html", "recipe.yaml", "stages", "student", "packages"} <= {
        p.name for p in out.iterdir()
    }
    ledger = json.loads((out / "ledger.json").read_text())
    kinds = [entry["kind"] for entry in ledger["entries"]]
    assert kinds == ["teacher", "start", "stage", "package", "package"]
    for entry in ledger["entries"]:
        assert entry["scorecard"]["examples"] == 200
        assert entry["size_bytes"] > 0
    assert all(entry["verdict"]["passed"] for entry in ledger["entries"][2:])
    assert len(ledger["comparison"]["packages"]) == 3
    assert not [p for p in (out / "stages").iterdir() if p.name.startswith(".")]


def test_the_student_opens_with_transformers_and_says_where_it_came_from(run: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    student = run / "out" / "student"
    model = AutoModelForSequenceClassification.from_pretrained(student)
    assert model.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(student)("good")["input_ids"]
    record = json.loads((student / "potstill.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["student", "distill"]
    assert record["data"]["train"]["examples"] == 600
    card = (student / "README.md").read_text()
    assert "teacher `bert`" in card
    assert "/" not in card.split("teacher `bert`")[0].rpartition("teacher")[0] or str(run) not in card


@pytest.mark.parametrize("target", ["laptop-x86-vnni", "phone-iphone"])
def test_a_package_is_whole_and_true(run: Path, target: str) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    folder = run / "out" / "packages" / target
    manifest = check_package(folder)
    assert manifest["target"]["id"] == target
    assert manifest["checked"]["as_target"] is False or target == "laptop-x86-vnni"
    # the scorecard once more, by hand: transformers' tokenizer and ONNX Runtime alone
    session, tokenizer = onnxruntime.InferenceSession(folder / "model.onnx"), AutoTokenizer.from_pretrained(folder)
    fixed = session.get_inputs()[0].shape[1]
    padding = {"padding": "max_length", "max_length": fixed} if isinstance(fixed, int) else {}
    recipe = json.loads((run / "out" / "ledger.json").read_text())["recipe"]
    rows = load_dataset("csv", data_files=recipe["data"]["eval"], delimiter="\t", split="train")
    right = 0
    for row in rows:
        encoded = tokenizer(row["sentence"], truncation=True, return_tensors="np", **padding)
        logits = session.run(None, {i.name: encoded[i.name].astype(np.int64) for i in session.get_inputs()})[0]
        right += int(logits.argmax() == row["label"])
    assert right / len(rows) == manifest["scorecard"]["value"]


def test_done_work_is_not_done_again(run: Path) -> None:
    stages = {p.name: p.stat().st_mtime_ns for p in (run / "out" / "stages").iterdir()}
    done = potstill("run", run / "recipe.yaml", "--out", run / "out", "--json")
    assert {p.name: p.stat().st_mtime_ns for p in (run / "out" / "stages").iterdir()} == stages
    assert json.loads(done.stdout)["format"] == "potstill-ledger/1"


def test_a_plan_says_what_is_done_and_what_a_change_costs(run: Path) -> None:
    plan = json.loads(called("run", run / "recipe.yaml", "--out", run / "out", "--dry-run", "--json").stdout)
    assert all(step["done"] for step in plan["steps"])
    words = ("run", run / "recipe.yaml", "--out", run / "out", "--set", "distill.epochs=3", "--dry-run", "--json")
    plan = json.loads(called(*words).stdout)
    done = {step["name"]: step["done"] for step in plan["steps"]}
    assert done["0-teacher"]
    assert done["1-student"]
    assert not done["2-distill"]
    assert not done["packages/laptop-x86-vnni"]
    assert plan["kind"] == "estimated"
    assert plan["seconds"] > 0
    assert plan["memory_bytes"] > 1e8


def test_profile_by_hand(run: Path) -> None:
    package = run / "out" / "packages" / "laptop-x86-vnni"
    kept = json.loads(called("profile", package, "--runs", 50, "--threads", 1, "--json").stdout)
    measured = kept["measurement"]
    assert (kept["format"], kept["package"]) == ("potstill-profile/1", "laptop-x86-vnni")
    assert measured["kind"] == "measured"
    assert (measured["runs"], measured["threads"]) == (50, 1)
    assert measured["min_ms"] <= measured["median_ms"] <= measured["p90_ms"]
    assert "CPUExecutionProvider" in measured["provider_nodes"]
    shown = called("profile", package, "--runs", 20).stdout
    for word in ("median", "cold load", "first run", "peak memory", "warm up"):
        assert word in shown


def test_export_of_the_student_against_the_teacher(run: Path, text_teacher: Path, texts: dict[str, Path]) -> None:
    called(
        "export",
        run / "out" / "student",
        "--teacher",
        text_teacher,
        "--target",
        "laptop-x86-avx2",
        "--calibrate",
        texts["calibrate"],
        "--eval",
        texts["eval"],
        "--columns",
        "text=sentence",
        "--max-drop",
        "5pp",
        "--out",
        run / "exported",
    )
    manifest = check_package(run / "exported" / "packages" / "laptop-x86-avx2")
    assert manifest["quantization"]["scheme"].startswith("dynamic uint8")
    assert manifest["lineage"]["teacher"]["source"] == "bert"


def test_compress_by_the_verb_and_a_gate_that_fails(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    words = (
        "compress",
        text_teacher,
        "--task",
        "text-classification",
        "--train",
        texts["train"],
        "--eval",
        texts["eval"],
        "--columns",
        "text=sentence,label=label",
        "--student",
        "layers=1,hidden=8",
        "--epochs",
        "0.2",
        "--max-drop",
        "1pp",
        "--out",
        tmp_path / "out",
    )
    done = potstill(*words, code=3)
    assert "distill missed its gate: accuracy" in done.stderr
    assert "Try more epochs" in done.stderr
    out = tmp_path / "out"
    assert (out / "report.html").is_file()
    assert list(out.glob("stages/2-distill-*/checkpoint/model.safetensors"))
    assert not (out / "student").exists()
    assert json.loads((out / "ledger.json").read_text())["entries"][-1]["verdict"]["passed"] is False


def test_images(image_teacher: Path, pictures: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"task: image-classification\nteacher: {image_teacher}\n"
        f"data: {{train: {pictures['train']}, eval: {pictures['eval']}}}\n"
        "student: {layers: 2}\nstages: [distill: {epochs: 4, learning_rate: 1e-3}]\ngate: {max_drop: 40pp}\n"
        "targets: [phone-arm64, phone-iphone]\nprofile: {runs: 10}\n"
    )
    called("run", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    package = tmp_path / "out" / "packages" / "phone-arm64"
    manifest = check_package(package)
    assert manifest["labels"] == ["quarter0", "quarter1", "quarter2", "quarter3"]
    assert (package / "preprocessor_config.json").is_file()
    check_package(package.parent / "phone-iphone")
    check_shapes(package.parent, "phone-arm64")


MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(width * 4, 4)

    def forward(self, x):
        x = self.body(x.permute(0, 3, 1, 2) / 128 - 1)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))

def big(): return Net(24)
def small(): return Net(6)
def wide(): return nn.Sequential(nn.Flatten(), nn.Linear(432, 7))
def broken():
    net = Net(6)
    net.head.bias.data.fill_(float("nan"))
    return net
"""


@pytest.fixture(scope="module")
def modules(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a user's own `models.py`, trained weights `big.th`, and `data.npz`."""
    import torch

    folder = tmp_path_factory.mktemp("modules")
    (folder / "models.py").write_text(MODELS)
    (folder / "data.npz").write_bytes(arrays.read_bytes())
    space: dict[str, Any] = {}
    exec(MODELS, space)
    model, data = space["big"](), np.load(arrays)
    x, y = torch.from_numpy(data["train_x"]).float(), torch.from_numpy(data["train_y"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(12):
        for index in torch.randperm(len(y)).split(50):
            torch.nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "best_prec1": 1}, folder / "big.th"
    )
    return folder


def test_a_module_of_ones_own(modules: Path, tmp_path: Path) -> None:
    potstill(
        "compress",
        "models:big",
        "--weights",
        "big.th",
        "--task",
        "module",
        "--train",
        "data.npz:train",
        "--eval",
        "data.npz:test",
        "--student",
        "models:small",
        "--epochs",
        "8",
        "--max-drop",
        "10pp",
        "--out",
        tmp_path / "out",
        cwd=modules,
    )
    refused = called(
        "export",
        tmp_path / "out" / "student",
        "--task",
        "module",
        "--target",
        "browser-wasm",
        "--calibrate",
        "data.npz:train",
        "--eval",
        "data.npz:test",
        "--out",
        tmp_path / "x",
        cwd=modules,
        code=2,
    )
    assert "name the factory yourself: models:small --weights" in refused.stderr
    called(
        "export",
        "models:small",
        "--weights",
        tmp_path / "out" / "student" / "model.safetensors",
        "--target",
        "phone-arm64-dotprod",
        "--calibrate",
        "data.npz:train",
        "--eval",
        "data.npz:test",
        "--max-drop",
        "2pp",
        "--out",
        tmp_path / "packages",
        cwd=modules,
    )
    manifest = check_package(tmp_path / "packages" / "packages" / "phone-arm64-dotprod")
    assert manifest["quantization"]["left_float"] == 0
    assert manifest["labels"] == ["0", "1", "2", "3"]


def test_init_writes_a_recipe_that_runs(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    called(
        "init",
        text_teacher,
        "--train",
        texts["train"],
        "--eval",
        texts["eval"],
        "--columns",
        "text=sentence",
        "--out",
        tmp_path / "recipe.yaml",
    )
    text = (tmp_path / "recipe.yaml").read_text()
    assert "layers: 2" in text
    assert text.count("#") > 10
    called(
        "run",
        tmp_path / "recipe.yaml",
        "--out",
        tmp_path / "out",
        "--set",
        "distill.epochs=0.5",
        "--set",
        "gate.max_drop=60pp",
        "--set",
        "targets=[]",
    )
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()
    again = called(
        "init",
        text_teacher,
        "--train",
        texts["train"],
        "--eval",
        texts["eval"],
        "--out",
        tmp_path / "recipe.yaml",
        code=2,
    )
    assert "is there already" in again.stderr


def test_more_evaluation_examples_train_nothing_again(run: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    more = tmp_path / "more.tsv"
    more.write_text(texts["eval"].read_text() + "a very good film\t1\n")
    words = ("run", run / "recipe.yaml", "--out", run / "out", "--set", f"data.eval={more}", "--dry-run", "--json")
    steps = {step["name"]: step for step in json.loads(called(*words).stdout)["steps"]}
    assert steps["graph"]["done"]
    for name in ("0-teacher", "1-student", "2-distill", "packages/laptop-x86-vnni"):  # judged again
        assert not steps[name]["done"]
        assert 0 < steps[name]["seconds"] < 5


def test_without_a_student_the_teacher_itself_is_trained_on(
    text_teacher: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    called(
        "compress",
        text_teacher,
        "--task",
        "text-classification",
        "--train",
        texts["train"],
        "--eval",
        texts["eval"],
        "--columns",
        "text=sentence",
        "--epochs",
        "0.5",
        "--out",
        tmp_path / "out",
    )
    (tmp_path / "out" / ".git").mkdir()  # a user's own folder in the run's folder
    called("run", tmp_path / "out" / "recipe.yaml", "--out", tmp_path / "out")
    assert (tmp_path / "out" / ".git").is_dir()
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()


def test_examples_in_both_sets_are_counted(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    leaky = tmp_path / "train.tsv"
    rows = texts["eval"].read_text().splitlines(keepends=True)[1:]
    near_ones = [row.upper() for row in rows[100:102]]
    leaky.write_text(texts["train"].read_text() + "".join(rows[:30] + near_ones))
    done = called(
        "compress",
        text_teacher,
        "--task",
        "text-classification",
        "--train",
        leaky,
        "--eval",
        texts["eval"],
        "--columns",
        "text=sentence",
        "--student",
        "layers=1",
        "--epochs",
        "0.5",
        "--out",
        tmp_path / "out",
        "--json",
    )
    ledger, report = json.loads(done.stdout), (tmp_path / "out" / "report.html").read_text()
    exact, near = ledger["warnings"]
    assert int(exact.split()[0]) >= 30
    assert "evaluation examples are in data.train too" in exact
    assert "more of the 200 evaluation examples have a near duplicate in data.train (5-letter shingles" in near
    (leak,) = ledger["leaks"]
    leaked = {row for row, _ in leak["near"]}
    assert {*leak["exact"], 101, 102} <= leaked
    assert [101, 631] in leak["near"]
    rest = [entry["unleaked"] for entry in ledger["entries"]]
    assert [card["examples"] for card in rest] == [200 - len(leaked)] * 3
    right = 200 * ledger["entries"][0]["scorecard"]["value"] - rest[0]["value"] * (200 - len(leaked))
    assert 0 <= round(right) <= len(leaked)  # what the teacher has right of those that leaked
    card = (tmp_path / "out" / "student" / "README.md").read_text()
    assert exact in report
    assert exact in card
    assert f"Without the {len(leaked)} evaluation examples that are exact or near duplicates of data." in report
    assert "were not looked for" not in report


def test_a_target_of_ones_own_with_fixed_shapes_and_integers(modules: Path, tmp_path: Path) -> None:
    from potstill.targets.target import load_target

    (tmp_path / "mine.yaml").write_text(
        "id: mine\ntitle: my own chip\nextends: laptop-x86-vnni\nmodel: {shapes: static, opset: 19, ort: true}\n"
    )
    assert load_target(str(tmp_path / "mine.yaml")).model.shapes == "static"
    called(
        "export",
        "models:big",
        "--weights",
        "big.th",
        "--target",
        tmp_path / "mine.yaml",
        "--target",
        "laptop-x86-vnni",
        "--calibrate",
        "data.npz:train",
        "--eval",
        "data.npz:test",
        "--out",
        tmp_path / "out",
        cwd=modules,
    )
    manifest = check_package(tmp_path / "out" / "packages" / "mine")
    assert manifest["opset"] == 19
    assert {"model.onnx", "model.ort", "required_operators_and_types.config"} <= set(manifest["files"])
    assert manifest["model_bytes"] == max(manifest["files"][f"model.{kind}"]["bytes"] for kind in ("onnx", "ort"))
    expected, found = manifest["fusions"]["expected"], manifest["fusions"]["found"]
    assert found["integer convolution"] == expected["integer convolution"] > 0
    session = onnxruntime.InferenceSession(tmp_path / "out" / "packages" / "mine" / "model.onnx")
    assert session.get_inputs()[0].shape == [1, 12, 12, 3]
    check_shapes(tmp_path / "out" / "packages", fixed="mine")


def test_limits_on_what_a_package_costs(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "out", tmp_path / "out")
    limits = ("gate.undecided=strict", "gate.min_agreement=50%", "gate.max_size=1kB", "gate.max_latency=1ms")
    words = [word for limit in (*limits, "gate.max_memory=1GB", "gate.max_drop=30pp") for word in ("--set", limit)]
    done = called("run", run / "recipe.yaml", "--out", tmp_path / "out", *words, code=3)
    assert "or a wider max_size" in done.stderr
    assert "the model file takes" in done.stderr
    entries = json.loads((tmp_path / "out" / "ledger.json").read_text())["entries"]
    student = entries[2]["verdict"]
    assert (student["passed"], [check["limit"] for check in student["checks"]]) == (True, ["max_drop", "min_agreement"])
    for package in entries[3:]:
        found = {check["limit"]: check for check in package["verdict"]["checks"]}
        assert list(found) == ["max_drop", "min_agreement", "max_size", "max_latency", "max_memory"]
        assert not found["max_size"]["passed"]
        assert found["max_latency"]["passed"] == (package["measurement"]["median_ms"] <= 1)
        assert found["max_memory"]["passed"]
    assert "missed max_size" in (tmp_path / "out" / "report.html").read_text()
