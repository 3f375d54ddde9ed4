"""Models are predicted once; everything else that is asked of them is answered from what was kept."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.pipeline.cli import call
from potstill.validate.errors import InputError
from tests.conftest import sentences, write_tsv
from tests.pipeline.test_road import check_package

TARGET = "laptop-x86-vnni"


@pytest.fixture(scope="module")
def run(text_teacher: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small student and its package, judged on a second set and on the first one made harder."""
    folder = tmp_path_factory.mktemp("run")
    write_tsv(folder / "shifted.tsv", sentences(90, 7))
    (folder / "recipe.yaml").write_text(
        f"""
task: text-classification
teacher: {text_teacher}
data:
  train: {texts["train"]}
  eval: {texts["eval"]}
  shifted: {folder / "shifted.tsv"}
  perturb: [typos]
  columns: {{text: sentence}}
student: {{layers: 1, hidden: 16}}
stages:
  - distill: {{epochs: 1}}
gate: {{max_drop: 90pp}}
targets: [{TARGET}]
profile: {{runs: 5}}
"""
    )
    assert call(["run", str(folder / "recipe.yaml"), "--out", str(folder / "out")]) == 0
    return folder


def again(run: Path, *settings: str) -> int:
    return call(["run", str(run / "recipe.yaml"), "--out", str(run / "out"), *(f"--set={one}" for one in settings)])


def entries(run: Path) -> dict[str, Any]:
    return {one["name"]: one for one in json.loads((run / "out" / "ledger.json").read_text())["entries"]}


def made(run: Path) -> dict[str, int]:
    """When each step's folder and each package's model was written."""
    paths = [*(run / "out" / "stages").iterdir(), *(run / "out" / "packages").glob("*/model.onnx")]
    return {str(path.relative_to(run / "out")): path.stat().st_mtime_ns for path in paths}


def added(run: Path, before: dict[str, int]) -> set[str]:
    """Kinds of steps that were written since."""
    after = made(run)
    assert {name: after[name] for name in before} == before
    return {name.removeprefix("stages/").partition("-")[0] for name in after.keys() - before}


def test_steps_add_up(run: Path) -> None:
    found = entries(run)
    student, distill, package = (found[name] for name in ("student", "distill", TARGET))
    assert found["teacher"]["step"] is None
    assert student["step"]["difference"] == student["scorecard"]["difference"]
    alone = [one["step"]["difference"] for one in (student, distill, package)]
    assert sum(alone[:2]) == pytest.approx(distill["scorecard"]["difference"])
    assert sum(alone) == pytest.approx(package["scorecard"]["difference"])
    for one, other in ((distill, student), (package, distill)):
        assert one["step"]["teacher_value"] == other["scorecard"]["value"]
        low, high = (one["step"]["difference_interval"][end] for end in ("low", "high"))
        assert low <= one["step"]["difference"] <= high


