"""Packages run by their target's arithmetic, in whole exports: what is kept, said, and judged of them."""

import json
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from potstill.export.checked import Emulated
from potstill.pipeline import emulating
from potstill.pipeline.cli import call
from potstill.pipeline.emulating import sqnr_db
from potstill.pipeline.on_device import answers_as_here
from potstill.targets.host import runs_here
from potstill.targets.qemu import ARM64_ROOT, Crashed
from potstill.targets.target import load_target
from potstill.validate.predictor import LEAST
from potstill.validate.scorecard import Scorecard, paired

ELSEWHERE = pytest.mark.skipif(
    not shutil.which("qemu-x86_64") or platform.machine() != "x86_64" or runs_here(load_target("laptop-x86-avx2"))[0],
    reason="needs qemu-x86_64 and an x86_64 machine with VNNI",
)
FACTORY = '''
import torch
from torch import nn

def net():
    """Bright pictures (B, 8, 6, 6) to logits (B, 4) of large sums that are nearly equal."""
    torch.manual_seed(0)
    core = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))
    with torch.no_grad():
        for layer in (core[0], core[3]):
            layer.weight.uniform_(0.7, 1.0)
            layer.bias.zero_()
        core[3].weight -= core[3].weight.mean(0)
    return core
'''
PROFILE = """
id: careless
title: AVX2 with the number formats of a CPU with VNNI
extends: laptop-x86-avx2
quantize:
  convolution: {reduce_range: false, why: to overflow}
sources: {}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A net, its data, and a target whose number formats its CPU cannot compute."""
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "bright_net.py").write_text(FACTORY)
    (folder / "careless.yaml").write_text(PROFILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import bright_net  # type: ignore[import-not-found]

        model = bright_net.net().eval()
        random = np.random.default_rng(0)
        x = random.uniform(0.5, 1, size=(320, 8, 6, 6)).astype(np.float32)
        with torch.inference_mode():
            model[3].bias -= model(torch.from_numpy(x)).mean(0)
            y = model(torch.from_numpy(x)).argmax(1).numpy()
        save_file(model.state_dict(), folder / "net.safetensors")
        np.savez(folder / "calibrate.npz", x=x[:200], y=y[:200])
        np.savez(folder / "eval.npz", x=x[200:], y=y[200:])
        yield folder


def export(folder: Path, out: str, *more: str) -> int:
    words = ["export", "bright_net:net", "--weights", str(folder / "net.safetensors"), "--out", str(folder / out)]
    words += ["--calibrate", str(folder / "calibrate.npz"), "--eval", str(folder / "eval.npz"), "--search-time", "0"]
    return call([*words, *more])


def manifest(folder: Path, out: str, target: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / out / "packages" / target / "manifest.json").read_text())
    return found


