"""What a record says of the models that a run starts from, and of Potstill itself."""

import hashlib
import json
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from huggingface_hub import constants
from onnx import TensorProto, helper, numpy_helper

from potstill.compress.api_settings import ApiTeacher
from potstill.pipeline.lineage import record
from potstill.pipeline.lineage.record import code, now, origin
from potstill.validate.checkpoint import RECORD, Checkpoint
from potstill.validate.files import seal, sealed, sha256_each, sha256_folder

ROOT = Path(__file__).resolve().parents[2]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache that holds one commit of org/name, as loading it leaves it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--org--name"
    snapshot = model / "snapshots" / ("0123" * 10)
    for folder in (model / "blobs", model / "refs", snapshot):
        folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (model / "blobs" / name).write_text(f"the {name} of the hub")
        (snapshot / name).symlink_to(model / "blobs" / name)
    (model / "refs" / "main").write_text("0123" * 10)
    return snapshot


@pytest.mark.parametrize("revision", ["0123" * 10, None])
def test_a_hub_name_is_hashed_in_the_cache(revision: str | None, hub: Path) -> None:
    found = origin(Checkpoint("org/name"), revision)
    assert (found["source"], found["revision"]) == ("org/name", "0123" * 10)
    assert found["files"] == {name: sha256(hub / name) for name in ("config.json", "model.safetensors")}


def test_a_hub_name_that_is_not_in_the_cache_has_no_files(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / RECORD).write_text('{"format": "another model\'s"}')
    monkeypatch.chdir(tmp_path)
    found = origin(Checkpoint("org/other"), "89ab" * 10)
    assert (found["files"], found["revision"], found["sha256"]) == ({}, "89ab" * 10, "name:org/other")
    assert found["lineage"] is None


def test_a_factory_has_its_weights_and_what_made_them(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    made = {"format": record.FORMAT, "chain": ["a"], "factory": "x:y", "seal": "b"}
    (tmp_path / RECORD).write_text(json.dumps(made))
    found = origin(Checkpoint("potstill.pipeline.demo_models:teacher", weights))
    assert found["source"] == "demo_models:teacher"
    assert found["files"] == {weights.name: sha256(weights)}
    assert found["lineage"] == {"format": record.FORMAT, "chain": ["a"]}
    assert origin(Checkpoint("potstill.pipeline.demo_models:teacher"))["files"] == {}


def test_an_onnx_file_has_the_file_of_its_weights(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((4, 400), dtype=np.float32), "w")
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 4), ("y", 400))
    )
    model = helper.make_model(
        helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    )
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    found = origin(Checkpoint(str(tmp_path / "model.onnx")))
    assert found["files"] == {name: sha256(tmp_path / name) for name in ("model.onnx", "model.onnx.data")}


def test_a_service_is_named_without_its_address_or_key(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    api: Any = {"api": "http://localhost:8000/v1", "model": "big", "key_env": "A_KEY"}
    found = origin(Checkpoint(str(tmp_path)), api=ApiTeacher(**api))
    assert found["api"] == {"service": "localhost:8000", "model": "big"}


def test_the_code_is_that_of_the_checkout() -> None:
    found = code()
    assert len(found["sha256"]) == 64
    own = Path(record.__file__).resolve().is_relative_to(ROOT)
    if not shutil.which("git") or not (ROOT / ".git").exists() or not own:
        pytest.skip("needs git, and the copy that is imported to be this checkout's")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found["commit"] == head.strip()


@pytest.mark.parametrize("how", ["foreign", "none", "no git"])
def test_the_commit_of_another_repository_is_not_ours(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Potstill may be installed below a user's own repository, which does not hold its files."""
    copy = tmp_path / "site" / "record.py"
    copy.parent.mkdir()
    shutil.copyfile(ROOT / "pipeline" / "lineage" / "record.py", copy)
    if how == "foreign":
        if not shutil.which("git"):
            pytest.skip("needs git")
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    if how == "no git":
        monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(record, "__file__", str(copy))
    found = code.__wrapped__()
    assert (found["commit"], found["changed"]) == (None, None)
    assert found["sha256"] == code()["sha256"]


def test_the_time_is_utc_to_the_second() -> None:
    off = datetime.now(UTC) - datetime.fromisoformat(now())
    assert 0 <= off.total_seconds() < 60
    assert now().endswith("Z")


def test_a_seal_is_over_all_but_itself() -> None:
    made = sealed({"a": (1, 2), "b": {"c": None}})
    assert made["seal"] == seal(made) == seal({"b": {"c": None}, "a": [1, 2], "seal": "other"})
    assert seal(made | {"a": [1, 3]}) != made["seal"]
    canonical = json.dumps({"a": [1, 2], "b": {"c": None}}, sort_keys=True, separators=(",", ":"))
    assert made["seal"] == hashlib.sha256(canonical.encode()).hexdigest()


def test_each_file_of_a_folder_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/one", "a"):
        (tmp_path / name).write_text(name)
    assert sha256_each(tmp_path) == {name: sha256(tmp_path / name) for name in ("a", "b/one")}
    lines = "".join(f"{name}\0{found}\n" for name, found in sha256_each(tmp_path).items())
    assert sha256_folder(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()
