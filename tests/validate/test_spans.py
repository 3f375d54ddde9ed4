"""Questions and the spans that answer them: tokens, targets, and SQuAD's F1 and exact match by hand."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import IGNORED
from potstill.validate.errors import InputError
from potstill.validate.model import MASKED, Model
from potstill.validate.predictor import TorchPredictor
from potstill.validate.spans import SpansEncoder, best_span, squad_scores
from potstill.validate.task import TASKS
from tests.predicted import predicted

SPANS = TASKS["question-answering"]
CPU = torch.device("cpu")


@pytest.fixture
def model(span_teacher: Path) -> Model:
    return SPANS.load(Checkpoint(str(span_teacher)))


def row(question: str, context: str, *answers: str) -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    return {"question": question, "context": context, "answers": {"text": [*answers], "answer_start": starts}}


def columns(*rows: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: [one[name] for one in rows] for name in rows[0]}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_targets_are_the_tokens_of_the_answer(model: Model) -> None:
    person = row("who", "the film with anna smith is good", "anna smith")
    rows = columns(person, row("where is it", "new parisian", "parisian"))
    tensors = model.tensors(rows, CPU)
    tokens = [model.encode.tokenizer.convert_ids_to_tokens(ids) for ids in tensors["input_ids"]]  # type: ignore[attr-defined]
    spans = tensors["targets"].reshape(2, 2).tolist()
    assert [tokens[i][a : b + 1] for i, (a, b) in enumerate(spans)] == [["anna", "smith"], ["paris", "##ian"]]
    inside = [np.flatnonzero(one) for one in tensors["context"].numpy()]
    context = [[tokens[i][j] for j in places] for i, places in enumerate(inside)]
    assert context == [["the", "film", "with", "anna", "smith", "is", "good"], ["new", "paris", "##ian"]]


def test_rows_are_starts_and_ends_within_the_context(model: Model) -> None:
    rows = columns(row("who", "anna smith", "anna"), row("where is it", "the film with a new oslo", "oslo"))
    tensors = model.tensors(rows, CPU)
    outputs = model.module(*model.batch(rows, CPU))
    found = model.answers(tensors)
    assert found.shape == (4, tensors["input_ids"].shape[1])
    for i in range(2):
        inside = tensors["context"][i] == 1
        torch.testing.assert_close(found[2 * i][inside], outputs[i, inside, 0])
        torch.testing.assert_close(found[2 * i + 1][inside], outputs[i, inside, 1])
        assert (found[2 * i : 2 * i + 2, ~inside] == MASKED).all()


def test_an_answer_that_is_cut_off_has_no_target(span_teacher: Path) -> None:
    model = SPANS.load(Checkpoint(str(span_teacher)), max_length=8)
    rows = columns(row("who", "the film with a plot and anna", "anna"))
    assert model.tensors(rows, CPU)["targets"].tolist() == [IGNORED, IGNORED]
    assert model.encode.truncated == 1
    with pytest.raises(InputError, match="a question fills all of max_length"):
        model.encode(columns(row("who is it and who is it and who", "anna", "anna")))


@pytest.mark.parametrize(
    ("starts", "ends", "expected"),
    [
        ([0, 5, 1, 0], [0, 0, 4, 1], (1, 2)),
        ([0, 0, 5, 1], [0, 6, 1, 4], (2, 3)),  # the best end stands before the best start
        ([MASKED] * 4, [MASKED] * 4, None),
    ],
)
def test_the_best_span(starts: list[float], ends: list[float], expected: tuple[int, int] | None) -> None:
    assert best_span(np.array(starts, dtype=np.float32), np.array(ends, dtype=np.float32)) == expected


def test_the_best_span_is_that_of_trying_all() -> None:
    starts, ends = np.random.default_rng(0).normal(size=(2, 60)).astype(np.float32)
    spans = [(i, j) for i in range(60) for j in range(i, min(i + 30, 60))]
    assert best_span(starts, ends) == max(spans, key=lambda span: float(starts[span[0]]) + float(ends[span[1]]))


def by_hand(said: str, gold: str) -> tuple[float, float]:
    """SQuAD 1.1's F1 and exact match for one true answer, written anew."""
    a, b = (re.sub(r"[^\w\s]", "", text.lower()).split() for text in (said, gold))
    a, b = ([word for word in words if word not in ("a", "an", "the")] for words in (a, b))
    left, common = list(b), 0
    for word in a:
        if word in left:
            left.remove(word)
            common += 1
    precision, recall = common / max(len(a), 1), common / max(len(b), 1)
    return (2 * precision * recall / (precision + recall) if common else 0.0), float(a == b)


