"""A student with a tokenizer of its own: the same texts in the tokens of two models, and judged by bytes."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from potstill.validate.aligned import END, between, met, pieces, read_by
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.errors import InputError
from potstill.validate.examples import IGNORED, Examples
from potstill.validate.gate import Gate
from potstill.validate.model import Model
from potstill.validate.predictor import TorchPredictor
from potstill.validate.task import TASKS
from potstill.validate.units import parse_limit
from tests.byte_tokenizers import byte_tokenizer, save_small
from tests.conftest import stories
from tests.predicted import predicted

TASK, CPU = TASKS["text-generation"], torch.device("cpu")
ODD = ["naïve café → 3 €\n\n  two\tspaces 😀😀 end", "日本語のテキスト, und ein Wörtchen", "a", "   "]


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Any, Any]:
    """One that splits into little more than bytes, and one that knows long pieces."""
    return byte_tokenizer(ODD, 262), byte_tokenizer(stories(200, 5) + ODD, 420)


@pytest.fixture(scope="module")
def models(tokenizers: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """A teacher and a student."""
    folder = tmp_path_factory.mktemp("models")
    paths = [save_small(folder / name, one, 96) for name, one in zip("ts", tokenizers, strict=True)]
    teacher = TASK.load(Checkpoint(str(paths[0])))
    return teacher, TASK.load(Checkpoint(str(paths[1])), like=teacher)


def in_both(path: Path, rows: Sequence[dict[str, Any]], models: tuple[Model, Model]) -> Examples:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode: Any = models[0].encode
    read = TASK.examples(str(path), {}, judging=True)
    return TASK.checked(read, (), encode=replace(encode, beside=models[1].encode), judging=True)


def rows_of(models: tuple[Model, Model], examples: Examples) -> list[NDArray[np.float32]]:
    return [predicted(TorchPredictor(one, "one", CPU), read_by(examples, one.encode)) for one in reversed(models)]


def judged(models: tuple[Model, Model], examples: Examples) -> Any:
    teacher, student = models
    mine, theirs = rows_of(models, examples)
    return TASK.judge(mine, theirs, between(examples, student.encode, teacher.encode))


def bytes_upto(tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    """Bytes of the text up to the end of each token, by the tokens themselves."""
    spelled = [token if token not in ("<s>", "</s>") else "" for token in tokenizer.convert_ids_to_tokens(tokens)]
    return np.cumsum([len(one) for one in spelled]).tolist()  # type: ignore[no-any-return]


def surprisals(model: Model, tokens: Sequence[int]) -> NDArray[np.float64]:
    core: Any = model.core
    with torch.no_grad():
        logs = torch.log_softmax(core(input_ids=torch.tensor([[*tokens]])).logits[0, :-1].double(), 1)
    return -logs.gather(1, torch.tensor(tokens)[1:, None])[:, 0].numpy()


@pytest.mark.parametrize("most", [3, 7, 30, 1000])
def test_marks_are_where_both_have_a_boundary(most: int, models: tuple[Model, Model]) -> None:
    """By the bytes that each token of these tokenizers spells itself."""
    teacher, student = (replace(model.encode, max_length=most) for model in models)  # type: ignore[type-var]
    for text in [*stories(5, 3), *ODD]:
        sides = [one.spelled(text) for one in (teacher, student)]  # type: ignore[attr-defined]
        ends = [bytes_upto(one.tokenizer, side.tokens) for one, side in zip((teacher, student), sides, strict=True)]  # type: ignore[attr-defined]
        letters = {len(text[:i].encode()) for i in range(len(text) + 1)}
        common = sorted(set(ends[0]) & set(ends[1]) & letters)
        found = list(pieces(text, *sides))
        if not any(cut for _, cut in found) and most == 1000:
            assert [piece["text"] for piece, _ in found] == [text]
            assert np.cumsum(found[0][0]["spans"]).tolist() == common
        for piece, _ in found:
            for prefix, one in (("", teacher), ("own_", student)):
                tokens, at = piece[f"{prefix}tokens"], piece[f"{prefix}at"]
                assert len(tokens) <= most
                spelled = bytes_upto(one.tokenizer, tokens)  # type: ignore[attr-defined]
                assert np.diff([spelled[i] for i in at]).tolist() == piece["spans"][1:]


def test_a_long_text_is_cut_where_both_can(models: tuple[Model, Model]) -> None:
    teacher, student = (replace(model.encode, max_length=40) for model in models)  # type: ignore[type-var]
    text = " ".join(stories(9, 8))
    found = list(pieces(text, teacher.spelled(text), student.spelled(text)))  # type: ignore[attr-defined]
    assert len(found) > 3
    assert not any(cut for _, cut in found)
    assert "".join(piece["text"] for piece, _ in found) == text
    for prefix, one in (("", teacher), ("own_", student)):
        tokens = [token for piece, _ in found for token in piece[f"{prefix}tokens"]]
        assert tokens == one.tokenizer(text)["input_ids"]  # type: ignore[attr-defined]


def test_what_is_longer_than_a_piece_between_two_marks_is_cut_off(models: tuple[Model, Model]) -> None:
    teacher, student = models[0].encode, models[1].encode
    text = "tom sees the old ann ."
    short = replace(teacher.spelled(text), most=4)  # type: ignore[attr-defined]
    whole = student.spelled(text)  # type: ignore[attr-defined]
    wide = replace(whole, tokens=[0, 5], ends=np.array([0, len(text)]))
    ((piece, cut),) = list(pieces(text, short, wide))
    assert cut
    assert (len(piece["tokens"]), piece["at"], piece["spans"]) == (4, [0], [0])


def test_probability_of_a_byte_is_that_of_the_whole_text(models: tuple[Model, Model], tmp_path: Path) -> None:
    """In float64 from each model's own reading of each text: with <s> before it, all its bytes are predicted."""
    texts = [text[:60] for text in stories(12, 4)] + ["naïve 😀 café", "日本語のテキスト"]
    examples = in_both(tmp_path / "t.jsonl", [{"text": text} for text in texts], models)
    card = judged(models, examples)
    size, sums, tokens = sum(len(text.encode()) for text in texts), [], 0
    for model in models:
        encode: Any = model.encode
        ids = [encode.tokenizer(text)["input_ids"] for text in texts]
        sums.append(sum(surprisals(model, one).sum() for one in ids))
        tokens = tokens or sum(len(one) - 1 for one in ids)
    assert card.metric == "probability of a byte"
    assert card.value == pytest.approx(math.exp(-sums[1] / size), rel=1e-3)
    assert card.teacher_value == pytest.approx(math.exp(-sums[0] / size), rel=1e-3)
    assert card.perplexity.bits_per_byte == pytest.approx(sums[1] / math.log(2) / size, rel=1e-3)
    assert card.perplexity.teacher_bits_per_byte == pytest.approx(sums[0] / math.log(2) / size, rel=1e-3)
    assert card.perplexity.tokens == tokens
    assert card.perplexity.value == pytest.approx(math.exp(sums[1] / tokens), rel=1e-3)
    assert card.perplexity.ratio == pytest.approx(math.exp((sums[1] - sums[0]) / tokens), rel=1e-3)
    assert card.interval.low < card.value < card.interval.high
    assert (card.agreement, card.kl_nats, card.lost) == (None, None, None)


