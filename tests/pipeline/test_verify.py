"""`potstill verify`: what holds, and every way in which it may not, each named with what was expected and found."""

import hashlib
import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat, PublicFormat

from potstill.export.package import BOM, MANIFEST
from potstill.pipeline.lineage.bom import package_bom
from potstill.pipeline.lineage.record import chained
from potstill.validate.checkpoint import RECORD
from potstill.validate.files import read_json, sealed, sha256_file, write_json, write_text
from tests.program import called

TARGET = "laptop-x86-vnni"
Record = dict[str, Any]


@pytest.fixture(scope="module")
def run(text_teacher: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two teachers, with a student and a package."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(text_teacher, folder / "other")
    (folder / "recipe.yaml").write_text(
        f"""
task: text-classification
teacher: {text_teacher}
other_teachers: [{{checkpoint: {folder / "other"}, weight: 0.5}}]
data:
  train: {texts["train"]}
  eval: {texts["eval"]}
  calibrate: {texts["calibrate"]}
  columns: {{text: sentence}}
student: {{layers: 1, hidden: 16}}
stages:
  - distill: {{epochs: 0.1}}
targets: [{TARGET}]
profile: {{runs: 5}}
"""
    )
    called("run", folder / "recipe.yaml", "--out", folder / "out")
    return folder / "out"


@pytest.fixture
def package(run: Path, tmp_path: Path) -> Path:
    """A copy of the package, away from its run."""
    return shutil.copytree(run / "packages" / TARGET, tmp_path / "package")


@pytest.fixture
def student(run: Path, tmp_path: Path) -> Path:
    """A copy of the student, away from its run."""
    return shutil.copytree(run / "student", tmp_path / "student")


def looked_at(*words: object, code: int = 0) -> tuple[dict[str, str], str]:
    """Outcome by what was looked at, and what broke."""
    found = json.loads(called("verify", *words, "--json", code=code).stdout)
    return {one["what"]: one["outcome"] for one in found["checked"]}, str(found["broken"])


def edit(file: Path, change: Callable[[Record], object]) -> None:
    """Change a JSON file in place."""
    record = read_json(file)
    change(record)
    write_json(file, record)


def test_the_record_says_who_made_it(run: Path, text_teacher: Path) -> None:
    student, manifest = read_json(run / "student" / RECORD), read_json(run / "packages" / TARGET / MANIFEST)
    weights = text_teacher / "model.safetensors"
    teacher = student["teacher"]
    assert teacher["files"]["model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    lines = "".join(f"{name}\0{found}\n" for name, found in teacher["files"].items())
    assert teacher["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert (teacher["source"], teacher["licence"], teacher["revision"]) == ("bert", None, None)
    assert [(one["source"], one["weight"]) for one in student["other_teachers"]] == [("other", 0.5)]
    first, second = student["stages"]
    assert (first["name"], second["name"], second["settings"]["epochs"]) == ("student", "distill", 0.1)
    own = hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest()
    assert second["files"]["model.safetensors"] == own != first["files"]["model.safetensors"]
    assert datetime.fromisoformat(first["started"]) <= datetime.fromisoformat(student["made"])
    assert student["task"] == "text-classification"
    assert {one["licence"] for one in student["data"].values()} == {None}
    assert student["chain"] == manifest["lineage"]["chain"]
    assert len(student["chain"]) == 3
    assert str(run) not in json.dumps([student, manifest])


def test_everything_holds_in_the_run(run: Path) -> None:
    outcome, broken = looked_at(run / "packages" / TARGET, "--golden")
    assert broken == "None"
    assert outcome.pop("signature") == "not checked"
    assert set(outcome.values()) == {"holds"}
    assert {"files", "lineage", "manifest.json", BOM, "stage 1 (student)", "stage 2 (distill)"} < set(outcome)
    assert {"data: train", "data: eval", "data: calibrate", "teacher", "teacher 2", "golden samples"} < set(outcome)
    outcome, _ = looked_at(run / "student")
    assert [what for what, one in outcome.items() if one == "not checked"] == ["README.md", "signature"]
    stage = next(run.glob("stages/1-student-*/checkpoint"))
    assert looked_at(stage)[0]["stage 1 (student)"] == "holds"


def test_what_is_not_here_is_said(package: Path, run: Path, text_teacher: Path) -> None:
    outcome, _ = looked_at(package)
    assert outcome["files"] == outcome["lineage"] == outcome[MANIFEST] == outcome[BOM] == "holds"
    assert outcome["stage 2 (distill)"] == outcome["data: train"] == outcome["teacher"] == "not checked"
    assert looked_at(package, "--teacher", text_teacher)[0]["teacher"] == "holds"
    assert looked_at(package, "--run", run)[0]["stage 2 (distill)"] == "holds"
    shown = " ".join(called("verify", package).stdout.split())
    assert "teacher not checked bert is not here; give it by --teacher" in shown


EDITS: dict[str, tuple[Callable[[Record], object], str]] = {
    "another teacher": (
        lambda m: m["lineage"]["teacher"].update(sha256="0" * 64),
        "the lineage was edited at what the model began with: its link says ",
    ),
    "another source": (lambda m: m["lineage"]["teacher"].update(source="own"), "edited at what the model began with"),
    "a setting": (lambda m: m["lineage"]["stages"][1]["settings"].update(epochs=9), "edited at stage 2 (distill)"),
    "a stage less": (lambda m: m["lineage"]["stages"].pop(), "it has 3 links and 1 stage"),
    "a link": (lambda m: m["lineage"]["chain"].__setitem__(1, "0" * 64), "edited at stage 1 (student)"),
    "a link less": (lambda m: m["lineage"]["chain"].pop(), "its link says no link"),
    "a version": (lambda m: m["lineage"]["versions"].update(torch="9"), "its seal says "),
    "a score": (lambda m: m["scorecard"].update(value=1.0), "was edited after it was written"),
    "no seal": (lambda m: m.pop("seal"), "its seal says none"),
    "no teacher": (lambda m: m["lineage"].pop("teacher"), "it has not the form of a record (KeyError: 'teacher')"),
    "a list": (lambda m: m.update(lineage=[]), "its seal says "),
    "a hash": (
        lambda m: m["files"]["config.json"].update(sha256="0" * 64),
        f"config.json is not what manifest.json names: expected SHA-256 {'0' * 64}, found SHA-256 ",
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_manifest_is_found(what: str, package: Path) -> None:
    change, words = EDITS[what]
    edit(package / MANIFEST, change)
    _, broken = looked_at(package, code=3)
    assert words in broken


def test_an_edited_record_of_a_checkpoint_is_found(student: Path) -> None:
    edit(student / RECORD, lambda r: r["stages"][0].update(seconds=0.0))
    assert "the lineage was edited at stage 1 (student)" in looked_at(student, code=3)[1]


def test_changed_missing_and_foreign_files_are_found(package: Path, student: Path) -> None:
    found = sha256_file(package / "model.onnx")
    (package / "model.onnx").write_bytes((package / "model.onnx").read_bytes() + b"\0")
    _, broken = looked_at(package, code=3)
    assert f"model.onnx is not what manifest.json names: expected SHA-256 {found}, found SHA-256 " in broken
    (package / "model.onnx").unlink()
    assert "found no such file" in called("verify", package, code=3).stderr
    (student / "extra.py").write_text("print()")
    assert "extra.py is not what potstill.json names: expected no such file" in looked_at(student, code=3)[1]
    (student / "extra.py").rename(student / ".gitattributes")
    (student / "LICENSE").write_text("mine")
    outcome, _ = looked_at(student)
    assert outcome[".gitattributes"] == outcome["LICENSE"] == "not checked"
    (student / "model.safetensors").write_bytes(b"others")
    assert "model.safetensors is not what potstill.json names" in looked_at(student, code=3)[1]


def test_a_bill_that_says_otherwise_is_found(package: Path, student: Path) -> None:
    def relabel(bom: Record) -> None:
        next(one for one in bom["components"] if one["bom-ref"] == "teacher")["name"] = "own"

    edit(student / BOM, relabel)
    _, broken = looked_at(student, code=3)
    assert 'does not say what potstill.json says, at components.teacher.name: expected "bert", found "own"' in broken
    (student / BOM).unlink()
    assert looked_at(student)[0][BOM] == "not checked"
    edit(package / BOM, relabel)  # and with its hash in a manifest that is sealed anew
    manifest = read_json(package / MANIFEST)
    manifest["files"][BOM]["sha256"] = sha256_file(package / BOM)
    write_json(package / MANIFEST, sealed(manifest))
    assert "at components.teacher.name" in looked_at(package, code=3)[1]
    (package / BOM).write_text("no JSON")
    manifest["files"][BOM]["sha256"] = sha256_file(package / BOM)
    write_json(package / MANIFEST, sealed(manifest))
    assert "bom.cdx.json: not JSON" in called("verify", package, code=2).stderr


def forge(package: Path, change: Callable[[Record], object]) -> None:
    """Change a manifest and compute every hash that hangs on it anew, as somebody with Potstill can."""
    manifest = read_json(package / MANIFEST)
    change(manifest)
    manifest["lineage"]["chain"] = chained(manifest["lineage"])
    write_text(package / BOM, str(package_bom(package, manifest)))
    manifest["files"][BOM]["sha256"] = sha256_file(package / BOM)
    write_json(package / MANIFEST, sealed(manifest))


def test_a_whole_forgery_is_found_by_what_made_the_model(package: Path, run: Path, text_teacher: Path) -> None:
    forge(package, lambda m: m["lineage"]["teacher"]["files"].update({"config.json": "0" * 64}))
    assert looked_at(package)[1] == "None"
    _, broken = looked_at(package, "--teacher", text_teacher, code=3)
    found = sha256_file(text_teacher / "config.json")
    assert (
        f"the teacher ({text_teacher}) is another: config.json: expected SHA-256 {'0' * 64}, found SHA-256 " in broken
    )
    assert broken.endswith(found)
    _, broken = looked_at(package, "--run", run, code=3)
    assert "stage 1 (student) is not of the run" in broken
    assert "2 checkpoints with others" in broken


def test_other_data_and_a_changed_checkpoint_of_the_run_are_found(run: Path, package: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(run, tmp_path / "mine")
    recipe = (mine / "recipe.yaml").read_text()
    judged = read_json(package / MANIFEST)["lineage"]["data"]["eval"]["name"]
    line = next(line for line in recipe.splitlines() if line.strip().startswith("eval:"))
    (tmp_path / judged).write_text("sentence\tlabel\ngood\t1\nbad\t0\n")
    (mine / "recipe.yaml").write_text(recipe.replace(line.strip(), f"eval: {tmp_path / judged}"))
    _, broken = looked_at(package, "--run", mine, code=3)
    assert f"data: eval ({judged}) is not what it was: expected SHA-256 " in broken
    outcome, _ = looked_at(mine / "student")
    assert (outcome["data: train"], outcome["data: eval"]) == ("holds", "not checked")
    (tmp_path / judged).unlink()
    outcome, _ = looked_at(package, "--run", mine)
    assert outcome["data: train"] == outcome["data: eval"] == outcome["teacher"] == "not checked"
    weights = next(mine.glob("stages/1-student-*/checkpoint/model.safetensors"))
    weights.write_bytes(b"others")
    _, broken = looked_at(package, "--run", mine, code=3)
    assert f"stage 1 (student) of the run ({weights.parent}) is another: model.safetensors: expected SHA-256 " in broken
    shutil.rmtree(mine / "stages")
    assert looked_at(package, "--run", mine)[0]["stage 1 (student)"] == "not checked"


def test_golden_samples_that_do_not_come_out_are_found(package: Path) -> None:
    index = package / "golden" / "golden.json"
    edit(index, lambda golden: golden["samples"][2]["outputs"]["logits"].update(atol=-1.0))
    forge(package, lambda m: m["files"]["golden/golden.json"].update(sha256=sha256_file(index)))
    assert looked_at(package)[0]["golden samples"] == "not checked"
    _, broken = looked_at(package, "--golden", code=3)
    assert "golden sample 2: logits is 0 off, expected -1 at most" in broken


def test_golden_samples_of_another_shape_or_form_are_found(package: Path) -> None:
    index = package / "golden" / "golden.json"

    def taller(golden: Record) -> None:
        logits = golden["samples"][0]["outputs"]["logits"]
        logits["shape"] = [*logits["shape"], 1]

    edit(index, taller)
    forge(package, lambda m: m["files"]["golden/golden.json"].update(sha256=sha256_file(index)))
    assert "golden sample 0: logits is inf off" in looked_at(package, "--golden", code=3)[1]
    edit(index, lambda golden: golden.update(format="other"))
    forge(package, lambda m: m["files"]["golden/golden.json"].update(sha256=sha256_file(index)))
    assert "no samples of the form 'potstill-golden/1'" in called("verify", package, "--golden", code=2).stderr
    (package / "model.onnx").write_bytes(b"no model")
    edit(index, lambda golden: golden.update(format="potstill-golden/1"))
    for name in ("golden/golden.json", "model.onnx"):
        forge(package, lambda m, name=name: m["files"][name].update(sha256=sha256_file(package / name)))  # type: ignore[misc]
    told = called("verify", package, "--golden", code=2).stderr
    assert "ONNX Runtime does not open" in told


def test_a_signature_of_a_package(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, public = tmp_path / "key.pem", tmp_path / "public.pem"
    private, locked = Ed25519PrivateKey.generate(), BestAvailableEncryption(b"word")
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
    public.write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    _, broken = looked_at(package, "--public-key", public, code=3)
    assert "has no signature" in broken
    monkeypatch.setattr("typer.prompt", lambda *_, **__: "word")
    said = called("sign", package, "--key", key).stdout
    assert looked_at(package, "--public-key", public)[0]["signature"] == "holds"
    outcome = json.loads(called("verify", package, "--json").stdout)["checked"]
    told = next(one["told"] for one in outcome if one["what"] == "signature")
    assert told.removeprefix("it names the key ").removesuffix("; give --public-key") in said
    forge(package, lambda m: m["lineage"]["teacher"].update(source="own"))
    assert looked_at(package)[1] == "None"
    _, broken = looked_at(package, "--public-key", public, code=3)
    assert "bom.cdx.json is not what was signed" in broken
    edit(package / MANIFEST, lambda m: m.update(seconds=0.0))
    assert "its seal says" in called("sign", package, "--key", key, code=3).stderr


def older(lineage: Record) -> None:
    """Make a lineage what it was before it had a chain."""
    for name in ("chain", "task", "code", "made", "other_teachers", "student"):
        lineage.pop(name)
    lineage["format"] = "potstill-lineage/1"
    lineage["teacher"] = {name: lineage["teacher"][name] for name in ("source", "sha256")}
    lineage["stages"] = [{name: one[name] for name in ("name", "settings", "seconds")} for one in lineage["stages"]]


def test_an_older_record_is_read_and_what_it_lacks_is_said(package: Path, student: Path, text_teacher: Path) -> None:
    edit(package / MANIFEST, lambda manifest: [older(manifest["lineage"]), manifest.pop("seal")])
    outcome, _ = looked_at(package, "--teacher", text_teacher)
    assert outcome["files"] == outcome["teacher"] == "holds"
    assert outcome["lineage"] == outcome[BOM] == "not checked"
    assert looked_at(package)[0]["teacher"] == "not checked"
    _, broken = looked_at(package, "--teacher", student, code=3)
    assert f"the teacher {student} is another: expected SHA-256 " in broken
    edit(student / RECORD, lambda record: [older(record), record.pop("seal")])
    assert looked_at(student)[0]["files"] == "not checked"


def test_an_older_run_goes_on(run: Path, tmp_path: Path) -> None:
    """Its stages stay as they are; a package that is made now says what is known of them."""
    mine = shutil.copytree(run, tmp_path / "mine")
    for stage in mine.glob("stages/[12]-*"):
        edit(stage / "record.json", lambda record: record.pop("stage"))
        edit(stage / "checkpoint" / RECORD, lambda record: [older(record), record.pop("seal")])
    shutil.rmtree(mine / "packages" / TARGET)
    called("run", run.parent / "recipe.yaml", "--out", mine)
    assert not (mine / "student" / BOM).exists()
    outcome, _ = looked_at(mine / "packages" / TARGET)
    assert outcome["lineage"] == outcome[BOM] == outcome["teacher"] == outcome["data: train"] == "holds"
    assert outcome["stage 1 (student)"] == outcome["stage 2 (distill)"] == "not checked"


def test_a_model_made_of_a_model_carries_both_lineages(run: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    called(
        "export", run / "student", "--target", TARGET, "--calibrate", texts["calibrate"], "--eval", texts["eval"],
        "--columns", "text=sentence", "--out", tmp_path / "out",
    )  # fmt: skip
    package = tmp_path / "out" / "packages" / TARGET
    lineage = read_json(package / MANIFEST)["lineage"]
    assert lineage["teacher"]["lineage"]["teacher"]["source"] == "bert"
    assert looked_at(package)[0]["teacher"] == "holds"
    forge(package, lambda m: m["lineage"]["teacher"]["lineage"]["teacher"].update(source="own"))
    _, broken = looked_at(package, code=3)
    assert "the lineage of the teacher student was edited at what the model began with" in broken


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/none"], "{tmp}/none is not a folder; give a package"),
        (["{tmp}"], "{tmp} has no manifest.json and no potstill.json, so nothing says where it came from"),
        (["{package}", "--teacher", "{tmp}/none"], "no such teacher: {tmp}/none"),
        (["{package}", "--run", "{tmp}"], "{tmp} is no folder of a run: it has no potstill-run.json"),
        (["{student}", "--golden"], "{student} is a checkpoint and has no golden samples"),
    ],
)
def test_wrong_use_is_told(words: list[str], message: str, package: Path, student: Path, tmp_path: Path) -> None:
    places = {"tmp": tmp_path, "package": package, "student": student}
    told = called("verify", *(one.format(**places) for one in words), code=2).stderr
    assert message.format(**places) in told


def test_what_cannot_be_read_is_told(package: Path, student: Path) -> None:
    (package / MANIFEST).write_text("[]")
    assert "manifest.json: holds a list, expected a mapping" in called("verify", package, code=2).stderr
    (package / MANIFEST).write_text("{")
    assert "manifest.json: not JSON" in called("verify", package, code=2).stderr
    (student / RECORD).write_text('{"factory": "a:b"}')
    assert "potstill.json says nothing of where it came from" in called("verify", student, code=2).stderr
