"""Nodes ranked by what their integers cost, and the search for those to leave in float."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from potstill.export.graph import export_graph
from potstill.export.net import Net, open_model
from potstill.export.quantize import float_nodes, prepare, quantize
from potstill.export.search import helps, search
from potstill.export.search_files import Limits, Start
from potstill.export.search_record import Search
from potstill.export.sensitivity import ON, apart, end_of, multiply_adds, nodes_between, noisy_graph, sensitivities
from potstill.export.weight_only import in_blocks
from potstill.targets.target import Scheme
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples, load_examples
from potstill.validate.encoder import ArrayEncoder, Encoder
from potstill.validate.metrics import Interval
from potstill.validate.scorecard import Scorecard
from potstill.validate.task import TASKS, Model
from potstill.validate.verdict import Check, Verdict, verdict_of

STATIC = Scheme(method="static", activation="uint8", weight="int8", per_channel=True, why="test")

DYNAMIC = Scheme(method="dynamic", weight="int8", per_channel=True, why="test")


def images(n: int) -> Examples:
    x = np.random.default_rng(0).normal(size=(n, 3, 12, 12)).astype(np.float32)
    return Examples("made", Arrays({"x": x}), np.zeros(n, dtype=np.int64), None, "d")


@dataclass
class Made:
    """A net whose third convolution has large weights for a channel that is always zero: they cost all others bits."""

    model: Model
    graph: Path
    prepared: Path
    quantized: Path
    worst: str

    def start(self, folder: Path, plain: tuple[Scorecard, Verdict], n: int = 400) -> Start:
        out = folder / "model.onnx"
        out.write_bytes(self.quantized.read_bytes())
        return Start(self.graph, out, plain, STATIC, self.model, self.model.encode, images(n), 0, {})

    def agreement(self, path: Path) -> float:
        """Share of 200 examples on which a model file and the float graph say the same."""
        x = images(900).rows(range(700, 900))["x"]
        mine, theirs = (onnxruntime.InferenceSession(p).run(None, {"x": x})[0].argmax(1) for p in (self.graph, path))
        return float((mine == theirs).mean())


@pytest.fixture(autouse=True)
def repairs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests with `repaired` in their name repair first; the others are about the nodes in float."""
    if "repaired" not in request.node.name:
        monkeypatch.setattr("potstill.export.search_sets.REPAIRS", ())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(0)
    core = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU(),
        nn.Conv2d(24, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    before, spoiled = core[2], core[4]
    assert isinstance(before, nn.Conv2d)
    assert isinstance(spoiled, nn.Conv2d)
    assert before.bias is not None
    with torch.no_grad():
        for layer in core:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
        before.weight[0], before.bias[0] = 0, -1
        spoiled.weight[:, 0] = 60
    model = Model(core, ArrayEncoder(), ("x",), ("0", "1", "2", "3"), Checkpoint("made:up"), core)
    folder = tmp_path_factory.mktemp("graph")
    graph, prepared, quantized = (folder / f"{name}.onnx" for name in ("float", "prepared", "int8"))
    export_graph(model, images(4), graph, 20)
    prepare(graph, prepared)
    quantize(graph, quantized, STATIC, images(400), model.encode, 0)
    worst = next(n.name for n in Net.read(prepared).model.graph.node if "4.weight" in n.input)
    return Made(model, graph, prepared, quantized, worst)


def card(difference: float) -> Scorecard:
    around = Interval(difference - 0.01, difference + 0.01)
    return Scorecard("accuracy", 200, "made", 0.9, Interval(0.8, 1), 0.9, difference, around)


def verdict(passed: bool, limit: str = "max_drop") -> Verdict:
    near = None if passed else "9pp"
    return verdict_of([Check(limit, "pass" if passed else "fail", passed, "because", nearest=near)])


@dataclass
class Judge:
    """A gate that asks for some agreement with the float graph; it counts what it is asked, and the seconds of that."""

    made: Made
    least: float
    seconds: float = 0.0
    clock: list[float] = field(default_factory=lambda: [0.0])
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def __call__(self, path: Path, left: tuple[str, ...], encode: Encoder) -> tuple[Scorecard, Verdict]:
        self.asked.append(left)
        self.clock[0] += self.seconds
        agreement = self.made.agreement(path)
        return card(agreement - 1), verdict(agreement >= self.least)


def found(made: Made, folder: Path, judge: Judge, seconds: float = 60, asked: str = "a") -> tuple[Search, Start]:
    folder.mkdir(exist_ok=True)
    start = made.start(folder, judge(made.quantized, (), made.model.encode))
    judge.asked.clear()
    return search(start, Limits(seconds, folder / "tries", asked), judge)[0], start


def test_multiply_adds_by_hand(made: Made) -> None:
    macs = multiply_adds(made.prepared, made.model, images(1).rows([0]))
    of = {node.name: node.input[1] for node in Net.read(made.prepared).model.graph.node if node.name in macs}
    assert {of[name]: count for name, count in macs.items()} == {
        "0.weight": 10 * 10 * 16 * 3 * 9,
        "2.weight": 8 * 8 * 16 * 9,
        "4.weight": 8 * 8 * 24 * 16,
        "6.weight": 6 * 6 * 16 * 24 * 9,
        "10.weight": 16 * 4,
    }


def test_the_noisy_graph_is_the_float_graph_the_integer_graph_and_all_between(made: Made, tmp_path: Path) -> None:
    names = float_nodes(made.prepared)
    session, x = open_model(noisy_graph(made.prepared, made.quantized, names)), images(8).rows(range(8))["x"]

    def run(on: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {"x": x, ON: on.astype(np.float32)})[0])

    float_, int_ = (onnxruntime.InferenceSession(p).run(None, {"x": x})[0] for p in (made.graph, made.quantized))
    apart_ = float(np.abs(float_ - int_).max())
    assert np.abs(run(np.zeros(5)) - float_).max() < 1e-5
    assert np.abs(run(np.ones(5)) - int_).max() < 0.1 * apart_
    graph = Net.read(made.prepared)
    nodes = {node.name: node for node in graph.model.graph.node}
    for i, name in enumerate(names):  # each node alone, against onnxruntime's own quantiser told to leave out the rest
        own = {name, graph.made_by[end_of(graph, nodes[name])].name}
        left = [other for other in nodes if other not in own]
        quantize(made.graph, tmp_path / "one.onnx", STATIC, images(400), made.model.encode, 0, keep_float=left)
        alone = onnxruntime.InferenceSession(tmp_path / "one.onnx").run(None, {"x": x})[0]
        assert np.abs(alone - float_).max() > 1e-3
        assert np.abs(run(np.eye(5)[i]) - alone).max() < 0.1 * np.abs(alone - float_).max()


