"""Licences on the road: what stops before anything runs, what goes along, and what the card says."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from potstill.export.papers import PAPERS
from potstill.pipeline.lineage.additions import with_additions
from potstill.pipeline.lineage.said import DECIDED_BY
from tests.program import called

TARGET = "laptop-x86-vnni"
TERMS = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n\nLlama 3.1 Version Release Date: July 23, 2024\n"


@pytest.fixture(scope="module")
def run(text_teacher: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe walked: a teacher under Llama's terms, and data under CC BY-SA that say so in the recipe."""
    folder = tmp_path_factory.mktemp("licensed")
    teacher = folder / "teacher"
    shutil.copytree(text_teacher, teacher)
    (teacher / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    (teacher / "LICENSE").write_text(TERMS)
    (folder / "recipe.yaml").write_text(
        f"""
task: text-classification
teacher: {teacher}
data: {{train: {texts["train"]}, eval: {texts["eval"]}, columns: {{text: sentence}}}}
student: {{layers: 2}}
stages: [{{distill: {{epochs: 1, learning_rate: 2e-3}}}}]
targets: [{TARGET}]
emulate: {{time: 0s}}
profile: {{runs: 5}}
licences: {{data: cc-by-sa-4.0}}
"""
    )
    called("run", folder / "recipe.yaml", "--out", folder / "out")
    return folder


@pytest.fixture
def nobody_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DECIDED_BY)


@pytest.mark.parametrize("place", ["student", f"packages/{TARGET}"])
def test_what_a_licence_wants_is_done(run: Path, place: str) -> None:
    folder = run / "out" / place
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "llama3.1"
    title = re.search(r"^# (.*)$", card.text, flags=re.M)
    assert title is not None
    assert title[1].startswith("Llama ")
    assert "**Built with Llama**" in card.text
    assert (folder / "LICENSE").read_text() == TERMS
    assert (folder / "NOTICE").read_text().startswith("Llama 3.1 is licensed under the Llama 3.1 Community License")
    assert "Potstill is no lawyer" in card.text
    assert "train.tsv" in card.text
    assert "[cc-by-sa-4.0](https://creativecommons.org/licenses/by-sa/4.0/legalcode)" in card.text


def test_the_record_has_the_verdict(run: Path) -> None:
    out = run / "out"
    manifest = json.loads((out / "packages" / TARGET / "manifest.json").read_text())
    records = [json.loads((out / "student" / "potstill.json").read_text()), manifest["lineage"]]
    records.append(json.loads((out / "ledger.json").read_text()))
    for record in records:
        assert record["licences"]["level"] == "allowed if"
        assert record["licences"]["licence"] == "llama3.1"
        assert [one["role"] for one in record["licences"]["findings"]] == ["teacher", "train"]
    assert {"LICENSE", "NOTICE"} <= {*manifest["files"]}


def test_licences_stand_in_the_lineage_and_its_bill(run: Path) -> None:
    for place, file in (("student", "potstill.json"), (f"packages/{TARGET}", "manifest.json")):
        folder = run / "out" / place
        record = json.loads((folder / file).read_text())
        record = record.get("lineage", record)
        assert record["teacher"]["licence"] == "llama3.1"
        assert record["data"]["train"]["licence"] == "cc-by-sa-4.0"
        assert record["data"]["eval"]["licence"] is None
        bill = json.loads((folder / "bom.cdx.json").read_text())
        said = {str(one.get("licenses", "")) for one in bill["components"]}
        assert any("CC-BY-SA-4.0" in one for one in said)
        assert any("llama3.1" in one for one in said)
        called("verify", folder)


def test_a_card_is_what_the_hub_reads(run: Path) -> None:
    card, package = (ModelCard.load(run / "out" / place / "README.md") for place in ("student", f"packages/{TARGET}"))
    ledger = json.loads((run / "out" / "ledger.json").read_text())
    entries = {entry["name"]: entry for entry in ledger["entries"]}
    for one, name in ((card, "distill"), (package, TARGET)):
        (result,) = one.data.eval_results
        assert (result.task_type, result.metric_type) == ("text-classification", "accuracy")
        assert result.metric_value == entries[name]["scorecard"]["value"]
        assert one.data.metrics == ["accuracy"]
        assert one.data.base_model is None  # a folder of this machine, and no name of the hub
    assert str(run) not in card.content + package.content


def test_a_card_tells_how_knowledge_was_passed_on_and_where_it_got_worse(run: Path) -> None:
    text = (run / "out" / "student" / "README.md").read_text()
    entry = json.loads((run / "out" / "ledger.json").read_text())["entries"][2]
    steps = int(entry["log"][-1]["step"])
    said = re.search(rf"- distill: 1 epoch; trained for {steps} steps by the losses (.*)\. The teacher ran for", text)
    assert said is not None
    assert {*said[1].split(", ")} <= {name for row in entry["log"] for name in row}
    assert "The student began as a part of the teacher: 2 of 4 layers" in text
    assert "## Where it is worse, and where better" in text
    for one in entry["slices"]:
        worse = one["p_holm"] is not None and one["p_holm"] < 0.05 and one["difference"] < 0
        assert (f"Worse than the teacher on {one['by']} {one['value']}" in text) == (worse and " " not in one["value"])
    assert "Slices by anything but class, length and the teacher's confidence: no column was named." in text


