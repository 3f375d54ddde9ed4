import json
import re
from pathlib import Path
from typing import Any

import pytest

from potstill.pipeline.cache import MARKER
from potstill.pipeline.cli import call
from potstill.pipeline.device_report import kept_at, write_device_report
from potstill.validate.errors import InputError

Profile = dict[str, Any]


def card(value: float) -> Profile:
    interval = {"low": value - 0.02, "high": value + 0.02}
    return {"metric": "accuracy", "value": value, "interval": interval, "agreement": 0.975}


def profile(package: str = "laptop", device: str = "local", **changes: Any) -> Profile:
    measurement = {
        "kind": "measured", "device": device, "where": {"cpu": "a CPU"}, "median_ms": 4.25, "p90_ms": 5.5,
        "noise": 0.031, "peak_memory_mb": 12.5, "file_mb": 3.75, "unattributed_share": 0.1,
        "nodes": [{"name": f"layer{n}", "operator": "Conv", "share": 0.03} for n in range(30)],
    }  # fmt: skip
    own = {key: changes.pop(key) for key in list(changes) if key in measurement}
    whole = {"format": "potstill-profile/1", "package": package, "model_sha256": "a", "measurement": measurement | own}
    return whole | {"sustained": None, "accuracy": None, "budget": None} | changes


def keep(run: Path, name: str, value: Profile) -> Path:
    (run / MARKER).parent.mkdir(exist_ok=True)
    (run / MARKER).write_text("{}")
    (run / "profiles").mkdir(exist_ok=True)
    file = run / "profiles" / f"{name}.json"
    file.write_text(json.dumps(value))
    return file


def page(run: Path) -> str:
    write_device_report([run], run / "page.html")
    return (run / "page.html").read_text()


def test_the_last_profile_of_a_package_on_a_device_stands(tmp_path: Path) -> None:
    run = tmp_path / "run"
    keep(run, "laptop-local-1", profile(median_ms=9.5, accuracy={"scorecard": card(0.87)}))
    keep(run, "laptop-local-2", profile(median_ms=4.25))
    keep(run, "laptop-pi-1", profile(device="ssh://pi"))
    assert write_device_report([run], run / "page.html") == (2, 0)
    text = page(run)
    assert "1 package on 2 devices." in text
    assert "4.250 ms" in text
    assert "9.500 ms" not in text
    assert "accuracy 87.0%" in text  # of the same file, from the earlier profile
    keep(run, "laptop-local-3", profile(model_sha256="another"))
    assert "accuracy 87.0%" not in page(run)


def test_an_emulated_time_is_no_latency(tmp_path: Path) -> None:
    run = tmp_path / "run"
    keep(run, "laptop-emulate-1", profile(device="emulate", kind="emulated", accuracy={"scorecard": card(0.5)}))
    text = page(run)
    assert "4.250 ms" not in text
    assert "accuracy 50.0%" in text
    assert "<h2>Latency, accuracy, size</h2>" not in text


def test_the_scorecard_of_the_package_where_there_is_none_of_the_device(tmp_path: Path) -> None:
    run = tmp_path / "run"
    keep(run, "laptop-local-1", profile())
    assert "not available" in page(run)
    package = run / "packages" / "laptop"
    package.mkdir(parents=True)
    (package / "manifest.json").write_text(json.dumps({"scorecard": card(0.9)}))
    text = page(run)
    assert "accuracy 90.0%" in text
    assert "where it was made" in text
    assert "<h2>Latency, accuracy, size</h2>" in text
    assert kept_at(package) == [run / "profiles" / "laptop-local-1.json"]


def test_a_task_without_one_class_has_no_agreement(tmp_path: Path) -> None:
    run = tmp_path / "run"
    keep(run, "laptop-local-1", profile(accuracy={"scorecard": card(0.8) | {"agreement": None}}))
    assert "<td>not available</td>" in page(run)


def test_nodes_beyond_the_largest_are_one_row(tmp_path: Path) -> None:
    run = tmp_path / "run"
    nodes = [{"name": f"layer{n}", "operator": "Conv", "share": 0.03 + n / 1000} for n in range(30)]
    keep(run, "laptop-local-1", profile(nodes=nodes))
    text = page(run)
    assert "6 other nodes" in text
    assert "Conv  layer29" in text
    assert "Conv  layer5 " not in text
    label = re.search(r'aria-label="time by node: ([^"]+)"', text)
    assert label
    shares = [float(share) for share in re.findall(r"([\d.]+)%", label[1])]
    assert sum(shares) == pytest.approx(100 * sum(one["share"] for one in nodes), abs=2)


