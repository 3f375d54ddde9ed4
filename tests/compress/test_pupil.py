"""The student in training: layers matched, projections learned and left behind."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from potstill.compress.distill import Distill
from potstill.compress.layer_losses import LAYERS
from potstill.compress.lesson import Lesson
from potstill.compress.pupil import Pupil
from potstill.compress.terms import terms
from potstill.validate.encoder import TextEncoder
from potstill.validate.errors import InputError
from potstill.validate.task import Model

Fresh = Callable[..., Model]
Conv = Callable[[tuple[int, int], int], Model]
CPU = torch.device("cpu")


def pupil(student: Model, lesson: Lesson, **losses: Any) -> Pupil:
    rows = lesson.train.rows([0, 1])
    return Pupil(
        student, lesson.teacher, terms(losses), (student.tensors(rows, CPU), lesson.teacher.tensors(rows, CPU))
    )


def hooks(model: Model) -> int:
    return sum(len(module._forward_hooks) for module in model.module.modules())


def course(log: list[dict[str, float]], name: str) -> list[float]:
    return [entry[name] for entry in log if name in entry]


@pytest.mark.parametrize("name", [name for name, loss in LAYERS.items() if loss.reads != "map"])
def test_training_lowers_each_loss_on_transformer_layers(name: str, lesson: Lesson, fresh: Fresh) -> None:
    student = fresh(layers=2)
    log = Distill(epochs=2, learning_rate=2e-3, losses={name: 1.0})(student, lesson)
    losses = course(log, name)
    assert losses == course(log, "loss")
    assert losses[-1] < 0.9 * losses[0]
    assert hooks(student) == hooks(lesson.teacher) == 0


@pytest.mark.parametrize("name", [name for name, loss in LAYERS.items() if loss.reads == "map"])
def test_training_lowers_each_loss_on_feature_maps(name: str, picture_lesson: Lesson, conv: Conv) -> None:
    student = conv((8, 6), 1)
    losses = course(Distill(epochs=2, losses={name: 1.0})(student, picture_lesson), name)
    assert losses[-1] < 0.9 * losses[0]
    assert hooks(student) == hooks(picture_lesson.teacher) == 0


def test_projections_are_made_where_widths_differ(lesson: Lesson, fresh: Fresh) -> None:
    made = pupil(fresh(layers=2, hidden=16), lesson, hidden=1.0, pkd={"layers": {1: 3}}, values=1.0).projections
    assert {name: tuple(layer.weight.shape) for name, layer in made.items()} == {
        "hidden-0": (32, 16), "hidden-1": (32, 16), "pkd-0": (32, 16),
    }  # fmt: skip
    assert not pupil(fresh(layers=2), lesson, hidden=1.0, pkd=1.0, relations=1.0).projections


def test_projections_are_made_for_maps(picture_lesson: Lesson, conv: Conv) -> None:
    made = pupil(conv((8, 16), 1), picture_lesson, features=1.0, attention_transfer=1.0)
    assert {name: tuple(layer.weight.shape) for name, layer in made.projections.items()} == {
        "features-0": (12, 8, 1, 1),
    }  # fmt: skip
    assert [pair.student for pair in made.pairs["features"]] == ["one", "two"]
    given = pupil(conv((8, 16), 1), picture_lesson, features={"layers": {"one": "two"}})
    assert [(pair.student, pair.teacher) for pair in given.pairs["features"]] == [("one", "two")]
    assert given.projections["features-0"].weight.shape == (16, 8, 1, 1)


def test_projections_are_trained_kept_in_checkpoints_and_not_in_the_student(lesson: Lesson, fresh: Fresh) -> None:
    student = fresh(layers=2, hidden=16)
    names, modules = set(student.core.state_dict()), len(list(student.module.modules()))
    Distill(epochs=2, learning_rate=2e-3, losses={"kl": 1.0, "hidden": 0.5})(student, lesson)
    first, last = (
        load_file(path / "model.safetensors")
        for path in sorted(lesson.work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    )
    for i in (0, 1):
        assert last[f"projections.hidden-{i}.weight"].shape == (32, 16)
        assert not torch.equal(first[f"projections.hidden-{i}.weight"], last[f"projections.hidden-{i}.weight"])
    assert set(student.core.state_dict()) == names
    assert len(list(student.module.modules())) == modules
    assert hooks(student) == 0


def test_the_loss_is_the_weighted_sum_of_its_parts(lesson: Lesson, fresh: Fresh) -> None:
    weights = {"kl": 0.5, "hard": 0.25, "hidden": 0.125}
    log = Distill(epochs=1, losses=weights)(fresh(), lesson)
    for entry in log:
        if "loss" in entry:
            wanted = sum(weight * entry[name] for name, weight in weights.items())
            assert entry["loss"] == pytest.approx(wanted, rel=1e-5)


def test_other_tokens_cannot_be_compared(lesson: Lesson, fresh: Fresh) -> None:
    student = fresh()
    assert isinstance(lesson.teacher.encode, TextEncoder)
    student.encode = dataclasses.replace(lesson.teacher.encode, max_length=5)
    with pytest.raises(
        InputError, match=r"hidden compares token with token, and .* cut the examples into other tokens"
    ):
        Distill(epochs=1, losses={"hidden": 1.0})(student, lesson)
    assert hooks(student) == hooks(lesson.teacher) == 0
    Distill(epochs=0.1)(student, lesson)  # on outputs they can learn from each other


@pytest.mark.parametrize(
    ("losses", "match"),
    [
        ({"attention": 1.0}, "the student has 2 and the teacher 4; use relations"),
        ({"relations": {"heads": 3}}, "relations.heads: 3 must divide the student's width 16 and the teacher's 32"),
        ({"hidden": {"layers": {5: 0}}}, "hidden.layers: the student has layers 0 to 1, and 5 was given"),
        ({"features": 1.0}, "features matches feature maps, and there are none in the student or the teacher"),
        ({"features": {"layers": {"here": "there"}}}, "BertForSequenceClassification has no module 'here'"),
    ],
)
def test_layers_that_cannot_be_matched(losses: dict[str, Any], match: str, lesson: Lesson, fresh: Fresh) -> None:
    student = fresh(layers=2, hidden=16)
    with pytest.raises(InputError, match=match):
        Distill(losses=losses)(student, lesson)
    assert hooks(student) == hooks(lesson.teacher) == 0


def test_stacks_of_convolutions_are_no_layers_of_tokens(picture_lesson: Lesson) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)])
            self.out = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[1](self.layers[0](x.permute(0, 3, 1, 2) / 128 - 1))
            return self.out(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]

    core = Stack()
    model = dataclasses.replace(picture_lesson.teacher, module=core, core=core)
    with pytest.raises(InputError, match=r"hidden compares states of tokens.* gives \(2, 3, 12, 12\) .* use features"):
        pupil(model, dataclasses.replace(picture_lesson, teacher=model), hidden=1.0)


def test_checkpointing_gives_the_same_student(lesson: Lesson, fresh: Fresh) -> None:
    made = []
    for checkpointing in (False, True):
        student = fresh()
        stage = Distill(epochs=0.5, losses={"kl": 1.0, "hidden": 1.0, "relations": 1.0}, checkpointing=checkpointing)
        stage(student, dataclasses.replace(lesson, work=lesson.work / str(checkpointing)))
        made.append(student)
    for one, other in zip(*(model.core.parameters() for model in made), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    core: Any = made[1].core
    assert not core.bert.encoder.layer[0].gradient_checkpointing


def test_checkpointing_is_for_transformers_models(picture_lesson: Lesson, conv: Conv) -> None:
    with pytest.raises(
        InputError, match="checkpointing is for transformers models; torch.nn:Identity is a module of one's own"
    ):
        Distill(checkpointing=True)(conv((8, 6), 1), picture_lesson)
