"""One request, served to one browser: a page, the runtime and the request's files, under a token of its own."""

import json
import secrets
import shutil
import sys
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from onnx import TensorProto, helper

from potstill.targets.device import BrokenOff, Made, with_names
from potstill.targets.onnxruntime_web import bundle, runtime
from potstill.validate.errors import PotstillError
from potstill.validate.external_data import files_of

TYPES = {".html": "text/html; charset=utf-8", ".mjs": "text/javascript", ".wasm": "application/wasm"}
HEADERS = {  # the first two isolate the page, which threads need: https://html.spec.whatwg.org/#cross-origin-isolated
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_PAGE, _AGENT = (Path(__file__).with_name(name) for name in ("browser_page.html", "browser_agent.mjs"))
_BEAT_S = 0.5


class BrowserJob:
    """A server on one address and a free port, until the block ends.

    Attributes:
        url: the page, with the token.
        claimed: whether a browser has taken the request; others are refused from then on.
        names: under which that browser says that it lives, answers or fails; only the request tells them.
        done: set when there is an outcome.
        said: what the page said while it ran, a line of JSON for each second under load.
        next: the token of the request after it, which only its page is given.
        expected: whether the page of an earlier job knows the address.
        runtime_bytes: of the runtime's files, which an app ships beside its model.
    """

    def __init__(self, host: str, request: Mapping[str, Any], after: Self | None = None) -> None:
        """`request` is as of `Device.ask`; `after` is a job whose page is to take this one, if it is still open.

        Raises:
            InputError: a model cannot be read, or there is no runtime and none can be fetched.
        """
        self.done, self.claimed, self.said = threading.Event(), False, b""
        self._lock = threading.Lock()
        self._outcome: dict[str, Any] | PotstillError = {}
        self.expected = after is not None and after.claimed
        self._token: str = after.next if after else secrets.token_urlsafe(16)
        self.next: str = secrets.token_urlsafe(16)
        self.names = {name: f"{name}/{secrets.token_urlsafe(12)}" for name in ("alive", "said", "reply", "error")}
        self.files: dict[str, Path | bytes] = {"": _PAGE, _AGENT.name: _AGENT}
        self.made: dict[str, Path] = {}
        self.runtime_bytes = 0
        self.request = json.dumps(self._named(request)).encode()
        self._server = _Server((host, after.port if after else 0), self)
        self.port: int = self._server.server_port
        self.url = f"http://{host}:{self.port}/{self._token}/"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self._server.shutdown()
        self._server.server_close()

    def reply(self) -> dict[str, Any]:
        """What the browser answered, once `done` is set.

        Raises:
            PotstillError: the page failed.
            BrokenOff: it went away.
        """
        if isinstance(self._outcome, PotstillError):
            raise self._outcome
        return self._outcome

    def end(self, outcome: dict[str, Any] | PotstillError) -> None:
        """Settle how it went; the first word counts."""
        with self._lock:
            if not self.done.is_set():
                self._outcome = outcome
                self.done.set()

    def claim(self) -> bool:
        """Take the request for a browser; False where one has it already."""
        with self._lock:
            taken, self.claimed = self.claimed, True
        return not taken

    def within(self, path: str) -> str | None:
        """The part of a URL's path behind the token; None without the right one."""
        token, _, name = path.removeprefix("/").partition("/")
        return name if secrets.compare_digest(token.encode(), self._token.encode()) else None

    def _named(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The request with names in the place of its files; what those names are is known to who has the request."""
        external: dict[str, list[dict[str, str]]] = {}

        def name(file: Path | Made) -> str:
            random = secrets.token_urlsafe(12)
            if isinstance(file, Made):
                self.made[f"made/{random}"] = file.path
                return f"made/{random}"
            self.files[f"files/{random}"] = file
            if file.suffix == ".onnx":
                beside = [(one.relative_to(file.parent).as_posix(), name(one)) for one in files_of(file)[1:]]
                external[f"files/{random}"] = [{"path": path, "file": where} for path, where in beside]
            return f"files/{random}"

        named = with_names(request, name)
        wanted = [
            one for spec in (*named.get("models", []), named.get("answer", {})) for one in spec.get("providers", [])
        ]
        folder, files = runtime(), bundle(wanted)
        self.files |= {f"ort/{file}": folder / file for file in files} | {"files/tiny": _one_node()}
        self.runtime_bytes = sum((folder / file).stat().st_size for file in files)
        known = {"module": f"ort/{files[0]}", "providers": list(dict.fromkeys(wanted)), "tiny": "files/tiny"}
        return {**named, "external": external, "runtime": known, "names": self.names}


def _one_node() -> bytes:
    """A model that every provider opens, to see which are there."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", [x], [y])
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], job: BrowserJob) -> None:
        self.job = job
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no error here: the response that never ends tells of one that went away."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            self.job.end(PotstillError(f"the page could not be served: {type(error).__name__}: {error}"))


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 60

    def do_GET(self) -> None:
        job, name = self.server.job, self.server.job.within(self.path)
        if name is None:
            self._refuse(HTTPStatus.FORBIDDEN, "this address is not valid, or no longer")
        elif name == job.names["alive"]:
            self._beat()
        elif name in job.files:
            self._send(job.files[name])
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such file")

    def do_POST(self) -> None:
        job, name = self.server.job, self.server.job.within(self.path)
        if name is None:
            self._refuse(HTTPStatus.FORBIDDEN, "this address is not valid, or no longer")
        elif name == "claim" and not job.claim():
            self._refuse(HTTPStatus.FORBIDDEN, "another browser has this request already")
        elif name == "claim":
            self._send(job.request)
        elif name in job.made:
            self._receive(job.made[name])
            self._send(b"")
        elif name == job.names["said"]:
            job.said += self.rfile.read(int(self.headers["Content-Length"])) + b"\n"
            self._send(b"")
        elif name in (job.names["reply"], job.names["error"]):
            said = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self._send(f"/{job.next}/".encode())
            job.end(json.loads(said) if name == job.names["reply"] else PotstillError(f"the page failed: {said}"))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such file")

    def _beat(self) -> None:
        """A response that never ends: writing to it fails once the page is gone."""
        self._head(HTTPStatus.OK, "text/plain", None)
        try:
            while not self.server.job.done.wait(_BEAT_S):
                self.wfile.write(b".")
        except OSError:
            job = self.server.job
            job.end(BrokenOff("the page went away before it answered: it crashed, or was closed", job.said))

    def _send(self, what: Path | bytes) -> None:
        if isinstance(what, bytes):
            self._head(HTTPStatus.OK, "application/octet-stream", len(what))
            self.wfile.write(what)
            return
        with what.open("rb") as file:
            self._head(HTTPStatus.OK, TYPES.get(what.suffix, "application/octet-stream"), what.stat().st_size)
            shutil.copyfileobj(file, self.wfile)

    def _receive(self, path: Path) -> None:
        """Take a file whole or not at all."""
        left, aside = int(self.headers["Content-Length"]), path.with_name(f".{path.name}.part")
        with aside.open("wb") as file:
            while left and (part := self.rfile.read(min(left, 1 << 20))):
                file.write(part)
                left -= len(part)
        if left:
            aside.unlink()
            raise ConnectionError("the browser hung up")
        aside.rename(path)

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._head(status, "text/plain; charset=utf-8", len(why))
        self.wfile.write(why.encode())

    def _head(self, status: HTTPStatus, kind: str, length: int | None) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: the address is a secret."""
