"""Who makes the files of `make bench-formats`, and of what: the words of each side, and why one made none."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from potstill.pipeline.cli import app
from tests.benchmarks.test_formats import opened

models, peers = opened("formats_models"), opened("formats_peers")
sides = opened("formats_sides")  # it imports the models by their bare name
TEXT = models.Case("bert", "text-classification", "bert", "train.tsv", "dev.tsv", "text=sentence,label=label")
NET = models.Case("net", "module", "nets:net", "train.npz", "test.npz", weights=Path("net.safetensors"))


@pytest.mark.parametrize("case", [TEXT, NET], ids=["transformers", "module"])
def test_each_case_is_made_by_all_four_and_quickly_by_fewer(case: Any) -> None:
    whole, quick = (sides.sides(case, quick=quick) for quick in (False, True))
    assert len(set(whole)) == len(whole) > len(quick)
    assert set(quick) < set(whole)
    for found in (whole, quick):
        assert found[:2] == ["potstill laptop-x86-vnni", "potstill laptop-x86-avx2"]
        assert {side.partition(" ")[0] for side in found} == {"potstill", "onnxruntime", "optimum", "olive"}
        assert sides.PLAIN in found
    assert any(side.endswith("dynamic") for side in whole) == (case is TEXT)  # convolutions have no dynamic form


@pytest.mark.parametrize("case", [TEXT, NET], ids=["transformers", "module"])
def test_our_words_are_those_of_the_command_line(case: Any) -> None:
    python, flag, module, verb, *words = sides.export_words(case, ["a", "b"], Path("out"))
    assert (python, flag, module) == (sys.executable, "-m", "potstill.pipeline.cli")
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    given = command.make_context(verb, [*words]).params
    assert given["target"] == ["a", "b"]
    assert given["checkpoint"] == case.checkpoint
    assert (given["calibrate"], given["eval_"], given["columns"]) == (case.calibrate, case.judge, case.columns or None)
    assert given["weights"] == case.weights


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["starting", "ValueError: no shape", "the end"], "ValueError: no shape"),
        (
            ["KeyError: first", "onnxruntime.InvalidGraph: second", "Error in a sentence"],
            "onnxruntime.InvalidGraph: second",
        ),
        (["only", "words"], "words"),
        (["x" * 500], "x" * 300),
    ],
)
def test_the_complaint_is_the_last_line_that_names_an_error(lines: list[str], named: str) -> None:
    assert sides._complaint(lines) == named


def given(tmp_path: Path, case: Any = TEXT) -> Any:
    """What a side starts from; nothing of it is there."""
    return sides.Given(case, tmp_path / "graph.onnx", tmp_path / "calibrate.npz")


def test_a_side_that_is_not_installed_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "ROOT", tmp_path)
    for side, place in (
        ("olive auto-opt", ".venv-olive/bin/olive"),
        ("optimum avx2 static", ".venv-optimum/bin/python"),
    ):
        made = sides.make(side, given(tmp_path), tmp_path / side)
        assert (made.path, made.seconds) == (None, 0)
        assert made.why == f"no {tmp_path / place}: make bench-formats installs it"


@pytest.mark.parametrize(
    ("script", "limit", "why"),
    [
        ("open('model.onnx', 'w').close()", 60, ""),
        ("raise ValueError('no shape')", 60, "exit code 1: ValueError: no shape"),
        ("raise SystemExit(3)", 60, "exit code 3: it said nothing"),
        ("import time; time.sleep(60)", 0.5, "stopped after 0.5 s: it said nothing"),
    ],
)
def test_a_side_made_its_file_or_says_why_not(
    script: str, limit: float, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "side"
    words = ([sys.executable, "-c", script], folder, folder / "model.onnx")
    monkeypatch.setattr(sides, "_command", lambda *_: words)
    monkeypatch.setattr(sides, "LIMIT_S", limit)
    made = sides.make("any", given(tmp_path), folder)
    assert made.why == why
    assert made.path == (None if why else folder / "model.onnx")
    assert made.seconds > 0


def test_a_module_of_ones_own_goes_to_the_others_as_its_graph(tmp_path: Path) -> None:
    for case, source in ((TEXT, "bert"), (NET, str(tmp_path / "graph.onnx"))):
        words, place, file = sides._command("olive auto-opt", given(tmp_path, case), tmp_path)
        assert words[words.index("-m") + 1] == source
        assert ("-t" in words) == (case is TEXT)
        assert (place, file) == (tmp_path, tmp_path / "out" / "model.onnx")


def test_what_was_trained_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(models, "ROOT", tmp_path)
    monkeypatch.setattr(models.subprocess, "run", never)
    monkeypatch.setattr(models, "_train_vit", never)
    cache = tmp_path / "runs" / "formats" / "quick"
    for folder in ("sst2-student", "vit"):
        (cache / folder).mkdir(parents=True)
    (cache / "depthwise.safetensors").touch()
    found = {name: models.case(name, quick=True) for name in models.CASES}
    assert {name: one.name for name, one in found.items()} == {name: name for name in models.CASES}
    assert found["sst2-student"].checkpoint == str(cache / "sst2-student")
    assert found["depthwise"].weights == cache / "depthwise.safetensors"
    assert all(one.calibrate != one.judge for one in found.values())
    with pytest.raises(AssertionError, match="trained"):
        models.case("vit", quick=False)  # a cache of its own


def test_the_inputs_come_back_in_their_order(tmp_path: Path) -> None:
    arrays = {f"{i}/{name}": np.full((1, 2), i) for i in (10, 2, 0) for name in ("ids", "mask")}
    np.savez(tmp_path / "inputs.npz", **arrays)
    found = list(peers.examples(tmp_path / "inputs.npz"))
    assert [int(one["ids"][0, 0]) for one in found] == [0, 2, 10]
    assert all(set(one) == {"ids", "mask"} for one in found)