@pytest.fixture(scope="module")
def shallow(text_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's first two layers: a search makes and runs a file for every node."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    model, folder = BertForSequenceClassification.from_pretrained(text_teacher), tmp_path_factory.mktemp("shallow")
    model.bert.encoder.layer = model.bert.encoder.layer[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(text_teacher).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "scheme",
    [
        DYNAMIC,
        DYNAMIC.model_copy(update={"embedding": "int8", "more_bits": "int8_blocks"}),
        Scheme(method="weights", weight="int4", embedding="int4", why="test"),
    ],
    ids=["dynamic", "more-bits", "weights"],
)
def test_nodes_of_a_transformer_and_their_search(
    scheme: Scheme, shallow: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    model = TASKS["text-classification"].load(Checkpoint(str(shallow)))
    examples = load_examples(str(texts["train"]), ("text",), {"text": "sentence"}).take(range(64), "few")
    graph, prepared, plain, one = (tmp_path / f"{name}.onnx" for name in ("float", "prepared", "plain", "one"))
    export_graph(model, examples, graph, 20)
    prepare(graph, prepared)
    quantize(graph, plain, scheme, None, model.encode, 0)
    ranked = sensitivities(prepared, plain, model, examples.take(range(8), "few"))
    matrices, embeddings = [[one for one in ranked if bool(one.macs) == has] for has in (True, False)]
    assert len(matrices) == len(float_nodes(graph)) > 6
    assert 1 <= len(embeddings) <= 3
    session, names = open_model(noisy_graph(prepared, plain, [node.node for node in ranked])), Net.read(prepared)
    inputs = model.encode(examples.rows([0]))
    float_ = onnxruntime.InferenceSession(graph).run(None, inputs)[0]
    only = scheme.model_copy(update={"more_bits": None})
    for i, node in enumerate(ranked):
        left = [other.name for other in names.model.graph.node if other.name != node.node]
        quantize(graph, one, only, None, model.encode, 0, keep_float=left)
        alone = onnxruntime.InferenceSession(one).run(None, inputs)[0]
        found = session.run(None, inputs | {ON: np.eye(len(ranked))[i].astype(np.float32)})[0]
        assert np.abs(found - alone).max() <= 0.1 * np.abs(alone - float_).max() + 1e-6
    start = Start(graph, plain, (card(-0.1), verdict(False)), scheme, model, model.encode, examples, 0, {})
    asked: list[Path] = []

    def judge(path: Path, left: tuple[str, ...], encode: Encoder) -> tuple[Scorecard, Verdict]:
        asked.append(path)
        return card(-0.01), verdict(len(asked) > (2 if scheme.more_bits else 1))

    result, made_of_it, *_ = search(start, Limits(600, tmp_path / "tries", "a"), judge)
    assert result.passed
    assert made_of_it
    assert made_of_it.left_float == len(float_nodes(plain)) == len([one for one in result.left if one.macs])
    assert made_of_it.more_bits == 0
    assert 0.2 < result.int8_share < 1


def test_more_bits_are_taken_where_they_hold_the_gate(shallow: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    """All of them are asked about first, and none gets float32."""
    model = TASKS["text-classification"].load(Checkpoint(str(shallow)))
    examples = load_examples(str(texts["train"]), ("text",), {"text": "sentence"}).take(range(64), "few")
    graph, plain = tmp_path / "float.onnx", tmp_path / "plain.onnx"
    export_graph(model, examples, graph, 20)
    scheme = DYNAMIC.model_copy(update={"more_bits": "int8_blocks"})
    quantize(graph, plain, scheme, None, model.encode, 0)
    start = Start(graph, plain, (card(-0.1), verdict(False)), scheme, model, model.encode, examples, 0, {})
    asked: list[int] = []

    def judge(path: Path, left: tuple[str, ...], encode: Encoder) -> tuple[Scorecard, Verdict]:
        asked.append(len(in_blocks(path)))
        assert float_nodes(path) == []
        return card(-0.01), verdict(True)

    result, made_of_it, *_ = search(start, Limits(600, tmp_path / "tries", "a"), judge)
    assert result.passed
    assert asked[0] == len(float_nodes(graph))
    assert made_of_it
    assert made_of_it.left_float == 0
    assert made_of_it.more_bits == len([one for one in result.left if one.macs]) == len(in_blocks(plain)) > 0


def test_what_lies_between_nodes_in_float_is_in_float_too(made: Made) -> None:
    graph = Net.read(made.prepared)
    of = {node.input[1]: node.name for node in graph.model.graph.node if node.name in graph.float_nodes}
    ends = {name: graph.made_by[end_of(graph, node)].name for name in of.values() for node in _named(graph, name)}
    two, four, six = of["2.weight"], of["4.weight"], of["6.weight"]
    assert nodes_between(graph, {four}) == [ends[four]]  # its own ReLU, not that of the node before
    assert nodes_between(graph, {two, four}) == [ends[two], ends[four]]
    pooling = [node.name for node in graph.model.graph.node if "Pool" in node.op_type or node.op_type == "ReduceMean"]
    assert nodes_between(graph, {six}) == [ends[six], *pooling]


def _named(graph: Net, name: str) -> list[onnx.NodeProto]:
    return [node for node in graph.model.graph.node if node.name == name]


def test_the_spoiled_node_is_ranked_first(made: Made) -> None:
    ranked = sensitivities(made.prepared, made.quantized, made.model, images(32))
    assert (ranked[0].module, ranked[0].node) == ("4", made.worst)
    assert ranked[0].cost > 5 * max(one.cost for one in ranked[1:])
    assert [one.cost / one.macs for one in ranked] == sorted((one.cost / one.macs for one in ranked), reverse=True)


def test_a_cost_is_the_divergence_of_a_node_alone_in_integers(made: Made, tmp_path: Path) -> None:
    ranked = {one.node: one.cost for one in sensitivities(made.prepared, made.quantized, made.model, images(32))}
    graph, x = Net.read(made.prepared), images(32).rows(range(32))["x"]
    node = next(one for one in graph.model.graph.node if one.name == made.worst)
    own = {made.worst, graph.made_by[end_of(graph, node)].name}
    left = [one.name for one in graph.model.graph.node if one.name not in own]
    quantize(made.graph, tmp_path / "one.onnx", STATIC, images(400), made.model.encode, 0, keep_float=left)
    p, q = (
        torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"x": x})[0]).double().log_softmax(1)
        for path in (made.graph, tmp_path / "one.onnx")
    )
    kl = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert ranked[made.worst] == pytest.approx(float(kl), rel=0.02)


