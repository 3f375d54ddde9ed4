"""The errors that Potstill raises on purpose, each with the exit code of the command line.

    PotstillError          1  a fault of ours
    ├── InputError         2  wrong use or wrong input
    ├── GateFailed         3  a scorecard missed its limits, or licences stop it
    └── Unreachable        4  a device or a service could not be reached

A message says what was given, what was expected and what to do.
"""


class PotstillError(Exception):
    """Base of every error that is shown to a user as one sentence; exit code 1."""

    exit_code = 1


class InputError(PotstillError):
    """The command, the recipe or a file in it cannot be used as given; exit code 2."""

    exit_code = 2


class GateFailed(PotstillError):
    """A stage or a package missed its limits, and what was made is kept; or licences stop it before; exit code 3."""

    exit_code = 3


class Unreachable(PotstillError):
    """A device or a service did not answer; exit code 4."""

    exit_code = 4


def did_you_mean(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?` when a known word is close to `word`, else the list of known words."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def told(error: BaseException, lines: int = 2) -> str:
    """The first lines of a library's error, at most 400 characters; its type where it says nothing."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(said[:lines])[:400] or type(error).__name__
