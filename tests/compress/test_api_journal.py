"""Every request and what came of it is kept: through torn lines and killed processes."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from potstill.compress.api_journal import open_journal
from potstill.compress.generate import journal_of
from potstill.validate.errors import InputError
from tests.service import Ask, Says, Seen, Service, completion, journal, rows


def test_what_was_answered_is_not_asked_again(service: Service, ask: Ask, tmp_path: Path) -> None:
    first = ask("frogs", "toads", samples=2)
    data = (tmp_path / "out.jsonl").read_bytes()
    second = ask("frogs", "toads", "newts", samples=2)
    assert Counter(seen.prompt for seen in service.seen) == {"frogs": 2, "toads": 2, "newts": 2}
    assert (tmp_path / "out.jsonl").read_bytes().startswith(data)
    assert (first.requests, second.requests, second.kept) == ({"teacher": 4}, {"teacher": 2}, 6)
    assert second.tokens == {"teacher": [60, 30]}  # over both runs


@pytest.mark.parametrize(
    "other", [{"temperature": 1.0}, {"model": "bigger"}, {"system": "Be short."}, {"max_tokens": 7}]
)
def test_other_settings_are_other_requests(service: Service, ask: Ask, other: dict[str, object]) -> None:
    ask("frogs")
    ask("frogs", **other)
    assert len(service.seen) == 2


def test_each_line_says_what_was_asked_and_what_came(service: Service, ask: Ask, tmp_path: Path) -> None:
    ask("frogs", max_tokens=9)
    asked, answered = journal(tmp_path)
    assert asked["asked"] == answered["answered"]
    assert asked["request"] == service.seen[0].body
    assert asked["bound"] == [5 + 16 + 128, 9]
    assert (answered["body"], answered["tokens"]) == (completion("about frogs"), [10, 5])
    assert asked["time"] <= answered["time"]


def test_a_torn_last_line_is_noticed_cut_off_and_asked_again(service: Service, ask: Ask, tmp_path: Path) -> None:
    ask("frogs", "toads", concurrency=1)
    path = journal_of(tmp_path / "out.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    torn = len(whole[:-20]) - whole[:-20].rindex(b"\n") - 1
    record = ask("frogs", "toads")
    assert record.journal == {"file": "out.jsonl.requests.jsonl", "torn_bytes": torn}
    assert [seen.prompt for seen in service.seen] == ["frogs", "toads", "toads"]
    assert record.perhaps["tokens"] == 5 + 16 + 128 + 1024  # the answer that was lost was perhaps charged
    assert len([json.loads(line) for line in path.read_bytes().splitlines()]) == 3 + 2


@pytest.mark.parametrize("line", ["{}", "nonsense", '{"answered": "x", "by": "teacher", "tokens": [1, 1]}', "[1]"])
def test_a_file_that_is_no_journal_is_not_touched(ask: Ask, tmp_path: Path, line: str) -> None:
    path = journal_of(tmp_path / "out.jsonl")
    path.write_text(f"{line}\n")
    with pytest.raises(
        InputError, match=r"requests\.jsonl: line 1 is no line of such a journal; move the file away, or"
    ):
        ask("frogs")
    assert path.read_text() == f"{line}\n"


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with (
        open_journal(path),
        pytest.raises(InputError, match=r"journal\.jsonl is being written by another process; wait for it, or give"),
        open_journal(path),
    ):
        pass


def test_a_killed_run_asks_nothing_twice(service: Service, ask: Ask, tmp_path: Path) -> None:
    """Six answers come, then the service holds back; the process is killed with two requests under way."""
    held = threading.Event()

    def answer(seen: Seen) -> Says:
        if len(service.seen) > 6:
            held.wait(20)
        return Says(completion(f"about {seen.prompt}"))

    service.answer = answer
    prompts = [str(i) for i in range(12)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    words = [
        "generate",
        tmp_path / "prompts.txt",
        "--api",
        service.url,
        "--model",
        "big",
        "--out",
        tmp_path / "out.jsonl",
    ]
    command = [sys.executable, "-m", "potstill.pipeline", *map(str, words), "--concurrency", "2"]
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL)
    while len(service.seen) < 8:
        assert process.poll() is None
        held.wait(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    held.set()
    assert not (tmp_path / "out.jsonl").exists()
    answered = [entry["body"]["choices"][0]["message"]["content"] for entry in journal(tmp_path) if "answered" in entry]
    under_way = {seen.prompt for seen in service.seen[6:8]}
    assert len(answered) == 6
    record = ask(*prompts)
    counts = Counter(seen.prompt for seen in service.seen)
    assert counts == {prompt: 2 if prompt in under_way else 1 for prompt in prompts}
    assert [row["text"] for row in rows(tmp_path)] == [f"about {prompt}" for prompt in prompts]
    assert record.perhaps["tokens"] == 2 * (1 + 16 + 128 + 1024)
