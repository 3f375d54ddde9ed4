"""Prompts in, rows out: which stay, and what is told of the rest."""

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.compress.api_settings import ApiTeacher
from potstill.compress.generate import generate, record_of
from potstill.validate.errors import InputError
from tests.service import Ask, Says, Seen, Service, completion, rows


def by_prompt(**texts: list[str]) -> Any:
    """Answers by prompt, the samples of each in turn."""
    waiting = {prompt: list(said) for prompt, said in texts.items()}
    return lambda seen: Says(completion(waiting[seen.prompt].pop(0)))


def test_right_answers_stay(service: Service, ask: Ask, tmp_path: Path) -> None:
    service.answer = by_prompt(sum=["<think>2 + 2</think>It is 4.", "5"], capital=["Paris", "The answer is **paris**"])
    prompts = {"prompt": "sum", "answer": 4}, {"prompt": "capital", "answer": "Paris"}
    record = ask(*prompts, check="exact", samples=2, concurrency=1)
    assert [(row["prompt"], row["sample"], row["reasoning"]) for row in rows(tmp_path)] == [
        ("sum", 0, "2 + 2"), ("capital", 0, ""), ("capital", 1, ""),
    ]  # fmt: skip
    assert (record.kept, record.dropped) == (3, {"wrong": 1})


def test_the_majority_stays(service: Service, ask: Ask, tmp_path: Path) -> None:
    service.answer = by_prompt(a=["so 4", "5", "4.0"], b=["1", "2", "3"])
    record = ask("a", "b", check="vote", samples=3, concurrency=1)
    assert [row["text"] for row in rows(tmp_path)] == ["so 4", "4.0"]
    assert record.dropped == {"outvoted": 1, "no majority": 3}


def test_what_the_judge_says_yes_to_stays(service: Service, ask: Ask, tmp_path: Path) -> None:
    says = {"good": "Yes.", "bad": "<think>yes?</think>No", "dark": "perhaps", "cut": "yes"}

    def answer(seen: Seen) -> Says:
        if seen.body["model"] == "big":
            return Says(completion(f"it is {seen.prompt}", finish_reason="length" if seen.prompt == "cut" else "stop"))
        assert (seen.body["temperature"], seen.body["max_tokens"]) == (0, 9)
        return Says(completion(next(said for word, said in says.items() if f"it is {word}" in seen.prompt)))

    service.answer = answer
    judge = {"api": service.url, "model": "judge", "max_tokens": 9}
    record = ask(*says, check="judge", judge=judge, concurrency=1)
    assert [row["text"] for row in rows(tmp_path)] == ["it is good"]
    assert record.dropped == {"judge says no": 1, "judge unclear": 1, "truncated": 1}
    assert record.requests == {"teacher": 4, "judge": 3}
    asked = len(service.seen)
    assert ask(*says, check="judge", judge=judge).kept == 1
    assert len(service.seen) == asked


def test_samples_that_are_the_same_are_judged_once(service: Service, ask: Ask) -> None:
    service.answer = lambda seen: Says(completion("yes"), after=0.05)
    record = ask("a", samples=4, check="judge", judge={"api": service.url, "model": "judge"})
    assert (record.kept, record.requests) == (4, {"teacher": 4, "judge": 1})
    assert ask("a", samples=4, check="judge", judge={"api": service.url, "model": "judge"}).kept == 4


def test_a_judge_has_its_own_number_of_requests_at_once(service: Service, ask: Ask) -> None:
    judge = Service()
    try:

        def answer(seen: Seen) -> Says:
            judge.hold_until(2)
            return Says(completion("yes"), after=0.02)

        judge.answer = answer
        of_judge = {"api": judge.url, "model": "judge", "concurrency": 2}
        assert ask(*"abcdefgh", check="judge", judge=of_judge).kept == 8
        assert judge.most_at_once == 2
    finally:
        judge.close()


def test_an_answer_that_was_not_judged_is_dropped(service: Service, ask: Ask) -> None:
    def answer(seen: Seen) -> Says:
        if seen.body["model"] == "big":
            return Says(completion(f"it is {seen.prompt}"))
        return Says({"detail": "no"}, 400) if "it is b" in seen.prompt else Says(completion("yes"))

    service.answer = answer
    judge = {"api": service.url, "model": "judge"}
    record = ask("a", "b", check="judge", judge=judge, concurrency=1)
    assert (record.kept, record.dropped, record.missing) == (1, {"not judged": 1}, {})