@ELSEWHERE
def test_a_file_that_overflows_on_its_target_fails_the_gate(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = ["--target", str(folder / "careless.yaml"), "--target", "laptop-x86-avx2"]
    assert export(folder, "out", *targets, "--max-drop", "20pp", "--json") == 3
    said = " ".join(capsys.readouterr().err.split())
    careless, careful = (manifest(folder, "out", name) for name in ("careless", "laptop-x86-avx2"))
    native = careless["verdict"]["checks"][0]
    assert (native["limit"], native["passed"]) == ("max_drop", True)
    assert [check["limit"] for check in careless["verdict"]["checks"] if not check["passed"]] == ["emulated max_drop"]
    assert "as Haswell, 120 of 120 examples emulated: accuracy" in careless["verdict"]["reason"]
    assert careless["checked"]["emulated"]["sqnr_db"] < 30
    assert "this file computes otherwise on its target" in said
    warnings = json.loads((folder / "out" / "ledger.json").read_text())["warnings"]
    found = [one for one in warnings if "this file computes otherwise on its target" in one]
    assert [one.partition(":")[0] for one in found] == ["careless"]
    assert careful["checked"]["where"] == "emulated"
    assert careful["checked"]["emulated"]["sqnr_db"] is None
    assert [check["limit"] for check in careful["verdict"]["checks"]] == ["max_drop"]
    assert "the same outputs as here" in (folder / "out/packages/laptop-x86-avx2/README.md").read_text()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("emulated again")

    monkeypatch.setattr(emulating, "EmulatedPredictor", never)
    assert export(folder, "out", *targets, "--max-drop", "99pp") == 0  # another gate asks what was kept


class Slow:
    """An emulator that runs two examples in the time."""

    name, chip, emulator = "the phone-arm64 package", "cortex-a53", "qemu-aarch64"

    def __init__(self, *_: Any, **__: Any) -> None:
        self.encode = lambda rows: rows

    def first(self, rows: Any, seconds: float) -> list[np.ndarray]:
        assert seconds == 2.0
        return [np.zeros((1, 4), np.float32)] * 2


class Crashing(Slow):
    """One whose CPU cannot run the file."""

    def first(self, rows: Any, seconds: float) -> list[np.ndarray]:
        raise Crashed("the package crashed as cortex-a53: the agent was ended by signal 4")


class Broken(Slow):
    """One that gives no numbers."""

    def first(self, rows: Any, seconds: float) -> list[np.ndarray]:
        return [np.full((1, 4), np.nan, np.float32)] * len(rows["x"])


def check_crash(out: Path, said: str) -> None:
    """A crash is a finding of its own, on the terminal, in the manifest, the ledger, the card and the report."""
    found = (
        "By its target's arithmetic it does not run: the package crashed as cortex-a53: the agent was ended by signal "
        "4; run its golden samples on a device, whose CPU may have what its emulator lacks."
    )
    assert said.count(found) == 2  # when it is met, and among the warnings
    assert "It was not checked" not in said
    checked = manifest(out.parent, out.name, "phone-arm64")["checked"]
    assert (checked["where"], checked["emulated"]) == ("crashed", None)
    assert checked["note"].endswith(found)
    ledger = json.loads((out / "ledger.json").read_text())
    assert f"phone-arm64: {checked['note']}" in ledger["warnings"]
    assert [entry["findings"] for entry in ledger["entries"]] == [[], [checked["note"]]]
    for file, times in (("packages/phone-arm64/README.md", 1), ("report.html", 2)):  # its section, and the open points
        assert (out / file).read_text().count("ended by signal 4") == times


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine computes as the target")
def test_where_it_is_not_checked_it_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ARM64_ROOT, raising=False)

    def told(time: str, code: int = 0) -> str:
        assert export(folder, "plain", "--target", "phone-arm64", "--emulate-time", time) == code
        said = capsys.readouterr()
        return " ".join((said.out + said.err).split())

    unchecked = "It was not checked by its target's arithmetic: "
    assert f"{unchecked}the time for it is 0 (`emulate: {{time: 10s}}`)." in told("0")
    assert f"{unchecked}qemu-aarch64 " in told("2s")
    checked = manifest(folder, "plain", "phone-arm64")["checked"]
    assert (checked["where"], checked["emulated"]) == ("not checked", None)
    assert f"{unchecked}qemu-aarch64 " in checked["note"]
    for file in ("packages/phone-arm64/README.md", "report.html"):
        assert "arithmetic: qemu-aarch64 " in (folder / "plain" / file).read_text()
    monkeypatch.setattr(emulating, "EmulatedPredictor", Slow)
    assert f"{unchecked}only 2 examples ran in 2 s, and 5 are the fewest; give it more time" in told("2s")
    monkeypatch.setattr(emulating, "EmulatedPredictor", Crashing)
    check_crash(folder / "plain", told("2s"))
    monkeypatch.setattr(emulating, "EmulatedPredictor", Broken)
    assert "gave logits that are not finite as cortex-a53, on 120 of 120 rows" in told("2s", code=2)


