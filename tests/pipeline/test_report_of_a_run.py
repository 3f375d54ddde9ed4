"""What a run records of layers and lost examples, and shows in its report."""

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from potstill.pipeline.cli import call

CLASSES = ("negative", "positive")


@pytest.fixture(scope="module")
def run(text_teacher: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that has hardly learnt, and its package."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(
        f"""
task: text-classification
teacher: {text_teacher}
data: {{train: {texts["train"]}, eval: {texts["eval"]}, columns: {{text: sentence}}}}
student: {{layers: 1, hidden: 8}}
stages:
  - distill: {{epochs: 0.1, losses: {{kl: 1, hidden: 0.1}}}}
targets: [laptop-x86-vnni]
profile: {{runs: 5}}
"""
    )
    assert call(["run", str(folder / "recipe.yaml"), "--out", str(folder / "out")]) == 0
    return folder / "out"


def entry(run: Path, name: str) -> dict[str, Any]:
    entries = json.loads((run / "ledger.json").read_text())["entries"]
    found: dict[str, Any] = next(one for one in entries if one["name"] == name)
    return found


def judged(run: Path, name: str) -> np.ndarray:
    """The logits of the step that is as sure of its first flip as the ledger says."""
    first = entry(run, name)["flips"]["worst"][0]
    kept = [np.load(path).astype(np.float64) for path in (run / "stages").glob("predicted-*/logits.npy")]
    sure = [softmax(logits[first["row"] - 1]).max() for logits in kept]
    return next(logits for logits, one in zip(kept, sure, strict=True) if one == first["probability"])


@pytest.mark.parametrize("name", ["distill", "laptop-x86-vnni"])
def test_lost_examples_are_those_of_the_evaluation_set(run: Path, name: str, texts: dict[str, Path]) -> None:
    flips, card = entry(run, name)["flips"], entry(run, name)["scorecard"]
    assert (flips["lost"], flips["gained"]) == (card["lost"], card["gained"])
    assert len(flips["worst"]) == min(12, card["lost"]) > 0
    rows = [line.split("\t") for line in texts["eval"].read_text().splitlines()[1:]]
    said = judged(run, name).argmax(axis=1)
    expected = [(CLASSES[int(rows[flip["row"] - 1][1])], CLASSES[said[flip["row"] - 1]]) for flip in flips["worst"]]
    assert [(flip["label"], flip["said"]) for flip in flips["worst"]] == expected
    assert all(label != other for label, other in expected)
    report = (run / "report.html").read_text()
    shown = [f"<q>{html.escape(rows[flip['row'] - 1][0])}</q>" for flip in flips["worst"]]
    assert [text for text in shown if text not in report] == []


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_no_flips_of_the_teacher_and_of_a_student_before_training(run: Path, name: str) -> None:
    assert entry(run, name)["flips"] is None


def test_layers_are_compared_after_the_training(run: Path) -> None:
    found = entry(run, "distill")["likeness"]
    assert np.array(found["cka"], dtype=float).shape == (1, 4)
    assert found["matched"] == [[0, 3]]
    assert found["examples"] == 50  # held out of 600
    report = (run / "report.html").read_text()
    assert "layer by layer" in report
    assert "Framed: matched by a loss of the training." in report


def test_the_report_is_made_again_from_the_folder(run: Path) -> None:
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert call(["run", str(run.parent / "recipe.yaml"), "--out", str(run)]) == 0
    assert (run / "report.html").read_text() == before