def test_answers_that_are_none_are_dropped_whatever_the_check(service: Service, ask: Ask) -> None:
    said = {
        "cut": completion("half a", finish_reason="length"),
        "empty": completion("<think>hm</think>"),
        "refused": completion(None, message={"refusal": "I will not"}),
        "filtered": completion("", finish_reason="content_filter"),
        "fine": completion("yes"),
    }
    service.answer = lambda seen: Says(said[seen.prompt])
    record = ask(*said)
    assert record.dropped == {"truncated": 1, "empty": 1, "refusal": 2}
    assert record.finish_reasons == {"stop": 3, "length": 1, "content_filter": 1}
    assert record.kept == 1
    record = ask(*said, keep_truncated=True)
    assert (record.kept, record.dropped, len(service.seen)) == (2, {"empty": 1, "refusal": 2}, 5)


def test_a_refusal_in_words_is_counted_and_stays(service: Service, ask: Ask) -> None:
    service.answer = by_prompt(a=["I'm sorry, but I can't help with that."], b=["Sorry is a card game."])
    record = ask("a", "b")
    assert (record.kept, record.refusals, record.dropped) == (2, 1, {})


def test_messages_are_sent_and_kept_as_they_are(service: Service, ask: Ask, tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "x"},
    ]
    own = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "y"}]
    ask({"messages": chat}, {"messages": own}, system="Be short.", concurrency=1)
    assert [seen.body["messages"] for seen in service.seen] == [
        [{"role": "system", "content": "Be short."}, *chat],
        own,
    ]
    assert [row["messages"] for row in rows(tmp_path)] == [chat, own]
    assert "prompt" not in rows(tmp_path)[0]


def test_a_prompt_is_asked_once_and_repeats_are_told(service: Service, ask: Ask) -> None:
    record = ask("a", "b", "a")
    assert (len(service.seen), record.samples) == (2, 2)
    assert (record.prompts["count"], record.prompts["repeated"]) == (2, 1)


def test_the_record_says_how_the_data_were_made(service: Service, ask: Ask, tmp_path: Path) -> None:
    ask("a", seed=3)
    record = json.loads(record_of(tmp_path / "out.jsonl").read_text())
    assert record["settings"]["model"] == "big"
    assert record["settings"]["seed"] == 3
    assert record["output"]["file"] == "out.jsonl"
    assert set(record["versions"]) == {"potstill"}
    assert record["made"].endswith("+00:00")


def test_rows_are_whole_or_not_there(service: Service, ask: Ask, tmp_path: Path) -> None:
    service.answer = lambda seen: Says({"detail": "no"}, 400)
    with pytest.raises(InputError):
        ask("a")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == [
        "out.jsonl.requests.jsonl", "prompts.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "settings", "words"),
    [
        ("p.jsonl", "nonsense", {}, 'p.jsonl, line 1: not JSON; expected {"prompt"'),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "a"}', {}, "p.jsonl, line 2: no prompt; expected"),
        ("p.jsonl", '{"prompt": "a", "messages": []}', {}, "line 1: no prompt; expected"),
        ("p.jsonl", '{"prompt": " "}', {}, "line 1: no prompt; expected"),
        ("p.jsonl", '{"messages": "a"}', {}, "line 1: no prompt; expected"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', {}, "line 1: no prompt; expected"),
        ("p.jsonl", "[1]", {}, "line 1: no prompt; expected"),
        (
            "p.jsonl",
            '{"prompt": "a"}',
            {"check": "exact"},
            "line 1: no answer; check: exact compares with",
        ),
        ("p.jsonl", '{"prompt": "a", "answer": [1]}', {}, "line 1: the answer is [1], expected text or a number"),
        (
            "p.jsonl",
            '{"messages": [{"role": "user", "content": "a"}]}',
            {"completions": True},
            "line 1: messages are for chat; completions takes a prompt",
        ),
        ("p.jsonl", '{"prompt": "so \\ud83d"}', {}, "p.jsonl, line 1: holds half a sign (a lone surrogate)"),
        ("p.jsonl", "\n\n", {}, "p.jsonl has no prompt in it"),
        ("p.csv", "a", {}, "p.csv is no file of prompts; expected .jsonl, or .txt with a prompt on each line"),
    ],
)
def test_prompts_that_are_none(
    tmp_path: Path, service: Service, name: str, text: str, settings: dict[str, Any], words: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        generate(ApiTeacher(api=service.url, model="big", **settings), tmp_path / name, tmp_path / "out.jsonl")
    assert words in str(caught.value)
    assert service.seen == []


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    teacher, prompts = ApiTeacher(api="http://localhost", model="big"), tmp_path / "p.txt"
    with pytest.raises(InputError, match=r"p\.txt is not there; expected \.jsonl, or \.txt"):
        generate(teacher, prompts, tmp_path / "out.jsonl")
    prompts.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match=r"p\.txt is no text in UTF-8: invalid start byte"):
        generate(teacher, prompts, tmp_path / "out.jsonl")
    with pytest.raises(InputError, match=r"p\.txt would replace the prompts; give --out another name"):
        generate(teacher, prompts, prompts)
    with pytest.raises(InputError, match="is a folder; expected the name of a file to write"):
        generate(teacher, prompts, tmp_path)
