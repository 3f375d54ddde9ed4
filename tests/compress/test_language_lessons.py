"""Language models as students: packed lessons, several teachers, and texts that the student writes itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from potstill.compress.distill import Distill, Work
from potstill.compress.lesson import Lesson
from potstill.compress.on_policy import Writer
from potstill.compress.student import Student
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.errors import InputError
from potstill.validate.examples import IGNORED, Examples
from potstill.validate.predictor import TorchPredictor
from potstill.validate.task import TASKS, Model
from tests.predicted import predicted

TASK, CPU = TASKS["text-generation"], torch.device("cpu")


def read(source: Path, teacher: Model) -> Examples:
    return TASK.checked(TASK.examples(str(source), {}), (), encode=teacher.encode)


@pytest.fixture
def teacher(story_teacher: Path) -> Model:
    return TASK.load(Checkpoint(str(story_teacher)))


@pytest.fixture
def lesson(teacher: Model, story_files: dict[str, Path], tmp_path: Path) -> Lesson:
    """160 texts to learn, 40 held out."""
    train = read(story_files["train"], teacher)
    parts = train.take(range(160), "train"), train.take(range(160, 200), "held out")
    return Lesson(TASK, teacher, *parts, 0, tmp_path / "work", outputs=tmp_path / "outputs")


@pytest.fixture
def student(teacher: Model) -> Model:
    """Two of the teacher's layers, and a head and an embedding that were forgotten."""
    cut = Student(layers=2)(teacher, TASK, {}, 0)
    torch.manual_seed(0)
    core: Any = cut.core
    torch.nn.init.normal_(core.lm_head.weight, std=0.02)
    return cut


def perplexity(model: Model, teacher: Model, examples: Examples) -> float:
    rows = [predicted(TorchPredictor(one, "one", CPU), examples, TASK.length_of) for one in (model, teacher)]
    found = TASK.judge(*rows, examples).perplexity  # type: ignore[arg-type]
    assert found
    return found.value


def test_a_student_learns_and_the_teacher_runs_once(student: Model, teacher: Model, lesson: Lesson) -> None:
    before = perplexity(student, teacher, lesson.held_out)
    log = Distill(epochs=4, learning_rate=5e-3, batch_size=16)(student, lesson)
    after, best = (perplexity(one, teacher, lesson.held_out) for one in (student, teacher))
    assert best < after < min(1.6 * best, before / 2)
    assert log[-1]["taught_rows"] == len(lesson.train.labels) + len(lesson.held_out.labels)
    assert log[-1]["kept_rows"] > 3 * len(lesson.train.labels)


def test_the_loss_of_a_packed_batch_is_the_mean_over_its_tokens(
    student: Model, teacher: Model, lesson: Lesson, story_teacher: Path
) -> None:
    """0.9 · KL at temperature 1 and 0.1 · cross-entropy, in float64, of each text by itself."""
    work = Work(Distill(), student, lesson, CPU)
    batch = work.collate([("train", 0, i) for i in range(12)])
    assert len(batch["student"]["input_ids"]) < 12
    assert work.teacher
    parts = work.pupil(batch["student"], work.teacher(batch["teachers"]), batch["labels"], batch["keep"])
    loss = work.pupil.weighted(parts).item()
    work.close()
    core, sums, tokens = AutoModelForCausalLM.from_pretrained(story_teacher), np.zeros(2), 0
    own: Any = student.core.eval()
    for piece in lesson.train.rows(range(12))["tokens"]:
        ids = torch.tensor([piece])
        with torch.no_grad():
            p, q = (torch.log_softmax(one(input_ids=ids).logits[0, :-1].double(), 1) for one in (core, own))
        sums[0] += float((p.exp() * (p - q)).sum())
        sums[1] += float(-q.gather(1, ids[0, 1:, None]).sum())
        tokens += len(piece) - 1
    assert loss == pytest.approx((0.9 * sums[0] + 0.1 * sums[1]) / tokens, rel=1e-4)


def test_several_teachers_of_one_tokenizer(student: Model, teacher: Model, lesson: Lesson, tmp_path: Path) -> None:
    other = Student(layers=3)(teacher, TASK, {}, 0)
    both = replace(lesson, others=(other,), weights=(1.0, 1.0))
    work = Work(Distill(), student, both, CPU)
    batch = work.collate([("train", 0, i) for i in range(5)])
    assert work.teacher
    outputs = work.teacher(batch["teachers"]).outputs
    work.close()
    with torch.no_grad():
        logs = [torch.log_softmax(one.answers(batch["student"]), 1) for one in (teacher, other)]
    torch.testing.assert_close(outputs, (logs[0] + logs[1]) / 2)
    longer = replace(other, encode=replace(other.encode, max_length=9))  # type: ignore[type-var]
    with pytest.raises(InputError, match="has another tokenizer than .*; give models of one tokenizer"):
        Work(Distill(), student, replace(lesson, others=(longer,), weights=(1.0, 1.0)), CPU)


# Texts that the student writes.