def test_beside_itself_a_model_loses_nothing(models: tuple[Model, Model], tmp_path: Path) -> None:
    examples = in_both(tmp_path / "t.jsonl", [{"text": text} for text in stories(8, 4)], models)
    rows = rows_of(models, examples)
    for model, mine in zip(reversed(models), rows, strict=True):
        card = TASK.judge(mine, mine, between(examples, model.encode, model.encode))
        assert (card.difference, card.perplexity.ratio) == (0, 1)  # type: ignore[union-attr]


def test_rows_of_other_examples_are_refused(models: tuple[Model, Model], tmp_path: Path) -> None:
    examples = in_both(tmp_path / "t.jsonl", [{"text": "tom sees the old ann ."}], models)
    mine, theirs = rows_of(models, examples)
    with pytest.raises(InputError, match=r"a model gave \d+ rows for \d+ tokens; predict t.jsonl anew"):
        TASK.judge(mine[:-1], theirs, between(examples, models[1].encode, models[0].encode))


def test_limits_on_tokens_are_refused(models: tuple[Model, Model], tmp_path: Path) -> None:
    examples = in_both(tmp_path / "t.jsonl", [{"text": text} for text in stories(8, 4)], models)
    card = judged(models, examples)
    with pytest.raises(InputError, match="gate.min_agreement: probability of a byte has none; leave it out"):
        Gate(parse_limit("1pp"), min_agreement=0.9)(card)
    assert Gate(parse_limit("50pp"), max_perplexity_rise=50.0)(card).passed


