"""The bill of materials, held against CycloneDX's own schema, and what it says of a record."""

import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.model.bom import Bom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from potstill.pipeline.lineage.bom import checkpoint_bom, differs, package_bom
from potstill.pipeline.lineage.record import lineage
from potstill.validate.files import sha256_json

A, B, C = "a" * 64, "b" * 64, "c" * 64


def model(source: str, sha256: str, **more: Any) -> dict[str, Any]:
    plain = {"source": source, "sha256": sha256, "files": {}, "revision": None, "licence": None}
    return plain | {"lineage": None, "api": None} | more


def record(stages: int = 1, **more: Any) -> dict[str, Any]:
    """A lineage of a teacher, two sets of examples and some stages."""
    data = {
        "train": {"name": "train.tsv", "sha256": B, "examples": 600, "licence": "CC-BY-4.0"},
        "eval": {"name": "eval.tsv", "sha256": C, "examples": 300, "licence": None},
    }
    made = {"name": "distill", "settings": {"epochs": 2}, "seconds": 1.5, "files": {"model.safetensors": B}}
    given: dict[str, Any] = {"teacher": model("bert", A), "others": [], "student": None} | more
    return lineage("text-classification", 7, data=data, stages=[made] * stages, **given)


def manifest(**more: Any) -> dict[str, Any]:
    """As far as a bill reads it."""
    scorecard = {"metric": "accuracy", "value": 0.9, "interval": {"low": 0.85, "high": 0.93}}
    files = {"model.onnx": {"sha256": C}, "README.md": {"sha256": A}}
    return {"lineage": record(**more), "target": {"id": "phone"}, "files": files, "scorecard": scorecard}


def read(text: str | None) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[str]]]:
    """A bill that fits the schema: whole, its components by reference, and what depends on what."""
    assert text is not None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found = json.loads(text)
    parts = {one["bom-ref"]: one for one in [found["metadata"]["component"], *found["components"]]}
    return found, parts, {one["ref"]: one.get("dependsOn", []) for one in found["dependencies"]}


def test_a_package_hangs_on_its_student_and_that_on_its_teacher(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    found, parts, depends = read(package_bom(tmp_path, manifest()))
    assert {"student", "data/eval", "library/torch"} < set(depends["package"])
    assert "teacher" not in depends["package"]
    assert set(depends["student"]) == {"teacher", "data/train"}
    kinds = {ref: parts[ref]["type"] for ref in ("package", "student", "teacher", "data/train", "library/onnx")}
    assert list(kinds.values()) == [*["machine-learning-model"] * 3, "data", "library"]
    hashes = [parts[ref]["hashes"][0]["content"] for ref in ("package", "student", "teacher", "data/train")]
    assert hashes == [C, B, A, B]
    assert parts["data/train"]["licenses"] == [{"license": {"id": "CC-BY-4.0"}}]
    assert "licenses" not in parts["data/eval"]
    assert [one["name"] for one in parts["package"]["components"]] == ["model.onnx"]
    card = parts["package"]["modelCard"]
    assert card["modelParameters"]["modelArchitecture"] == "BertForSequenceClassification"
    assert card["quantitativeAnalysis"]["performanceMetrics"][0]["confidenceInterval"]["lowerBound"] == "0.85"
    assert parts["student"]["modelCard"]["modelParameters"]["datasets"] == [{"ref": "data/train"}]
    told = {one["name"]: one["value"] for one in parts["student"]["properties"]}
    assert json.loads(told["potstill:stage:1"])["settings"] == {"epochs": 2}
    assert told["potstill:seed"] == "7"
    assert found["metadata"]["timestamp"].startswith(manifest()["lineage"]["made"][:10])


def test_the_library_reads_it_back(tmp_path: Path) -> None:
    text = package_bom(tmp_path, manifest())
    found = Bom.from_json(data=json.loads(str(text)))  # type: ignore[attr-defined]
    assert {one.name for one in found.components} > {"bert", "train.tsv", "torch"}


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    made = manifest()
    first = package_bom(tmp_path, made)
    assert package_bom(tmp_path, json.loads(json.dumps(made))) == first
    made["files"] |= {"README.md": {"sha256": C}, "bom.cdx.json": {"sha256": C}}  # which are written after
    assert package_bom(tmp_path, made) == first
    made["files"]["model.onnx"]["sha256"] = A
    other = json.loads(str(package_bom(tmp_path, made)))
    assert other["serialNumber"] != json.loads(str(first))["serialNumber"]


def test_all_that_a_model_began_with(tmp_path: Path) -> None:
    api = {"service": "localhost:8000", "model": "big"}
    hub = model("org/name", "name:org/name", revision="0123abc", licence="my own", files={"config.json": A}, api=api)
    others = [model("other", B, licence="MIT OR Apache-2.0") | {"weight": 0.5}]
    made = record(stages=2, teacher=hub, others=others, student=model("tiny", C))
    _, parts, depends = read(checkpoint_bom(tmp_path, made))
    assert {"teacher", "teacher-2", "origin", "data/train", "data/eval"} < set(depends["student"])
    assert "hashes" not in parts["teacher"]  # a name is no hash
    assert parts["teacher"]["components"][0]["hashes"][0]["content"] == A
    assert (parts["teacher"]["version"], parts["teacher"]["licenses"]) == ("0123abc", [{"license": {"name": "my own"}}])
    assert parts["teacher-2"]["licenses"] == [{"expression": "MIT OR Apache-2.0"}]
    assert parts["teacher"]["properties"] == [{"name": "potstill:api", "value": "big at localhost:8000"}]
    assert "modelArchitecture" not in parts["student"]["modelCard"]["modelParameters"]


def test_a_package_of_the_teacher_itself(tmp_path: Path) -> None:
    _, parts, depends = read(package_bom(tmp_path, manifest(stages=0)))
    assert "student" not in parts
    assert {"teacher", "data/train", "data/eval", "library/onnxruntime"} < set(depends["package"])


def test_an_older_record_has_none(tmp_path: Path) -> None:
    old = {"teacher": {"source": "bert", "sha256": A}, "data": {}, "stages": [], "seed": 0}
    assert checkpoint_bom(tmp_path, old) is None
    assert package_bom(tmp_path, manifest() | {"lineage": old}) is None


@pytest.mark.parametrize(
    ("expected", "found", "where"),
    [
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}, None),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, ("a.1.b", 2, 3)),
        ({"a": 1}, {"a": 1, "c": 2}, ("c", None, 2)),
        ({"a": [1, 2]}, {"a": [1]}, ("a.1", 2, None)),
        (
            [{"bom-ref": "x", "v": 1}, {"bom-ref": "y", "v": 2}],
            [{"bom-ref": "y", "v": 2}],
            ("x", {"bom-ref": "x", "v": 1}, None),
        ),
        ({"a": {}}, {"a": 1}, ("a", {}, 1)),
    ],
)
def test_the_first_difference(expected: Any, found: Any, where: Any) -> None:
    assert differs(expected, found) == where


def test_links_hang_on_all_that_made_the_model_and_on_nothing_else() -> None:
    chain = record(2)["chain"]
    assert len(chain) == 3
    assert chain == record(2, teacher=model("bert", A, licence="MIT"))["chain"]
    assert chain[:2] == record(1)["chain"]
    assert not set(chain) & set(record(2, teacher=model("bert", A, revision="1"))["chain"])
    begun = {"models": [{name: v for name, v in model("bert", A).items() if name != "licence"}], "data": {"train": B}}
    assert chain[0] == sha256_json(begun | {"seed": 7, "task": "text-classification"})
