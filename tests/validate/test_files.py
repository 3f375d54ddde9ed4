"""Whole or not there."""

import hashlib
from pathlib import Path

import pytest

from potstill.validate.files import sha256_file, sha256_folder, sha256_json, size_bytes, whole_folder, write_text


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
