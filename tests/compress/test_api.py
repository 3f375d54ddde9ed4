"""A service as it is asked, against a real server with faults on purpose."""

import json
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from potstill.compress import api
from potstill.compress.api_settings import ApiTeacher
from potstill.compress.generate import record_of
from potstill.validate.errors import InputError, Unreachable
from tests.service import Ask, Says, Seen, Service, completion, journal, rows

KEY = "sk-very-secret-0123456789abcdef"


def first_then(*first: Says) -> Callable[[Seen], Says]:
    """Says these things once each, whatever is asked, and then answers."""
    waiting = list(first)
    return lambda seen: waiting.pop(0) if waiting else Says(completion(f"about {seen.prompt}"))


def test_a_request_says_what_was_set_and_its_answer_is_a_row(service: Service, ask: Ask, tmp_path: Path) -> None:
    record = ask("frogs", system="Be short.", temperature=0.5, top_p=0.9, max_tokens=77, seed=40, samples=2)
    assert [seen.path for seen in service.seen] == ["/v1/chat/completions"] * 2
    assert sorted(seen.body.pop("seed") for seen in service.seen) == [40, 41]
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "frogs"}]
    sent = {"model": "big", "messages": messages, "max_tokens": 77, "temperature": 0.5, "top_p": 0.9}
    assert [seen.body for seen in service.seen] == [sent] * 2
    assert "authorization" not in service.seen[0].headers
    row = {"prompt": "frogs", "text": "about frogs", "reasoning": "", "teacher": "big-1", "finish_reason": "stop"}
    more = {"endpoint": service.url.removeprefix("http://"), "tokens": [10, 5], "grown": False}
    assert rows(tmp_path) == [row | more | {"sample": 0}, row | more | {"sample": 1}]
    assert (record.samples, record.answered, record.kept, record.requests) == (2, 2, 2, {"teacher": 2})
    assert record.tokens == {"teacher": [20, 10]}
    assert json.loads(record_of(tmp_path / "out.jsonl").read_text())["models"] == {"big-1": 2}


def test_settings_that_are_not_given_are_not_sent(service: Service, ask: Ask) -> None:
    ask("frogs")
    assert set(service.seen[0].body) == {"model", "messages", "max_tokens"}


def test_a_base_model_is_asked_by_the_bare_prompt(service: Service, ask: Ask, tmp_path: Path) -> None:
    service.answer = lambda seen: Says({"choices": [{"text": " and toads", "finish_reason": "stop"}]})
    ask("frogs", completions=True)
    assert (service.seen[0].path, service.seen[0].body["prompt"]) == ("/v1/completions", "frogs")
    assert (rows(tmp_path)[0]["text"], rows(tmp_path)[0]["teacher"]) == (" and toads", "big")


def test_openais_own_hosts_name_the_longest_answer_otherwise() -> None:
    for host, name in (("api.openai.com", "max_completion_tokens"), ("notopenai.com", "max_tokens")):
        teacher = ApiTeacher(api=f"https://{host}", model="big")
        assert api.request_body(teacher, [], 9)[name] == 9


def test_no_more_are_asked_at_once_than_wished(service: Service, ask: Ask) -> None:
    def answer(seen: Seen) -> Says:
        service.hold_until(3)
        return Says(completion("yes"), after=0.05)

    service.answer = answer
    ask(*map(str, range(12)), concurrency=3)
    assert service.most_at_once == 3


def test_faults_are_tried_again_and_counted(service: Service, ask: Ask, tmp_path: Path) -> None:
    service.answer = first_then(
        Says({"error": {"message": "oops"}}, 500),
        Says(cut=True),
        Says(b"<html>"),
        Says({"choices": []}),
        Says(completion("late"), after=3),
    )
    record = ask("frogs", concurrency=1, timeout=1)
    assert rows(tmp_path)[0]["text"] == "about frogs"
    assert len(service.seen) == 6
    said = {entry["why"] for entry in journal(tmp_path) if "failed" in entry}
    assert said == {
        "500 Internal Server Error: oops",
        "the connection broke: RemoteProtocolError",
        "the answer is no JSON but '<html>'",
        "the answer is no completion but {'choices': []}",
        "no answer in 1 s",
    }
    assert sum(record.failures.values()) == 5
    worst = 5 + 16 + 128 + 1024  # bytes, a message, a template, the longest answer
    assert record.perhaps == {"tokens": 4 * worst, "cost": None}  # all but the 500 may have been charged


