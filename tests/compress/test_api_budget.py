"""What is spent is known by the services' usage, and what may be spent is not exceeded."""

from pathlib import Path
from typing import Any

import pytest

from potstill.compress.api_estimate import estimate
from potstill.compress.api_settings import ApiTeacher
from potstill.validate.errors import InputError
from tests.service import Ask, Says, Seen, Service, completion

PRICES = {"price_in": 2.0, "price_out": 10.0}
WORST_IN = 1 + 16 + 128  # a prompt of one byte, a message, a template
WORST = (WORST_IN * 2.0 + 100 * 10.0) / 1e6
TRUE = (10 * 2.0 + 5 * 10.0) / 1e6


def test_the_cost_is_by_the_services_own_usage(ask: Ask) -> None:
    record = ask("a", "b", "c", **PRICES)
    assert record.tokens == {"teacher": [30, 15]}
    assert record.cost == pytest.approx(3 * TRUE)
    assert record.perhaps == {"tokens": 0, "cost": 0}


@pytest.mark.parametrize("concurrency", [1, 8])
def test_no_request_is_started_that_could_exceed_the_ceiling(service: Service, ask: Ask, concurrency: int) -> None:
    """With room for 5 answers and one at its worst: however many may be under way, a 6th is asked and no 7th."""
    service.answer = lambda seen: Says(completion("yes"), after=0.01)
    settings = {"max_cost": 5 * TRUE + WORST, "max_tokens": 100, "concurrency": concurrency} | PRICES
    record = ask(*"abcdefghij", **settings)
    assert (len(service.seen), record.kept, record.ceiling_reached) == (6, 6, True)
    assert record.missing == {"not asked": 4}
    assert record.cost == pytest.approx(6 * TRUE)
    assert ask(*"abcdefghij", **settings).kept == 6  # a second run has no new ceiling
    assert len(service.seen) == 6
    assert ask(*"abcdefghij", **settings | {"max_cost": 1.0}).kept == 10


def test_requests_under_way_count_at_their_worst(service: Service, ask: Ask) -> None:
    def answer(seen: Seen) -> Says:
        service.hold_until(3)
        return Says(completion("yes"), after=0.05)

    service.answer = answer
    ask(*"abcdefgh", max_tokens=100, max_tokens_total=3 * (WORST_IN + 100))
    assert service.most_at_once == 3


def test_the_worst_is_what_a_service_that_uses_it_all_takes(service: Service, ask: Ask) -> None:
    """A service that takes each request's worst case meets the ceiling and does not pass it."""
    usage = {"prompt_tokens": WORST_IN, "completion_tokens": 100}
    service.answer = lambda seen: Says(completion("yes", usage=usage))
    ceiling = 4 * (WORST_IN + 100) + 50
    record = ask(*"abcdefgh", max_tokens=100, max_tokens_total=ceiling)
    assert record.answered == 4
    assert sum(record.tokens["teacher"]) <= ceiling


def test_a_template_that_adds_more_than_was_taken_is_learned_from(service: Service, ask: Ask) -> None:
    usage = {"prompt_tokens": WORST_IN + 500, "completion_tokens": 1}
    service.answer = lambda seen: Says(completion("yes", usage=usage))
    room = 2 * (WORST_IN + 500 + 100)
    record = ask(*"abcdefgh", max_tokens=100, max_tokens_total=room, concurrency=1)
    assert record.answered == 2
    assert sum(record.tokens["teacher"]) <= room


def test_an_answer_without_usage_counts_at_its_worst(service: Service, ask: Ask) -> None:
    service.answer = lambda seen: Says(completion("yes", usage=None))
    for _ in range(2):
        record = ask("a", max_tokens=100, **PRICES)
        assert (record.tokens, record.cost) == ({"teacher": [0, 0]}, 0)
        assert record.perhaps == {"tokens": WORST_IN + 100, "cost": pytest.approx(WORST)}


