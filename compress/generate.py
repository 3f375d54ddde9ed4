"""Teacher data: prompts in, the answers of a service out that passed the check, and a record of what became of each.

Beside the rows lie the record (`OUT.record.json`) and the journal of every request (`OUT.requests.jsonl`), by which a
run that was stopped goes on where it was. Rows are written from the journal once all is asked, in the prompts' order.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from potstill.compress.api import key_of
from potstill.compress.api_answers import final_answer, is_right, majority, verdict
from potstill.compress.api_grow import Grown
from potstill.compress.api_job import Job, fault_of_reply, judge_body, replies_of
from potstill.compress.api_journal import Journal, open_journal
from potstill.compress.api_prompts import Prompt, Prompts
from potstill.compress.api_replies import Reply, read_reply
from potstill.compress.api_settings import ApiTeacher
from potstill.compress.phrases import refusal
from potstill.validate.errors import InputError
from potstill.validate.files import sha256_file, whole_file, write_json


@dataclass
class Record:
    """What was asked and what came of it, in numbers.

    Attributes:
        made: when, in UTC.
        seconds: that this run took.
        settings: of the teacher; the name of the key's variable, not the key.
        prompts: file, SHA-256, how many, how many were repeated, and what was grown.
        samples: how many answers were wished for.
        answered: how many came.
        missing: how many did not: `refused by the service`, `unanswered` after all tries, `not asked` for the ceiling.
        kept: rows that were written.
        dropped: answers that were not, by rule.
        refusals: answers that start by refusing, in words; they stay, and `potstill clean` can drop them.
        finish_reasons: of the answers.
        models: of the answers, as the service names them.
        requests: tries of this run, by who was asked.
        failures: tries without an answer, over all runs, by what came instead.
        tokens: in and out of all answers, over all runs, by who was asked.
        cost: dollars for them at the given prices, cached prompts at the full one; None without prices.
        perhaps: tokens, and dollars, at most, of tries over all runs that may have been charged and told no usage.
        ceiling_reached: whether requests were left out for it.
        journal: file, and bytes of a torn last line that were cut off.
        output: file and SHA-256.
        versions: of what made it.
    """

    made: str
    seconds: float
    settings: ApiTeacher
    prompts: dict[str, Any]
    samples: int = 0
    answered: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    refusals: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    requests: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    cost: float | None = None
    perhaps: dict[str, Any] = field(default_factory=dict)
    ceiling_reached: bool = False
    journal: dict[str, Any] = field(default_factory=dict)
    output: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: {"potstill": version("potstill")})

    def to_json(self) -> Any:
        """Plain data."""
        return vars(self) | {"settings": asdict(self.settings)}


def record_of(out: Path) -> Path:
    """Where the record of generated data lies."""
    return out.with_name(f"{out.name}.record.json")


def journal_of(out: Path) -> Path:
    """Where every request and answer lies."""
    return out.with_name(f"{out.name}.requests.jsonl")


def generate(teacher: ApiTeacher, prompts: Path, out: Path) -> Record:
    """Ask a teacher, and write the rows that stay, with a record beside them.

    A row has `prompt` or `messages` as it was given, `text`, `reasoning` (empty where none was told), `teacher` and
    `endpoint`, `finish_reason`, `tokens` ([in, out] or null), `sample` and `grown`.

    Args:
        teacher: who is asked, and how.
        prompts: as `Prompts` takes them.
        out: the JSON lines to write.

    Raises:
        InputError: prompts or an output that cannot be used, a key that is not there, or a service that refuses the
            key, the model, or the first request.
        Unreachable: a service is not there, or stopped answering; what was answered is kept.
    """
    check_output(out, prompts)
    for service in (teacher, teacher.judge):
        if service:
            service.key()
    given = Prompts(prompts, teacher)
    start = time.monotonic()
    with open_journal(journal_of(out)) as journal:
        job = Job(teacher, journal)
        job.run(given, len(given))
        record = Record(datetime.now(UTC).isoformat(timespec="seconds"), 0.0, teacher, _told(prompts, given, job.grown))
        with whole_file(out) as aside:
            with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
                for prompt in job.prompts(given):
                    for row in _rows(teacher, prompt, journal, job, record):
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            record.output = {"file": out.name, "sha256": sha256_file(aside)}
        _account(record, job, journal)
    record.journal = {"file": journal_of(out).name, "torn_bytes": journal.torn}
    record.seconds = round(time.monotonic() - start, 3)
    write_json(record_of(out), record.to_json())
    return record


def check_output(out: Path, prompts: Path) -> None:
    """Refuse an output that would replace the prompts, or is a folder.

    Raises:
        InputError: it is.
    """
    if out.is_dir():
        raise InputError(f"{out} is a folder; expected the name of a file to write")
    for target in (out, record_of(out), journal_of(out)):
        if target.exists() and prompts.exists() and target.samefile(prompts):
            raise InputError(f"{target} would replace the prompts; give --out another name")


def _told(path: Path, prompts: Prompts, grown: Grown | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "file": path.name, "sha256": sha256_file(path), "count": len(prompts), "repeated": prompts.repeated
    }  # fmt: skip
    if grown:
        told["grown"] = {"count": len(grown.tasks), "requests": grown.requests, "refused": dict(grown.refused)}
    return told


def _rows(teacher: ApiTeacher, prompt: Prompt, journal: Journal, job: Job, record: Record) -> list[dict[str, Any]]:
    """The rows of one prompt; what became of each sample is counted."""
    found = replies_of(teacher, prompt, journal)
    record.samples += len(found)
    for key, reply in found:
        if reply:
            record.answered += 1
            record.refusals += refusal(reply.text) is not None
            record.finish_reasons[reply.finish_reason or "not told"] += 1
            record.models[reply.model or teacher.model] += 1
        elif journal.is_refused(key):
            record.missing["refused by the service"] += 1
        else:
            record.missing["unanswered" if key in job.unanswered else "not asked"] += 1
    replies = [reply for _, reply in found]
    rows = []
    for sample, (reply, fault) in enumerate(zip(replies, _faults(teacher, prompt, replies, journal), strict=True)):
        if fault:
            record.dropped[fault] += 1
        elif reply:
            record.kept += 1
            rows.append(
                prompt.fields
                | {"text": reply.text, "reasoning": reply.reasoning, "teacher": reply.model or teacher.model}
                | {"endpoint": teacher.host, "finish_reason": reply.finish_reason, "tokens": reply.tokens}
                | {"sample": sample, "grown": prompt.grown}
            )
    return rows


def _faults(teacher: ApiTeacher, prompt: Prompt, replies: Sequence[Reply | None], journal: Journal) -> list[str | None]:
    """Why each answer is dropped; None where it stays, or is not there."""
    faults = [fault_of_reply(teacher, reply) if reply else None for reply in replies]
    texts = [reply.text if reply and not fault else None for reply, fault in zip(replies, faults, strict=True)]
    winner = majority(texts, teacher.samples) if teacher.check == "vote" else None
    for i, (text, reply) in enumerate(zip(texts, replies, strict=True)):
        if text is None or reply is None:
            continue
        if teacher.check == "exact" and not is_right(text, prompt.answer or ""):
            faults[i] = "wrong"
        elif teacher.check == "vote" and winner != final_answer(text):
            faults[i] = "outvoted" if winner is not None else "no majority"
        elif teacher.check == "judge":
            faults[i] = _judged(journal.answer(key_of(judge_body(teacher, prompt, reply), 0)))
    return faults


def _judged(body: Any) -> str | None:
    """Why an answer is dropped, by what its judge said."""
    said = None if body is None else verdict(read_reply(body).text)
    if said is None:
        return "not judged" if body is None else "judge unclear"
    return None if said else "judge says no"


def _account(record: Record, job: Job, journal: Journal) -> None:
    """What it cost."""
    (cost, _), (perhaps, perhaps_tokens) = job.budget.spent(), job.budget.possible()
    priced = record.settings.price_in is not None
    record.requests = {by: endpoint.asked for by, endpoint in job.endpoints.items()}
    record.failures = dict(journal.failures)
    record.tokens = {by: tokens for by, tokens in journal.spent.items() if by in job.endpoints}
    record.cost = cost if priced else None
    record.perhaps = {"tokens": perhaps_tokens, "cost": perhaps if priced else None}
    record.ceiling_reached = job.budget.reached
