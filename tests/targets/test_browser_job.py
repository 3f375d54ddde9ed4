"""What one browser is served, and what nobody else is."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import onnx
import pytest

from potstill.targets import browser_job
from potstill.targets.browser_job import BrowserJob
from potstill.targets.device import BrokenOff, Made
from potstill.targets.onnxruntime_web import WASM
from potstill.targets.request import read_package
from potstill.validate.errors import InputError, PotstillError

MakePackage = Callable[..., Path]
NOT_VALID = (403, "this address is not valid, or no longer")
ABSENT = (404, "there is no such file")


@pytest.fixture
def job(make_package: MakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BrowserJob]:
    """A request to measure a package whose weights lie in a file of their own, with a runtime of three short files."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    for name in WASM:
        (folder / name).write_text(name)
    monkeypatch.setattr(browser_job, "runtime", lambda: folder)
    package = make_package(width=8, target="browser-wasm")
    model = onnx.load(package / "model.onnx")
    onnx.save(model, str(package / "model.onnx"), save_as_external_data=True, location="weights", size_threshold=0)
    request = {"threads": 1, "models": [read_package(package).spec()], "operators": Made(tmp_path / "made")}
    with BrowserJob("127.0.0.1", request) as job:
        yield job


def asked(url: str, data: bytes | None = None) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, data) as reply:
            return reply.status, reply.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def claimed(job: BrowserJob) -> Any:
    status, request = asked(f"{job.url}claim", b"")
    assert status == 200
    return json.loads(request)


def test_a_wrong_token_is_refused(job: BrowserJob) -> None:
    base = job.url.rsplit("/", 2)[0]
    for wrong in (f"{base}/", f"{base}/wrong/", f"{base}/wrong/claim", f"{job.url[:-2]}/", f"{base}/favicon.ico"):
        assert asked(wrong) == NOT_VALID
        assert asked(wrong, b"") == NOT_VALID
    assert not job.claimed


def test_only_what_belongs_to_the_request_is_served(job: BrowserJob) -> None:
    for name in ("files/guess", "browser_agent.py", "agent.py", "../agent.py", "%2e%2e/agent.py", "ort/../agent.py"):
        assert asked(job.url + name)[0] in (403, 404)
        assert asked(job.url + name, b"")[0] in (403, 404)
    assert asked(f"{job.url}ort/{WASM[0]}") == (200, WASM[0])
    assert asked(f"{job.url}ort/ort.webgpu.min.mjs") == ABSENT


def test_the_first_browser_gets_the_request_and_the_second_none(job: BrowserJob) -> None:
    request = claimed(job)
    assert asked(f"{job.url}claim", b"") == (403, "another browser has this request already")
    for name in ("reply", "error", "alive"):  # under names that only the request tells
        assert asked(job.url + name, b"{}") == ABSENT
    assert not job.done.is_set()
    path = request["models"][0]["path"]
    assert len(asked(job.url + path)[1]) > 100
    (weights,) = request["external"][path]
    assert weights["path"] == "weights"
    assert asked(job.url + weights["file"])[0] == 200
    assert asked(job.url + request["names"]["reply"], b'{"threads": 1}') == (200, f"/{job.next}/")
    assert job.done.wait(60)
    assert job.reply() == {"threads": 1}


def test_the_page_is_isolated(job: BrowserJob) -> None:
    kinds = {
        "": "text/html; charset=utf-8",
        "browser_agent.mjs": "text/javascript",
        f"ort/{WASM[2]}": "application/wasm",
    }
    for name, kind in kinds.items():
        with urllib.request.urlopen(job.url + name) as reply:
            assert reply.headers["Content-Type"] == kind
            assert reply.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert reply.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert reply.headers["Referrer-Policy"] == "no-referrer"
            assert reply.headers["Cache-Control"] == "no-store"


def test_a_page_that_fails(job: BrowserJob) -> None:
    names = claimed(job)["names"]
    asked(job.url + names["error"], b"RangeError: no memory")
    assert job.done.wait(60)
    asked(job.url + names["reply"], b"{}")  # the first word counts
    with pytest.raises(PotstillError, match=r"^the page failed: RangeError: no memory$"):
        job.reply()


def test_a_page_that_answers_nonsense(job: BrowserJob) -> None:
    asked(job.url + claimed(job)["names"]["reply"], b"no json")
    assert job.done.wait(60)
    with pytest.raises(PotstillError, match=r"the page could not be served: JSONDecodeError: Expecting value: line 1"):
        job.reply()


def test_a_page_that_is_closed(job: BrowserJob) -> None:
    names = claimed(job)["names"]
    for line in (b"one", b"two"):
        assert asked(job.url + names["said"], line) == (200, "")
    urllib.request.urlopen(job.url + names["alive"]).close()
    assert job.done.wait(60)
    with pytest.raises(BrokenOff, match=r"^the page went away before it answered: it crashed, or was closed$") as told:
        job.reply()
    assert told.value.said == b"one\ntwo\n"


def test_a_file_that_comes_back_half_is_none(job: BrowserJob, tmp_path: Path) -> None:
    name = claimed(job)["operators"]
    with socket.create_connection(("127.0.0.1", job.port)) as raw:
        raw.sendall(f"POST {urlsplit(job.url).path}{name} HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf".encode())
        raw.shutdown(socket.SHUT_WR)
        assert raw.recv(1) == b""  # the server has hung up as well
    assert not list(tmp_path.glob("*made*"))
    assert asked(job.url + name, b"whole") == (200, "")
    assert (tmp_path / "made").read_bytes() == b"whole"
    assert not job.done.is_set()


def test_the_address_dies_with_the_request(job: BrowserJob) -> None:
    job.__exit__()
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(job.url)


def test_a_model_without_its_weights(tmp_path: Path, make_package: MakePackage) -> None:
    package = make_package(width=8)
    model = onnx.load(package / "model.onnx")
    onnx.save(model, str(package / "model.onnx"), save_as_external_data=True, location="weights", size_threshold=0)
    (package / "weights").unlink()
    with pytest.raises(InputError, match="keeps weights in 'weights', which is not in"):
        BrowserJob("127.0.0.1", {"threads": 1, "models": [{"path": package / "model.onnx"}]})
