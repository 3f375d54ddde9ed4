"""`potstill kinship` of texts: which words and phrases a model prefers, and who it says it is."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.validate.errors import InputError

if TYPE_CHECKING:
    from potstill.validate.kinship import Kinship

TEXTS = ".jsonl"


def are_texts(names: Sequence[str]) -> bool:
    """Whether files of texts are compared, and no models.

    Raises:
        InputError: some are, and some are not.
    """
    found = [name.endswith(TEXTS) for name in names]
    if any(found) and not all(found):
        raise InputError(
            f"{names[found.index(False)]} is a model and {names[found.index(True)]} a file of texts; compare models "
            "by their answers, or what each of them wrote"
        )
    return all(found)


def compare_texts(
    names: Sequence[str], suspects: int, columns: dict[str, str], alpha: float
) -> "tuple[Kinship, dict[str, dict[str, int]]]":
    """Who the first of some files' writers learned from, and what each writer says of itself.

    Args:
        names: JSON lines with `text`: of the writer in question, of the suspects, of the references.
        suspects: how many.
        columns: other names of `text`.
        alpha: of the test.

    Returns:
        The evidence; and by file how often each statement of identity stands in it.

    Raises:
        InputError: a file cannot be read, or the writers cannot be compared.
    """
    from potstill.compress.phrases import cut_identity
    from potstill.validate.phrasing import phrasing

    texts = {name: _texts(Path(name), columns) for name in names}
    mine, theirs, others = names[0], names[1 : suspects + 1], names[suspects + 1 :]
    found = phrasing(texts[mine], {name: texts[name] for name in theirs}, [texts[name] for name in others], alpha)
    says = {}
    for name, written in texts.items():
        cuts = (cut_identity(text) for text in written)
        says[name] = dict(Counter(phrase.means for cut in cuts if cut for phrase in cut.phrases))
    return found, says


def plain(found: "Kinship", says: dict[str, dict[str, int]], model: str, verdict: str) -> dict[str, Any]:
    """What `--json` prints."""
    return asdict(found) | {"model": model, "identity": says, "says": verdict}


def print_identity(says: dict[str, dict[str, int]]) -> None:
    """A line for each file in which somebody says who it is."""
    from potstill.pipeline.tell import console

    for name, statements in says.items():
        told = "; ".join(f"{means} ({count} times)" for means, count in statements.items())
        console.print(f"{name}: {told or 'says nothing of who wrote it'}", highlight=False, markup=False)


def _texts(file: Path, columns: dict[str, str]) -> list[str]:
    from potstill.compress.data_rows import lines, parse

    try:
        with file.open("rb") as handle:
            return [_text(file, number, line, columns, parse) for number, _, line in lines(handle)]
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}; give JSON lines with `text`") from None


def _text(file: Path, number: int, line: bytes, columns: dict[str, str], parse: Any) -> str:
    try:
        return str(parse(line, columns).text)
    except ValueError as error:
        raise InputError(f"{file}: line {number}: {error}; give JSON lines with `text`") from None
