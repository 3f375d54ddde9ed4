"""The verb that has a teacher behind an API write data. Heavy packages are imported inside."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potstill.pipeline.licence_verbs import DecidedByOption, LicencesOption, check_terms
from potstill.pipeline.options import JsonOption, print_json

if TYPE_CHECKING:
    from potstill.compress.api_estimate import Estimate
    from potstill.compress.api_settings import ApiTeacher
    from potstill.compress.generate import Record

_PRICE = "Dollars for a million tokens of"


def generate(
    prompts: Annotated[
        Path, typer.Argument(help="JSON lines with prompt or messages (and answer), or .txt with one a line.")
    ],
    api: Annotated[str, typer.Option("--api", help="Address of the service: http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option("--model", help="As the service names it.")],
    out: Annotated[Path, typer.Option("--out", help="JSON lines to write; the same command goes on where it was.")],
    key_env: Annotated[
        str | None, typer.Option("--key-env", help="Environment variable that holds the key; without it none is sent.")
    ] = None,
    completions: Annotated[
        bool, typer.Option("--completions", help="Ask /completions with the bare prompt: for a base model.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="First message of each chat.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Answers to each prompt. Default: 1.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of the sampling; default: the service's.")
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Share sampled from; default: the service's.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="The longest answer, with its reasoning. Default: 1024.")
    ] = None,
    keep_truncated: Annotated[
        bool, typer.Option("--keep-truncated", help="Let answers stay that were cut at --max-tokens.")
    ] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Sent as seed + sample; default: none is sent.")] = None,
    grow: Annotated[
        int | None, typer.Option("--grow", help="New prompts that the teacher writes from the given ones.")
    ] = None,
    check: Annotated[
        str | None, typer.Option("--check", help="Which answers stay: exact, vote or judge. Default: all whole ones.")
    ] = None,
    judge: Annotated[str | None, typer.Option("--judge", help="Model that says yes or no to answers.")] = None,
    judge_api: Annotated[str | None, typer.Option("--judge-api", help="Its service; default: that of --api.")] = None,
    judge_key_env: Annotated[
        str | None, typer.Option("--judge-key-env", help="Its key's variable; default, on --api: that of --key-env.")
    ] = None,
    judge_price_in: Annotated[float | None, typer.Option("--judge-price-in", help=f"{_PRICE} its prompts.")] = None,
    judge_price_out: Annotated[float | None, typer.Option("--judge-price-out", help=f"{_PRICE} its words.")] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", help="Requests at once. Default: 8.")] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds for an answer. Default: 600.")] = None,
    retries: Annotated[int | None, typer.Option("--retries", help="Further tries of a request. Default: 6.")] = None,
    price_in: Annotated[float | None, typer.Option("--price-in", help=f"{_PRICE} prompts.")] = None,
    price_out: Annotated[float | None, typer.Option("--price-out", help=f"{_PRICE} answers.")] = None,
    max_cost: Annotated[
        float | None, typer.Option("--max-cost", help="Dollars that may be spent, over all runs into --out.")
    ] = None,
    max_tokens_total: Annotated[
        int | None, typer.Option("--max-tokens-total", help="Tokens that may be spent, prompts and answers.")
    ] = None,
    licences: LicencesOption = None,
    decided_by: DecidedByOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and ask nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Have a teacher behind an OpenAI-compatible API write data to learn from."""
    from potstill.compress.api_estimate import estimate
    from potstill.compress.generate import generate as ask

    given = {
        "api": api, "model": model, "key_env": key_env, "completions": completions, "system": system,
        "samples": samples, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed,
        "keep_truncated": keep_truncated,
        "grow": grow, "check": check, "concurrency": concurrency, "timeout": timeout, "retries": retries,
        "price_in": price_in, "price_out": price_out, "max_cost": max_cost, "max_tokens_total": max_tokens_total,
    }  # fmt: skip
    of_judge = {
        "api": judge_api, "model": judge, "key_env": judge_key_env, "price_in": judge_price_in,
        "price_out": judge_price_out,
    }  # fmt: skip
    teacher = _teacher(given, of_judge)
    found = estimate(teacher, prompts, out)
    terms = check_terms(teacher, prompts, licences, decided_by, as_json)
    if dry_run:
        print_json(vars(found) | {"licences": terms}) if as_json else print_estimate(found, teacher)
        return
    if not as_json:
        print_estimate(found, teacher)
    record = ask(teacher, prompts, out)
    print_json(record.to_json()) if as_json else print_record(record, out)


