"""Profiles by the command line: what is measured, judged on the device, and kept."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from potstill.pipeline import on_device, profiling
from potstill.pipeline.cli import call
from potstill.pipeline.on_device import judge_on
from potstill.pipeline.profiling import FORMAT, Wish, profile_package
from potstill.targets.device import Kind
from potstill.targets.local import Local
from potstill.targets.profile import profile
from potstill.validate.errors import InputError, Unreachable


@pytest.fixture(scope="module")
def packages(text_teacher: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of a run: two targets, no training."""
    out = tmp_path_factory.mktemp("profiling") / "out"
    words = ["export", text_teacher, "--target", "laptop-x86-vnni", "--target", "laptop-x86-avx2", "--calibrate"]
    words += [texts["calibrate"], "--eval", texts["eval"], "--columns", "text=sentence", "--max-drop", "50pp"]
    assert call([str(word) for word in [*words, "--emulate-time", "0", "--out", out]]) == 0
    return out / "packages"


def kept(packages: Path) -> list[dict[str, Any]]:
    """The profiles that were kept; comparisons lie beside them."""
    found = [json.loads(file.read_text()) for file in sorted((packages.parent / "profiles").iterdir())]
    return [one for one in found if one["format"] == FORMAT]


@dataclass
class Weak:
    """This machine as a device that goes away after some answers, and counts them."""

    lasts: int
    answers: int = 0
    measured: int = 0
    where: str = "weak"
    kind: Kind = "measured"
    there: Local = field(default_factory=Local)

    def ask(self, request: Mapping[str, Any], *, timeout_s: float = 900) -> dict[str, Any]:
        if "answer" in request:
            if self.answers == self.lasts:
                raise Unreachable("weak went away")
            self.answers += 1
            assert timeout_s == 77
        else:
            self.measured += request.get("runs", 0)
        return self.there.ask(request, timeout_s=timeout_s)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "BATCH", 16)


def test_the_accuracy_there_is_that_here(packages: Path) -> None:
    package = packages / "laptop-x86-vnni"
    found = profile_package(package, Wish(runs=5, accuracy=True), Console(quiet=True))
    ledger = json.loads((packages.parent / "ledger.json").read_text())
    (entry,) = [one for one in ledger["entries"] if one["name"] == "laptop-x86-vnni"]
    assert found.there
    assert found.there.judged.scorecard.value == entry["scorecard"]["value"]
    assert found.there.judged.step
    assert found.there.judged.step.agreement == 1.0
    assert found.there.verdict
    assert found.there.verdict.passed
    assert found.failed() is None
    assert found.file
    assert json.loads(found.file.read_text())["accuracy"]["scorecard"]["value"] == entry["scorecard"]["value"]