def test_the_ratio_is_that_of_powers_in_decibels() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 4))
    assert sqnr_db(rows, rows) is None
    assert sqnr_db(rows, rows * 1.1) == pytest.approx(20)
    masked = np.pad(rows, ((0, 0), (0, 1)), constant_values=LEAST)
    assert sqnr_db(masked, np.pad(rows * 1.01, ((0, 0), (0, 1)), constant_values=LEAST)) == pytest.approx(40)


@ELSEWHERE
def test_a_file_made_for_vnni_is_caught_as_avx2_and_the_one_for_avx2_passes(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    targets = ["--target", "laptop-x86-vnni", "--target", "laptop-x86-avx2"]
    assert export(folder, "trap", *targets, "--emulate-time", "0") == 0
    trap, careful = (folder / "trap/packages" / name for name in targets[1::2])
    capfd.readouterr()
    words = ["--accuracy", "--runs", "1", "--json"]
    assert call(["profile", str(trap), "--on", "emulate://laptop-x86-avx2", *words]) == 3
    said = capfd.readouterr()
    assert "saturation: 2 of its 2 int8 products have weights of all 8 bits" in said.err
    assert "export for it (`--target laptop-x86-avx2`)" in said.err
    found = json.loads(said.out)["accuracy"]
    (check,) = found["verdict"]["checks"]
    assert (check["limit"], check["outcome"], check["passed"]) == ("emulated answers", "fail", False)
    assert found["emulated"]["sqnr_db"] < found["emulated"]["least_db"] == 30
    assert found["emulated"]["apart"]["agreement"] < 1
    assert call(["profile", str(careful), "--on", "emulate", *words]) == 0
    found = json.loads(capfd.readouterr().out)["accuracy"]
    assert found["verdict"]["passed"]
    assert found["emulated"]["apart"]["agreement"] == 1
    assert "on 120 examples: 100.00% of the answers are those of the same file here" in found["verdict"]["reason"]


@pytest.mark.slow
@ELSEWHERE
def test_a_target_whose_own_scheme_overflows_is_told_what_to_change(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert export(folder, "own", "--target", str(folder / "careless.yaml"), "--emulate-time", "0") == 0
    place = str(folder / "own/packages/careless")
    assert call(["profile", place, "--on", f"emulate://{folder / 'careless.yaml'}", "--accuracy", "--runs", "1"]) == 3
    assert "give this target's scheme `reduce_range: true` or `weight: uint8`" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("db", "lost", "outcome", "words"),
    [
        (None, 0, "pass", "as Haswell, on 100 examples: the same outputs as here; pearson 0"),
        (41.0, 1, "pass", "99.00% of the answers .* 41 dB above their differences .30 dB or more is rounding.; acc"),
        (
            29.0,
            1,
            "fail",
            "29 dB above their differences .* points .−.*: why is not known; judge it on the device itself",
        ),
        (
            None,
            20,
            "fail",
            "80.00% of the answers are those of the same file here, the same .* −20.0 points .* not known",
        ),
    ],
)
def test_answers_within_rounding_pass_and_others_say_what_is_known(
    db: float | None, lost: int, outcome: str, words: str, tmp_path: Path
) -> None:
    """A file in float has nothing to overflow."""
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "nothing", [x], [y])), tmp_path / "model.onnx")
    right = paired(np.arange(100) >= lost, np.ones(100, bool))
    card = Scorecard("accuracy", data="made up", agreement=1 - lost / 100, **right)
    if not lost:  # of a task whose answers are numbers
        card = replace(card, metric="pearson", agreement=None)
    found = Emulated("Haswell", "qemu-x86_64", 100, 100, card, card, db, 30.0, 1.0)
    avx2 = load_target("laptop-x86-avx2")
    check = answers_as_here(found, tmp_path / "model.onnx", avx2, avx2)
    assert (check.outcome, check.passed) == (outcome, outcome == "pass")
    assert re.search(words, check.reason), check.reason