def test_vectors_are_apart_by_their_angle(made: Made) -> None:
    vectors = Model(made.model.core, ArrayEncoder(), ("x",), (), Checkpoint("made:up"), made.model.core, output="e")
    mine, theirs = np.array([[1.0, 0], [2, 0]]), np.array([[5.0, 0], [1, 1]])
    assert apart(mine, theirs, vectors) == pytest.approx([0, 1 - np.sqrt(0.5)])


def test_only_the_spoiled_node_is_left_in_float(made: Made, tmp_path: Path) -> None:
    judge = Judge(made, made.agreement(made.quantized) + 0.02)
    result, start = found(made, tmp_path, judge)
    assert (result.passed, result.ended) == (True, "through")
    assert [one.module for one in result.left] == ["4"]
    total = 10 * 10 * 16 * 27 + 64 * 16 * 9 + 64 * 24 * 16 + 36 * 16 * 24 * 9 + 64
    assert result.int8_share == pytest.approx(1 - 64 * 24 * 16 / total)
    assert made.agreement(start.quantized) >= judge.least
    assert made.worst in float_nodes(start.quantized)
    assert len(float_nodes(start.quantized)) == 1
    kept = next(one for one in result.tries if one.left_float == [made.worst])
    assert kept.passed
    assert kept.size_bytes == start.quantized.stat().st_size
    assert result.judged == 1 + len(judge.asked) <= 7
    assert (
        f"{result.int8_share:.0%} of multiply-adds in the target's integers, found by a search of" in result.in_words()
    )