def test_all_wait_as_long_as_the_service_asks(service: Service, ask: Ask) -> None:
    service.answer = first_then(Says({}, 429, {"Retry-After": "1"}))
    ask("frogs", "toads", concurrency=1)
    first, second, _ = service.seen
    assert second.at - first.at >= 1.0


def test_no_request_goes_out_before_a_limit_is_reset(service: Service, ask: Ask) -> None:
    limits = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "400ms"}
    service.answer = first_then(Says(completion("yes"), headers=limits))
    ask("frogs", "toads", concurrency=1)
    assert service.seen[1].at - service.seen[0].at >= 0.4


def test_a_busy_service_that_answers_others_is_waited_for_beyond_the_retries(service: Service, ask: Ask) -> None:
    """It is too busy for the frogs nine times, and answers another prompt between each two."""
    others, tries = threading.Semaphore(0), iter(range(100))

    def answer(seen: Seen) -> Says:
        if seen.prompt != "frogs":
            others.release()
        elif next(tries) < 9:
            assert others.acquire(timeout=20)
            return Says({}, 429, {"retry-after-ms": "5"})
        return Says(completion("yes"))

    service.answer = answer
    assert ask("frogs", *map(str, range(12)), concurrency=2, retries=5).answered == 13


def test_a_service_that_stops_answering_is_unreachable_and_keeps_what_it_said(
    service: Service, ask: Ask, tmp_path: Path
) -> None:
    service.answer = lambda seen: Says(completion("yes")) if seen.prompt in ("frogs", "newts") else Says({}, 503)
    ask("frogs")
    words = r"gave no answer in 3 tries, the last one: 503 Service Unavailable: \{\}; what was answered is kept"
    with pytest.raises(Unreachable, match=words):
        ask("frogs", "toads", retries=2)
    assert len(service.seen) == 1 + 3
    with pytest.raises(Unreachable, match=words):  # or after three in a row, where it answered before
        ask("newts", "toads", "eels", "crabs", "snails", retries=2, concurrency=1)
    assert len(service.seen) == 4 + 1 + 9


def test_a_request_that_fails_alone_is_left_out_and_counted(service: Service, ask: Ask, tmp_path: Path) -> None:
    service.answer = lambda seen: Says({}, 500) if seen.prompt == "toads" else Says(completion("yes"))
    record = ask("frogs", "toads", "newts", retries=2, concurrency=1)
    assert record.missing == {"unanswered": 1}
    assert [row["prompt"] for row in rows(tmp_path)] == ["frogs", "newts"]
    service.answer = lambda seen: Says(completion("yes"))
    assert (ask("frogs", "toads", "newts", concurrency=1).kept, len(service.seen)) == (3, 2 + 3 + 1)


def test_a_prompt_that_is_refused_alone_is_counted_and_not_asked_again(service: Service, ask: Ask) -> None:
    service.answer = lambda seen: (
        Says({"detail": "too long"}, 400) if seen.prompt == "toads" else Says(completion("yes"))
    )
    assert ask("frogs", "toads", concurrency=1).missing == {"refused by the service": 1}
    assert ask("frogs", "toads", concurrency=1).missing == {"refused by the service": 1}
    assert len(service.seen) == 2


