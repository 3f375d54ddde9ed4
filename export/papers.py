"""Licences and notices that go along with a model, where the licence of a source wants it."""

from pathlib import Path

from potstill.validate.files import write_text

PAPERS = ("LICENSE", "NOTICE", "THIRD_PARTY_LICENSES")


def put(folder: Path, papers: dict[str, str]) -> None:
    """Write them where they differ, by the name of their file, and take away those of `PAPERS` that are no more."""
    for name in PAPERS:
        path, text = folder / name, papers.get(name)
        if text is None:
            path.unlink(missing_ok=True)
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
