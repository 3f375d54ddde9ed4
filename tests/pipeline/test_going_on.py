"""A profile whose device went away: what is kept, and what the same command takes from there."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console

from potstill.pipeline import profiling
from potstill.pipeline.cli import call
from potstill.pipeline.going_on import earlier_try
from potstill.pipeline.profiling import Wish, key_of, profile_package
from potstill.targets.device import BrokenOff, Kind
from potstill.targets.local import Local
from potstill.targets.request import read_package
from potstill.validate.errors import InputError, Unreachable
from tests.targets.conftest import write_package


def second(at_s: float, median_ms: float = 2.0) -> dict[str, Any]:
    return {"at_s": at_s, "runs": 9, "median_ms": median_ms, "p90_ms": median_ms}


REPLIES: dict[str, dict[str, Any]] = {}  # each is measured once, since an agent's start takes most of a second


def measured(request: Mapping[str, Any]) -> dict[str, Any]:
    key = json.dumps([len(request["models"]), *(request[name] for name in ("runs", "threads", "cores"))])
    if key not in REPLIES:
        REPLIES[key] = Local().ask(request)
    return deepcopy(REPLIES[key])


@dataclass
class Fleeting:
    """This machine as a device that goes away under load after some seconds; None: it stays."""

    lasts_s: int | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    where: str = "fleeting"
    kind: Kind = "measured"
    asked: list[str] = field(default_factory=list)

    def ask(self, request: Mapping[str, Any], *, timeout_s: float = 900) -> dict[str, Any]:
        if "sustained" not in request:
            self.asked.append(f"{request.get('runs')} runs")
            reply = measured(request)
            reply["machine"] |= self.machine
            return reply
        self.asked.append(f"{request['sustained']} s")
        if self.lasts_s is not None:
            lines = [json.dumps({"second": second(at + 1.0)}).encode() for at in range(self.lasts_s)]
            raise BrokenOff("fleeting went away", b"\n".join([*lines, b'{"second": {"at_']))
        reply = measured({**request, "sustained": 0})
        reply["models"][0]["seconds"] = [second(at + 1.0, 3.0) for at in range(request["sustained"])]
        return reply


Try = Callable[..., Fleeting]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_package(tmp_path / "package", width=8, layers=1)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Try:
    """Put a device in the place of every other."""

    def put(lasts_s: int | None = None, **more: Any) -> Fleeting:
        found = Fleeting(lasts_s, **more)
        monkeypatch.setattr(profiling, "open_device", lambda where, reach: found)
        return found

    return put


def kept(package: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((package.parent / "profiles").iterdir())]


WISH = Wish(runs=5, sustained_s=20)
SCREEN: dict[str, Any] = {"width": 200, "force_terminal": False}


def broken(package: Path, device: Try, lasts_s: int = 4, wish: Wish = WISH) -> dict[str, Any]:
    """What is kept of a try that broke off."""
    device(lasts_s)
    before = len(kept(package)) if (package.parent / "profiles").exists() else 0
    with pytest.raises(Unreachable, match="fleeting went away") as told:
        profile_package(package, wish, Console(quiet=True))
    assert told.value.exit_code == 4
    *_, last = kept(package)
    assert len(kept(package)) == before + 1
    return last


def test_a_series_that_broke_off_is_kept_and_not_joined(package: Path, device: Try) -> None:
    first = broken(package, device)
    (series,) = first["broken_off"]
    assert [one["at_s"] for one in series["seconds"]] == [1.0, 2.0, 3.0, 4.0]
    assert (series["broken_off"], series["drift"], series["throttles_at_s"]) == ("fleeting went away", None, None)
    assert (first["sustained"], first["unfinished"]) == (None, ["sustained"])
    again = device()
    console = Console(record=True, **SCREEN)
    found = profile_package(package, WISH, console)
    assert again.asked == ["1 runs", "20 s"]  # who it is, and the load from its start
    assert found.measurement.to_json() == first["measurement"]
    assert found.sustained
    assert {one.median_ms for one in found.sustained.seconds} == {3.0}
    (whole,) = kept(package)
    assert whole["measurement"] == first["measurement"]
    assert whole["broken_off"] == first["broken_off"]
    assert (len(whole["sustained"]["seconds"]), whole["unfinished"]) == (20, [])
    said = console.export_text()
    when = first["taken"].replace("T", " ").replace("+00:00", " UTC")
    assert f"goes on from the try of {when}: its measurement is taken from there; its load broke off after 4 s" in said


def test_a_finished_profile_is_made_anew(package: Path, device: Try) -> None:
    broken(package, device)
    device()
    profile_package(package, WISH, Console(quiet=True))
    again = device()
    profile_package(package, WISH, Console(quiet=True))
    assert again.asked == ["5 runs", "20 s"]
    assert len(kept(package)) == 2


def test_no_second_is_no_series(package: Path, device: Try) -> None:
    assert broken(package, device, lasts_s=0)["broken_off"] == []


def test_a_load_that_is_whole_is_not_made_anew(package: Path, device: Try) -> None:
    """As where the device goes away while it answers for the accuracy; the load's end is the file's last word here."""
    device()
    profile_package(package, WISH, Console(quiet=True))
    (file,) = (package.parent / "profiles").iterdir()
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"unfinished": ["accuracy"]}))
    again, console = device(), Console(record=True, **SCREEN)
    found = profile_package(package, WISH, console)
    assert again.asked == ["1 runs"]
    assert found.sustained
    assert found.sustained.to_json() == whole["sustained"]
    assert "and its 20 s under load from 20" in console.export_text()


@pytest.mark.parametrize("change", [{"name": "another"}, {"cpu": "another"}, {"cores": 77}])
def test_another_device_by_the_same_name_starts_anew(package: Path, device: Try, change: dict[str, Any]) -> None:
    broken(package, device)
    again, console = device(machine=change), Console(record=True, **SCREEN)
    found = profile_package(package, WISH, console)
    assert again.asked == ["1 runs", "5 runs", "20 s"]
    assert found.broken_off == []
    assert len(kept(package)) == 2
    assert "was on another machine, or with other versions there: all anew" in console.export_text()


@pytest.mark.parametrize(
    "wish",
    [
        replace(WISH, runs=6),
        replace(WISH, threads=2),
        replace(WISH, cores=(min(os.sched_getaffinity(0)),)),
        replace(WISH, throughput=(1,)),
        replace(WISH, sustained_s=21),
        replace(WISH, where="ssh://another"),
        replace(WISH, python="python4"),
    ],
)
def test_other_settings_start_anew(package: Path, device: Try, wish: Wish) -> None:
    broken(package, device)
    again = device()
    profile_package(package, wish, Console(quiet=True))
    assert again.asked[0] == f"{wish.runs} runs"
    assert len(kept(package)) == 2


def test_limits_alone_change_nothing(package: Path, device: Try) -> None:
    broken(package, device)
    again = device()
    found = profile_package(package, replace(WISH, timeout_s=7, budget=("size=9GB",)), Console(quiet=True))
    assert again.asked == ["1 runs", "20 s"]
    assert found.budget
    assert found.budget.passed


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_another_package_starts_anew(package: Path, device: Try, name: str) -> None:
    broken(package, device)
    other = write_package(package.parent / "other", width=8, layers=2, target="laptop-x86-avx2")
    shutil.copy(other / name, package / name)
    again = device()
    profile_package(package, WISH, Console(quiet=True))
    assert again.asked[0] == "5 runs"


def test_a_browser_that_comes_by_itself_starts_anew(package: Path, device: Try) -> None:
    wish = replace(WISH, where="browser", serve=True)
    broken(package, device, wish=wish)
    again = device()
    profile_package(package, wish, Console(quiet=True))
    assert again.asked == ["5 runs", "20 s"]


def test_a_device_that_is_still_away_changes_nothing(
    package: Path, device: Try, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = broken(package, device)
    away = device()
    monkeypatch.setattr(away, "ask", Mock(side_effect=Unreachable("fleeting is away")))
    with pytest.raises(Unreachable, match="fleeting is away"):
        profile_package(package, WISH, Console(quiet=True))
    assert kept(package) == [first]
    again = device()
    profile_package(package, WISH, Console(quiet=True))
    assert again.asked == ["1 runs", "20 s"]


def test_what_another_version_kept_is_left_alone(package: Path, device: Try) -> None:
    broken(package, device)
    folder = package.parent / "profiles"
    (file,) = folder.iterdir()
    opened = read_package(package)
    key = key_of(opened, WISH)
    assert earlier_try(folder, "package", key)
    assert earlier_try(folder, "package", key | {"potstill": "0.0"}) is None
    whole = json.loads(file.read_text())
    for damaged in ("", "[]", "{}", json.dumps(whole | {"measurement": {}}), json.dumps(whole | {"broken_off": [{}]})):
        file.write_text(damaged)
        assert earlier_try(folder, "package", key) is None


def test_the_command_says_where_it_is_kept(
    package: Path, device: Try, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["profile", str(package), "--runs", "5", "--sustained", "20s"]
    device(4)
    assert call(words) == 4
    said = capfd.readouterr()
    assert "kept so far: " in said.out
    assert "the same command goes on from there" in said.out
    assert "fleeting went away" in said.err
    device()
    assert call(words) == 0
    said = capfd.readouterr()
    assert "under load broken off after 4 s, from 20" in " ".join(said.out.split())
    assert "2.000 ms in the first 4 seconds, too short to tell drift and throttling" in " ".join(said.out.split())
    assert "under load for 20 s: 3.000 ms in the first ten seconds, +0.0% in the last ten" in said.out
    assert call(["report", str(package), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "broken off after 4 s: fleeting went away" in page
    assert page.count("<h2>Under load: package on fleeting</h2>") == 2


def test_a_time_limit_is_for_each_request(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    class Noting(Fleeting):
        def ask(self, request: Mapping[str, Any], *, timeout_s: float = 900) -> dict[str, Any]:
            limits.append(timeout_s)
            return super().ask(request, timeout_s=timeout_s)

    monkeypatch.setattr(profiling, "open_device", lambda where, reach: Noting())
    words = ["profile", str(package), "--runs", "5"]
    assert call([*words, "--sustained", "20s", "--timeout", "30min"]) == 0
    assert limits == [1800, 1820]
    assert call(words) == 0
    assert limits[2:] == [900]
    assert call(["profile", str(package), str(package), "--compare", "--runs", "5", "--timeout", "90s"]) == 0
    assert limits[3:] == [90]


@pytest.mark.parametrize(
    ("limit", "words"),
    [("0s", "--timeout is '0s', and no device answers in that"), ("30", "'30' is not a limit here")],
)
def test_a_time_limit_that_is_none(package: Path, limit: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(["profile", str(package), "--timeout", limit]) == 2
    assert words in capfd.readouterr().err


def test_a_time_limit_is_kept_here(package: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(["profile", str(package), "--runs", "1000000000", "--timeout", "2s"]) == 4
    said = capfd.readouterr().err
    assert "the agent did not finish within 2 s; give it less to do, or more time (profile --timeout)" in said
    with pytest.raises(InputError, match="5 s under load are asked for"):
        profile_package(package, Wish(sustained_s=5), Console(quiet=True))
