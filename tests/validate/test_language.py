"""Language models: tokens, packing, and a scorecard that transformers' own loss agrees with."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from transformers import AutoModelForCausalLM

from potstill.validate.checkpoint import Checkpoint
from potstill.validate.errors import InputError
from potstill.validate.examples import IGNORED, Examples
from potstill.validate.gate import Gate
from potstill.validate.language import TextGeneration, check_tokenizer
from potstill.validate.metrics import Interval
from potstill.validate.model import Model
from potstill.validate.next_tokens import surprisals
from potstill.validate.predictor import TorchPredictor, predict
from potstill.validate.scorecard import Scorecard, scorecard_from_json
from potstill.validate.task import TASKS
from potstill.validate.tokens import USEFUL, TokensEncoder
from potstill.validate.units import PARSERS, parse_limit
from tests.conftest import stories, story_tokenizer

TASK, CPU = TASKS["text-generation"], torch.device("cpu")


def examples_of(source: Path, model: Model) -> Examples:
    return TASK.checked(TASK.examples(str(source), {}, judging=True), (), encode=model.encode, judging=True)


def written(path: Path, *rows: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def teacher(story_teacher: Path) -> Model:
    return TASK.load(Checkpoint(str(story_teacher)))


@pytest.fixture(scope="module")
def judged(teacher: Model, story_files: dict[str, Path]) -> Examples:
    return examples_of(story_files["eval"], teacher)


def small(kind: str) -> torch.nn.Module:
    """An untrained model of a kind."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 15}
    attention = {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
    config = {
        "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=15, n_positions=64),
        "qwen2": lambda: transformers.Qwen2Config(**sizes, **attention, num_key_value_heads=2),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**sizes, **attention),
        "mamba": lambda: transformers.MambaConfig(**sizes, state_size=8),
        "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=15),
    }[kind]()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gpt_neox", "mamba", "bloom"])
