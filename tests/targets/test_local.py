import ast
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from potstill.targets.device import with_names
from potstill.targets.local import AGENT, Local
from potstill.targets.profile import compare, profile
from potstill.targets.request import read_package
from potstill.targets.target import target_names
from potstill.validate.errors import InputError, PotstillError, Unreachable

MakePackage = Callable[..., Path]


def soon_between(low: float, ratio: Callable[[], float], high: float, tries: int = 5) -> None:
    """A ratio of times is measured until it lies between two bounds: neighbours on a shared machine slow one side."""
    found = []
    for _ in range(tries):
        found.append(ratio())
        if low < found[-1] < high:
            return
    pytest.fail(f"ratios of {found}, expected one between {low} and {high}")


def bare_median_ms(package: Path, runs: int = 200) -> float:
    """The reference: onnxruntime in a loop, no code of ours."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(package / "model.onnx", options, providers=["CPUExecutionProvider"])
    width = session.get_inputs()[0].shape[1]
    feed = {"x0": np.ones((8, width), np.float32)}
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        session.run(None, feed)
        times.append((time.perf_counter() - begin) * 1e3)
    return float(np.median(times))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.timing
def test_profile_measures_what_onnxruntime_does(make_package: MakePackage) -> None:
    package = make_package(width=512)
    soon_between(0.5, lambda: profile(package, runs=200).median_ms / bare_median_ms(package), 2)


def test_a_profile_says_of_what_it_is(make_package: MakePackage) -> None:
    found = profile(make_package(width=512), runs=200)
    assert found.kind == "measured"
    assert found.min_ms <= found.median_ms <= found.p90_ms
    assert (found.runs, found.warmup, found.threads, len(found.times_ms)) == (200, 10, 1, 200)
    assert found.load_ms > 0
    assert found.first_run_ms > 0
    assert found.where.cores >= 1
    assert found.inputs == {"x0": "float32 8×512"}
    assert found.file_mb == pytest.approx(4 * 512 * 512 * 4 / 1e6, rel=0.01)
    assert found.versions["onnxruntime"] == ort.__version__


@pytest.mark.timing
def test_profile_says_where_the_time_goes(make_package: MakePackage) -> None:
    found = profile(make_package(width=512, layers=3, rows=(64,)), runs=20)
    assert found.provider_nodes == {"CPUExecutionProvider": 6}
    assert found.providers == ["CPUExecutionProvider"]
    assert found.missing_providers == []
    assert {row.operator: row.count for row in found.operators} == {"MatMul": 3, "Tanh": 3}
    assert found.operators[0].operator == "MatMul"
    assert found.operators[0].share > 0.5
    assert found.unattributed_share is not None
    assert sum(row.share for row in found.operators) + found.unattributed_share == pytest.approx(1)


def test_profile_says_which_nodes_and_what_memory(make_package: MakePackage) -> None:
    found = profile(make_package(width=512, layers=3, rows=(1000,)), runs=20)
    assert [node.name for node in found.nodes] == [f"{kind}{n}" for n in range(3) for kind in ("matmul", "tanh")]
    assert sum(node.share for node in found.nodes) == pytest.approx(sum(row.share for row in found.operators))
    assert found.weights_mb == pytest.approx(3 * 512 * 512 * 4 / 1e6, rel=0.001)
    assert found.activations_mb is not None
    assert 2.048 <= found.activations_mb <= 3 * 2.048 + 0.1  # 1000 × 512 floats, two or three of them at a time
    assert found.p90_ms <= found.p99_ms <= max(found.times_ms)
    assert found.noise is None


@pytest.mark.timing
def test_throughput_is_as_many_runs_as_fit_into_a_second(make_package: MakePackage) -> None:
    def ratio() -> float:
        found = profile(package, runs=60, throughput=[1])
        assert found.throughput.keys() == {1}
        return found.throughput[1] * found.median_ms / 1e3

    package = make_package(width=256)
    soon_between(0.3, ratio, 1.5)


def test_the_noise_and_the_sensors(make_package: MakePackage) -> None:
    found = profile(make_package(width=256), runs=60)
    assert found.noise is not None
    assert found.sensors.keys() == {"before", "after"}
    for said in found.sensors.values():
        assert said.keys() == {"temperature_c", "governor"}
    assert found.energy_mj is None or found.energy_mj > 0


def test_a_profile_keeps_to_its_cores(make_package: MakePackage) -> None:
    package, core = make_package(layers=1), min(os.sched_getaffinity(0))
    profile(package, runs=3, cores=[core])
    with pytest.raises(InputError, match=r"^there are no cores \[4095\] here, only \["):
        profile(package, runs=3, cores=[4095])


@pytest.mark.timing
def test_two_profiles_of_one_package_agree(make_package: MakePackage) -> None:
    """The least of each side's medians within 15 %; the sides take turns, until neighbours have left both in peace."""
    package = make_package(width=512)
    sides = [float("inf"), float("inf")]

    def ratio() -> float:
        for side in range(2):
            sides[side] = min(sides[side], profile(package).median_ms)
        return max(sides) / min(sides)

    soon_between(0.99, ratio, 1.15)