def batch_of(lesson: Lesson, student: Model, items: list[int]) -> dict[str, Any]:
    work = Work(Distill(cache=False), student, lesson, CPU)
    try:
        return work.collate([("train", 0, i) for i in items])
    finally:
        work.close()


def test_a_batch_that_the_student_wrote(student: Model, teacher: Model, lesson: Lesson) -> None:
    batch, core = batch_of(lesson, student, [3, 7, 8]), student.core
    core.generation_config.eos_token_id = None  # type: ignore[union-attr]  # so that each is as long as it was
    torch.manual_seed(0)
    found = Writer(student, [teacher], lesson, 1.0)(batch, 0, CPU)
    assert set(found) == set(batch)
    assert found["part"] == "written"
    assert (found["labels"] == IGNORED).all()
    ids, places = found["student"]["input_ids"].reshape(-1), found["student"]["places"]
    texts = lesson.train.rows([3, 7, 8])["tokens"]
    at = 0
    for text in texts:
        kept = found["keep"][at:][: len(text) - 1]
        read = 1 + int(kept.int().argmax())  # tokens that were given
        assert 1 <= read <= max(1, round(len(text) / 2))
        assert ids[places[at : at + read]].tolist() == text[:read]
        assert kept[read - 1 :].all()
        at += len(kept)
    assert len(found["keep"]) == at == len(places)
    assert torch.equal(found["teachers"][0]["input_ids"], found["student"]["input_ids"])


def test_an_answer_is_written_to_its_prompt(student: Model, teacher: Model, lesson: Lesson, tmp_path: Path) -> None:
    source = tmp_path / "asked.jsonl"
    rows = [{"prompt": "tom sees the", "text": "old ann . tom sees ."}, {"prompt": "dog", "text": "finds the big cat"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = replace(lesson, train=read(source, teacher))
    found = Writer(student, [teacher], asked, 1.0)(batch_of(asked, student, [0, 1]), 0, CPU)
    ids, places, keep = found["student"]["input_ids"].reshape(-1), found["student"]["places"], found["keep"]
    words = student.encode.tokenizer.convert_ids_to_tokens(ids[places[:4]].tolist())  # type: ignore[attr-defined]
    assert words == ["<s>", "tom", "sees", "the"]
    assert keep[:4].tolist() == [False, False, False, True]
    assert int(keep.sum()) <= 7 + 5


def test_a_text_ends_where_the_student_ends_it(student: Model, lesson: Lesson) -> None:
    core: Any = student.core
    with torch.no_grad():
        core.lm_head.weight.zero_()
        core.lm_head.weight[2] = 1e3  # </s> wherever the state's sum is positive, else anything
        core.model.norm.weight.zero_()
        core.model.norm.weight[0] = 1.0
    writer = Writer(student, [], lesson, 1.0)
    torch.manual_seed(0)
    written = [writer.write([[1, 4]] * 20, [12] * 20, CPU)[i] for i in range(20)]
    assert all(one.index(2) == len(one) - 1 for one in written if 2 in one)
    assert all(2 < len(one) <= 12 for one in written)
    assert any(2 in one for one in written)


def test_the_share_and_the_seed_decide_which_batches(student: Model, lesson: Lesson) -> None:
    batch = batch_of(lesson, student, [0])

    def which(share: float, seed: int = 0) -> list[bool]:
        writer = Writer(student, [], replace(lesson, seed=seed), share)
        writer.write = lambda begun, *_: [[*one, 3] for one in begun]  # type: ignore[method-assign]
        return [writer(batch, step, CPU) is not batch for step in range(200)]

    assert 60 < sum(which(0.4)) < 100
    assert which(0.4) == which(0.4) != which(0.4, 1)
    assert all(which(1.0))


def test_a_student_learns_from_its_own_texts(student: Model, teacher: Model, lesson: Lesson) -> None:
    before = perplexity(student, teacher, lesson.held_out)
    losses: dict[str, Any] = {"reverse_kl": {"weight": 1.0, "temperature": 1.0}}
    Distill(epochs=2, learning_rate=5e-3, batch_size=16, on_policy=0.5, losses=losses)(student, lesson)
    assert perplexity(student, teacher, lesson.held_out) < before / 2
    assert not student.core.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_policy": 1.5}, "on_policy must be from 0 to 1, and is 1.5"),
        ({"on_policy": 0.5, "losses": {"hard": 1.0}}, "on_policy needs a loss that reads the teacher, such as kl"),
    ],
)
def test_what_cannot_be(settings: dict[str, Any], message: str, student: Model, lesson: Lesson) -> None:
    with pytest.raises((InputError, ValueError), match=message):
        Distill(**settings)(student, lesson)


def test_only_language_models_write(text_teacher: Path, lesson: Lesson) -> None:
    task = TASKS["text-classification"]
    model = task.load(Checkpoint(str(text_teacher)))
    with pytest.raises(InputError, match="on_policy is for language models, which write; the task is text-classific"):
        Distill(on_policy=0.5)(model, replace(lesson, task=task, teacher=model))
