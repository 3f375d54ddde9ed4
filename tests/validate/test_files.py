"""Whole or not there."""

import hashlib
import tempfile
from pathlib import Path

import pytest

from potstill.validate.files import (
    sha256_file,
    sha256_folder,
    sha256_json,
    short_folder,
    size_bytes,
    whole_file,
    whole_folder,
    write_text,
)


def test_a_folder_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="halfway"), whole_folder(tmp_path / "made") as aside:
        (aside / "file").write_text("half")
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "made") as aside:
        (aside / "file").write_text("all")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "file").read_text() == "all"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_an_older_folder_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "made") as aside:
        (aside / "new").write_text("new")
        raise KeyboardInterrupt
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["old"]
    with whole_folder(tmp_path / "made") as aside:
        (aside / "new").write_text("new")
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["new"]


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file"
    for content in (b"old", b"new"):
        with whole_file(target) as aside:
            aside.write_bytes(content)
            assert not target.exists() or target.read_bytes() == b"old"
        assert target.read_bytes() == content
    with pytest.raises(ZeroDivisionError), whole_file(target) as aside:
        aside.write_bytes(b"half")
        raise ZeroDivisionError
    assert target.read_bytes() == b"new"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "1")
    write_text(tmp_path / "a", "2")
    assert (tmp_path / "a").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello")
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"hello").hexdigest()
    before = sha256_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert sha256_folder(tmp_path) != before
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    assert size_bytes(tmp_path) == size_bytes(tmp_path / "b") == 5


def test_a_socket_has_room_below_a_short_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/a/short/one")
    assert short_folder() is None  # the usual one
    monkeypatch.setattr(tempfile, "tempdir", "/" + 60 * "a")
    assert short_folder() == "/tmp"
