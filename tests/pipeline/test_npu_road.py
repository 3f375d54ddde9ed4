"""Packages for NPUs that are not here, by the command line: what the manifest, the card and the terminal say."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from potstill.pipeline.cli import call
from potstill.validate.files import sha256_file

TARGETS = ("phone-iphone", "phone-snapdragon-v75", "laptop-x86-vnni")


@pytest.fixture(scope="module")
def road(
    text_teacher: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder of packages, and the manifests by target."""
    out = tmp_path_factory.mktemp("npu") / "out"
    data = ["--calibrate", str(texts["calibrate"]), "--eval", str(texts["eval"]), "--columns", "text=sentence"]
    targets = [word for name in TARGETS for word in ("--target", name)]
    assert call(["export", str(text_teacher), *data, *targets, "--max-length", "16", "--out", str(out)]) == 0
    folder = out / "packages"
    return folder, {name: json.loads((folder / name / "manifest.json").read_text()) for name in TARGETS}


def test_core_ml_is_estimated_and_only_the_embeddings_are_left(road: tuple[Path, dict[str, Any]]) -> None:
    folder, manifests = road
    found = manifests["phone-iphone"]["coverage"]
    assert (found["kind"], found["partitions"]) == ("estimated", 1)
    assert {one["operator"] for one in found["left"]} == {"Gather"}
    assert all("embedding" in one["name"] for one in found["left"])
    assert manifests["phone-iphone"]["rewritten"]["Gather"] == 1
    assert manifests["phone-iphone"]["context"] is None
    card = (folder / "phone-iphone" / "README.md").read_text()
    assert "## On the target\n\n- Estimated: CoreMLExecutionProvider takes" in card


def test_a_limit_on_what_leaves_stops_a_run_and_names_the_nodes(
    road: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(road[0].parent, tmp_path / "out")
    recipe = str(tmp_path / "out" / "recipe.yaml")
    limits = ["--set", "gate.max_drop=90pp", "--set", "gate.max_fallback=0%"]
    assert call(["run", recipe, "--out", str(tmp_path / "out"), *limits]) == 3
    error = " ".join(capsys.readouterr().err.split())
    assert "phone-iphone missed its gate: estimated: " in error
    assert "of the multiply-adds leave CoreMLExecutionProvider, limit 0%; they are node_embedding" in error
    assert "a wider max_fallback" in error
    entries = json.loads((tmp_path / "out" / "ledger.json").read_text())["entries"]
    found = {one["name"]: one["verdict"]["checks"][-1] for one in entries if one["kind"] == "package"}
    assert {one["limit"] for one in found.values()} == {"max_fallback"}
    snapdragon = "pass" if find_spec("onnxruntime_qnn") else "undecided"
    wanted = {"phone-iphone": "fail", "phone-snapdragon-v75": snapdragon, "laptop-x86-vnni": "pass"}
    assert {name: one["outcome"] for name, one in found.items()} == wanted
    manifest = json.loads((tmp_path / "out" / "packages" / "phone-iphone" / "manifest.json").read_text())
    assert manifest["verdict"]["passed"] is False
    assert manifest["coverage"]["work_left"] == 0


def test_a_targets_own_limit_stops_a_run_without_a_gate(
    text_teacher: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kiosk = tmp_path / "kiosk.yaml"
    kiosk.write_text("id: kiosk\ntitle: ours\nextends: phone-iphone\nmodel: {max_fallback: 0%}\n")
    data = ["--calibrate", str(texts["calibrate"]), "--eval", str(texts["eval"]), "--columns", "text=sentence"]
    words = ["export", str(text_teacher), *data, "--target", str(kiosk), "--max-length", "16"]
    assert call([*words, "--out", str(tmp_path / "out")]) == 3
    assert "kiosk missed its gate: estimated: " in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out" / "packages" / "kiosk" / "model.onnx").is_file()


def test_a_snapdragon_is_compiled_for_or_says_how(road: tuple[Path, dict[str, Any]]) -> None:
    folder, manifests = road
    manifest, card = manifests["phone-snapdragon-v75"], (folder / "phone-snapdragon-v75" / "README.md").read_text()
    context = manifest["context"]
    if find_spec("onnxruntime_qnn"):
        assert (manifest["coverage"]["kind"], manifest["coverage"]["left"]) == ("compiled", [])
        assert context["emulated"]["samples"] == 4
        for name in context["files"]:
            assert manifest["files"][name]["sha256"] == sha256_file(folder / "phone-snapdragon-v75" / name)
    else:
        assert (manifest["coverage"]["kind"], context["compiled"]) == ("unknown", False)
        assert 'pip install "potstill[qnn]" and export again' in card


@pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed")
def test_a_snapdragons_accuracy_is_judged_by_the_simulated_npu(road: tuple[Path, dict[str, Any]]) -> None:
    folder = road[0] / "phone-snapdragon-v75"
    assert call(["profile", str(folder), "--on", "qnn-sim", "--accuracy", "--runs", "1"]) == 0
    (kept,) = (road[0].parent / "profiles").glob("phone-snapdragon-v75-qnn-sim-*.json")
    found = json.loads(kept.read_text())
    entries = json.loads((road[0].parent / "ledger.json").read_text())["entries"]
    (here,) = [one["scorecard"] for one in entries if one["name"] == folder.name]
    card = found["accuracy"]["scorecard"]
    assert card["examples"] == here["examples"]
    assert abs(card["value"] - here["value"]) <= 0.05
    assert found["measurement"]["notes"][0].startswith("Compiled: QNNExecutionProvider takes")


def test_a_target_of_the_cpu_provider_has_nothing_to_say(road: tuple[Path, dict[str, Any]]) -> None:
    folder, manifests = road
    manifest = manifests["laptop-x86-vnni"]
    assert (manifest["coverage"], manifest["context"]) == (None, None)
    assert list(manifest["rewritten"]) == ["Add"]  # the sums before layer norms
    assert "## On the target" not in (folder / "laptop-x86-vnni" / "README.md").read_text()
