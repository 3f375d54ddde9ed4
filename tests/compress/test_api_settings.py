"""What may be said of a teacher behind an API, and what is refused without repeating a secret."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from potstill.compress.api_settings import ApiTeacher

GIVEN: dict[str, Any] = {"api": "http://localhost:8000", "model": "big"}
JUDGE = {"api": "http://localhost:8000", "model": "judge"}


def build(**more: Any) -> ApiTeacher:
    return TypeAdapter(ApiTeacher).validate_python(GIVEN | more)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("https://api.example.com/v1/", "https://api.example.com/v1"),
        ("https://api.example.com/openai/v1/chat/completions", "https://api.example.com/openai/v1"),
        ("http://[::1]:8000/v1/completions", "http://[::1]:8000/v1"),
    ],
)
def test_an_address_ends_before_the_name_of_the_call(given: str, found: str) -> None:
    assert build(api=given).api == found


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"api": "localhost:8000"}, "expected the address of a service, such as http://localhost:8000/v1"),
        ({"api": "ftp://host"}, "expected the address of a service"),
        ({"api": "http://host:port"}, "expected the address of a service"),
        ({"price_in": 1.0}, "price_in and price_out go together, in dollars per million tokens; one of them is given"),
        ({"completions": True, "system": "x"}, "system goes with chat; completions sends the bare prompt"),
        (
            {"samples": 4, "temperature": 0.0},
            "4 samples at temperature 0 are the same answer; give a temperature above 0",
        ),
        ({"check": "vote", "samples": 2}, "a vote needs 3 samples or more; given 2"),
        ({"check": "exact", "grow": 5}, "exact needs the answer of each prompt, and prompts that are grown have none"),
        ({"check": "judge"}, r"check: judge and the judge \(its api and model\) go together; one of them is given"),
        ({"judge": JUDGE}, r"check: judge and the judge \(its api and model\) go together; one of them is given"),
        ({"max_cost": 1.0}, "max_cost needs price_in and price_out, of the teacher and of a judge"),
        (
            {"max_cost": 1.0, "price_in": 1.0, "price_out": 1.0, "check": "judge", "judge": JUDGE},
            "max_cost needs price_in and price_out, of the teacher and of a judge",
        ),
        ({"sample": 3}, "sample"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": float("inf")}, "temperature"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        build(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"api": "https://me:SECRETsecret@host/v1"},
        {"api": "https://host/v1?api-key=SECRETsecret"},
        {"api": "https://host/v1#SECRETsecret"},
        {"key_env": "sk-SECRETsecret"},
        {"key_env": "hf_SECRETsecret"},
    ],
)
def test_a_secret_that_was_given_is_refused_and_not_repeated(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        build(**settings)
    (fault,) = caught.value.errors()
    expected = ("expected an address without user", "expected the name of an environment variable in capitals")
    assert str(fault["ctx"]["error"]).startswith(expected)
    assert "SECRET" not in str(fault["ctx"]["error"])