def test_peak_memory_grows_with_the_weights(make_package: MakePackage) -> None:
    small = profile(make_package("small", width=64, layers=1), runs=3)
    large = profile(make_package("large", width=3600, layers=4), runs=3)  # 207 MB of weights
    assert small.peak_memory_mb is not None
    assert large.peak_memory_mb is not None
    assert 150 < large.peak_memory_mb - small.peak_memory_mb < 800
    assert small.peak_memory_mb < 60


@pytest.mark.timing
def test_compare_takes_turns(make_package: MakePackage) -> None:
    def ratio() -> float:
        found = compare([small, large, small], runs=100, threads=1, warmup=5)
        first, second, again = found.packages
        assert found.runs == 100
        assert first.ratio == 1
        assert second.ratio > 2
        assert second.ratio_low is not None
        assert second.ratio_high is not None
        assert second.ratio_low <= second.ratio <= second.ratio_high
        assert second.package == "large"
        return again.ratio

    small, large = make_package("small", layers=4), make_package("large", layers=40)
    soon_between(0.8, ratio, 1.25)


@pytest.mark.timing
def test_a_large_neighbour_does_not_slow_a_small_model(make_package: MakePackage) -> None:
    def ratio() -> float:
        return compare([small, large], runs=50).packages[0].median_ms / profile(small, runs=200).median_ms

    small, large = make_package("small", width=512), make_package("large", width=3000, layers=2)
    soon_between(0, ratio, 2)


def test_json_has_no_single_times(make_package: MakePackage) -> None:
    package = make_package(layers=1)
    value = profile(package, runs=3).to_json()
    assert "times_ms" not in value
    assert json.loads(json.dumps(value)) == value
    table = compare([package, package], runs=3).to_json()
    assert json.loads(json.dumps(table)) == table


def test_missing_provider_is_named(make_package: MakePackage) -> None:
    found = profile(make_package(target="phone-iphone"), runs=3)
    assert found.missing_providers == ["CoreMLExecutionProvider"]
    assert found.providers == ["CPUExecutionProvider"]


def test_no_wanted_provider_is_here(make_package: MakePackage) -> None:
    found = profile(make_package(target="browser-wasm"), runs=3)
    assert (found.providers, found.missing_providers) == (["CPUExecutionProvider"], ["wasm"])


def test_the_sample_of_median_size_is_used(make_package: MakePackage) -> None:
    package = read_package(make_package(width=8, rows=(9, 1, 4)))
    assert package.inputs["x0"]["shape"] == [4, 8]
    assert package.input_texts() == {"x0": "float32 4×8"}
    assert package.model_sha256 == hashlib.sha256(package.model.read_bytes()).hexdigest()
    assert read_package(package) is package
    assert profile(package, runs=3).package == package.name


@pytest.mark.timing
def test_default_runs_have_a_ceiling(make_package: MakePackage) -> None:
    assert profile(make_package(width=8, layers=1)).runs == 2000


@pytest.mark.parametrize(
    ("file", "name"), [("model.onnx", "model.onnx"), ("manifest.json", "manifest.json"), ("golden/golden.json", "gold")]
)
def test_missing_file(make_package: MakePackage, file: str, name: str) -> None:
    package = make_package()
    (package / file).unlink()
    with pytest.raises(InputError, match=f"has no {name}.*give a package"):
        profile(package)