def test_answers_are_read_after_their_prompts(models: tuple[Model, Model], tmp_path: Path) -> None:
    teacher, student = models
    rows = [{"prompt": "tom sees", "text": " the old ann ."}, {"prompt": "dog", "text": " finds the big cat ."}]
    examples = in_both(tmp_path / "a.jsonl", rows, models)
    card, sums, exact = judged(models, examples), np.zeros(2), []
    for row in rows:
        for i, model in enumerate((teacher, student)):
            tokenizer: Any = model.encode.tokenizer  # type: ignore[attr-defined]
            before = tokenizer(row["prompt"])["input_ids"]
            answer = [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            sums[i] += surprisals(model, before + answer)[len(before) - 1 :].sum()
            core: Any = model.core
            with torch.no_grad():
                said = core(input_ids=torch.tensor([before + answer])).logits[0].argmax(1)
            exact.append(said[len(before) - 1 : -1].tolist() == answer)
    size = sum(len(row["text"]) for row in rows)
    assert card.perplexity.bits_per_byte == pytest.approx(sums[1] / math.log(2) / size, rel=1e-3)
    assert card.perplexity.teacher_bits_per_byte == pytest.approx(sums[0] / math.log(2) / size, rel=1e-3)
    assert card.beside == {"exact match": np.mean(exact[1::2])}
    short = replace(teacher, encode=replace(teacher.encode, max_length=14))  # type: ignore[type-var]
    examples = in_both(tmp_path / "a.jsonl", rows, (short, student))
    assert max(len(one) for one in examples.rows([0, 1])["tokens"]) == 14


def test_choices_by_each_models_own_tokens(models: tuple[Model, Model], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": text[:9], "choices": [text[9:15], text[9:21], " naïve"], "answer": int(rng.integers(3))}
        for text in stories(30, 6)
    ]
    card = judged(models, in_both(tmp_path / "q.jsonl", rows, models))
    said: list[list[int]] = [[], []]
    for row in rows:
        for i, model in enumerate(models):
            tokenizer: Any = model.encode.tokenizer  # type: ignore[attr-defined]
            before = tokenizer(row["prompt"])["input_ids"]
            after = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in row["choices"]]  # type: ignore[attr-defined]
            said[i].append(int(np.argmin([surprisals(model, before + one)[len(before) - 1 :].sum() for one in after])))
    truth = np.array([row["answer"] for row in rows])
    assert card.value == (np.array(said[1]) == truth).mean()
    assert card.teacher_value == (np.array(said[0]) == truth).mean()
    assert card.agreement == (np.array(said[0]) == np.array(said[1])).mean()
    with pytest.raises(InputError, match="choice 1 in row 1 of q.jsonl has no token to predict after its prompt"):
        in_both(tmp_path / "q.jsonl", [{"prompt": "tom", "choices": ["a", ""], "answer": 0}], models)


def test_met_rows_come_after_the_same_text(models: tuple[Model, Model], tmp_path: Path) -> None:
    teacher, student = models
    examples = in_both(tmp_path / "t.jsonl", [{"text": text} for text in [*stories(4, 4), *ODD[:2]]], models)
    rows = examples.rows(range(len(examples)))
    ours, theirs = met(rows)
    assert len(ours) == len(theirs) > 50

    def read(model: Model, prefix: str) -> list[str]:
        tokenizer: Any = model.encode.tokenizer  # type: ignore[attr-defined]
        found = [[tokenizer.decode(one[: i + 1]) for i in range(len(one) - 1)] for one in rows[f"{prefix}tokens"]]
        return [text for texts in found for text in texts]

    mine, others = read(student, "own_"), read(teacher, "")
    assert [mine[i] for i in ours] == [others[i] for i in theirs]


def test_texts_without_a_mark_are_refused(models: tuple[Model, Model], tmp_path: Path) -> None:
    class Elsewhere(type(models[1].encode)):  # type: ignore[misc]
        def spelled(self, *args: Any) -> Any:
            found = super().spelled(*args)
            return replace(found, ends=found.ends * 2 + 1001)

    odd = replace(models[1], encode=Elsewhere(**vars(models[1].encode)))
    with pytest.raises(InputError, match="in no text of t.jsonl do the tokens of teacher and student end at the same"):
        in_both(tmp_path / "t.jsonl", [{"text": "tom sees"}], (models[0], odd))
    with pytest.raises(InputError, match="t.jsonl has no token to predict in row 1: ''; leave such texts out"):
        in_both(tmp_path / "t.jsonl", [{"text": ""}], models)


def test_a_token_that_ends_texts_counts_where_both_have_it(tokenizers: tuple[Any, Any], models: Any) -> None:
    from tokenizers import processors

    ended = byte_tokenizer(ODD, 262)
    ended.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    encode = replace(models[0].encode, tokenizer=ended)
    with_end, without = encode.spelled("tom"), models[1].encode.spelled("tom")
    assert with_end.ends.tolist()[-2:] == [3, END]
    ((piece, _),) = pieces("tom", with_end, with_end)
    assert (piece["at"][-2:], piece["spans"][-2:]) == ([len(piece["tokens"]) - 2, len(piece["tokens"]) - 1], [1, 0])
    ((piece, _),) = pieces("tom", with_end, without)
    assert piece["at"][-1] == len(piece["tokens"]) - 2


def test_labels_are_each_models_own(models: tuple[Model, Model], tmp_path: Path) -> None:
    examples = in_both(tmp_path / "a.jsonl", [{"prompt": "tom", "text": " sees"}] * 2, models)
    for model in models:
        tokenizer: Any = model.encode.tokenizer  # type: ignore[attr-defined]
        before, after = tokenizer("tom")["input_ids"], tokenizer(" sees", add_special_tokens=False)["input_ids"]
        wanted = [*[IGNORED] * (len(before) - 1), *after, 1] * 2
        assert read_by(examples, model.encode).labels.tolist() == wanted