@pytest.mark.parametrize(
    ("said", "golds"),
    [
        ("The Eiffel Tower.", ["eiffel tower"]),
        ("in Paris, France", ["Paris", "Paris, France", "the city of Paris"]),
        ("nothing", ["something"]),
        ("", ["something"]),
        ("to be or not to be", ["to be to be"]),
    ],
)
def test_scores_are_those_of_squad(said: str, golds: list[str]) -> None:
    each = [by_hand(said, gold) for gold in golds]
    assert squad_scores(said, golds) == pytest.approx((max(f for f, _ in each), max(e for _, e in each)))


def test_a_trained_model_is_right(model: Model, span_files: dict[str, Path]) -> None:
    examples = SPANS.checked(SPANS.examples(str(span_files["eval"]), {}, judging=True), (), judging=True)
    rows = predicted(TorchPredictor(model, "teacher", CPU, batch_size=16), examples, "context")
    few = examples.take(range(10), "ten")
    alone = predicted(TorchPredictor(model, "teacher", CPU, batch_size=1), few)
    np.testing.assert_allclose(rows[:20, : alone.shape[1]], alone, rtol=2**-10, atol=1e-4)
    assert (rows[:20, alone.shape[1] :] == MASKED).all()
    card = SPANS.judge(rows, rows, examples, model.encode)
    assert (card.metric, card.agreement, card.difference) == ("SQuAD F1", 1.0, 0.0)
    assert card.value > 0.85
    assert card.value >= card.beside["exact match"] > 0.7
    worse = rows + np.random.default_rng(0).normal(size=rows.shape).astype(np.float32) * 4
    card = SPANS.judge(np.where(rows <= MASKED, rows, worse), rows, examples, model.encode)
    assert card.difference_interval.low < card.difference < card.difference_interval.high < 0
    assert model.encode.truncated == 0


@pytest.mark.parametrize(
    ("answers", "match"),
    [
        ({"text": [], "answer_start": []}, "0 texts and 0 starts of answers in row 2; expected at least one"),
        ({"text": ["a"], "answer_start": []}, "1 texts and 0 starts"),
    ],
)
def test_questions_without_an_answer_are_refused(tmp_path: Path, answers: dict[str, Any], match: str) -> None:
    rows = [row("who", "anna", "anna"), {"question": "who", "context": "anna", "answers": answers}]
    with pytest.raises(InputError, match=match):
        SPANS.examples(write(tmp_path / "a.jsonl", rows), {})


def test_another_tokenizer_is_refused(model: Model, tag_teacher: Path, text_teacher: Path) -> None:
    with pytest.raises(InputError, match="another tokenizer than its teacher"):
        SPANS.load(Checkpoint(str(text_teacher)), (), like=model)


def test_rows_over_other_tokens_are_refused(model: Model, span_files: dict[str, Path]) -> None:
    examples = SPANS.examples(str(span_files["eval"]), {}).take([0], "one")
    assert isinstance(model.encode, SpansEncoder)
    with pytest.raises(InputError, match="must be over the same tokens"):
        SPANS.judge(np.zeros((2, 9), np.float32), np.zeros((2, 8), np.float32), examples, model.encode)


def test_rows_that_are_padded_further_are_the_same_answers(model: Model, span_files: dict[str, Path]) -> None:
    """A package with one length for all pads to it, its teacher to the longest of a batch."""
    examples = SPANS.examples(str(span_files["eval"]), {}).take(range(20), "some")
    rows = predicted(TorchPredictor(model, "teacher", CPU), examples, SPANS.length_of)
    wider = np.pad(rows, ((0, 0), (0, 8)), constant_values=MASKED)
    card = SPANS.judge(rows, rows, examples, model.encode)
    assert SPANS.judge(wider, rows, examples, model.encode) == SPANS.judge(rows, wider, examples, model.encode) == card
    assert card.agreement == 1