def test_weights_outside_the_package(make_package: MakePackage) -> None:
    package = make_package()
    model = onnx.load(package / "model.onnx")
    onnx.save(model, str(package / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
    assert read_package(package).file_mb > 1
    (package / "model.onnx.data").rename(package.parent / "model.onnx.data")
    with pytest.raises(InputError, match=r"'model.onnx.data', which is not in .*; put it there"):
        profile(package)


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder; give a package"):
        profile(tmp_path / "missing")


def test_malformed_manifest(make_package: MakePackage) -> None:
    package = make_package()
    (package / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: not JSON"):
        profile(package)
    (package / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"manifest\.json: target: Field required"):
        profile(package)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.update(format="other/1"), "format 'other/1', expected 'potstill-golden/1'"),
        (lambda g: g.update(samples=[]), "no samples, expected one or more"),
        (lambda g: g["samples"][0]["inputs"]["x0"].update(file="../../secret"), "leaves the folder"),
        (lambda g: g["samples"][0]["inputs"]["x0"].update(file="/etc/passwd"), "leaves the folder"),
        (lambda g: g["samples"][0]["inputs"]["x0"].update(dtype="float99"), "dtype 'float99', expected a numpy name"),
        (lambda g: g["samples"][0]["inputs"]["x0"].update(shape=[7, 256]), "holds 8192 bytes, expected 7168"),
    ],
)
def test_bad_golden(make_package: MakePackage, change: Callable[[dict[str, Any]], object], message: str) -> None:
    package = make_package()
    edit(package / "golden/golden.json", change)
    with pytest.raises(InputError, match=message):
        profile(package)


def test_a_file_that_the_manifest_does_not_name(make_package: MakePackage) -> None:
    package = make_package()
    named = {"model.onnx": {"sha256": hashlib.sha256((package / "model.onnx").read_bytes()).hexdigest()}}
    edit(package / "manifest.json", lambda manifest: manifest.update(files=named))
    assert profile(package, runs=3).runs == 3
    with (package / "model.onnx").open("ab") as file:
        file.write(b"\n\x00")
    with pytest.raises(InputError, match="model.onnx is not the file that manifest.json names; export the model again"):
        profile(package)


def test_a_package_names_no_file_of_this_machine(make_package: MakePackage) -> None:
    package = make_package(target="phone-snapdragon-v75")
    options = {"session.custom_file": "/tmp/evil.so"}
    edit(package / "manifest.json", lambda m: m["target"]["runtime"].update(session_options=options))
    with pytest.raises(InputError, match="the option session.custom_file in manifest.json is a path.*not a package to"):
        profile(package)
    edit(package / "manifest.json", lambda m: m["target"].update(emulate={"binary": "/tmp/evil", "cpu": "max"}))
    with pytest.raises(InputError, match="manifest.json: target.emulate.binary: .*pattern"):
        profile(package)


@pytest.mark.parametrize(
    ("provider", "option", "known"),
    [
        ("QNNExecutionProvider", "backend_path", "backend_type, .*, vtcm_mb"),
        ("VitisAIExecutionProvider", "config_file", "target"),
        ("CPUExecutionProvider", "anything", "none"),
        ("MyExecutionProvider", "library", "none"),
    ],
)
def test_a_package_sets_known_options_alone(make_package: MakePackage, provider: str, option: str, known: str) -> None:
    package = make_package(target="phone-snapdragon-v75")
    edit(
        package / "manifest.json",
        lambda m: m["target"]["runtime"]["provider_options"].setdefault(provider, {}).update({option: "evil.so"}),
    )
    told = f"manifest.json sets the option {option} of {provider}, and a package may set {known}; export for a target"
    with pytest.raises(InputError, match=told):
        read_package(package)


@pytest.mark.parametrize("target", target_names())
def test_the_targets_set_known_options(make_package: MakePackage, target: str) -> None:
    assert read_package(make_package(target=target)).target.id == target


def test_link_out_of_the_package(make_package: MakePackage, tmp_path: Path) -> None:
    package = make_package()
    (package / "model.onnx").rename(tmp_path / "outside.onnx")
    (package / "model.onnx").symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(InputError, match=r"'model\.onnx' leaves the folder"):
        profile(package)


