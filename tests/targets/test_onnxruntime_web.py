"""The browser's runtime: fetched once, checked by its hash, and what is said where it cannot be had."""

import base64
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from potstill.targets import onnxruntime_web as web
from potstill.validate.errors import InputError, PotstillError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no programs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "cache" / "potstill"


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A package of npm's form with files of the right names, whose hash is the expected one."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name in (*web.WASM, *web.WEBGPU, web.WEBGPU_LIST, "another.js"):
            folder = "docs" if name == web.WEBGPU_LIST else "dist"
            entry = tarfile.TarInfo(f"package/{folder}/{name}")
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    digest = base64.b64encode(hashlib.sha512(made.getvalue()).digest()).decode()
    monkeypatch.setattr(web, "INTEGRITY", f"sha512-{digest}")
    return made.getvalue()


def npm(tmp_path: Path, script: str) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin" / "npm").chmod(0o755)


def test_it_is_fetched_once_by_npm(cache: Path, archive: bytes, tmp_path: Path) -> None:
    (tmp_path / "there.tgz").write_bytes(archive)
    copy = f'/bin/cat {tmp_path}/there.tgz > "$5/onnxruntime-web-{web.VERSION}.tgz"'
    npm(tmp_path, f'echo "$@" >> {tmp_path}/asked\n{copy}')
    folder = web.runtime()
    assert folder == cache / f"onnxruntime-web-{web.VERSION}"
    assert {one.name: one.read_text() for one in folder.iterdir()} == {
        name: name for name in (*web.WASM, *web.WEBGPU, web.WEBGPU_LIST)
    }
    assert web.runtime() == folder
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert asked.startswith(f"pack onnxruntime-web@{web.VERSION} --silent --pack-destination /")
    assert [one.name for one in cache.iterdir()] == [folder.name]


def test_an_archive_that_the_user_brought_is_taken(cache: Path, archive: bytes) -> None:
    cache.mkdir(parents=True)
    (cache / web.TARBALL).write_bytes(archive)
    assert len(list(web.runtime().iterdir())) == 7


def test_another_archive_is_refused(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / web.TARBALL).write_bytes(b"another")
    with pytest.raises(PotstillError, match=rf"{web.TARBALL} has the hash sha512-.*, expected sha512-q0y.*; remove it"):
        web.runtime()
    assert [one.name for one in cache.iterdir()] == [web.TARBALL]


def test_npm_that_fails_is_quoted(cache: Path, tmp_path: Path) -> None:
    npm(tmp_path, "echo npm error ENOTFOUND >&2; exit 1")
    with pytest.raises(InputError) as error:
        web.runtime()
    assert str(error.value) == (
        f"onnxruntime-web {web.VERSION} is not here and cannot be fetched (npm error ENOTFOUND); run `npm pack "
        f"onnxruntime-web@{web.VERSION}` where there is a network, and put {web.TARBALL} into {cache}"
    )


def test_without_npm(cache: Path) -> None:
    with pytest.raises(
        InputError, match=r"cannot be fetched \(.*No such file.*npm.*\); run `npm pack onnxruntime-web@"
    ):
        web.runtime()


@pytest.mark.parametrize(
    ("providers", "module"),
    [(["wasm"], "ort.wasm.min.mjs"), (["webgpu", "wasm"], "ort.webgpu.min.mjs"), ([], "ort.wasm.min.mjs")],
)
def test_the_smaller_runtime_where_it_is_enough(providers: list[str], module: str) -> None:
    assert web.bundle(providers)[0] == module
