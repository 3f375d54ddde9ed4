"""What a run records of slices and calibration, and shows in its report."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.pipeline.cli import call
from potstill.validate.slices import by_column, slices


def with_column(source: Path, path: Path) -> Path:
    """The same rows with a column of who wrote them."""
    lines = source.read_text().splitlines()
    who = ["who", *(("critic", "reader")[i % 3 == 0] for i in range(len(lines) - 1))]
    path.write_text("".join(f"{line}\t{one}\n" for line, one in zip(lines, who, strict=True)))
    return path


@pytest.fixture(scope="module")
def run(text_teacher: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that has hardly learnt, and its package."""
    folder = tmp_path_factory.mktemp("run")
    source = with_column(texts["eval"], folder / "eval.tsv")
    (folder / "recipe.yaml").write_text(
        f"""
task: text-classification
teacher: {text_teacher}
data: {{train: {texts["train"]}, eval: {source}, columns: {{text: sentence}}, slices: [who]}}
student: {{layers: 1, hidden: 8}}
stages:
  - distill: {{epochs: 0.1}}
targets: [laptop-x86-vnni]
profile: {{runs: 5}}
"""
    )
    assert call(["run", str(folder / "recipe.yaml"), "--out", str(folder / "out")]) == 0
    return folder


def entry(run: Path, name: str) -> dict[str, Any]:
    entries = json.loads((run / "out" / "ledger.json").read_text())["entries"]
    found: dict[str, Any] = next(one for one in entries if one["name"] == name)
    return found


def right(run: Path, card: dict[str, Any]) -> np.ndarray:
    """On which examples the model of a scorecard is right, by the logits that were kept."""
    with (run / "eval.tsv").open() as file:
        labels = [int(row["label"]) for row in csv.DictReader(file, delimiter="\t")]
    places = (run / "out" / "stages").glob("predicted-*/logits.npy")
    answers = [np.load(place).argmax(axis=1) == np.array(labels) for place in places]
    found: np.ndarray = next(one for one in answers if one.mean() == card["value"])
    return found


@pytest.mark.parametrize("name", ["distill", "laptop-x86-vnni"])
def test_slices_are_of_the_evaluation_set(run: Path, name: str) -> None:
    found = entry(run, name)["slices"]
    assert {one["by"]: 0 for one in found}.keys() == {"class", "who", "length", "teacher’s confidence"}
    for by in ("class", "who", "length", "teacher’s confidence"):
        assert sum(one["examples"] for one in found if one["by"] == by) == 200
    differences = [one["difference"] for one in found if one["p"] is not None]
    assert differences == sorted(differences)
    mine, teacher = (right(run, entry(run, one)["scorecard"]) for one in (name, "teacher"))
    who = by_column("who", [("critic", "reader")[i % 3 == 0] for i in range(200)])
    for one in slices(mine, teacher, [who]):
        same = next(other for other in found if (other["by"], other["value"]) == ("who", one.value))
        assert (same["accuracy"], same["difference"], same["p"]) == (one.accuracy, one.difference, one.p)


@pytest.mark.parametrize("name", ["distill", "laptop-x86-vnni"])
def test_calibration_is_of_the_evaluation_set(run: Path, name: str) -> None:
    found, card = entry(run, name)["calibration"], entry(run, name)["scorecard"]
    for side, accuracy in (("model", card["value"]), ("teacher", card["teacher_value"])):
        bins = found[side]["bins"]
        assert sum(one["examples"] for one in bins) == 200
        assert sum(one["examples"] * one["accuracy"] for one in bins) / 200 == pytest.approx(accuracy)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_none_of_the_teacher_and_of_a_student_before_training(run: Path, name: str) -> None:
    assert entry(run, name)["slices"] is entry(run, name)["calibration"] is None


def test_other_slices_judge_and_make_nothing_again(run: Path) -> None:
    def made() -> dict[str, int]:  # but for cards, which tell of slices
        stages = {path.name: path for path in (run / "out" / "stages").iterdir()}
        models = {path.name: path / "model.onnx" for path in (run / "out" / "packages").iterdir()}
        return {name: path.stat().st_mtime_ns for name, path in (stages | models).items()}

    before, words = made(), ["run", str(run / "recipe.yaml"), "--out", str(run / "out"), "--set"]
    assert call([*words, "data.slices=[]"]) == 0
    after = made()
    assert {name: after[name] for name in before} == before
    assert {name.partition("-")[0] for name in after.keys() - before} == {"judged"}
    assert {one["by"] for one in entry(run, "distill")["slices"]} == {"class", "length", "teacher’s confidence"}
    assert call([*words, "data.slices=[who]"]) == 0


@pytest.mark.parametrize(
    ("column", "message"),
    [("whom", "has no column 'whom'; did you mean 'who'?"), ("sentence", "column 'sentence' has 200")],
)
def test_columns_that_cannot_be_sliced_by_are_told_first(
    run: Path, tmp_path: Path, text_teacher: Path, texts: dict[str, Path], column: str, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["compress", text_teacher, "--task", "text-classification", "--train", texts["train"], "--eval",
             run / "eval.tsv", "--columns", "text=sentence", "--slice", column, "--out", tmp_path / "out"]  # fmt: skip
    assert call(list(map(str, words))) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "stages").exists()