def test_a_service_that_is_not_there(ask: Ask, tmp_path: Path) -> None:
    with pytest.raises(
        Unreachable, match=r"127\.0\.0\.1:9 cannot be reached: no connection: .*; start the service, or"
    ):
        ask("frogs", api="http://127.0.0.1:9")
    assert [next(iter(entry)) for entry in journal(tmp_path)] == ["asked", "failed"]


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (
            Says({"error": {"message": "wrong key"}}, 401),
            "refuses a request without a key .*: 401 Unauthorized: wrong key",
        ),
        (
            Says({"error": "no such model"}, 404),
            "/v1 has no model 'big', or is no such service: 404 Not Found: no such",
        ),
        (Says({"detail": "bad top_p"}, 400), "refuses the request: 400 Bad Request: bad top_p"),
        (Says({}, 402), "refuses to go on until the account is paid for: 402"),
        (Says({"error": {"code": "insufficient_quota"}}, 429), "refuses to go on until the account is paid for: 429"),
        (Says({}, 308, {"Location": "/v2"}), r"/v1 redirects \(308\) and is not followed; give the final address"),
    ],
    ids=["key", "model", "request", "money", "quota", "redirection"],
)
def test_what_no_further_try_can_mend_is_said_at_once(service: Service, ask: Ask, says: Says, words: str) -> None:
    service.answer = lambda seen: says
    with pytest.raises(InputError, match=words):
        ask("frogs")
    assert len(service.seen) == 1


def test_a_wait_of_hours_ends_the_job(service: Service, ask: Ask) -> None:
    service.answer = lambda seen: Says({}, 429, {"Retry-After": "7200"})
    with pytest.raises(
        Unreachable, match="asks to come back in 120 min; what was answered is kept: the same command goes"
    ):
        ask("frogs")


def test_the_key_is_sent_and_stands_nowhere_else(
    service: Service, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TEACHER_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)

    def echo(seen: Seen) -> Says:
        said = f"you sent {seen.headers['authorization']}"
        return Says({"error": {"message": said}}, 500) if len(service.seen) < 3 else Says(completion(said))

    service.answer = echo
    record = ask("frogs", key_env="TEACHER_KEY", concurrency=1)
    assert service.seen[0].headers["authorization"] == f"Bearer {KEY}"
    assert rows(tmp_path)[0]["text"] == "you sent Bearer ***"
    assert KEY not in repr(record) + caplog.text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 4
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    service.answer = lambda seen: Says({"error": {"message": f"bad {seen.headers['authorization']}"}}, 401)
    with pytest.raises(InputError, match=r"refuses the key in TEACHER_KEY: 401 Unauthorized: bad Bearer \*\*\*$"):
        ask("toads", key_env="TEACHER_KEY")
    service.answer = lambda seen: Says(KEY.encode(), 500)
    with pytest.raises(Unreachable, match=r"500 Internal Server Error: \*\*\*; what"):
        ask("toads", key_env="TEACHER_KEY", retries=0)


def test_a_word_too_short_for_a_secret_is_left_in_answers(
    service: Service, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "EMPTY")
    service.answer = lambda seen: Says(completion("an EMPTY box"))
    ask("frogs", key_env="TEACHER_KEY")
    assert rows(tmp_path)[0]["text"] == "an EMPTY box"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "the environment variable TEACHER_KEY is not set; expected the key for"),
        (" ", "the environment variable TEACHER_KEY is not set"),
        (
            "two words",
            "the environment variable TEACHER_KEY holds no key: expected letters, digits and signs, no blanks$",
        ),
    ],
)
def test_a_key_that_is_not_there(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, words: str
) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(InputError, match=words):
        ask("frogs", key_env="TEACHER_KEY")
    assert not list(tmp_path.glob("out*"))


def test_how_long_to_wait_is_read_from_headers() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 28 <= api.retry_after({"retry-after": date}) <= 30
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=30), usegmt=True)
    cases = {"7": 7.0, "1.5": 1.5, "soon": 0.0, past: 0.0}
    assert {said: api.retry_after({"retry-after": said}) for said in cases} == cases
    assert api.retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert api.retry_after({}) == 0
    resets = {"6m0s": 360.0, "20ms": 0.02, "1h2m3.5s": 3723.5, "12": 12.0, "1.5s": 1.5, "": 0.0, "tomorrow": 0.0}
    assert {said: api.reset_s(said) for said in resets} == resets
