"""Packages for NPUs that are not here, by the command line: what the manifest, the card and the terminal say."""

import json
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


def test_a_target_of_the_cpu_provider_has_nothing_to_say(road: tuple[Path, dict[str, Any]]) -> None:
    folder, manifests = road
    manifest = manifests["laptop-x86-vnni"]
    assert (manifest["coverage"], manifest["context"]) == (None, None)
    assert list(manifest["rewritten"]) == ["Add"]  # the sums before layer norms
    assert "## On the target" not in (folder / "laptop-x86-vnni" / "README.md").read_text()
