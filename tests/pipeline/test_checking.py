"""`potstill check` and `potstill targets --here`, by the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from potstill.pipeline.cli import call
from potstill.targets import host
from potstill.targets.host import Host
from potstill.targets.target import load_target, target_names
from potstill.validate.files import write_json

Capture = pytest.CaptureFixture[str]
KIOSK = "id: kiosk\ntitle: our kiosk\nextends: phone-iphone\nmodel: {max_fallback: 0%, max_file_mb: 1}\n"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package for phone-iphone, x (1, 8) to y (1, 4): a product, and a Sign that Core ML does not take."""
    folder, x = tmp_path / "package", np.ones((1, 8), dtype=np.float32)
    (folder / "golden").mkdir(parents=True)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("Sign", ["a"], ["y"], name="odd"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 8), ("y", 4))]
    weight = numpy_helper.from_array(np.ones((8, 4), dtype=np.float32), "w")
    body = helper.make_graph(nodes, "made", ends[:1], ends[1:], [weight])
    onnx.save(
        helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx"
    )
    (folder / "golden" / "x.bin").write_bytes(x.tobytes())
    sample = {"inputs": {"x": {"file": "x.bin", "dtype": "float32", "shape": [1, 8]}}, "outputs": {}}
    write_json(folder / "golden" / "golden.json", {"format": "potstill-golden/1", "samples": [sample]})
    write_json(folder / "manifest.json", {"target": load_target("phone-iphone").model_dump(mode="json")})
    return folder


def test_what_is_known_is_printed_and_a_package_without_faults_passes(package: Path, capsys: Capture) -> None:
    assert call(["check", str(package)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "on phone-iphone, estimated: no device was asked" in out
    assert "50.0% of the nodes and 0.0% of the multiply-adds leave" in out
    assert "leaves: 1 Sign: not in the list of operators" in out


def test_a_limit_that_is_broken_is_a_failed_gate(package: Path, capsys: Capture) -> None:
    assert call(["check", str(package), "--max-fallback", "50%"]) == 0
    capsys.readouterr()
    assert call(["check", str(package), "--max-fallback", "0%"]) == 3
    error = " ".join(capsys.readouterr().err.split())
    assert f"{package} is not for phone-iphone as it is: fallback: estimated: 50.0% of the nodes" in error
    assert "limit 0%; they are odd (not in the list of operators); choose a format or operators" in error


def test_a_target_of_ones_own(package: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "kiosk.yaml").write_text(KIOSK)
    assert call(["check", str(package), "--target", str(tmp_path / "kiosk.yaml"), "--json"]) == 3
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["target"], found["kind"]) == ("kiosk", "estimated")
    assert {one["what"]: one["outcome"] for one in found["findings"]} == {
        "size": "holds",
        "opset": "holds",
        "shapes": "holds",
        "types": "holds",
        "operators": "holds",
        "fallback": "broken",
    }
    assert found["coverage"]["left"] == [{"name": "odd", "operator": "Sign", "reason": "not in the list of operators"}]
    assert "is not for kiosk as it is" in captured.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--max-fallback", "0"], "--max-fallback: '0' is not a limit here; write a number from 0 on with its unit"),
        (["--max-fallback", "101%"], "--max-fallback: '101%' is more than all"),
        (["--target", "toaster"], "no target named 'toaster'"),
    ],
)
def test_wrong_use(words: list[str], told: str, package: Path, capsys: Capture) -> None:
    assert call(["check", str(package), *words]) == 2
    assert told in capsys.readouterr().err


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let this machine be another one."""

    def be(arch: str, *isa: str) -> None:
        def pretended() -> Host:
            return Host("Linux", arch, isa, "a pretended CPU", 2)

        monkeypatch.setattr(host, "here", pretended)
        monkeypatch.setattr("potstill.pipeline.tell.here", pretended)

    return be


def test_the_targets_of_this_machine(machine: Callable[..., None], capsys: Capture) -> None:
    machine("x86_64", "avx2", "avx_vnni")
    assert call(["targets", "--here", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["best"], found["machine"]["isa"]) == ("laptop-x86-avx-vnni", ["avx2", "avx_vnni"])
    assert {one["id"] for one in found["targets"]} == set(target_names())
    assert [one["id"] for one in found["targets"] if one["fits"]] == ["laptop-x86-avx-vnni", "laptop-x86-vnni"]
    assert call(["targets", "--here"]) == 0
    out = capsys.readouterr().out
    assert "a pretended CPU" in out
    assert out.index("laptop-x86-avx-vnni") < out.index("laptop-x86-vnni") < out.index("laptop-x86-avx2")


def test_a_machine_that_no_target_is_for(machine: Callable[..., None], capsys: Capture) -> None:
    machine("riscv64")
    assert call(["targets", "--here", "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["best"] is None
    told = f"none of {len(target_names())} targets fits this machine; write one of your own (docs/targets.md)"
    assert told in " ".join(captured.err.split())
    assert call(["targets", "phone-arm64", "--here"]) == 2
    assert "phone-arm64 is for arm64 and this machine is riscv64" in " ".join(capsys.readouterr().err.split())