def test_no_example_sees_another(kind: str, tmp_path: Path, judged: Examples) -> None:
    """Packed or below one another: each token's logits are those of transformers on its text alone."""
    core = small(kind)
    core.save_pretrained(tmp_path)
    story_tokenizer().save_pretrained(tmp_path)
    model = TASK.load(Checkpoint(str(tmp_path)))
    rows = judged.rows(range(12))
    tensors = model.tensors(rows, CPU)
    assert (len(tensors["input_ids"]) == 12) == (kind in ("mamba", "bloom"))  # they take no positions
    core.eval()
    with torch.inference_mode():
        found = model.answers(tensors)
        alone = [core(input_ids=torch.tensor([tokens])).logits[0, :-1] for tokens in rows["tokens"]]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_packing_wastes_little(teacher: Model) -> None:
    encode, rng = teacher.encode, np.random.default_rng(0)
    for _ in range(50):
        pieces = [list(range(1, 1 + int(n))) for n in rng.integers(2, 64, size=int(rng.integers(1, 40)))]
        arrays = encode({"tokens": pieces})
        ids, positions = arrays["input_ids"], arrays["position_ids"]
        total = sum(map(len, pieces))
        assert total >= USEFUL * ids.size
        assert len(ids) <= -(-total // 64)
        assert positions.max() < 64
        flat, at = positions.reshape(-1), arrays["places"]
        ends = np.cumsum([len(piece) - 1 for piece in pieces])
        for piece, places in zip(pieces, np.split(at, ends[:-1]), strict=True):
            assert ids.reshape(-1)[places].tolist() == piece[:-1]
            assert flat[places].tolist() == list(range(len(piece) - 1))
        assert len(set(at.tolist())) == total - len(pieces)


def test_the_scorecard_is_that_of_transformers_own_loss(
    teacher: Model, judged: Examples, story_teacher: Path, tmp_path: Path
) -> None:
    core, other = AutoModelForCausalLM.from_pretrained(story_teacher), small("gpt_neox")
    other.save_pretrained(tmp_path / "other")
    story_tokenizer().save_pretrained(tmp_path / "other")
    student = TASK.load(Checkpoint(str(tmp_path / "other")), like=teacher)
    rows = [
        predict(TorchPredictor(one, name, CPU), judged, TASK.length_of, tmp_path / f"{name}.npy")
        for one, name in ((student, "student"), (teacher, "teacher"))
    ]
    card = TASK.judge(*rows, judged)
    sums, right, same, apart, tokens = np.zeros(2), np.zeros(2), 0, 0.0, 0
    for piece in judged.rows(range(len(judged)))["tokens"]:
        ids = torch.tensor([piece])
        with torch.no_grad():
            logits = [one(input_ids=ids).logits[0, :-1].double().numpy() for one in (other.eval(), core.eval())]
            sums += [one(input_ids=ids, labels=ids).loss.item() * (len(piece) - 1) for one in (other, core)]
        said = [one.argmax(1) for one in logits]
        right += [(one == np.array(piece[1:])).sum() for one in said]
        same += int((said[0] == said[1]).sum())
        q, p = (log_softmax(one, axis=1) for one in logits)
        apart += float((np.exp(p) * (p - q)).sum())
        tokens += len(piece) - 1
    assert card.perplexity
    assert card.perplexity.tokens == tokens == len(judged.labels)
    assert card.perplexity.value == pytest.approx(math.exp(sums[0] / tokens), rel=1e-4)
    assert card.perplexity.teacher == pytest.approx(math.exp(sums[1] / tokens), rel=1e-4)
    assert card.perplexity.ratio == pytest.approx(math.exp((sums[0] - sums[1]) / tokens), rel=1e-4)
    assert card.value == pytest.approx(right[0] / tokens, abs=1e-12)
    assert card.difference == pytest.approx((right[0] - right[1]) / tokens, abs=1e-12)
    assert card.agreement == pytest.approx(same / tokens, abs=2 / tokens)
    assert card.kl_nats == pytest.approx(apart / tokens, rel=1e-3)
    assert (card.metric, card.unit, card.examples) == ("next-token accuracy", "tokens", 60)
    assert scorecard_from_json(card.to_json()) == card
    size = sum(len(text) for text in judged.rows(range(len(judged)))["text"])
    assert card.perplexity.bits_per_byte == pytest.approx(sums[0] / math.log(2) / size, rel=1e-4)
    assert card.perplexity.teacher_bits_per_byte == pytest.approx(sums[1] / math.log(2) / size, rel=1e-4)
    assert card.also() == [
        f"perplexity {card.perplexity.value:.4g} ({card.perplexity.ratio:.3f} × the teacher’s)",
        f"{card.perplexity.bits_per_byte:.3f} bits a byte",
    ]


def test_pieces_of_one_text_are_drawn_together(teacher: Model, tmp_path: Path) -> None:
    """Intervals are over texts: pieces of one are no independent examples."""
    rng = np.random.default_rng(0)
    encode = TokensEncoder(story_tokenizer(), 4)
    texts = [" ".join(["tom sees the old ann ."] * 6)] * 9
    examples = TASK.checked(
        TASK.examples(str(written(tmp_path / "t.jsonl", *({"text": text} for text in texts))), {}), (), encode=encode
    )
    assert len(examples) == 9 * 9
    of = np.repeat(np.arange(81) // 9, np.diff(examples.offsets))  # type: ignore[arg-type]
    rows = rng.normal(size=(len(examples.labels), 15)) + rng.normal(size=(9, 15))[of]
    card = TASK.judge(rows, rows * 1.1, examples)
    by_text = [surprisals(rows, examples.labels)[of == i].mean() for i in range(9)]
    spread = np.std(by_text, ddof=1) / 3
    assert card.perplexity
    half = np.log(card.perplexity.interval.high / card.perplexity.interval.low) / 2
    assert 1.7 * spread < half < 3.2 * spread  # Student's t with 8 degrees of freedom: 2.3
    assert card.examples == 9


def test_a_long_text_is_cut_and_nothing_is_lost(teacher: Model, tmp_path: Path) -> None:
    text = " ".join(["tom sees the old ann ."] * 25)
    examples = examples_of(written(tmp_path / "long.jsonl", {"text": text}, {"text": "the cat"}), teacher)
    rows = examples.rows(range(len(examples)))
    tokens = story_tokenizer()(text)["input_ids"]
    assert [len(piece) for piece in rows["tokens"]] == [64, 64, 23, 3]
    assert [*chain(*rows["tokens"][:3])] == tokens
    assert "".join(rows["text"][:3]).replace(" ", "") == text.replace(" ", "")
    assert rows["document"] == [0, 0, 0, 1]
    assert examples.labels.tolist()[:63] == tokens[1:64]
    assert teacher.encode.truncated == 0
    just_over = examples_of(written(tmp_path / "over.jsonl", {"text": " ".join(["tom"] * 64)}), teacher)
    assert [len(piece) for piece in just_over.rows([0])["tokens"]] == [64]  # the 65th is predicted from nothing


def test_an_answer_is_predicted_and_its_prompt_is_read(story_teacher: Path, tmp_path: Path) -> None:
    model = TASK.load(Checkpoint(str(story_teacher)), max_length=9)
    source = written(
        tmp_path / "asked.jsonl",
        {"prompt": "tom sees", "text": "the old ann ."}, {"prompt": "dog finds the", "text": "big cat . tom sees ."},
    )  # fmt: skip
    examples = examples_of(source, model)
    ids = story_tokenizer().convert_tokens_to_ids
    assert list(examples.rows([0])["tokens"][0]) == [1, *ids(["tom", "sees", "the", "old", "ann", "."]), 2]
    assert examples.labels_of([0]).tolist() == [IGNORED, IGNORED, *ids(["the", "old", "ann", "."]), 2]
    assert len(examples.rows([1])["tokens"][0]) == 9
    assert model.encode.truncated == 1


def test_a_prompt_goes_through_the_chat_template(story_teacher: Path, tmp_path: Path) -> None:
    model = TASK.load(Checkpoint(str(story_teacher)))
    model.encode.tokenizer.chat_template = (  # type: ignore[attr-defined]
        "<s>{% for m in messages %}{{ ' the ' + m.content }}{% endfor %}{% if add_generation_prompt %} .{% endif %}"
    )
    examples = examples_of(written(tmp_path / "a.jsonl", {"prompt": "tom sees", "text": "ann"}), model)
    ids = story_tokenizer().convert_tokens_to_ids
    said = ids(["the", "tom", "sees", ".", "ann"])
    assert list(examples.rows([0])["tokens"][0]) == [1, *said, 2]
    assert examples.labels.tolist() == [IGNORED] * 4 + [said[-1], 2]


def test_an_exact_match_is_what_greedy_decoding_writes(story_teacher: Path, teacher: Model, tmp_path: Path) -> None:
    texts = [text.split() for text in stories(40, 7)]
    rows = [{"prompt": " ".join(text[:4]), "text": " ".join(text[4:6])} for text in texts]
    examples = examples_of(written(tmp_path / "asked.jsonl", *rows), teacher)
    logits = predict(TorchPredictor(teacher, "teacher", CPU), examples, None, tmp_path / "l.npy")
    core, tokenizer = AutoModelForCausalLM.from_pretrained(story_teacher), story_tokenizer()
    hits = []
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        wanted = [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], 2]
        said = core.generate(ids, do_sample=False, max_new_tokens=3, pad_token_id=0)[0, ids.shape[1] :].tolist()
        hits.append(said == wanted)
    with_end = TASK.judge(logits, logits, examples)
    assert with_end.beside == {"exact match": np.mean(hits)}
    known = examples.labels != 2  # the teacher never saw an end
    examples = replace(examples, labels=np.where(known, examples.labels, IGNORED))
    hits = []
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        wanted = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        said = core.generate(ids, do_sample=False, max_new_tokens=2, pad_token_id=0)[0, ids.shape[1] :].tolist()
        hits.append(said == wanted)
    assert 0 < np.mean(hits) < 1
    assert TASK.judge(logits, logits, examples).beside == {"exact match": np.mean(hits)}


def asked(path: Path, n: int = 30) -> tuple[Path, list[dict[str, Any]]]:
    """Who does what, with three choices."""
    does, rng, rows = {"tom": "sees", "ann": "likes", "dog": "finds", "cat": "hears"}, np.random.default_rng(3), []
    for _ in range(n):
        who = str(rng.choice([*does]))
        choices = [does[who], "the", f"{does[who]} the"]
        answer = int(rng.integers(3))
        rows.append({"prompt": who, "choices": choices, "answer": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def test_the_likeliest_of_several_choices(story_teacher: Path, teacher: Model, tmp_path: Path) -> None:
    """Against transformers, one question and one choice at a time."""
    path, rows = asked(tmp_path / "q.jsonl")
    examples = examples_of(path, teacher)
    assert len(examples) == 90
    other = small("gpt_neox").eval()
    core, tokenizer = AutoModelForCausalLM.from_pretrained(story_teacher).eval(), story_tokenizer()
    said = []
    for one in (other, core):
        found = []
        for row in rows:
            sums = []
            for text in row["choices"]:
                before = tokenizer(row["prompt"])["input_ids"]
                after = tokenizer(text, add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    logs = torch.log_softmax(one(input_ids=torch.tensor([before + after])).logits[0].double(), 1)
                sums.append(sum(float(logs[len(before) - 1 + i, token]) for i, token in enumerate(after)))
            found.append(sums)
        said.append(np.array(found))
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    student = TASK.load(Checkpoint(str(tmp_path / "other")), like=teacher)
    logits = [
        predict(TorchPredictor(one, "one", CPU), examples, None, tmp_path / f"{i}.npy")
        for i, one in enumerate((student, teacher))
    ]
    card = TASK.judge(logits[0], logits[1], examples)
    truth = np.array([row["answer"] for row in rows])
    size = np.array([[len(text) for text in row["choices"]] for row in rows])
    mine, theirs = (sums.argmax(1) for sums in said)
    assert card.metric == "accuracy of choices"
    assert card.value == (mine == truth).mean()
    assert card.teacher_value == (theirs == truth).mean()
    assert card.agreement == (mine == theirs).mean()
    assert card.lost == int(((theirs == truth) & (mine != truth)).sum())
    assert card.beside == {"by length in bytes": ((said[0] / size).argmax(1) == truth).mean()}
    assert card.perplexity is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "tom", "choices": ["sees", "likes"], "answer": 2}, "2 choices and the answer 2 in row 1; expected"),
        ({"prompt": "tom", "choices": ["sees"], "answer": 0}, "1 choices and the answer 0 in row 1; expected two"),
        ({"prompt": "tom", "choices": ["sees", ""], "answer": 0}, "choice 1 in row 1 of .* has no token to predict"),
    ],
)
def test_questions_that_cannot_be_asked(row: dict[str, Any], message: str, teacher: Model, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        examples_of(tmp_path / "q.jsonl", teacher)


def test_neither_texts_nor_questions(teacher: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no column 'text'"):
        examples_of(written(tmp_path / "t.jsonl", {"story": "tom sees"}), teacher)


def test_a_text_without_anything_to_predict(teacher: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"empty.jsonl has no token to predict in row 2: ''; leave such texts out"):
        examples_of(written(tmp_path / "empty.jsonl", {"text": "tom sees"}, {"text": ""}), teacher)


def test_another_tokenizer(teacher: Model, tmp_path: Path) -> None:
    small("gpt_neox").save_pretrained(tmp_path)
    tokenizer = story_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path)
    student = TASK.load(Checkpoint(str(tmp_path)), like=teacher)
    assert (student.encode.prefix, teacher.encode.prefix) == ("own_", "")  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"has another tokenizer than .*; give models of one tokenizer"):
        check_tokenizer(student, teacher)