def test_an_easy_gate_leaves_more_in_integers_than_a_hard_one(made: Made, tmp_path: Path) -> None:
    """The distance falls with each aim, and a try that is judged reaches its aim."""
    hard, _ = found(made, tmp_path / "hard", Judge(made, 1.0))
    easy, _ = found(made, tmp_path / "easy", Judge(made, made.agreement(made.quantized) + 0.02))
    assert hard.passed
    assert easy.passed
    assert hard.int8_share < easy.int8_share
    plain = next(one for one in easy.tries if not one.left_float)
    assert min(one.distance for one in easy.tries if one.passed) <= plain.distance / 4


def test_the_time_bound_holds_and_what_was_found_is_kept(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge(made, 1.0, seconds=1.5)
    monkeypatch.setattr("potstill.export.search_time.time", SimpleNamespace(monotonic=lambda: judge.clock[0]))
    start = made.start(tmp_path, (card(-0.1), verdict(False)))
    result, *_ = search(start, Limits(1.0, tmp_path / "tries", "a"), judge)
    assert len(judge.asked) == 1  # the one that ran when the time was up is allowed to finish
    assert judge.clock == [1.5]
    assert result.ended == "out of time"
    assert "it was out of time" in result.in_words()


def test_without_time_the_plain_one_stays(made: Made, tmp_path: Path) -> None:
    judge = Judge(made, 1.0)
    start = made.start(tmp_path, (card(-0.1), verdict(False)))
    result, quantized, *judged = search(start, Limits(0, tmp_path / "tries", "a"), judge)
    assert (judge.asked, result.left, result.int8_share, quantized) == ([], [], 1.0, None)
    assert judged == [card(-0.1), verdict(False)]
    assert "a search of 1 try, 1 of them judged" in result.in_words()
    assert start.quantized.read_bytes() == made.quantized.read_bytes()


def test_a_worse_set_is_never_taken(made: Made, tmp_path: Path) -> None:
    """Here the evaluation set says that every set in float is worse than none."""
    start = made.start(tmp_path, (card(-0.1), verdict(False)))
    result, *_ = search(
        start, Limits(60, tmp_path / "tries", "a"), lambda path, left, encode: (card(-0.2), verdict(False))
    )
    assert result.left == []
    assert start.quantized.read_bytes() == made.quantized.read_bytes()
    assert result.judged > 2
    assert [one.left_float for one in result.tries].count([]) == 1
    assert "none of which holds the gate; this holds max_drop: 9pp" in result.in_words()


def test_where_none_passes_the_best_is_kept(made: Made, tmp_path: Path) -> None:
    start, drops = made.start(tmp_path, (card(-0.1), verdict(False))), iter([-0.05, -0.02, -0.04, -0.06, -0.07, -0.08])
    names: list[tuple[str, ...]] = []

    def judge(path: Path, left: tuple[str, ...], encode: Encoder) -> tuple[Scorecard, Verdict]:
        names.append(left)
        return card(next(drops)), verdict(False)

    result, _, kept, _ = search(start, Limits(60, tmp_path / "tries", "a"), judge)
    assert not result.passed
    assert kept.difference == -0.02
    assert tuple(result.keep_float) == names[1]


def test_a_killed_search_goes_on(made: Made, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    class Killed(Judge):
        def __call__(self, path: Path, left: tuple[str, ...], encode: Encoder) -> tuple[Scorecard, Verdict]:
            if len(self.asked) == 1:
                raise KilledError
            return super().__call__(path, left, encode)

    start = made.start(tmp_path, (card(-0.1), verdict(False)))
    limits = Limits(60, tmp_path / "tries", "a")
    killed, after = Killed(made, 1.0), Judge(made, 1.0)
    with pytest.raises(KilledError):
        search(start, limits, killed)
    assert not list(tmp_path.glob(".search*"))
    before = {path: path.stat().st_mtime_ns for path in limits.folder.iterdir()}
    result, *_ = search(start, limits, after)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was measured again
    assert not set(killed.asked) & set(after.asked)
    whole, _ = found(made, tmp_path / "whole", Judge(made, 1.0))
    assert (result.left, result.passed) == (whole.left, whole.passed)


def test_another_gate_asks_again_and_measures_nothing_again(made: Made, tmp_path: Path) -> None:
    judge = Judge(made, 1.0)
    found(made, tmp_path, judge)
    first, kept = len(judge.asked), {path.name for path in (tmp_path / "tries").glob("try-*")}
    found(made, tmp_path, judge)
    assert judge.asked == []
    found(made, tmp_path, judge, asked="b")
    assert len(judge.asked) == first
    assert {path.name for path in (tmp_path / "tries").glob("try-*")} == kept


def test_few_examples_measure_on_those_that_calibrate(made: Made, tmp_path: Path) -> None:
    judge = Judge(made, 1.0)
    start = made.start(tmp_path, (card(-0.1), verdict(False)), n=40)
    result, *_ = search(start, Limits(60, tmp_path / "tries", "a"), judge)
    assert (result.calibrated_too, result.held_out) == (True, 40)
    enough, _ = found(made, tmp_path / "enough", judge)
    assert (enough.calibrated_too, enough.held_out) == (False, 400 - 256)


def test_more_bits_do_not_help_a_size() -> None:
    assert not helps(verdict(False, "max_size"))
    assert not helps(None)
    assert helps(verdict_of([*verdict(False, "max_size").checks, *verdict(False).checks]))


def test_a_repaired_graph_that_passes_leaves_nothing_in_float(made: Made, tmp_path: Path) -> None:
    """Bias correction alone takes back what the spoiled node loses."""
    judge = Judge(made, made.agreement(made.quantized) + 0.02)
    result, start = found(made, tmp_path, judge)
    assert (result.passed, result.ended, result.left, result.keep_float) == (True, "through", [], [])
    assert result.repairs == ["equalize", "bias"]
    assert judge.asked == [("equalize", "bias")]
    assert (result.judged, [one.repairs for one in result.tries]) == (2, [[], ["equalize", "bias"]])
    assert result.tries[1].distance < result.tries[0].distance / 2
    assert float_nodes(start.quantized) == []
    assert made.agreement(start.quantized) >= judge.least
    again, *_ = search(made.start(tmp_path, (card(-0.1), verdict(False))), Limits(60, tmp_path / "tries", "a"), judge)
    assert (again.repairs, len(judge.asked)) == (result.repairs, 1)


def test_nodes_are_left_in_float_in_a_repaired_graph(made: Made, tmp_path: Path) -> None:
    judge = Judge(made, 1.0)
    result, start = found(made, tmp_path, judge)
    assert (result.passed, result.repairs) == (True, ["equalize", "bias"])
    assert result.left
    assert all(asked[:2] == ("equalize", "bias") for asked in judge.asked)
    assert len(judge.asked) <= 6
    assert set(float_nodes(start.quantized)) == {one.node for one in result.left}
    assert made.agreement(start.quantized) == 1.0


def test_a_repaired_graph_that_is_no_nearer_is_not_judged(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.export.search_sets.CLOSE", 1e9)
    judge = Judge(made, made.agreement(made.quantized) + 0.02)
    result, _ = found(made, tmp_path, judge)
    assert result.repairs == []
    assert ["equalize", "bias"] in [one.repairs for one in result.tries]
    assert ("equalize", "bias") not in [asked[:2] for asked in judge.asked]


def test_a_repaired_graph_that_is_judged_worse_is_not_kept(made: Made, tmp_path: Path) -> None:
    start = made.start(tmp_path, (card(-0.1), verdict(False)))
    result, quantized, *_ = search(
        start, Limits(60, tmp_path / "tries", "a"), lambda path, left, encode: (card(-0.2), verdict(False))
    )
    assert (result.repairs, result.left, quantized) == ([], [], None)
    assert start.quantized.read_bytes() == made.quantized.read_bytes()


def test_a_set_that_misses_what_the_plain_one_holds_is_not_taken(made: Made, tmp_path: Path) -> None:
    """It holds more limits, but not all that the plain one holds."""

    def says(*missed: str) -> Verdict:
        limits = ("max_drop", "max_flips", "max_size")
        return verdict_of([check for name in limits for check in verdict(name not in missed, name).checks])

    start = made.start(tmp_path, (card(-0.1), says("max_drop", "max_flips")))
    limits = Limits(60, tmp_path / "tries", "a")
    result, quantized, *_ = search(start, limits, lambda path, left, encode: (card(-0.01), says("max_size")))
    assert (result.left, quantized) == ([], None)
    assert result.judged > 2


def _with_more_bits(shallow: Path, texts: dict[str, Path], folder: Path) -> Start:
    model = TASKS["text-classification"].load(Checkpoint(str(shallow)))
    examples = load_examples(str(texts["train"]), ("text",), {"text": "sentence"}).take(range(64), "few")
    graph, plain = folder / "float.onnx", folder / "plain.onnx"
    export_graph(model, examples, graph, 20)
    scheme = DYNAMIC.model_copy(update={"more_bits": "int8_blocks"})
    quantize(graph, plain, scheme, None, model.encode, 0)
    return Start(graph, plain, (card(-0.1), verdict(False)), scheme, model, model.encode, examples, 0, {})


def test_a_search_that_knows_a_verdict_and_has_no_time_ends(
    shallow: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    """The verdict on all nodes with more bits is kept on the disk, but not how far they are from float."""
    start, limits = _with_more_bits(shallow, texts, tmp_path), Limits(600, tmp_path / "tries", "a")
    result, *_ = search(start, limits, lambda path, left, encode: (card(-0.1), verdict(False)))
    assert [len(one.left_float) for one in result.tries[:2]] == [0, result.weighted]
    assert result.judged <= 7
    for path in limits.folder.glob("try-*"):
        path.unlink()
    late, *_ = search(start, replace(limits, seconds=0), lambda path, left, encode: (card(-0.1), verdict(False)))
    assert (late.ended, late.left) == ("out of time", [])


def test_what_is_kept_in_blocks_is_told_from_float(shallow: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    start, asked = _with_more_bits(shallow, texts, tmp_path), list[tuple[str, ...]]()

    def judge(path: Path, left: tuple[str, ...], encode: Encoder) -> tuple[Scorecard, Verdict]:
        asked.append(left)
        return card(-0.01), verdict(bool(in_blocks(path)))

    result, *_ = search(start, Limits(600, tmp_path / "tries", "a"), judge)
    assert result.more_bits == "int8_blocks"
    assert all(left[0] == "int8_blocks" for left in asked)