def test_what_a_person_adds_survives_and_what_is_changed_is_kept(run: Path, capsys: Any) -> None:
    out = run / "out"
    student, package = out / "student" / "README.md", out / "packages" / TARGET / "README.md"
    clean = student.read_text()
    student.write_text(clean + "\n## Our own words\n")
    package.write_text(package.read_text().replace("## Not measured", "## All is well") + "Mine.\n")
    changed = package.read_text()
    done = called("run", run / "recipe.yaml", "--out", out)
    assert student.read_text() == clean + "\n## Our own words\n"
    now = package.read_text()
    assert now.endswith("yours below -->\nMine.\n")
    assert "## Not measured" in now
    (kept,) = (out / "cards").iterdir()
    assert kept.read_text() == changed
    told = " ".join(done.stdout.split())
    assert f"packages/{TARGET}/README.md was changed above its mark; that text is kept as cards/{kept.name}" in told
    manifest = json.loads((out / "packages" / TARGET / "manifest.json").read_text())
    from potstill.validate.files import sha256_file

    assert manifest["files"]["README.md"]["sha256"] == sha256_file(package)
    again = called("run", run / "recipe.yaml", "--out", out)
    assert "above its mark" not in again.stdout
    assert [*(out / "cards").iterdir()] == [kept]


def test_a_card_without_a_mark_is_kept(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "README.md").write_text("all of it mine")
    said = list[str]()
    text = with_additions(tmp_path, "student", "new\n", lambda _, sentence: said.append(sentence))
    assert text.startswith("new\n<!-- potstill: written by the run above this line")
    (kept,) = (tmp_path / "cards").iterdir()
    assert kept.read_text() == "all of it mine"
    assert said == [f"student/README.md was changed above its mark; that text is kept as cards/{kept.name}"]


def test_another_verdict_is_sealed_without_making_anything_anew(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(run / "out", out)
    model = (out / "packages" / TARGET / "model.onnx").stat().st_mtime_ns
    plain = yaml.safe_load((run / "recipe.yaml").read_text())
    plain["licences"] = {"teacher": "cc0-1.0", "data": "own", "decided_by": "Ada", "decision": "Meta told her"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    called("run", tmp_path / "recipe.yaml", "--out", out)
    for place in ("student", f"packages/{TARGET}"):
        card = ModelCard.load(out / place / "README.md")
        assert card.data.license == "cc0-1.0"
        assert "Decided by Ada: Meta told her." in card.text
        assert not [name for name in PAPERS if (out / place / name).exists()]
    manifest = json.loads((out / "packages" / TARGET / "manifest.json").read_text())
    assert not {*PAPERS} & {*manifest["files"]}
    assert manifest["lineage"]["licences"]["decided_by"] == "Ada"
    assert (out / "packages" / TARGET / "model.onnx").stat().st_mtime_ns == model


@pytest.mark.usefixtures("nobody_decides")
def test_nothing_runs_where_a_licence_is_not_known(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    words = ["compress", text_teacher, "--task", "text-classification", "--train", texts["train"]]
    words += ["--eval", texts["eval"], "--columns", "text=sentence", "--student", "layers=1", "--out", tmp_path / "out"]
    done = called(*words, code=3)
    assert "licences: unknown, so nothing was run. teacher bert, no licence known (its folder)" in done.stderr
    assert not (tmp_path / "out").exists()
    done = called(*words, "--licences", "teacher=apache2", code=2)
    assert "--licences teacher: unknown licence 'apache2'; did you mean 'apache-2.0'?" in done.stderr


@pytest.mark.usefixtures("nobody_decides")
def test_a_dry_run_shows_the_verdict_and_stops_where_it_does(run: Path) -> None:
    done = called("run", run / "recipe.yaml", "--out", run / "out", "--dry-run", "--json")
    assert json.loads(done.stdout)["licences"]["level"] == "allowed if"
    assert "licences: allowed if" in done.stderr
    forbidden = ["--set", "licences.use=commercial", "--set", "licences.data=cc-by-nc-4.0"]
    done = called("run", run / "recipe.yaml", "--out", run / "new", "--dry-run", *forbidden, code=3)
    assert "licences: forbidden, so nothing was run. train train.tsv, cc-by-nc-4.0 (the recipe)" in done.stderr
    assert not (run / "new").exists()


@pytest.mark.usefixtures("nobody_decides")
def test_the_verb_tells(run: Path, tmp_path: Path) -> None:
    table = called("licences")
    for word in ("llama3.1", "anthropic", "Potstill is no lawyer"):
        assert word in table.stdout
    plain = json.loads(called("licences", "--json").stdout)
    assert {"licences", "services"} <= {*plain}
    assert "licences: allowed if" in called("licences", run / "recipe.yaml").stdout
    told = json.loads(called("licences", run / "teacher", "--json").stdout)
    assert told["findings"][0]["licence"] == "llama3.1"
    (tmp_path / "r.yaml").write_text((run / "recipe.yaml").read_text().replace("cc-by-sa-4.0", "mrl"))
    assert "licences: unknown, so nothing was run" in called("licences", tmp_path / "r.yaml", code=3).stderr


@pytest.mark.usefixtures("nobody_decides")
def test_a_service_is_asked_nothing_where_its_terms_forbid_it(tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("Say something.\n")
    words = ["generate", prompts, "--api", "https://api.openai.com", "--model", "gpt", "--out", out]
    done = called(*words, "--licences", "prompts=own", code=3)
    assert "licences: forbidden, so nothing was run. api api.openai.com, openai (the service's address)" in done.stderr
    assert not [*tmp_path.glob("out*")]
    said = "prompts=own,competes=false"
    plain = called(*words, "--licences", said, "--decided-by", "Ada", "--dry-run", "--json")
    assert json.loads(plain.stdout)["licences"]["level"] == "allowed if"
    assert "what is made does not compete with its owner, says Ada" in plain.stderr
    done = called(*words, "--licences", "api=opanai", code=2)
    assert "--licences api: unknown terms 'opanai'; did you mean 'openai'?" in done.stderr