def card_with(ratio: float, low: float, high: float) -> Scorecard:
    from potstill.validate.scorecard import Perplexity

    near = Interval(0.5, 0.5)
    perplexity = Perplexity(4 * ratio, Interval(4 * low, 4 * high), 4.0, ratio, Interval(low, high), 1000)
    return Scorecard("next-token accuracy", 50, "made", 0.5, near, 0.5, 0.0, Interval(0.0, 0.0), perplexity=perplexity)


@pytest.mark.parametrize(
    ("limit", "card", "outcome", "near"),
    [
        ("3%", card_with(1.02, 1.01, 1.029), "pass", None),
        ("3%", card_with(1.041, 1.032, 1.05), "fail", "4.1%"),
        ("3%", card_with(1.025, 1.02, 1.04), "undecided", None),
        ("150%", card_with(2.2, 2.1, 2.3), "pass", None),
    ],
)
def test_a_limit_on_perplexity(limit: str, card: Scorecard, outcome: str, near: str | None) -> None:
    rise: Callable[[str], Any] = PARSERS["max_perplexity_rise"]
    gate = Gate(max_drop=parse_limit("1pp"), max_perplexity_rise=rise(limit))
    (check,) = (one for one in gate(card).checks if one.limit == "max_perplexity_rise")
    assert (check.outcome, check.nearest) == (outcome, near)
    assert "rise in perplexity" in check.reason
    without = Scorecard("accuracy", 50, "made", 0.5, Interval(0, 1), 0.5, 0.0, Interval(0, 0))
    with pytest.raises(InputError, match=r"gate.max_perplexity_rise: accuracy has none; leave it out"):
        gate(without)


def test_the_task_is_told_by_the_architecture(story_teacher: Path) -> None:
    from potstill.pipeline.starter import task_of

    assert task_of(Checkpoint(str(story_teacher))) == TextGeneration.word
