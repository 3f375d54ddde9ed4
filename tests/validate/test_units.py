"""Numbers with their nouns, as a person reads them."""

import pytest

from potstill.validate.units import counted


@pytest.mark.parametrize(("count", "words"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (12_345, "12,345 rows")])
def test_one_thing_is_no_plural(count: int, words: str) -> None:
    assert counted(count, "row") == words