def test_a_second_set_is_judged_as_transformers_would(run: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with (run / "shifted.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    labels = np.array([int(row["label"]) for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(run / "out" / "student")
    model = AutoModelForSequenceClassification.from_pretrained(run / "out" / "student").eval()
    with torch.inference_mode():
        said = model(**tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")).logits
    shifted = next(one for one in entries(run)["distill"]["shifts"] if one["by"] == "shifted")
    assert shifted["scorecard"]["examples"] == 90
    assert shifted["scorecard"]["value"] == pytest.approx(float((said.numpy().argmax(axis=1) == labels).mean()))
    assert {one["by"] for one in shifted["slices"]} == {"class", "length", "teacher’s confidence"}
    assert shifted["change"] is None


def test_perturbed_examples_are_beside_those_as_they_are(run: Path) -> None:
    for name in ("distill", TARGET):
        entry = entries(run)[name]
        typos = next(one for one in entry["shifts"] if one["by"] == "typos")
        card, as_is = typos["scorecard"], entry["scorecard"]
        assert card["examples"] == 200
        assert card["teacher_value"] < as_is["teacher_value"]
        change = (card["value"] - as_is["value"]) - (card["teacher_value"] - as_is["teacher_value"])
        assert typos["change"] == pytest.approx(change)


@pytest.mark.parametrize("place", ["student", f"packages/{TARGET}"])
def test_the_card_tells_of_other_examples(run: Path, place: str) -> None:
    card = (run / "out" / place / "README.md").read_text()
    entry = entries(run)[TARGET if place.startswith("packages") else "distill"]
    for shift in entry["shifts"]:
        assert f"| {shift['by']}: {shift['what']} | {100 * shift['scorecard']['value']:.2f}% (" in card


def test_the_gate_judges_the_second_set_too(run: Path) -> None:
    verdict = entries(run)["distill"]["verdict"]
    assert [check["limit"] for check in verdict["checks"]] == ["max_drop", "shifted max_drop"]
    assert "on shifted.tsv: accuracy" in verdict["checks"][1]["reason"]
    assert not any(check["limit"].startswith("typos") for check in verdict["checks"])


def test_another_gate_predicts_and_makes_nothing_again(run: Path) -> None:
    before, package = made(run), run / "out" / "packages" / TARGET
    assert again(run, "gate.max_drop=80pp") == 0
    drop = json.loads((package / "manifest.json").read_text())["verdict"]["checks"][0]
    assert "limit −80.00" in drop["reason"]
    assert check_package(package)["scorecard"] == entries(run)[TARGET]["scorecard"]
    assert "−80.00" in entries(run)[TARGET]["verdict"]["reason"]
    assert added(run, before) == set()
    assert again(run) == 0


def test_another_second_set_predicts_that_alone(run: Path) -> None:
    before = made(run)
    write_tsv(run / "other.tsv", sentences(70, 8))
    assert again(run, f"data.shifted={run / 'other.tsv'}", "data.perturb=[]") == 0
    names = made(run).keys() - before
    assert sorted(name.removeprefix("stages/").partition("-")[0] for name in names) == [
        *["judged"] * 2, "leaks", *["predicted"] * 3
    ]  # fmt: skip
    assert again(run) == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.perturb=[typo]", "did you mean 'typos'"),
        ("data.perturb=[jpeg]", "typos"),
        ("data.shifted=nowhere.tsv", "nowhere.tsv"),
    ],
)
def test_what_cannot_judge_is_told_before_anything_is_made(
    run: Path, tmp_path: Path, setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(run / "recipe.yaml"), "--out", str(tmp_path / "out"), "--set", setting]
    assert call(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "stages").exists()


def test_training_examples_in_the_second_set_are_counted(
    run: Path, texts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = texts["train"].read_text().splitlines()
    (run / "leaked.tsv").write_text("\n".join([*(run / "shifted.tsv").read_text().splitlines(), *lines[1:4]]) + "\n")
    assert again(run, f"data.shifted={run / 'leaked.tsv'}") == 0
    assert "3 of the 93 examples of data.shifted are in data.train too." in " ".join(capsys.readouterr().out.split())
    assert again(run) == 0


def test_a_package_is_sealed_with_what_judged_it(run: Path, texts: dict[str, Path]) -> None:
    """Another evaluation set: the same model, with its scorecard, its lineage and its card brought up to date."""
    lines, package = texts["eval"].read_text().splitlines(), run / "out" / "packages" / TARGET
    (run / "fewer.tsv").write_text("\n".join(lines[:100]) + "\n")
    model = (package / "model.onnx").stat().st_mtime_ns
    assert again(run, f"data.eval={run / 'fewer.tsv'}", "data.perturb=[case]") == 0
    manifest = check_package(package)
    assert manifest["scorecard"]["examples"] == manifest["lineage"]["data"]["eval"]["examples"] == 99
    assert manifest["lineage"]["data"]["eval"]["name"] == "fewer.tsv"
    card = (package / "README.md").read_text()
    assert "| case: " in card
    assert "| typos: " not in card
    assert (package / "model.onnx").stat().st_mtime_ns == model
    assert again(run) == 0


def test_a_kill_between_card_and_manifest_is_mended(run: Path) -> None:
    package = run / "out" / "packages" / TARGET
    (package / "README.md").write_text("another card")  # as a kill of another gate's run leaves it
    assert again(run) == 0
    assert "another card" not in (package / "README.md").read_text()
    check_package(package)


def test_a_package_that_is_made_again_is_asked_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from potstill.validate.predictor import OnnxPredictor

    asked: list[str] = []
    run_one = OnnxPredictor.run
    monkeypatch.setattr(OnnxPredictor, "run", lambda self, inputs: asked.append(self.name) or run_one(self, inputs))
    assert again(run) == 0
    assert not asked
    shutil.rmtree(run / "out" / "packages")
    assert again(run) == 0
    assert asked.count(f"{TARGET} package") >= 200 + 90 + 200  # the evaluation set, the second set, with typos


def test_broken_answers_under_a_perturbation_stop_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.pipeline import judging

    def fragile(predictor: Any, examples: Any, *more: Any) -> Any:
        if "typos" in examples.name and predictor.name != "the teacher":
            raise InputError("gave logits that are not finite")
        return predict(predictor, examples, *more)

    predict = judging.predict
    monkeypatch.setattr(judging, "predict", fragile)
    words = ["run", str(run / "recipe.yaml"), "--out", str(tmp_path / "out"), "--set", "targets=[]"]
    assert call(words) == 0
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    distill = next(one for one in ledger["entries"] if one["name"] == "distill")
    assert distill["unjudged"] == ["not judged under typos: gave logits that are not finite"]
    assert [shift["by"] for shift in distill["shifts"]] == ["shifted"]
    assert "distill: not judged under typos" in (tmp_path / "out" / "report.html").read_text()


def test_what_lies_there_from_other_limits_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert again(run, "gate.min_agreement=100%", "gate.undecided=strict") == 3
    told = " ".join(capsys.readouterr().out.split())
    assert f"student, packages/{TARGET}: from an earlier run, and not passed by these limits." in told
    assert again(run) == 0


def test_the_evaluation_set_is_no_second_set(run: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    words = ["run", str(run / "recipe.yaml"), "--out", str(tmp_path / "out"), "--set", f"data.shifted={texts['eval']}"]
    assert call(words) == 2


def test_a_second_set_that_is_lost_on_stops_the_run(
    run: Path, texts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A second set of what the student has wrong and the teacher right."""
    with texts["eval"].open() as file:
        rows = [(row["sentence"], int(row["label"])) for row in csv.DictReader(file, delimiter="\t")]
    distill = entries(run)["distill"]
    limit = 100 * -distill["scorecard"]["difference"] + 10
    lost = [rows[flip["row"] - 1] for flip in distill["flips"]["worst"]]
    write_tsv(run / "lost.tsv", [*lost * 10, *sentences(6, 9)])
    assert again(run, f"data.shifted={run / 'lost.tsv'}", f"gate.max_drop={limit:.1f}pp") == 3
    assert "distill missed its gate: on lost.tsv: accuracy" in capsys.readouterr().err
    checks = {check["limit"]: check["passed"] for check in entries(run)["distill"]["verdict"]["checks"]}
    assert checks == {"max_drop": True, "shifted max_drop": False}
    assert again(run) == 0


def test_the_verbs_take_a_second_set_and_perturbations(
    run: Path, text_teacher: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    words = ["export", run / "out" / "student", "--teacher", text_teacher, "--calibrate", texts["calibrate"], "--eval",
             texts["eval"], "--columns", "text=sentence", "--target", TARGET, "--shifted", run / "shifted.tsv",
             "--perturb", "typos", "--perturb", "case", "--max-drop", "95pp", "--out", tmp_path / "out"]  # fmt: skip
    assert call(list(map(str, words))) == 0
    entry = json.loads((tmp_path / "out" / "ledger.json").read_text())["entries"][-1]
    assert [shift["by"] for shift in entry["shifts"]] == ["shifted", "typos", "case"]
    assert entry["shifts"][0]["scorecard"]["examples"] == 90