def test_a_try_that_was_perhaps_charged_counts_against_the_ceiling(service: Service, ask: Ask) -> None:
    service.answer = lambda seen: Says(cut=True)
    record = ask("a", "b", max_tokens=100, max_tokens_total=2 * (WORST_IN + 100), concurrency=1, retries=5)
    assert (len(service.seen), record.ceiling_reached, record.answered) == (2, True, 0)


def test_prices_are_of_one_model(ask: Ask) -> None:
    ask("a", **PRICES)
    with pytest.raises(
        InputError, match="holds what big was asked, and the prices are those of small; give another --out"
    ):
        ask("a", model="small", **PRICES)
    assert ask("a", model="small").tokens == {"teacher": [20, 10]}


def test_a_judge_is_paid_from_the_same_purse(service: Service, ask: Ask) -> None:
    judge = {"api": service.url, "model": "judge", "price_in": 100.0, "price_out": 200.0, "max_tokens": 10}
    service.answer = lambda seen: Says(completion("yes"))
    record = ask("a", check="judge", judge=judge, **PRICES)
    assert record.tokens == {"teacher": [10, 5], "judge": [10, 5]}
    assert record.cost == pytest.approx(TRUE + (10 * 100 + 5 * 200) / 1e6)


def told(tmp_path: Path, service: Service, prompts: str, **settings: Any) -> Any:
    path = tmp_path / "prompts.txt"
    path.write_text(prompts)
    return estimate(ApiTeacher(api=service.url, model="big", **settings), path, tmp_path / "out.jsonl")


def test_an_estimate_asks_and_writes_nothing(service: Service, tmp_path: Path) -> None:
    found = told(tmp_path, service, "abcdefgh\nabcd\n", samples=2, max_tokens=100, **PRICES)
    assert (found.prompts, found.requests, found.answered) == (2, 4, 0)
    assert found.tokens_in == 2 * (2 + 1)
    assert found.tokens_in_most == 2 * (8 + 4) + 4 * (16 + 128)
    assert found.tokens_out_most == 400
    assert found.cost == pytest.approx((6 * 2 + 400 * 10) / 1e6)
    assert found.cost_most == pytest.approx((found.tokens_in_most * 2 + 400 * 10) / 1e6)
    assert service.seen == []
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_an_estimate_leaves_out_what_is_answered_and_counts_what_is_to_be_grown(
    service: Service, ask: Ask, tmp_path: Path
) -> None:
    ask("abcdefgh", max_tokens=100)
    found = told(tmp_path, service, "abcdefgh\nabcd\n", max_tokens=100)
    assert (found.requests, found.answered, found.tokens_out_most, found.cost) == (1, 1, 100, None)
    grown = told(tmp_path, service, "abcdefgh\nabcd\n", max_tokens=100, grow=20)
    assert grown.requests == 1 + 20 / 4 + 20  # one is left, 4 usable tasks of each request, 20 answers
    judge = {"api": service.url, "model": "judge", "max_tokens": 10}
    judged = told(tmp_path, service, "abcd\n", max_tokens=100, check="judge", judge=judge)
    assert (judged.requests, judged.tokens_out_most) == (2, 110)
    assert judged.tokens_in > 100


def test_an_estimates_most_bounds_what_is_spent(service: Service, ask: Ask, tmp_path: Path) -> None:
    def answer(seen: Seen) -> Says:  # a service with a token for each byte
        size = sum(len(message["content"].encode()) + 16 for message in seen.body["messages"])
        return Says(completion("yes", usage={"prompt_tokens": size + 100, "completion_tokens": 50}))

    service.answer = answer
    found = told(tmp_path, service, "Größe\n水\n", samples=3, max_tokens=50, **PRICES)
    record = ask("Größe", "水", samples=3, max_tokens=50, **PRICES)
    assert record.cost is not None
    assert record.cost <= found.cost_most
