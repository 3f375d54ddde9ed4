"""Quantisation-aware training by the command line: the packages ship the integers that were trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.program import called, potstill

CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        Pixels(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Flatten(), nn.Linear(256, 4),
    )

class Pixels(nn.Module):
    def forward(self, x):
        return x.permute(0, 3, 1, 2) / 255
"""


@pytest.fixture(scope="module")
def run(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose last stage is `qat`."""
    folder = tmp_path_factory.mktemp("qat")
    (folder / "tinynet.py").write_text(CODE)
    (folder / "recipe.yaml").write_text(
        f"""
task: module
teacher: {{checkpoint: "tinynet:net"}}
data: {{train: "{arrays}:train", eval: "{arrays}:test"}}
stages:
  - distill: {{epochs: 6, losses: {{hard: 1}}, learning_rate: 1e-2}}
  - qat: {{distill: {{epochs: 1, losses: {{hard: 1}}}}, calibrate: 64}}
targets: [laptop-x86-vnni, laptop-x86-avx2]
profile: {{runs: 5}}
"""
    )
    words = ("run", folder / "recipe.yaml", "--out", folder / "out")
    called(*words, cwd=folder)
    done = potstill(*words, cwd=folder)  # another process takes everything from the first
    assert "distilling" not in done.stdout
    return folder / "out"


def manifest(run: Path, target: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "packages" / target / "manifest.json").read_text())
    return read


def test_a_package_in_the_trained_formats_has_the_trained_accuracy(run: Path) -> None:
    made = manifest(run, "laptop-x86-vnni")
    assert made["quantization"]["scheme"] == "static uint8 × int8, per channel, from training"
    assert made["quantization"]["left_float"] == 0
    assert made["quantization"]["calibration_examples"] == 0
    entries = {entry["name"]: entry for entry in json.loads((run / "ledger.json").read_text())["entries"]}
    stage, package = entries["qat"], entries["laptop-x86-vnni"]
    assert stage["what"].startswith("uint8 × int8, 1 epoch")
    assert stage["scorecard"]["value"] > 0.8
    assert package["scorecard"]["value"] == pytest.approx(stage["scorecard"]["value"], abs=0.01)


def test_a_package_in_other_formats_is_made_from_the_float_weights_and_says_so(run: Path) -> None:
    made = manifest(run, "laptop-x86-avx2")["quantization"]
    assert made["scheme"] == "static uint8 × int8, per channel, reduced range, from the float weights"
    assert made["calibration_examples"] > 0


def test_the_student_keeps_its_scales(run: Path) -> None:
    assert (run / "student" / "quantization.safetensors").is_file()
    record = json.loads((run / "student" / "potstill.json").read_text())
    assert record["quantization"]["formats"] == {"activation": "uint8", "reduce_range": False}
    assert record["quantization"]["plan"]["fold"] == {"1": "2", "4": "5"}
    assert [stage["name"] for stage in record["stages"]] == ["distill", "qat"]
