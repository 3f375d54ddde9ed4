"""What bounds a search: its time, its disk; what its kept verdicts hang on; and that it ships what was judged."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from potstill.export import search_files
from potstill.export.graph import export_graph, fix_shapes
from potstill.export.quantize import Quantized, float_nodes, prepare, quantize
from potstill.export.search import search
from potstill.export.search_files import Files, Limits, Start, digest
from potstill.export.search_time import Clock, OutOfTimeError, Timed
from potstill.export.sensitivity import candidates, sensitivities
from potstill.pipeline import searching
from potstill.pipeline.limits import GateSpec
from potstill.targets.target import Scheme
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples, load_examples
from potstill.validate.encoder import ArrayEncoder, Encoder, TextEncoder
from potstill.validate.errors import PotstillError
from potstill.validate.metrics import Interval
from potstill.validate.predictor import OnnxPredictor
from potstill.validate.scorecard import Scorecard
from potstill.validate.task import TASKS, Model
from potstill.validate.verdict import Check, Verdict, verdict_of

STATIC = Scheme(method="static", activation="uint8", weight="int8", per_channel=True, why="test")


def images(n: int) -> Examples:
    x = np.random.default_rng(0).normal(size=(n, 3, 10, 10)).astype(np.float32)
    return Examples("made", Arrays({"x": x}), np.zeros(n, dtype=np.int64), None, "d")


def says(difference: float, passed: bool) -> tuple[Scorecard, Verdict]:
    around = Interval(difference - 0.01, difference + 0.01)
    card = Scorecard("accuracy", 200, "made", 0.9, Interval(0.8, 1), 0.9, difference, around)
    return card, verdict_of([Check("max_drop", "pass" if passed else "fail", passed, "because")])


MISSED = says(-0.1, False)


@dataclass
class Judge:
    """Lets a set pass by a rule; it keeps what it was asked about."""

    passes: Callable[[tuple[str, ...]], bool] = bool
    files: list[str] = field(default_factory=list)
    left: list[tuple[str, ...]] = field(default_factory=list)

    def __call__(self, path: Path, left: tuple[str, ...], encode: Encoder) -> tuple[Scorecard, Verdict]:
        self.files.append(digest(path))
        self.left.append(left)
        return says(-0.01, True) if self.passes(left) else MISSED


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """A net of six layers in integers; 400 examples: 256 give ranges, 144 measure."""
    torch.manual_seed(0)
    core = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(),
        nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    model = Model(core, ArrayEncoder(), ("x",), ("0", "1", "2", "3"), Checkpoint("made:up"), core)
    folder = tmp_path_factory.mktemp("start")
    export_graph(model, images(4), folder / "float.onnx", 20)
    quantize(folder / "float.onnx", folder / "model.onnx", STATIC, images(400), model.encode, 0)
    return Start(
        folder / "float.onnx", folder / "model.onnx", MISSED, STATIC, model, model.encode, images(400), 0, {}
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_repairs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests with `repairs` in their name repair first."""
    if "repairs" not in request.node.name:
        monkeypatch.setattr("potstill.export.search_sets.REPAIRS", ())


def here(start: Start, folder: Path) -> Start:
    """The same with a plain file of its own, which a search may replace."""
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(start.quantized.read_bytes())
    return replace(start, quantized=folder / "model.onnx")


