"""Pruning: what goes, what stays, and that the model is really smaller."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from potstill.compress.channel_parts import channels_of, remove_channels
from potstill.compress.distill import Distill
from potstill.compress.gates import Part, gated, importance
from potstill.compress.lesson import Lesson
from potstill.compress.prune import Prune, least_of_all, sizes
from potstill.compress.qat import quantized
from potstill.compress.student import Student
from potstill.compress.transformer_parts import Encoder, encoder_of
from potstill.export.graph import export_graph
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import IGNORED, Arrays, Examples, load_examples
from potstill.validate.errors import InputError
from potstill.validate.fake_quant import Formats
from potstill.validate.files import read_json
from potstill.validate.predictor import TorchPredictor
from potstill.validate.task import TASKS, Model
from tests.predicted import predicted

TEXT, IMAGE, MODULE = (TASKS[word] for word in ("text-classification", "image-classification", "module"))
CPU = torch.device("cpu")
SHORT = Distill(epochs=0.2, learning_rate=1e-6)  # so little that what is left is what was cut


class Block(nn.Module):
    """A residual block whose inner channels are free."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.norm = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.out = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.depthwise(self.norm(self.inner(x)).relu()))


class Net(nn.Module):
    """Pictures (B, 12, 12, 3) to logits (B, 4). The shortcut by padding fixes the stream's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Conv2d(3, 8, 3, stride=2, padding=1), Block(8)
        self.hidden, self.last = nn.Linear(12 * 9, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.first(x.permute(0, 3, 1, 2) / 128 - 1).relu())
        x = nn.functional.pad(x, (0, 0, 0, 0, 2, 2))
        logits: Tensor = self.last(nn.functional.gelu(self.hidden(nn.functional.avg_pool2d(x, 2).flatten(1))))
        return logits


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def text_lesson(folder: Path, texts: dict[str, Path], work: Path) -> Lesson:
    teacher = TEXT.load(Checkpoint(str(folder)))
    train = load_examples(str(texts["train"]), ("text",), {"text": "sentence"}).with_labels(teacher.labels)
    return Lesson(TEXT, teacher, train.take(range(200), "train"), train.take(range(540, 600), "held out"), 0, work)


@pytest.fixture
def lesson(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> Lesson:
    return text_lesson(text_teacher, texts, tmp_path / "work")


@pytest.fixture
def bert(text_teacher: Path) -> Model:
    return TEXT.load(Checkpoint(str(text_teacher)))


@pytest.fixture
def blobs(arrays: Path) -> Examples:
    return load_examples(f"{arrays}:train", ("x",), {}).with_labels([str(i) for i in range(4)])


@pytest.fixture
def cnn(monkeypatch: pytest.MonkeyPatch, blobs: Examples) -> Model:
    """A trained network of convolutions."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model = load_cnn(blobs)
    optimizer = torch.optim.AdamW(model.core.parameters(), lr=3e-3)
    model.core.train()
    for start in [*range(0, 600, 50)] * 3:
        x, y = blobs.rows(range(start, start + 50))["x"], torch.from_numpy(blobs.labels[start : start + 50])
        nn.functional.cross_entropy(model.core(torch.from_numpy(x).float()), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.core.eval()
    return model


def load_cnn(blobs: Examples, weights: Path | None = None) -> Model:
    return MODULE.load(Checkpoint("test_prune:net", weights), example=blobs.rows([0]))


def cnn_lesson(teacher: Model, blobs: Examples, work: Path) -> Lesson:
    return Lesson(MODULE, teacher, blobs.take(range(400), "train"), blobs.take(range(400, 450), "held out"), 0, work)


def inside(model: Model) -> Any:
    return model.core


def encoder(model: Model) -> Encoder:
    found = encoder_of(model.core)
    assert found
    return found


def logits(model: Model, examples: Examples) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model.module(*model.batch(examples.rows(range(32)), CPU))
    return out


# Importance.


def test_importance_is_the_slope_of_the_loss_in_a_gate(bert: Model, lesson: Lesson) -> None:
    """Against finite differences in float64 of a mask that is written out, one example at a time."""
    few = lesson.train.take(range(3), "few")
    bert.core.double()
    heads = encoder(bert).head_parts()[1]
    found = importance(bert, [heads], few, CPU)[0]
    output = inside(bert).bert.encoder.layer[1].attention.output.dense
    weight = output.weight.detach().clone()

    def loss(example: int, head: int, scale: float) -> float:
        scaled = weight.clone()
        scaled[:, 8 * head : 8 * head + 8] *= scale  # the output projection is linear in what a head gives
        output.weight.data = scaled
        with torch.no_grad():
            row = torch.log_softmax(bert.module(*bert.batch(few.rows([example]), CPU)), dim=1)[0]
        return -float(row[few.labels[example]])

    slopes = [[(loss(i, h, 1 + 1e-4) - loss(i, h, 1 - 1e-4)) / 2e-4 for h in range(4)] for i in range(3)]
    np.testing.assert_allclose(found, np.abs(slopes).mean(axis=0), rtol=1e-4, atol=1e-10)


def test_importance_of_channels_is_that_of_the_next_modules_weights(cnn: Model, blobs: Examples) -> None:
    """A gate's slope is Σ w ∂L/∂w over the weights that take the channel, one example at a time."""
    few = blobs.take(range(6), "few")
    part = next(
        p for p in channels_of(cnn.module, cnn.batch(few.rows([0, 1]), CPU)).parts if p.name == "block.depthwise"
    )
    expected = np.zeros(part.units)
    cnn.core.double()
    for i in range(6):
        cnn.core.zero_grad()
        x = torch.from_numpy(few.rows([i])["x"]).double()
        nn.functional.cross_entropy(cnn.core(x), torch.from_numpy(few.labels[[i]])).backward()
        taker: Any = inside(cnn).block.out
        expected += (taker.weight * taker.weight.grad).sum(dim=(0, 2, 3)).abs().detach().numpy() / 6
    cnn.core.float()
    np.testing.assert_allclose(importance(cnn, [part], few, CPU)[0], expected, rtol=1e-3, atol=1e-6)


def test_the_gate_of_a_layer_turns_it_off(bert: Model, lesson: Lesson) -> None:
    inputs = bert.batch(lesson.train.rows([0, 1]), CPU)
    parts = encoder(bert).layer_parts()
    with torch.inference_mode(), gated(parts, [torch.tensor([[float(i != 2)]]) for i in range(4)]):
        without = bert.module(*inputs)
    encoder(bert).remove_layers([2])
    with torch.inference_mode():
        assert torch.allclose(bert.module(*inputs), without, atol=1e-6)


def test_examples_that_a_part_mixes_cannot_be_judged(bert: Model, lesson: Lesson) -> None:
    part = encoder(bert).head_parts()[0]
    with (
        pytest.raises(InputError, match="cannot be judged example by example: a batch of 3 arrives as 2"),
        gated([part], [torch.ones(3, 4)]),
    ):
        bert.module(*bert.batch(lesson.train.rows([0, 1]), CPU))


def test_the_least_of_all_leaves_one_in_each_part() -> None:
    scores = [np.array([0.1, 0.2, 0.3]), np.array([5.0, 0.25]), np.array([9.0, 8.0])]
    assert least_of_all(scores, 2) == [[0, 1], [], []]
    assert least_of_all(scores, 4) == [[0, 1], [1], [1]]


# What is cut.


def silence(bert: Model) -> None:
    """Make one head and four neurons of each layer give nothing."""
    for i, layer in enumerate(inside(bert).bert.encoder.layer):
        layer.attention.output.dense.weight.data[:, 8 * i : 8 * i + 8] = 0
        layer.output.dense.weight.data[:, 10 * i : 10 * i + 4] = 0


def test_silent_heads_and_neurons_go_first_and_nothing_changes(bert: Model, lesson: Lesson) -> None:
    silence(bert)
    before = logits(bert, lesson.train)
    Prune(heads=0.25, neurons=4 / 64, distill=SHORT)(bert, dataclasses.replace(lesson, teacher=bert))
    cut = read_json(lesson.work / "round-1" / "cut.json")
    assert list(cut["heads"].values()) == [[0], [1], [2], [3]]
    assert list(cut["neurons"].values()) == [list(range(10 * i, 10 * i + 4)) for i in range(4)]
    assert torch.allclose(logits(bert, lesson.train), before, atol=1e-3)  # after a training at next to no rate


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_taking_out_what_is_silent_changes_nothing(bert: Model, lesson: Lesson, kind: str) -> None:
    silence(bert)
    before, found = logits(bert, lesson.train), encoder(bert)
    parts = found.head_parts() if kind == "heads" else found.neuron_parts()
    gone = {p.name: [i] if kind == "heads" else list(range(10 * i, 10 * i + 4)) for i, p in enumerate(parts)}
    (found.remove_heads if kind == "heads" else found.remove_neurons)(gone)
    assert torch.allclose(logits(bert, lesson.train), before, atol=1e-6)


def test_a_silent_channel_goes_first_and_nothing_changes(cnn: Model, blobs: Examples, tmp_path: Path) -> None:
    inside(cnn).block.out.weight.data[:, [3, 7]] = 0
    before, copied = logits(cnn, blobs), copy.deepcopy(cnn)
    Prune(channels=2 / 36, distill=SHORT)(cnn, cnn_lesson(copied, blobs, tmp_path))
    cut = read_json(tmp_path / "round-1" / "cut.json")["channels"]
    assert cut == {"block.depthwise": [3, 7], "hidden": []}
    remove_channels(copied.module, copied.batch(blobs.rows([0, 1]), CPU), cut)  # the same without a training after it
    assert torch.allclose(logits(copied, blobs), before, rtol=1e-6, atol=1e-5)
    assert inside(cnn).block.depthwise.groups == 14


def test_channels_that_a_padded_shortcut_fixes_are_left_and_counted(cnn: Model, blobs: Examples) -> None:
    found = channels_of(cnn.module, cnn.batch(blobs.rows([0, 1]), CPU))
    assert {part.name: part.units for part in found.parts} == {"block.depthwise": 16, "hidden": 20}
    assert (found.free, found.bound) == (16 + 16 + 20, 8 + 8)  # the depthwise filter with the inner channels
    assert "16 of 68 channels cannot be pruned" in Prune(channels=0.5).notes([{"free": 52, "bound": 16}])[0]
    assert Prune(channels=0.5).notes([{"free": 52, "bound": 0}]) == []


class Joined(nn.Module):
    """Two convolutions side by side, joined for a third, whose channels are flattened for a Linear module."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.middle, self.last = nn.Conv2d(10, 5, 1), nn.Linear(45, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.middle(torch.cat([self.left(x), self.right(x)], dim=1)).flatten(1))
        return logits


def test_channels_are_followed_through_joins_and_flattening() -> None:
    found = channels_of(Joined().eval(), [torch.rand(2, 3, 3, 3)])
    units = {part.name: [site.unit.tolist() for site in part.sites if site.unit is not None] for part in found.parts}
    assert units == {
        "left": [[0, 1, 2, 3, -1, -1, -1, -1, -1, -1]],
        "right": [[-1, -1, -1, -1, 0, 1, 2, 3, 4, 5]],
        "middle": [[channel for channel in range(5) for _pixel in range(9)]],
    }


def test_shares_are_what_was_asked(bert: Model, lesson: Lesson) -> None:
    before = bert.parameters
    log = Prune(heads=0.25, neurons=0.25, layers=1, rounds=2, distill=SHORT)(bert, lesson)
    assert [part.units for part in encoder(bert).neuron_parts()] == [48] * 3
    assert sum(part.units for part in encoder(bert).head_parts()) == 9
    config: Any = bert.core.config
    assert (config.num_hidden_layers, config.intermediate_size) == (3, 48)
    rounds = {int(entry["round"]): entry for entry in log if "round" in entry}
    assert [rounds[i]["parameters"] for i in (0, 2)] == [before, bert.parameters]
    assert rounds[0]["parameters"] > rounds[1]["parameters"] > rounds[2]["parameters"]
    assert rounds[0]["macs"] > rounds[1]["macs"] > rounds[2]["macs"]
    removed = 3 * 8 * (3 * 33 + 32) + 3 * 16 * (33 + 32)  # 3 heads of 8 features; 16 neurons in each of 3 layers
    layer = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32
    assert before - bert.parameters == removed + layer
    steps = [entry["step"] for entry in log]
    assert steps == sorted(steps)


@pytest.mark.parametrize(("share", "rounds", "left"), [(0.3, 2, 25), (0.9, 3, 4)])
def test_shares_of_channels_are_what_was_asked(
    cnn: Model, blobs: Examples, tmp_path: Path, share: float, rounds: int, left: int
) -> None:
    Prune(channels=share, rounds=rounds, distill=SHORT)(cnn, cnn_lesson(load_cnn(blobs), blobs, tmp_path))
    net = inside(cnn)
    assert net.block.inner.out_channels + net.hidden.out_features == left
    assert net.block.inner.out_channels == net.block.depthwise.groups == net.block.out.in_channels
    assert min(net.block.inner.out_channels, net.hidden.out_features) >= 1


def test_multiply_adds_are_counted_for_one_example(cnn: Model, blobs: Examples) -> None:
    by_hand = 36 * 9 * (3 * 8 + 8 * 16 + 16 + 16 * 8) + 12 * 9 * 20 + 20 * 4
    assert sizes(cnn, cnn.batch(blobs.rows([0, 1]), CPU))["macs"] == by_hand


def distilbert(bert: Path, folder: Path) -> Model:
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=25, dim=32, n_layers=4, n_heads=4, hidden_dim=64, max_position_embeddings=64)
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    return TEXT.load(Checkpoint(str(folder)))


def test_a_distilbert_is_pruned_too(text_teacher: Path, lesson: Lesson, tmp_path: Path) -> None:
    student = distilbert(text_teacher, tmp_path / "distilbert")
    Prune(heads=0.25, neurons=0.5, layers=2, distill=SHORT)(student, lesson)
    assert (student.core.config.n_layers, student.core.config.hidden_dim) == (2, 32)
    again = saved(student, tmp_path / "saved", TEXT)
    assert torch.equal(logits(again, lesson.train), logits(student, lesson.train))


def test_a_vision_transformer_is_pruned_too(image_teacher: Path, pictures: dict[str, Path], tmp_path: Path) -> None:
    student = IMAGE.load(Checkpoint(str(image_teacher)))
    train = load_examples(str(pictures["train"]), ("image",), {}).with_labels(student.labels)
    teacher = IMAGE.load(Checkpoint(str(image_teacher)))
    lesson = Lesson(IMAGE, teacher, train.take(range(64), "t"), train.take(range(64, 80), "h"), 0, tmp_path / "work")
    Prune(heads=0.25, neurons=0.5, layers=1, distill=SHORT)(student, lesson)
    assert sum(part.units for part in encoder(student).head_parts()) == 3 * 2 - 2
    again = saved(student, tmp_path / "saved", IMAGE)
    assert torch.equal(logits(again, train), logits(student, train))


# What is kept on disk.


def saved(model: Model, folder: Path, task: Any) -> Model:
    folder.mkdir()
    model.save(folder)
    loaded: Model = task.load(Checkpoint(str(folder)))
    return loaded


def test_pruned_heads_are_recorded_and_reload_bit_for_bit(bert: Model, lesson: Lesson, tmp_path: Path) -> None:
    Prune(heads=0.5, distill=SHORT)(bert, lesson)
    again = saved(bert, tmp_path / "saved", TEXT)
    assert torch.equal(logits(again, lesson.train), logits(bert, lesson.train))
    assert type(again.core) is type(bert.core)
    twice = saved(again, tmp_path / "twice", TEXT)  # the record goes on
    assert torch.equal(logits(twice, lesson.train), logits(bert, lesson.train))
    assert [p.units for p in encoder(twice).head_parts()] == [p.units for p in encoder(bert).head_parts()]


def test_neurons_and_layers_open_with_transformers_alone(bert: Model, lesson: Lesson, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    Prune(neurons=0.5, layers=1, distill=SHORT)(bert, lesson)
    bert.save(tmp_path)
    assert not (tmp_path / "potstill.json").exists()
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    inputs = dict(zip(bert.input_names, bert.batch(lesson.train.rows(range(32)), CPU), strict=True))
    with torch.inference_mode():
        assert torch.equal(theirs(**inputs).logits, logits(bert, lesson.train))


def test_pruned_channels_are_recorded_and_reload_bit_for_bit(cnn: Model, blobs: Examples, tmp_path: Path) -> None:
    Prune(channels=0.5, distill=SHORT)(cnn, cnn_lesson(load_cnn(blobs), blobs, tmp_path / "work"))
    (tmp_path / "saved").mkdir()
    cnn.save(tmp_path / "saved")
    again = load_cnn(blobs, tmp_path / "saved" / "model.safetensors")
    assert torch.equal(logits(again, blobs), logits(cnn, blobs))
    assert sum(part.units for part in channels_of(again.module, again.batch(blobs.rows([0, 1]), CPU)).parts) == 18
    plain = tmp_path / "model.safetensors"  # the same weights without the record
    plain.write_bytes((tmp_path / "saved" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="size mismatch|shape"):
        load_cnn(blobs, plain)


def test_the_graph_is_really_smaller(bert: Model, lesson: Lesson, tmp_path: Path) -> None:
    before = bert.parameters
    Prune(heads=0.5, neurons=0.5, distill=SHORT)(bert, lesson)
    export_graph(bert, lesson.train, tmp_path / "model.onnx", 20)  # compares with torch
    weights = sum(int(np.prod(w.dims)) for w in onnx.load(str(tmp_path / "model.onnx")).graph.initializer)
    assert weights == pytest.approx(bert.parameters, rel=0.01)
    assert weights < 0.6 * before


# Resuming, and learning again.


def without_times(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in log]


def test_a_killed_run_goes_on_to_the_same_weights(
    text_teacher: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Prune(heads=0.25, neurons=0.25, layers=1, rounds=2, distill=Distill(epochs=1, learning_rate=1e-3))
    whole = TEXT.load(Checkpoint(str(text_teacher)))
    log = stage(whole, text_lesson(text_teacher, texts, tmp_path / "whole"))

    train, trained = Distill.__call__, []

    def killed_in_the_second_round(self: Distill, student: Model, lesson: Lesson) -> Any:
        trained.append(lesson.work.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(self, student, lesson)

    monkeypatch.setattr(Distill, "__call__", killed_in_the_second_round)
    lesson = text_lesson(text_teacher, texts, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        stage(TEXT.load(Checkpoint(str(text_teacher))), lesson)
    resumed = TEXT.load(Checkpoint(str(text_teacher)))
    assert without_times(stage(resumed, lesson)) == without_times(log)
    assert trained == ["round-1", "round-2", "round-2"]
    ours, theirs = whole.core.state_dict(), resumed.core.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_was_lost_is_learned_again(bert: Model, lesson: Lesson, texts: dict[str, Path]) -> None:
    examples = load_examples(str(texts["eval"]), ("text",), {"text": "sentence"}).with_labels(bert.labels)

    def classes(model: Model) -> Any:
        return predicted(TorchPredictor(model, "model", CPU), examples).argmax(axis=1)

    theirs = classes(lesson.teacher)
    student = TEXT.load(bert.checkpoint)
    Prune(heads=0.7, neurons=0.9, layers=2, distill=SHORT)(student, lesson)
    without = (classes(student) == theirs).mean()
    better = dataclasses.replace(lesson, work=lesson.work / "again")
    Prune(heads=0.7, neurons=0.9, layers=2, distill=Distill(epochs=8, learning_rate=3e-3))(bert, better)
    assert (classes(bert) == theirs).mean() > max(without, 0.9)


# What does not go.


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "prune needs heads, neurons, channels or layers"),
        ({"heads": 1.0}, "heads must be above 0 and below 1, the share to remove, and is 1"),
        ({"layers": 0}, "layers must be at least 1, and is 0"),
        ({"neurons": 0.5, "rounds": 0}, "rounds must be at least 1"),
        ({"layers": 1, "rounds": 2}, "rounds are for heads, neurons and channels"),
        ({"heads": 0.5, "distill": {"epochs": 0}}, "epochs must be above 0"),
    ],
)
def test_settings_that_prune_nothing(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Prune(**settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"channels": 0.5}, "BertForSequenceClassification is a transformer; it has layers, heads and neurons"),
        ({"layers": 4}, "layers=4, and BertForSequenceClassification has 4; at least one must stay"),
        ({"heads": 0.02}, "heads=0.02 of 4 each in 4 parts would remove 0; from 1 to 12 can be removed"),
        ({"heads": 0.9}, "would remove 14; from 1 to 12"),
        ({"neurons": 0.999}, "neurons=0.999 of 64 each in 4 parts would remove 64 from each; from 1 to 63"),
    ],
)
def test_what_a_transformer_does_not_have(bert: Model, lesson: Lesson, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Prune(**settings)(bert, lesson)


def test_what_a_module_does_not_have(cnn: Model, blobs: Examples, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="Net has no transformer layers of a known form .* no heads or layers to remove"
    ):
        Prune(heads=0.5, layers=1)(cnn, cnn_lesson(cnn, blobs, tmp_path))
    cnn.module = cnn.core = nn.Sequential(nn.Flatten(), nn.Linear(432, 4))
    with pytest.raises(InputError, match="Sequential has no channels that can be removed"):
        Prune(channels=0.5)(cnn, cnn_lesson(load_cnn(blobs), blobs, tmp_path))


def test_a_cut_that_changes_more_than_it_should_is_refused(
    bert: Model, lesson: Lesson, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove: Callable[..., None] = Encoder.remove_neurons

    def wrong(self: Encoder, gone: dict[str, list[int]]) -> None:
        remove(self, {name: [63 - unit for unit in units] for name, units in gone.items()})

    monkeypatch.setattr(Encoder, "remove_neurons", wrong)
    with pytest.raises(InputError, match="without its neurons does not compute what it does with them at zero"):
        Prune(neurons=0.25)(bert, lesson)


def test_two_stacks_of_layers(bert: Model) -> None:
    both = nn.ModuleDict(
        {"a": nn.ModuleList([inside(bert).bert.encoder.layer[0]]), "b": inside(bert).bert.encoder.layer}
    )
    with pytest.raises(InputError, match=r"ModuleDict has 2 stacks of layers \(a, b\); one can be pruned"):
        encoder_of(both)


def test_a_part_is_named_by_its_module(bert: Model) -> None:
    parts: list[Part] = [*encoder(bert).head_parts()[:1], *encoder(bert).neuron_parts()[:1]]
    assert [part.name for part in parts] == [
        "bert.encoder.layer.0.attention.self",
        "bert.encoder.layer.0.intermediate.dense",
    ]


def test_a_student_of_low_rank_is_not_pruned(text_teacher: Path, tmp_path: Path) -> None:
    task = TASKS["text-classification"]
    teacher = task.load(Checkpoint(str(text_teacher)))
    student = Student(rank=0.5)(teacher, task, {}, 0)
    examples = Examples("made", Arrays({"text": np.array(["good"] * 4)}), np.zeros(4, dtype=np.int64), None, "d")
    with pytest.raises(InputError, match="a student of low rank cannot be pruned"):
        Prune(neurons=0.5)(student, Lesson(task, teacher, examples, examples, 0, tmp_path))


def test_several_processes_do_not_prune(text_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["text-classification"]
    teacher = task.load(Checkpoint(str(text_teacher)))
    examples = Examples("made", Arrays({"text": np.array(["good"] * 4)}), np.zeros(4, dtype=np.int64), None, "d")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="prune works in one process"):
        Prune(neurons=0.5)(teacher, Lesson(task, teacher, examples, examples, 0, tmp_path))


def test_a_quantised_student_is_not_pruned(text_teacher: Path, tmp_path: Path) -> None:
    task = TASKS["text-classification"]
    teacher, student = (task.load(Checkpoint(str(text_teacher))) for _ in range(2))
    examples = Examples("made", Arrays({"text": np.array(["good"] * 4)}), np.zeros(4, dtype=np.int64), None, "d")
    lesson = Lesson(task, teacher, examples, examples, 0, tmp_path)
    student.module = quantized(student, lesson, Formats(), 4)
    with pytest.raises(InputError, match="put prune before qat"):
        Prune(neurons=0.5)(student, lesson)


def test_examples_without_labels_weigh_nothing(text_teacher: Path, tmp_path: Path) -> None:
    task = TASKS["text-classification"]
    teacher, student = (task.load(Checkpoint(str(text_teacher))) for _ in range(2))
    none = Examples("plain", Arrays({"text": np.array(["good"] * 20)}), np.full(20, IGNORED), None, "d")
    with pytest.raises(InputError, match="importance is measured with labels, and plain .* has none"):
        Prune(neurons=0.5)(student, Lesson(task, teacher, none, none, 0, tmp_path))
