"""`potstill generate`: what a person sees and gets, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from potstill.compress.api_settings import ApiTeacher
from potstill.compress.generate import generate
from potstill.pipeline import cli
from tests.service import Says, Service, completion

KEY = "sk-very-secret-0123456789abcdef"


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service()
    yield server
    server.close()


@pytest.fixture
def words(service: Service, tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("frogs\ntoads\n")
    out = str(tmp_path / "out.jsonl")
    return ["generate", str(tmp_path / "prompts.txt"), "--api", service.url, "--model", "big", "--out", out]


def test_what_it_will_cost_is_told_before_and_what_it_did_after(
    service: Service, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"toads": completion("yes", finish_reason="length"), "frogs": completion("I cannot help with that.")}
    service.answer = lambda seen: Says(said[seen.prompt])
    priced = [*words, "--price-in", "2", "--price-out", "10", "--max-cost", "0.5", "--max-tokens", "100"]
    priced += ["--licences", "teacher=cc0-1.0,prompts=own"]
    assert cli.call([*priced, "--dry-run"]) == 0
    told = capsys.readouterr().out
    host = service.url.removeprefix("http://")
    assert told.splitlines() == [
        "licences: allowed",
        f"to ask of big at {host}: 2 requests",
        "  estimated tokens: about 4 in (at most 298), at most 200 out",
        "  estimated cost: up to $0.0020 if 4 bytes are a token, at most $0.0026",
        "  ceiling: $0.5, over all runs into this file",
    ]
    assert service.seen == []
    assert cli.call(priced) == 0
    said = capsys.readouterr().out
    assert said.startswith(told)
    assert said.removeprefix(told).splitlines() == [
        f"1 row in {words[-1]}; answered: 2 of 2 samples",
        "  dropped: truncated: 1",
        "  refusals in words: 1; `potstill clean --drop refusals` drops them",
        "  spent, by the services' own usage: 20 tokens in, 10 out, $0.0001",
        f"  the record is in {words[-1]}.record.json",
    ]
    assert cli.call([*priced, "--dry-run"]) == 0
    assert ": 0 requests (2 answers there already)" in capsys.readouterr().out


def test_a_ceiling_torn_lines_growth_and_lost_tries_are_told(
    service: Service, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.call(words) == 0
    journal = Path(f"{words[-1]}.requests.jsonl")
    journal.write_bytes(journal.read_bytes()[:-9])
    capsys.readouterr()
    assert cli.call([*words, "--grow", "5", "--max-tokens-total", "1300"]) == 0
    said = capsys.readouterr().out
    assert "  of them to grow 5 prompts and answer them: assumed, half of them usable\n" in said
    assert "  ceiling: 1,300 tokens, over all runs into this file\n" in said
    assert "  prompts grown: 0 of 5; refused: none\n" in said
    assert "  missing: not asked: 1\n" in said
    assert "  perhaps charged beyond that, at most: 1,173 tokens\n" in said
    assert "  the ceiling was reached; what is missing for it is asked by the same command with a higher one\n" in said
    assert "  the journal's last line was torn and is cut off: " in said


def test_every_option_reaches_its_setting(
    service: Service, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    given: dict[str, Any] = {
        "key_env": "TEACHER_KEY", "system": "Be short.", "samples": 2, "temperature": 0.5, "top_p": 0.9,
        "max_tokens": 77,
        "seed": 3, "check": "judge", "concurrency": 2, "timeout": 30.0, "retries": 1, "price_in": 1.0, "price_out": 2.0,
        "max_cost": 3.0, "max_tokens_total": 90_000, "grow": 2,
    }  # fmt: skip
    judge = {"judge": "small", "judge_price_in": 4.0, "judge_price_out": 5.0}
    options = [part for name, value in (given | judge).items() for part in (f"--{name.replace('_', '-')}", str(value))]
    service.answer = lambda seen: Says(completion("yes"))
    assert cli.call([*words, *options, "--keep-truncated", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    of_judge = {
        "api": f"{service.url}/v1",
        "model": "small",
        "key_env": "TEACHER_KEY",
        "price_in": 4.0,
        "price_out": 5.0,
    }
    of_judge |= {"concurrency": 2, "timeout": 30.0, "retries": 1, "max_tokens": 512}
    teacher = {"api": f"{service.url}/v1", "model": "big", "completions": False, "keep_truncated": True}
    assert settings == given | teacher | {"judge": of_judge}
    assert cli.call([*words, "--completions", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 2


def test_a_judge_of_another_service_gets_no_key_of_the_teachers(
    service: Service, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    other = Service()
    other.answer = lambda seen: Says(completion("yes"))
    try:
        judged = ["--check", "judge", "--judge", "small", "--judge-api", other.url, "--key-env", "TEACHER_KEY"]
        assert cli.call([*words, *judged]) == 0
        assert service.seen[0].headers["authorization"] == f"Bearer {KEY}"
        assert "authorization" not in other.seen[0].headers
    finally:
        other.close()


@pytest.mark.parametrize(
    ("options", "words_said", "code"),
    [
        (["--samples", "0"], "--samples: should be greater than or equal to 1; given the number 0", 2),
        (
            ["--check", "votes"],
            "--check: expected 'exact', 'vote' or 'judge'; given the text 'votes'; did you",
            2,
        ),
        (["--judge-api", "nowhere", "--check", "judge"], "--judge: missing: this key is required", 2),
        (["--api", "http://127.0.0.1:9"], "127.0.0.1:9 cannot be reached: no connection", 4),
        (["--key-env", KEY], "--key-env: expected the name of an environment variable in capitals", 2),
        (["--key-env", "NO_SUCH_KEY"], "the environment variable NO_SUCH_KEY is not set; expected the key for", 2),
    ],
)
def test_what_cannot_be_used_is_one_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str], options: list[str], words_said: str, code: int
) -> None:
    assert cli.call([*words, *options]) == code
    said = " ".join(capsys.readouterr().err.split())
    assert words_said in said
    assert KEY not in said


def test_a_key_is_in_no_process_list_and_no_traceback(service: Service, words: list[str], tmp_path: Path) -> None:
    """The command as a process of its own, with --debug, while the service says the key back in its error."""
    listed: list[bytes] = []

    def answer(seen: Any) -> Says:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it ended meanwhile
                listed.append(path.read_bytes())
        return Says({"error": {"message": seen.headers["authorization"]}}, 401)

    service.answer = answer
    command = [sys.executable, "-m", "potstill.pipeline", "--debug", *words, "--key-env", "TEACHER_KEY"]
    done = subprocess.run(command, env=os.environ | {"TEACHER_KEY": KEY}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "refuses the key in TEACHER_KEY: 401 Unauthorized: Bearer ***" in done.stderr
    assert "Traceback" in done.stderr
    assert KEY not in done.stdout + done.stderr
    assert any(b"--key-env" in line for line in listed)
    assert not any(KEY.encode() in line for line in listed)


CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.slow
@pytest.mark.parametrize("completions", [False, True], ids=["chat", "completions"])
def test_a_real_model_server_answers(story_teacher: Path, tmp_path: Path, completions: bool) -> None:
    """`transformers serve` with a small Llama; greedy, its answers are those of the model itself."""
    pytest.importorskip("uvicorn", reason="transformers serve needs: pip install 'transformers[serving]'")
    pytest.importorskip("openai", reason="transformers serve needs: pip install 'transformers[serving]'")
    pytest.importorskip("fastapi", reason="transformers serve needs: pip install 'transformers[serving]'")
    import socket

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(story_teacher, model)
    (model / "chat_template.jinja").write_text(CHAT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu"], env=environment, stdout=log, stderr=log
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server)
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("tom sees\nann likes\ndog finds\n")
        teacher = ApiTeacher(
            api=f"http://127.0.0.1:{port}", model=str(model), completions=completions, max_tokens=12, temperature=0,
            keep_truncated=True, concurrency=2,
        )  # fmt: skip
        record = generate(teacher, prompts, tmp_path / "out.jsonl")
    finally:
        server.terminate()
        server.wait(30)
        log.close()
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert record.kept == 3, (record.dropped, (tmp_path / "log").read_text()[-2000:])
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    for row in rows:
        encoded = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=completions)
        ids = network.generate(input_ids=encoded["input_ids"], max_new_tokens=12, do_sample=False)[0]
        written = ids[encoded["input_ids"].shape[1] :]
        said = tokenizer.decode(written, skip_special_tokens=True)
        assert row["text"] == (said if completions else said.strip())
        assert row["tokens"] == [encoded["input_ids"].shape[1], len(written)]
    assert record.tokens["teacher"] == [sum(row["tokens"][i] for row in rows) for i in (0, 1)]


def _wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server does not answer")
