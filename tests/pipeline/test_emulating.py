"""Packages run by their target's arithmetic, in whole exports: what is kept, said, and judged of them."""

import json
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from potstill.pipeline import emulating
from potstill.pipeline.cli import call
from potstill.pipeline.emulating import sqnr_db
from potstill.targets.host import runs_here
from potstill.targets.qemu import ARM64_ROOT
from potstill.targets.target import load_target
from potstill.validate.predictor import LEAST

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

    def __init__(self, *_: Any, **__: Any) -> None:
        self.encode = lambda rows: rows

    def first(self, rows: Any, seconds: float) -> list[np.ndarray]:
        assert seconds == 2.0
        return [np.zeros((1, 4), np.float32)] * 2


class Broken(Slow):
    """One that gives no numbers."""

    def first(self, rows: Any, seconds: float) -> list[np.ndarray]:
        return [np.full((1, 4), np.nan, np.float32)] * len(rows["x"])


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
    monkeypatch.setattr(emulating, "EmulatedPredictor", Broken)
    assert "gave logits that are not finite as cortex-a53, on 120 of 120 rows" in told("2s", code=2)


def test_the_ratio_is_that_of_powers_in_decibels() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 4))
    assert sqnr_db(rows, rows) is None
    assert sqnr_db(rows, rows * 1.1) == pytest.approx(20)
    masked = np.pad(rows, ((0, 0), (0, 1)), constant_values=LEAST)
    assert sqnr_db(masked, np.pad(rows * 1.01, ((0, 0), (0, 1)), constant_values=LEAST)) == pytest.approx(40)