@pytest.mark.parametrize("setting", [{"runs": 0}, {"threads": 0}, {"warmup": -1}, {"cores": [-1]}])
def test_bad_setting(make_package: MakePackage, setting: dict[str, int]) -> None:
    with pytest.raises(InputError, match=rf"({next(iter(setting))}|a core) is -?\d, expected \d or more"):
        profile(make_package(), **setting)  # type: ignore[arg-type]


def test_compare_needs_two(make_package: MakePackage) -> None:
    with pytest.raises(InputError, match="1 package given, expected two or more"):
        compare([make_package()])


def test_compare_needs_one_number_of_threads(make_package: MakePackage) -> None:
    one, two = make_package("one"), make_package("two")
    edit(two / "manifest.json", lambda m: m["target"]["profile"].update(threads=2))
    with pytest.raises(InputError, match=r"targets want \[1, 2\] threads; give one"):
        compare([one, two])


def test_a_failing_agent_is_quoted(make_package: MakePackage) -> None:
    package = make_package()
    model = onnx.load(package / "model.onnx")
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, package / "model.onnx")
    with pytest.raises(PotstillError, match=r"(?s)the agent failed with exit code 1: .*model\.onnx"):
        profile(package)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -9 $$", "was killed .signal 9"),
        ("kill -4 $$", "was ended by signal 4: no output"),
        ("echo hello", "gave no JSON line: hello"),
        ("exit 0", "gave no JSON line: no output"),
    ],
)
def test_a_broken_agent(tmp_path: Path, script: str, message: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    with pytest.raises(PotstillError, match=message):
        Local((str(python),)).ask({})


def test_timeout(make_package: MakePackage) -> None:
    with pytest.raises(
        Unreachable, match=r"did not finish within 1\.5 s; give it less to do, or more time \(profile --t"
    ):
        profile(make_package(), runs=10**9, timeout_s=1.5)


def test_python_that_is_none(make_package: MakePackage) -> None:
    with pytest.raises(InputError, match="cannot start '/no/python'"):
        profile(make_package(), device=Local(("/no/python",)))


@pytest.mark.parametrize(
    ("request_", "missing"),
    [
        ({"threads": 1, "warmup": 0, "runs": 1}, "'models'"),
        ({"models": [], "threads": 1, "runs": 1}, "'warmup'"),
        ({"models": [], "warmup": 1, "runs": 1}, "'threads'"),
        ({"models": [], "threads": 1, "warmup": 0, "seconds": 1}, "'runs', or 'seconds' with"),
    ],
)
def test_agent_refuses_an_incomplete_request(request_: dict[str, Any], missing: str) -> None:
    with pytest.raises(PotstillError, match=f"the request lacks {missing}"):
        Local().ask(request_)


def test_agent_runs_alone_and_its_last_line_is_json(make_package: MakePackage, tmp_path: Path) -> None:
    request = {"models": [read_package(make_package()).spec()], "threads": 1, "warmup": 1, "runs": 4}
    (tmp_path / "agent.py").write_bytes(AGENT.read_bytes())
    (tmp_path / "request.json").write_text(json.dumps(with_names(request, str)))
    command = [sys.executable, "-I", "agent.py", "request.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    reply = json.loads(done.stdout.splitlines()[-1])
    assert len(reply["models"][0]["times_ms"]) == 4
    assert "operators" not in reply["models"][0]


@pytest.mark.timing
def test_agent_tells_of_each_second_under_load_as_it_ends(make_package: MakePackage, tmp_path: Path) -> None:
    spec = read_package(make_package(width=8)).spec()
    request = {"models": [spec], "threads": 1, "warmup": 0, "runs": 1, "sustained": 2}
    (tmp_path / "request.json").write_text(json.dumps(with_names(request, str)))
    command = [sys.executable, str(AGENT), str(tmp_path / "request.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        first = json.loads(running.stdout.readline())
        assert running.poll() is None
        second, _, reply = map(json.loads, (line or "{}" for line in running.stdout.read().splitlines()))
    assert [first["second"], second["second"]] == reply["models"][0]["seconds"]


def test_agent_imports_only_what_a_device_has() -> None:
    tree = ast.parse(AGENT.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}