def test_a_device_that_went_away_goes_on_where_it_was(packages: Path, texts: dict[str, Path]) -> None:
    package = packages / "laptop-x86-avx2"
    weak = Weak(lasts=2)
    measurement = profile(package, device=weak, runs=5)
    with pytest.raises(Unreachable, match="weak went away"):
        judge_on(package, weak, measurement, Console(quiet=True), timeout_s=77)
    again = Weak(lasts=1000)
    found = judge_on(package, again, measurement, Console(quiet=True), timeout_s=77)
    batches = -(-found.judged.scorecard.examples // 16)
    assert batches > 3
    assert again.answers == batches - 2
    whole = judge_on(package, Weak(lasts=1000, where="another"), measurement, Console(quiet=True), timeout_s=77)
    assert whole.judged.scorecard == found.judged.scorecard
    assert not list((packages.parent / "stages").glob(".work-answers-*"))


def test_what_was_measured_is_kept_when_the_device_goes_away(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "open_device", lambda where, reach: Weak(lasts=0, where="fleeting"))
    with pytest.raises(Unreachable):
        profile_package(packages / "laptop-x86-vnni", Wish(runs=5, accuracy=True), Console(quiet=True))
    (found,) = [one for one in kept(packages) if one["measurement"]["device"] == "fleeting"]
    assert found["measurement"]["runs"] == 5
    assert found["accuracy"] is None


def test_the_same_command_goes_on_where_the_device_went_away(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, wish = packages / "laptop-x86-vnni", Wish(runs=5, accuracy=True, timeout_s=77)
    weak, again = (Weak(lasts, where="returning") for lasts in (2, 1000))
    monkeypatch.setattr(profiling, "open_device", lambda where, reach: weak)
    with pytest.raises(Unreachable):
        profile_package(package, wish, Console(quiet=True))
    (first,) = [one for one in kept(packages) if one["measurement"]["device"] == "returning"]
    assert first["unfinished"] == ["accuracy"]
    monkeypatch.setattr(profiling, "open_device", lambda where, reach: again)
    console = Console(record=True, width=200, force_terminal=False)
    found = profile_package(package, wish, console)
    (whole,) = [one for one in kept(packages) if one["measurement"]["device"] == "returning"]
    assert whole["measurement"] == first["measurement"]
    assert (whole["unfinished"], again.measured) == ([], 1)
    assert found.there
    assert again.answers == -(-found.there.judged.scorecard.examples // 16) - 2
    said = console.export_text()
    assert "its measurement is taken from there" in said
    assert "32 answers of laptop-x86-vnni on returning are kept from 20" in said


def test_a_missed_budget_ends_with_3(packages: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["profile", str(packages / "laptop-x86-vnni"), "--runs", "5", "--budget", "size=1kB"]
    assert call([*words, "--budget", "latency_p90=9s"]) == 3
    said = capfd.readouterr()
    assert "budget: fail" in said.out
    assert "budget: pass" in said.out
    assert "size" in said.err
    assert "0.001 MB allowed" in said.err
    assert call(["profile", str(packages / "laptop-x86-vnni"), "--runs", "5", "--budget", "latency_p90=9s"]) == 0


def test_packages_in_turns(packages: Path, capfd: pytest.CaptureFixture[str]) -> None:
    both = [str(packages / "laptop-x86-vnni"), str(packages / "laptop-x86-avx2")]
    assert call(["profile", *both, "--compare", "--runs", "10", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [one["package"] for one in found["packages"]] == ["laptop-x86-vnni", "laptop-x86-avx2"]
    assert (found["kind"], found["runs"], found["packages"][0]["ratio"]) == ("measured", 10, 1)
    assert call(["profile", "--compare", *both, "--runs", "10"]) == 0
    assert "above 1" in capfd.readouterr().out


def test_a_package_outside_of_a_run(packages: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(packages / "laptop-x86-vnni", alone / "app")
    found = profile_package(alone / "app", Wish(runs=5), Console(quiet=True))
    assert found.file
    assert found.file.parent == alone / "profiles"
    with pytest.raises(InputError, match="does not lie in the folder of a run.*or leave out --accuracy"):
        profile_package(alone / "app", Wish(runs=5, accuracy=True), Console(quiet=True))
    with pytest.raises(InputError, match="does not lie in the folder of a run.*give RUN/packages/NAME"):
        judge_on(alone / "app", Local(), found.measurement, Console(quiet=True))


def test_a_package_that_the_recipe_does_not_make(packages: Path) -> None:
    shutil.copytree(packages / "laptop-x86-vnni", packages / "another")
    try:
        with pytest.raises(InputError, match="is no package of .*'s recipe, which makes laptop-x86-vnni, "):
            profile_package(packages / "another", Wish(runs=5, accuracy=True), Console(quiet=True))
    finally:
        shutil.rmtree(packages / "another")


def test_a_group_without_a_verb_is_its_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert call(["devices"]) == 2
    said = capfd.readouterr()
    assert "clean" in said.out + said.err
    assert "potstill: \n" not in said.err


def test_a_run_that_would_be_made_anew(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(packages.parent, out)
    for folder in (out / "stages").glob("predicted-*"):
        shutil.rmtree(folder)
    with pytest.raises(InputError, match="0-teacher.*would have to be made anew.*run its recipe again first"):
        profile_package(out / "packages" / "laptop-x86-vnni", Wish(runs=5, accuracy=True), Console(quiet=True))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cores", "a"], "--cores is 'a', expected numbers with commas, like 0,1"),
        (["--throughput", "1;2"], "--throughput is '1;2', expected numbers"),
        (["--sustained", "2"], "'2' is not a limit here"),
        (["--sustained", "5s"], "5 s under load are asked for, expected 20 s or more"),
        (["--on", "moon"], "no device is called 'moon'"),
        (["--compare"], "1 package given, expected two or more to compare"),
        (["--compare", "--accuracy"], "--compare only takes times in turns"),
    ],
)
def test_wrong_use(packages: Path, words: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(["profile", str(packages / "laptop-x86-vnni"), *words]) == 2
    assert said in capfd.readouterr().err


def test_a_profile_loads_no_torch() -> None:
    """It would take most of the seconds that a short profile takes."""
    code = "import sys, potstill.pipeline.profiling, potstill.pipeline.tell_profile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_several_packages_want_compare(packages: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.chdir(packages):
        assert call(["profile", "laptop-x86-vnni", "laptop-x86-avx2"]) == 2
    assert "2 packages given; give one, or --compare" in capfd.readouterr().err


@pytest.mark.slow
def test_under_load(packages: Path, capfd: pytest.CaptureFixture[str]) -> None:
    package = str(packages / "laptop-x86-vnni")
    assert call(["profile", package, "--runs", "5", "--sustained", "20s", "--throughput", "1"]) == 0
    said = capfd.readouterr().out
    for word in ("under load for 20 s", "in the first ten seconds", "throttl", "runs a second", "temperature"):
        assert word in said
    (found,) = [one for one in kept(packages) if one["sustained"]]
    seconds = found["sustained"]["seconds"]
    assert [round(one["at_s"]) for one in seconds] == list(range(1, 21))
    assert all(one["runs"] > 10 and one["median_ms"] <= one["p90_ms"] for one in seconds)