def _teacher(given: dict[str, Any], of_judge: dict[str, Any]) -> "ApiTeacher":
    """The settings, checked as those of a recipe are, and all problems told with their options."""
    from potstill.compress.api_settings import ApiTeacher
    from potstill.pipeline.yaml_lines import Problem, as_error, check

    said = {name: value for name, value in given.items() if value is not None}
    judge = {name: value for name, value in of_judge.items() if value is not None}
    if judge:
        own = {"timeout": "timeout", "retries": "retries", "concurrency": "concurrency"}
        if "api" not in judge:  # on the teacher's service
            own |= {"api": "api", "key_env": "key_env"}
        said["judge"] = {name: said[name] for name in own if name in said} | judge
    teacher, faults = check(ApiTeacher, said)
    if faults:
        raise as_error("command line", [Problem(None, _option(path), text) for path, text in faults])
    assert isinstance(teacher, ApiTeacher)
    return teacher


def _option(path: tuple[str | int, ...]) -> str:
    """The option that gave a setting."""
    words = [str(part) for part in path]
    if words == ["judge", "model"]:
        return "--judge"
    return f"--{'-'.join(words).replace('_', '-')}" if words else ""


def print_estimate(found: "Estimate", teacher: "ApiTeacher") -> None:
    """What is to be asked, and what it may cost."""
    from potstill.validate.units import counted

    kept = f" ({counted(found.answered, 'answer')} there already)" if found.answered else ""
    typer.echo(f"to ask of {teacher.model} at {teacher.host}: {counted(found.requests, 'request')}{kept}")
    if teacher.grow:
        typer.echo(f"  of them to grow {counted(teacher.grow, 'prompt')} and answer them: assumed, half of them usable")
    typer.echo(
        f"  estimated tokens: about {found.tokens_in:,} in (at most {found.tokens_in_most:,}), at most "
        f"{found.tokens_out_most:,} out"
    )
    if found.cost is not None:
        typer.echo(
            f"  estimated cost: up to ${found.cost:,.4f} if 4 bytes are a token, at most ${found.cost_most:,.4f}"
        )
    if teacher.max_cost is not None or teacher.max_tokens_total is not None:
        ceilings = [] if teacher.max_cost is None else [f"${teacher.max_cost:g}"]
        ceilings += [] if teacher.max_tokens_total is None else [f"{teacher.max_tokens_total:,} tokens"]
        typer.echo(f"  ceiling: {' and '.join(ceilings)}, over all runs into this file")


def print_record(record: "Record", out: Path) -> None:
    """What came of it, and what it did cost."""
    from potstill.compress.generate import record_of
    from potstill.validate.units import counted

    typer.echo(f"{counted(record.kept, 'row')} in {out}; answered: {record.answered:,} of {record.samples:,} samples")
    if grown := record.prompts.get("grown"):
        wanted = record.settings.grow
        refused = ", ".join(f"{why}: {n:,}" for why, n in grown["refused"].items()) or "none"
        typer.echo(f"  prompts grown: {grown['count']:,} of {wanted:,}; refused: {refused}")
    for what, counts in (("dropped", record.dropped), ("missing", record.missing), ("failed tries", record.failures)):
        if counts:
            typer.echo(f"  {what}: {', '.join(f'{why}: {n:,}' for why, n in sorted(counts.items()))}")
    if record.refusals:
        typer.echo(f"  refusals in words: {record.refusals:,}; `potstill clean --drop refusals` drops them")
    read = sum(tokens[0] for tokens in record.tokens.values())
    written = sum(tokens[1] for tokens in record.tokens.values())
    cost = "" if record.cost is None else f", ${record.cost:,.4f}"
    typer.echo(f"  spent, by the services' own usage: {read:,} tokens in, {written:,} out{cost}")
    if record.perhaps["tokens"]:
        cost = "" if record.perhaps["cost"] is None else f", ${record.perhaps['cost']:,.4f}"
        typer.echo(f"  perhaps charged beyond that, at most: {record.perhaps['tokens']:,} tokens{cost}")
    if record.ceiling_reached:
        typer.echo("  the ceiling was reached; what is missing for it is asked by the same command with a higher one")
    if record.journal["torn_bytes"]:
        typer.echo(f"  the journal's last line was torn and is cut off: {record.journal['torn_bytes']:,} bytes")
    typer.echo(f"  the record is in {record_of(out)}")