def test_under_load_is_drawn(tmp_path: Path) -> None:
    seconds = [{"at_s": n + 1.0, "median_ms": 2.0 if n < 20 else 3.0} for n in range(30)]
    load = {"package": "laptop", "device": "local", "start_ms": 2.0, "broken_off": None}
    whole = load | {"seconds": seconds, "drift": 0.5, "throttles_at_s": 21.0}
    half = load | {"seconds": seconds[:4], "drift": None, "throttles_at_s": None, "broken_off": "it went away"}
    found = profile(sustained=whole, broken_off=[half], budget={"outcome": "fail"})
    keep(tmp_path / "run", "laptop-local-1", found)
    text = page(tmp_path / "run")
    assert "+50.0% in the last ten seconds against the first ten; throttles from 21 s on" in text
    assert 'latency under load: 2.000 ms in the first second, 3.000 ms in the last"' in text
    assert 'latency under load: 2.000 ms in the first second, 2.000 ms in the last, broken off after 4 s"' in text
    assert "broken off after 4 s: it went away; median of each second; too short to tell drift and throttling" in text
    assert text.count("<h2>Under load: laptop on local</h2>") == 2
    assert "<td>fail</td>" in text


def test_what_is_no_profile(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    for text in ("", "{}", '{"format": "other/1"}'):
        file = keep(run, "laptop-local-1", {})
        file.write_text(text)
        with pytest.raises(InputError, match=r"laptop-local-1.json is no profile that potstill kept"):
            write_device_report([run], run / "page.html")
    file.unlink()
    assert call(["report", str(run), "--out", str(run / "page.html")]) == 2
    assert "no profiles are kept at" in capfd.readouterr().err
    assert not (run / "page.html").exists()
    keep(run, "laptop-local-1", profile())
    assert call(["report", str(run), "--out", str(run / "page.html")]) == 0
    assert "1 profile on one page" in capfd.readouterr().out


def turns(*packages: str, device: str = "local", ratio: float = 1.25, **changes: Any) -> Profile:
    rows = [
        {"package": name, "median_ms": 4.0 + i, "ratio": 1 + i * (ratio - 1), "ratio_low": 0.9 + i * (ratio - 1),
         "ratio_high": 1.1 + i * (ratio - 1)} for i, name in enumerate(packages)
    ]  # fmt: skip
    comparison = {"kind": "measured", "device": device, "where": {"cpu": "a CPU"}, "threads": 1, "runs": 30}
    own = {"packages": rows} | changes
    return {"format": "potstill-comparison/1", "model_sha256": dict.fromkeys(packages, "a")} | {
        "comparison": comparison | own
    }


def test_packages_in_turns_are_drawn_the_last_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    keep(run, "in-turns-local-1", turns("laptop", "phone", ratio=1.5))
    keep(run, "in-turns-local-2", turns("phone", "laptop", ratio=1.25))
    keep(run, "in-turns-pi-1", turns("laptop", "phone", device="ssh://pi", ratio=1.75))
    assert write_device_report([run], run / "page.html") == (0, 2)
    text = page(run)
    assert "Packages in turns." in text
    assert "In turns: ssh://pi" in text
    assert "time over that of phone: phone 1.000; laptop 1.250" in text
    assert "laptop 1.000; phone 1.750" in text
    assert "1.500" not in text
    assert "measured on local (a CPU): 30 rounds, 1 thread; time over that of phone" in text
    assert "<h2>Profiles</h2>" not in text
    keep(run, "laptop-local-3", profile())
    assert write_device_report([run], run / "page.html") == (1, 2)
    assert "1 package on 1 device." in page(run)


def test_a_comparison_is_kept_of_each_of_its_packages(tmp_path: Path) -> None:
    run = tmp_path / "run"
    file = keep(run, "in-turns-local-1", turns("laptop", "phone", "browser", ratio_low=None))
    for name in ("laptop", "phone", "other"):
        (run / "packages" / name).mkdir(parents=True)
    assert [kept_at(run / "packages" / name) for name in ("laptop", "phone", "other")] == [[file], [file], []]


def test_profiles_beside_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "a-local-1.json").write_text(json.dumps(profile("a")))
    (tmp_path / "profiles" / "in-turns-local-2.json").write_text(json.dumps(turns("a", "b")))
    monkeypatch.chdir(tmp_path)
    assert call(["report", "."]) == 0
    assert "1 profile and 1 comparison on one page: profiles.html" in capfd.readouterr().out
    assert kept_at(tmp_path / "b") == [tmp_path / "profiles" / "in-turns-local-2.json"]
    for torn in ("", '{"format": "potstill-comp', '["a"]', '{"format": "potstill-profile/2"}'):
        (tmp_path / "profiles" / "a-local-3.json").write_text(torn)
        assert call(["report", "."]) == 2
        assert "a-local-3.json is no profile that potstill kept; expected format" in capfd.readouterr().err