@pytest.fixture
def never_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantiser that writes another file each time."""
    count = iter(range(1000))

    def quantized(path: Path, out: Path, *args: Any, **more: Any) -> Quantized:
        made = quantize(path, out, *args, **more)
        model = onnx.load(out)
        model.doc_string = f"file {next(count)}"
        onnx.save(model, out)
        return made

    monkeypatch.setattr(search_files, "quantize", quantized)


def test_the_file_that_was_judged_ships(start: Start, tmp_path: Path, never_the_same: None) -> None:
    own, judge = here(start, tmp_path), Judge()
    record, made, _, verdict = search(own, Limits(600, tmp_path / "tries", "a"), judge)
    assert verdict.passed
    assert digest(own.quantized) == judge.files[judge.left.index(tuple(record.keep_float))]
    assert made
    assert made.left_float == len(float_nodes(own.quantized)) == len(record.left) > 0
    assert not list(tmp_path.glob(".search*"))


def test_a_file_that_is_made_again_is_the_same_or_refused(
    start: Start, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    limits, first, again = Limits(600, tmp_path / "tries", "a"), Judge(), Judge()
    search(here(start, tmp_path), limits, first)
    before = digest(tmp_path / "model.onnx")
    search(here(start, tmp_path), limits, again)
    assert (digest(tmp_path / "model.onnx"), again.files) == (before, [])
    request.getfixturevalue("never_the_same")
    own = here(start, tmp_path)
    with pytest.raises(PotstillError, match=r"different files; remove .*tries and run the same command again"):
        search(own, limits, again)
    assert own.quantized.read_bytes() == start.quantized.read_bytes()


def test_weights_beside_the_file_are_of_its_content_and_ship(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beside(path: Path, out: Path, *args: Any, **more: Any) -> Quantized:
        made = quantize(path, out, *args, **more)
        onnx.save(onnx.load(out), out, save_as_external_data=True, location=f"{out.name}.data", size_threshold=64)
        return made

    monkeypatch.setattr(search_files, "quantize", beside)
    own, judge = here(start, tmp_path), Judge()
    record, *_ = search(own, Limits(600, tmp_path / "tries", "a"), judge)
    kept = digest(own.quantized)
    assert kept == judge.files[judge.left.index(tuple(record.keep_float))]
    onnxruntime.InferenceSession(own.quantized)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x01")
    assert digest(own.quantized) != kept


def test_the_disk_does_not_grow_with_the_tries(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the prepared graph: the best, the last that reached the aim, and the one that is made."""
    there = []

    def quantized(path: Path, out: Path, *args: Any, **more: Any) -> Quantized:
        made = quantize(path, out, *args, **more)
        there.append(len(list(tmp_path.glob(".search*/**/*.onnx"))))
        return made

    monkeypatch.setattr(search_files, "quantize", quantized)
    record, *_ = search(here(start, tmp_path), Limits(600, tmp_path / "tries", "a"), Judge(lambda left: False))
    assert len(record.tries) > 6
    assert max(there) <= 4
    assert not list((tmp_path / "tries").rglob("*.onnx"))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock of which a second passes with each run of a model, and with nothing else; its list holds the time."""
    now, run = [0], onnxruntime.InferenceSession.run

    def ran(self: Any, *args: Any, **more: Any) -> Any:
        now[0] += 1
        return run(self, *args, **more)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", ran)
    monkeypatch.setattr("potstill.export.search_time.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.mark.parametrize(
    ("seconds", "during", "tries"),
    [(0, "the measuring", 1), (20, "the measuring", 1), (200, "the measuring", 1), (294, "the ranking", 1)],
)
def test_the_time_holds_within_one_run(
    start: Start, tmp_path: Path, slow: list[int], seconds: float, during: str, tries: int
) -> None:
    """144 examples are measured twice, then 2 batches are run 7 times."""
    own = here(start, tmp_path)
    record, made, card, verdict = search(own, Limits(seconds, tmp_path / "tries", "a"), Judge())
    assert seconds <= slow[0] <= seconds + 1
    assert (record.ended, record.ended_in, len(record.tries)) == ("out of time", during, tries)
    assert f"; it was out of time in {during}" in record.in_words()
    assert (made, card, verdict) == (None, *MISSED)
    assert own.quantized.read_bytes() == start.quantized.read_bytes()


def test_the_time_holds_while_repairs_calibrate(start: Start, tmp_path: Path, slow: list[int]) -> None:
    record, *_ = search(here(start, tmp_path), Limits(290, tmp_path / "tries", "a"), Judge())
    assert record.ended_in == "the repairs"
    assert 290 <= slow[0] <= 291


def test_the_time_holds_while_a_set_is_judged_and_the_best_is_kept(
    start: Start, tmp_path: Path, slow: list[int]
) -> None:
    """The first set is better than the plain one; the second is on its tenth example when the time is up."""
    judged: list[tuple[str, ...]] = []

    def judge(path: Path, left: tuple[str, ...], encode: Encoder) -> tuple[Scorecard, Verdict]:
        judged.append(left)
        if len(judged) == 2:
            slow[0] = 100_000 - 10
            predictor = OnnxPredictor(path, encode, "slow")
            for i in range(100):
                predictor(images(100).rows([i]))
        return says(-0.05, False)

    own = here(start, tmp_path)
    record, made, card, _ = search(own, Limits(100_000, tmp_path / "tries", "a"), judge)
    assert slow[0] == 100_000
    assert (record.ended_in, len(judged)) == ("the judging", 2)
    assert made
    assert (card.difference, tuple(record.keep_float)) == (-0.05, judged[0])


def test_a_timed_encoder_is_the_encoder_until_the_time_is_up(tmp_path: Path) -> None:
    encode, clock = ArrayEncoder(), Clock(60)
    encode.truncated = 3
    timed, rows = Timed(encode, clock), images(2).rows([0, 1])
    assert np.array_equal(timed(rows)["x"], encode(rows)["x"])
    timed.truncated += 1
    assert (timed.truncated, encode.truncated, timed.axes) == (4, 4, encode.axes)
    assert timed.same_as(encode)
    timed.save(tmp_path)
    clock.seconds, clock.doing = 0, "the test"
    with pytest.raises(OutOfTimeError, match="the test"):
        timed(rows)
    clock.stop()
    assert timed(rows)


def test_verdicts_of_another_cpu_are_not_taken(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits, first, same, other = Limits(600, tmp_path / "tries", "a"), Judge(), Judge(), Judge()
    search(here(start, tmp_path), limits, first)
    search(here(start, tmp_path), limits, same)
    host = search_files.here()
    monkeypatch.setattr(search_files, "here", lambda: replace(host, isa=("sse2",)))
    search(here(start, tmp_path), limits, other)
    assert (len(same.left), other.left) == (0, first.left)


def test_what_is_kept_hangs_on_weights_beside_the_graph(start: Start, tmp_path: Path) -> None:
    def key(name: str, value: float) -> str:
        folder = tmp_path / name
        folder.mkdir()
        model = onnx.load(start.graph)
        weight = next(one for one in model.graph.initializer if len(one.dims) == 4)
        weight.CopyFrom(onnx.numpy_helper.from_array(np.full(tuple(weight.dims), value, np.float32), weight.name))
        path = folder / "float.onnx"
        onnx.save(model, path, save_as_external_data=True, location="float.onnx.data", size_threshold=0)
        bare.add(path.read_bytes())
        return Files(replace(start, graph=path), Limits(1, tmp_path, "a"), Clock(1), tmp_path).key

    bare: set[bytes] = set()
    assert key("a", 1.0) == key("b", 1.0) != key("c", 2.0)
    assert len(bare) == 1


def test_what_is_asked_hangs_on_gate_and_evaluation_data(tmp_path: Path) -> None:
    def asked(drop: str = "1pp", data: str = "d", slices: tuple[str, ...] = (), shifted: str | None = None) -> str:
        recipe = SimpleNamespace(
            gate=GateSpec(max_drop=drop), search=SimpleNamespace(seconds=60.0), data=SimpleNamespace(slices=slices)
        )
        elsewhere = {"shifted": SimpleNamespace(digest=shifted)} if shifted else {}
        material: Any = SimpleNamespace(recipe=recipe, eval=SimpleNamespace(digest=data), elsewhere=elsewhere)
        cache: Any = SimpleNamespace(folder=tmp_path)
        found = searching.limits(material, cache, "key")
        assert found
        return found.asked

    assert asked() == asked()
    assert len({asked(), asked(drop="2pp"), asked(data="e"), asked(slices=("length",)), asked(shifted="s")}) == 5


def test_a_transformer_of_fixed_shapes_is_ranked_and_its_tries_open(
    text_teacher: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    """ONNX Runtime reused a name of its own here: 'Attempt to replace the existing tensor'."""
    model = TASKS["text-classification"].load(Checkpoint(str(text_teacher)))
    examples = load_examples(str(texts["train"]), ("text",), {"text": "sentence"})
    graph, fixed, prepared, out = (tmp_path / f"{name}.onnx" for name in ("float", "fixed", "prepared", "int8"))
    export_graph(model, examples, graph, 20)
    assert isinstance(model.encode, TextEncoder)
    encode = replace(model.encode, pad_to=16)
    fix_shapes(graph, fixed, encode, 16)
    prepare(fixed, prepared)
    scheme = Scheme(method="dynamic", weight="int8", per_channel=True, why="test")
    quantize(fixed, out, scheme, None, encode, 0)
    ranked = sensitivities(prepared, out, replace(model, encode=encode), examples.take(range(2), "few"))
    names, inputs = candidates(prepared, out), encode(examples.rows([0]))
    assert len(ranked) == len(names) > 20
    expected = onnxruntime.InferenceSession(graph).run(None, inputs)[0]
    for count in (1, 5, 10, 15, 20, len(names)):
        quantize(fixed, out, scheme, None, encode, 0, keep_float=names[:count])
        found = onnxruntime.InferenceSession(out).run(None, inputs)[0]
    assert np.abs(found - expected).max() < 1e-4  # all of them are in float
