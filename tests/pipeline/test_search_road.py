"""The search for nodes to leave in float, in whole runs: what it makes, keeps, says and does not do again."""

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from potstill.pipeline.cli import call
from potstill.validate.files import sha256_file

TARGET = "laptop-x86-vnni"
FACTORY = '''
import torch
from torch import nn

def net():
    """Pictures (B, 3, 12, 12) to logits (B, 4); the third convolution has large weights for a channel that is zero."""
    torch.manual_seed(0)
    core = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU(),
        nn.Conv2d(24, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )
    with torch.no_grad():
        for layer in core:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
        core[2].weight[0], core[2].bias[0] = 0, -1
        core[4].weight[:, 0] = 60
    return core
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An export with a gate that the plain int8 misses; nothing is repaired, so that nodes are left in float."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "spoiled_net.py").write_text(FACTORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr("potstill.export.search_sets.REPAIRS", ())
        import spoiled_net  # type: ignore[import-not-found]

        model = spoiled_net.net().eval()
        save_file(model.state_dict(), folder / "net.safetensors")
        random = np.random.default_rng(0)
        for name, n in (("calibrate", 400), ("eval", 400)):
            x = random.normal(size=(n, 3, 12, 12)).astype(np.float32)
            with torch.inference_mode():
                y = model(torch.from_numpy(x)).argmax(1).numpy()
            np.savez(folder / f"{name}.npz", x=x, y=y)
        assert export(folder, "out", "5pp") == 0
        yield folder


def export(folder: Path, out: str, limit: str, *more: str) -> int:
    weights = ["--weights", str(folder / "net.safetensors"), "--target", TARGET, "--out", str(folder / out)]
    data = ["--calibrate", str(folder / "calibrate.npz"), "--eval", str(folder / "eval.npz"), "--max-drop", limit]
    return call(["export", "spoiled_net:net", *weights, *data, *more])


def package(folder: Path, out: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / out / "packages" / TARGET / "manifest.json").read_text())
    return found


def entry(folder: Path, out: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / out / "ledger.json").read_text())["entries"][-1]
    return found


def test_the_search_passes_and_says_what_it_gave_up(run: Path) -> None:
    manifest = package(run)
    search = manifest["search"]
    assert search["passed"]
    assert "4" in [one["module"] for one in search["left"]]
    assert 0.5 < search["int8_share"] < 1
    assert manifest["quantization"]["left_float"] == len(search["left"])
    assert search["tries"][0]["passed"] is False
    assert manifest["scorecard"]["difference"] >= -0.05 > search["tries"][0]["difference"]
    words = entry(run)["what"]
    assert f"{len(search['left'])} of 5 weighted nodes in float" in words
    assert f"{search['int8_share']:.0%} of multiply-adds in the target's integers, found by a search of" in words
    report = html.unescape((run / "out" / "report.html").read_text())
    assert f"{search['int8_share']:.0%} of multiply-adds in the target's integers" in report
    card = (run / "out" / "packages" / TARGET / "README.md").read_text()
    assert f"{search['int8_share']:.0%} of multiply-adds in the target's integers" in card


def test_the_scorecard_is_that_of_the_file(run: Path) -> None:
    """Each try is predicted on its own: the one that is kept is not read under another's key."""
    import onnxruntime

    session = onnxruntime.InferenceSession(run / "out" / "packages" / TARGET / "model.onnx")
    data = np.load(run / "eval.npz")
    said = np.concatenate([session.run(None, {"x": data["x"][i : i + 1]})[0] for i in range(400)]).argmax(1)
    assert package(run)["scorecard"]["value"] == entry(run)["scorecard"]["value"] == (said == data["y"]).mean()


def test_a_second_run_searches_nothing_again(run: Path) -> None:
    model = run / "out" / "packages" / TARGET / "model.onnx"
    before = {path: path.stat().st_mtime_ns for path in [model, *(run / "out" / "stages").rglob("*.json")]}
    assert export(run, "out", "5pp") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_gate_searches_anew_with_the_tries_that_are_kept(run: Path) -> None:
    first, tries = package(run)["search"], sorted((run / "out" / "stages").glob(".work-search-*/try-*"))
    assert export(run, "out", "90pp") == 0
    assert package(run)["search"] is None
    assert package(run)["quantization"]["left_float"] == 0
    assert export(run, "out", "5pp") == 0
    again = package(run)["search"]
    assert again["keep_float"] == first["keep_float"]
    assert sorted((run / "out" / "stages").glob(".work-search-*/try-*")) == tries


def test_without_time_nothing_is_searched_and_it_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(run, "off", "5pp", "--search-time", "0") == 3
    said = "The gate is missed and nothing was searched for: it has no time; give --search-time (search.time)."
    assert said in " ".join(capsys.readouterr().out.split())
    assert package(run, "off")["not_searched"] == said
    assert said in (run / "off" / "packages" / TARGET / "README.md").read_text()
    assert package(run, "off")["search"] is None
    assert package(run, "off")["verdict"]["passed"] is False
    plain = sha256_file(run / "off" / "packages" / TARGET / "model.onnx")
    assert export(run, "off", "5pp") == 0
    assert package(run, "off")["not_searched"] is None
    assert sha256_file(run / "off" / "packages" / TARGET / "model.onnx") != plain


def test_a_search_that_was_out_of_time_goes_on_with_more(run: Path) -> None:
    assert export(run, "late", "5pp", "--search-time", "0.001s") == 3
    assert package(run, "late")["search"]["ended"] == "out of time"
    assert package(run, "late")["search"]["ended_in"] == "the measuring"
    assert "it was out of time in the measuring" in entry(run, "late")["what"]
    assert export(run, "late", "5pp") == 0
    assert package(run, "late")["search"]["ended"] == "through"


def test_repairs_come_before_nodes_in_float(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.export.search_sets.REPAIRS", ("equalize", "bias"))
    assert export(run, "repaired", "5pp") == 0
    manifest, words = package(run, "repaired"), entry(run, "repaired")["what"]
    search = manifest["search"]
    assert (search["passed"], search["repairs"]) == (True, ["equalize", "bias"])
    assert search["int8_share"] >= package(run)["search"]["int8_share"]
    assert (search["tries"][1]["repairs"], search["tries"][1]["left_float"]) == (["equalize", "bias"], [])
    assert search["tries"][1]["distance"] < search["tries"][0]["distance"] / 2
    assert manifest["quantization"]["left_float"] == len(search["left"])
    left = len(search["left"])
    corrected = f"{5 - left} of 5 nodes, the others are in float" if left else "5 nodes"
    assert manifest["quantization"]["repaired"] == ["equalized: 3 pairs of layers", f"bias corrected: {corrected}"]
    assert "repaired by equalize and bias" in words
    import onnxruntime

    model = run / "repaired" / "packages" / TARGET / "model.onnx"
    data = np.load(run / "eval.npz")
    session = onnxruntime.InferenceSession(model)
    said = np.concatenate([session.run(None, {"x": data["x"][i : i + 1]})[0] for i in range(400)]).argmax(1)
    assert manifest["scorecard"]["value"] == (said == data["y"]).mean()  # not what the plain one was known by
    before = model.stat().st_mtime_ns
    assert export(run, "repaired", "5pp") == 0
    assert model.stat().st_mtime_ns == before
    assert entry(run, "repaired")["scorecard"]["value"] == manifest["scorecard"]["value"]


def test_a_plan_says_how_long_a_search_may_take(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {
        "task": "module",
        "teacher": {"checkpoint": "spoiled_net:net", "weights": str(run / "net.safetensors")},
        "data": {"calibrate": str(run / "calibrate.npz"), "eval": str(run / "eval.npz")},
        "gate": {"max_drop": "5pp"},
        "targets": [TARGET, "browser-wasm"],
    }

    def plan(out: str, **more: Any) -> dict[str, Any]:
        (run / "recipe.yaml").write_text(json.dumps(recipe | more))
        capsys.readouterr()
        assert call(["run", str(run / "recipe.yaml"), "--out", str(run / out), "--dry-run", "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    fresh = plan("fresh")
    assert {step["name"]: step["search_seconds"] for step in fresh["steps"] if step["search_seconds"]} == {
        f"packages/{TARGET}": 600.0,
        "packages/browser-wasm": 600.0,
    }
    assert fresh["search_seconds"] == 1200.0
    assert fresh["steps"][-2]["what"].endswith("; if it misses the gate, a search of at most 10 min")
    assert plan("fresh", search={"time": "90s"})["search_seconds"] == 180.0
    for without in ({"search": {"time": "0"}}, {"targets": ["phone-iphone"], "data": recipe["data"]}):
        assert plan("fresh", **without)["search_seconds"] == 0.0
    assert call(["run", str(run / "recipe.yaml"), "--out", str(run / "fresh"), "--dry-run"]) == 0
    assert "searches where packages" not in capsys.readouterr().out
    plan("fresh")
    assert call(["run", str(run / "recipe.yaml"), "--out", str(run / "fresh"), "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "(searches where packages miss the gate: at most 20 min more)" in shown
    done = plan("out", targets=[TARGET], seed=0)
    assert [step["done"] for step in done["steps"] if step["name"].startswith("packages/")] == [True]
    assert done["search_seconds"] == 0.0
    assert plan("out", targets=[TARGET], gate={"max_drop": "4pp"})["search_seconds"] == 600.0


@pytest.mark.parametrize("time", ["10", "fast", "-1s"])
def test_a_time_needs_its_unit(run: Path, time: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(run, "bad", "5pp", "--search-time", time) == 2
    assert "--search-time" in capsys.readouterr().err
