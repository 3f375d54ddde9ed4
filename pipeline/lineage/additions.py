"""What a person adds to a model card stays when a run writes it anew; what a person changed in it is kept aside."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from potstill.validate.files import write_text

CARD, ASIDE = "README.md", "cards"
_MARK = re.compile(r"<!-- potstill: written by the run above this line \(sha256 ([0-9a-f]{64})\), yours below -->\n?")


def with_additions(out: Path, place: str, card: str, say: Callable[[str, str], None]) -> str:
    """A new card with what stood below the mark of the one that is there.

    Where the part above the mark is not as a run wrote it, the old card is kept in `cards/` of the run's folder, and
    told.

    Args:
        out: the run's folder.
        place: of what the card is of, relative to it: `student`, `packages/…`.
        card: as it is written now.
        say: tells a step and a sentence.
    """
    file, own = out / place / CARD, ""
    if file.is_file():
        old = file.read_text(encoding="utf-8")
        written, marked, own = _parts(old)
        if not marked or _sha256(written) != marked:
            kept = Path(ASIDE) / f"{place.replace('/', '-')}-{_sha256(old)[:12]}.md"
            write_text(out / kept, old)
            say("card", f"{place}/{CARD} was changed above its mark; that text is kept as {kept}")
    mark = f"<!-- potstill: written by the run above this line (sha256 {_sha256(card)}), yours below -->\n"
    return card + mark + own


def _parts(text: str) -> tuple[str, str | None, str]:
    """What stands above the first mark, the hash that the mark has, and what stands below; no mark: all above."""
    found = _MARK.search(text)
    return (text[: found.start()], found[1], text[found.end() :]) if found else (text, None, "")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
